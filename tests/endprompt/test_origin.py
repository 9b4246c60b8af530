"""Checkpoints given as a hub's id, against a stand-in of the hub over HTTP, and as GGUF files."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlparse

import numpy as np
import pytest

from endprompt import origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
    "model-1.safetensors": b"one" * 1000,
    "model-2.safetensors": b"two" * 1000,
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"raise SystemExit('code ran')",
    "onnx/model.safetensors": b"another",
    "README.md": b"---\nlicense: mit\n---\n",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: a repository's commit, its tree, its files."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        files = self.repositories.get(name)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if api and parts[4:5] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(b), "oid": sha1(b)} for p, b in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        if api:
            if parts[4:] not in ([], ["revision", "main"], ["revision", COMMIT]):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": path} for path in files]
            return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        path = "/".join(parts[4:])
        if self.command == "GET":
            self.asked.append(path)
        body = files[path]
        if body == b"gone":
            return self.answer(500, b"", {})
        return self.answer(200, body, {"ETag": f'"{sha1(body)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def sha1(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """A running stand-in; `hub(typed, **variables)` resolves in a process of its own: (exit code, output, errors)."""
    Hub.repositories = {"org/name": dict(REPOSITORY)}
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def resolve(typed: str, weights: bool = True, **variables: str) -> tuple[int, str, str]:
        code = (
            "import sys\nfrom endprompt import origin\n"
            f"try: print(origin.directory_of({typed!r}, weights={weights}))\n"
            "except ValueError as error: print(error); sys.exit(1)"
        )
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | endpoint | quiet | variables, capture_output=True, text=True
        )
        return done.returncode, done.stdout.strip(), done.stderr

    yield resolve
    server.shutdown()
    server.server_close()


def test_an_id_becomes_a_snapshot_of_weights_and_configuration_without_code(hub):
    status, path, errors = hub("org/name")
    assert status == 0, (path, errors)
    here = Path(path)
    expected = {"config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"}
    assert {p.name for p in here.iterdir()} == expected | {"model-1.safetensors", "model-2.safetensors"}
    assert (here / "model-2.safetensors").read_bytes() == REPOSITORY["model-2.safetensors"]
    assert origin.about(here) == {"hub": "org/name", "revision": COMMIT}
    assert origin.name_of(here) == origin.name_of("org/name@main") == "name"
    # Offline the whole snapshot is taken from the cache; another revision is not there
    assert hub("org/name", HF_HUB_OFFLINE="1")[:2] == (0, path)
    assert hub(f"org/name@{COMMIT}", HF_HUB_OFFLINE="1")[:2] == (0, path)
    status, said, _ = hub("org/name@v2", HF_HUB_OFFLINE="1")
    assert status == 1 and "HF_HUB_OFFLINE" in said and "'org/name@v2'" in said and "\n" not in said


def test_a_tokenizer_alone_takes_no_weights(hub):
    assert hub("org/name", weights=False)[0] == 0
    assert not [path for path in Hub.asked if path.endswith(".safetensors")]
    status, said, _ = hub("org/name", HF_HUB_OFFLINE="1")  # whose snapshot lacks the weights then
    assert status == 1 and "not whole" in said and "HF_HUB_OFFLINE" in said and "\n" not in said


@pytest.mark.parametrize(
    "typed, files, said",
    [
        ("org/nothing", {}, "no such directory, and the hub has no such model"),
        ("org/name@v2", {}, "no such revision: model='org/name@v2'"),
        ("org/name", {"config.json": None}, "has no config.json"),
        ("org/name", {n: None for n in REPOSITORY if n.startswith("model")}, "no weights as *.safetensors"),
        ("org/name", {"model-2.safetensors": None}, "lacks model-2.safetensors"),
        ("org/name", {"model-2.safetensors": b"gone"}, "does not give it: HfHubHTTPError"),
    ],
)
def test_what_the_hub_cannot_give_is_one_line(hub, typed, files, said):
    kept = {**REPOSITORY, **files}
    Hub.repositories = {"org/name": {name: body for name, body in kept.items() if body is not None}}
    status, found, _ = hub(typed)
    assert status == 1 and said in found and "\n" not in found


def test_no_network_is_one_line(hub):
    status, found, _ = hub("org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 1 and "http://127.0.0.1:9) cannot be reached" in found and "\n" not in found


def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for typed in ("runs/extended", str(tmp_path / "nothing"), "a/b/c", "model.gguf"):
        with pytest.raises(ValueError, match=r"the checkpoint directory must exist .*model="):
            origin.directory_of(typed)


# ------------------------------------------------------------------------------------------------------------- GGUF

WIDTH, HEADS, VOCABULARY = 32, 2, 12


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """`gguf_file(quantisation, architecture)`: a Llama of one layer, its matrices in that quantisation."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path / "cache"))

    def write(kind: str = "Q8_0", architecture: str = "llama", left: str = "") -> Path:
        path = tmp_path / f"tiny.{kind}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(1)
        writer.add_context_length(128)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(WIDTH)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(5e4)
        writer.add_vocab_size(VOCABULARY)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        writer.add_license("apache-2.0")
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*"abcdefgh", "ab", "cd", "<s>", "</s>"])
        writer.add_token_types([1] * 10 + [3] * 2)
        writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(10)
        writer.add_eos_token_id(11)
        draw = np.random.default_rng(0)
        shapes = {
            "token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,), "output": (VOCABULARY, WIDTH),
            "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
            **{f"blk.0.{name}": (WIDTH, WIDTH) for name in
               ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down")},
        }  # fmt: skip
        for name, shape in shapes.items():
            value = draw.standard_normal(shape).astype(np.float32)
            if name == left:
                continue
            if len(shape) == 1:
                writer.add_tensor(f"{name}.weight", value)
            else:
                stored = gguf.GGMLQuantizationType.Q8_0
                packed = gguf.quants.quantize(value, stored)
                writer.add_tensor(f"{name}.weight", packed, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def test_a_gguf_file_becomes_a_plain_checkpoint_once(gguf_file, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_file()
    made = origin.directory_of(path)
    config = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 128)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    note = {"file": "tiny.Q8_0.gguf", "sha256": digest, "quantisation": "Q8_0", "licence": "apache-2.0"}
    assert origin.about(made) == note
    assert origin.told(note) == f"dequantised from Q8_0, tiny.Q8_0.gguf, sha256 {digest}"
    assert origin.name_of(made) == origin.name_of(path) == "tiny.Q8_0"
    model = AutoModelForCausalLM.from_pretrained(made)
    draw = np.random.default_rng(0)
    embedding = draw.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)  # the first that was drawn
    assert np.abs(model.get_input_embeddings().weight.float().detach().numpy() - embedding).max() < 0.03
    assert AutoTokenizer.from_pretrained(made)("abcd")["input_ids"][-2:] == [8, 9]
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert origin.directory_of(path) == made and (made / "model.safetensors").stat().st_mtime_ns == before
    assert "keeps so few bits" not in capsys.readouterr().err


def test_coarse_gguf_files_are_taken_with_a_warning(gguf_file, capsys):
    origin.directory_of(gguf_file("Q2_K"))
    assert "tiny.Q2_K.gguf: Q2_K keeps so few bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [({"architecture": "unheardof"}, r"architecture 'unheardof'"), ({"left": "blk.0.attn_q"}, r"lacks .*q_proj")],
)
def test_gguf_files_that_cannot_be_read_are_one_line(gguf_file, options, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        origin.directory_of(gguf_file(**options))
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("origin.json")]


def test_other_files_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path / "cache"))
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK" * 10)
    with pytest.raises(ValueError, match=r"must be a GGUF file: model="):
        origin.directory_of(other)
    monkeypatch.setitem(sys.modules, "gguf", None)
    cut = tmp_path / "model.gguf"
    cut.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"pip install gguf"):
        origin.directory_of(cut)


def test_the_real_file(tmp_path, monkeypatch):
    """ENDPROMPT_TEST_GGUF names a published GGUF file; its text goes on sensibly."""
    pytest.importorskip("gguf")
    path = os.environ.get("ENDPROMPT_TEST_GGUF")
    if not path:
        pytest.skip("ENDPROMPT_TEST_GGUF names no file")
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path))
    from endprompt.model import load_model, load_tokenizer

    model, tokenizer = load_model(path), load_tokenizer(path)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
