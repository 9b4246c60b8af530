"""Checkpoints given as a hub's id, against a stand-in of the hub over HTTP, and as GGUF files."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from endprompt import origin
from tests.support import hub as hub_of_tests
from tests.support.hub import COMMIT, REPOSITORY, VOCABULARY, WIDTH, Hub
from tests.support.runs import weights_of


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running stand-in; `hub(typed)` is (whether it was had, the directory or what was said in its place)."""
    from huggingface_hub import constants

    Hub.repositories = {"org/name": dict(REPOSITORY)}
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def resolve(typed: str, weights: bool = True, offline: bool = False, port: int = 0) -> tuple[bool, str]:
        origin.from_hub.cache_clear()  # as a process of its own would ask
        endpoint = f"http://127.0.0.1:{port or server.server_port}"
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for name, value in (
            ("ENDPOINT", endpoint), ("HF_HUB_CACHE", str(tmp_path / "home")), ("HF_HUB_OFFLINE", offline),
            ("HF_HUB_DISABLE_XET", True), ("HF_HUB_DISABLE_TELEMETRY", True),
        ):  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        try:
            return True, str(origin.directory_of(typed, weights=weights))
        except ValueError as error:
            return False, str(error)

    yield resolve
    origin.from_hub.cache_clear()
    server.shutdown()
    server.server_close()


def test_an_id_becomes_a_snapshot_of_weights_and_configuration_without_code(hub):
    had, path = hub("org/name")
    assert had, path
    here = Path(path)
    expected = {"config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"}
    assert {p.name for p in here.iterdir()} == expected | {"model-1.safetensors", "model-2.safetensors"}
    assert (here / "model-2.safetensors").read_bytes() == REPOSITORY["model-2.safetensors"]
    assert origin.about(here) == {"hub": "org/name", "revision": COMMIT}
    assert origin.name_of(here) == origin.name_of("org/name@main") == "name"
    # Offline the whole snapshot is taken from the cache; another revision is not there
    assert hub("org/name", offline=True) == hub(f"org/name@{COMMIT}", offline=True) == (True, path)
    had, said = hub("org/name@v2", offline=True)
    assert not had and "HF_HUB_OFFLINE" in said and "'org/name@v2'" in said and "\n" not in said


def test_a_tokenizer_alone_takes_no_weights(hub):
    assert hub("org/name", weights=False)[0]
    assert not [path for path in Hub.asked if path.endswith(".safetensors")]
    had, said = hub("org/name", offline=True)  # whose snapshot lacks the weights then
    assert not had and "not whole" in said and "HF_HUB_OFFLINE" in said and "\n" not in said


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
    had, found = hub(typed)
    assert not had and said in found and "\n" not in found


def test_no_network_is_one_line(hub):
    had, found = hub("org/name", port=9)
    assert not had and "http://127.0.0.1:9) cannot be reached" in found and "\n" not in found


def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for typed in ("runs/extended", str(tmp_path / "nothing"), "a/b/c", "model.gguf"):
        with pytest.raises(ValueError, match=r"the checkpoint directory must exist .*model="):
            origin.directory_of(typed)


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """`gguf_file(quantisation, architecture)`: a Llama of one layer, its matrices in that quantisation."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path / "cache"))
    return functools.partial(hub_of_tests.gguf_file, tmp_path)


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
    said = capsys.readouterr().err
    assert "keeps so few bits" not in said and said.count("tiny.Q8_0.gguf: its weights are rounded to bfloat16") == 1


def test_a_gguf_file_s_weights_may_be_kept_as_they_are(gguf_file, monkeypatch, capsys):
    """In float32, as the package gguf dequantises the file; the other checkpoint is these rounded."""
    import gguf

    path = gguf_file()
    rounded = weights_of(origin.directory_of(path))
    capsys.readouterr()
    monkeypatch.setenv("ENDPROMPT_GGUF_DTYPE", "float32")
    made = origin.directory_of(path)
    kept = weights_of(made)
    (stored,) = [one for one in gguf.GGUFReader(path).tensors if one.name == "blk.0.ffn_up.weight"]
    wanted = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(kept["model.layers.0.mlp.up_proj.weight"], wanted) and not torch.equal(
        wanted.bfloat16().float(), wanted
    )
    assert kept.keys() == rounded.keys() and all(torch.equal(kept[n].bfloat16(), rounded[n]) for n in kept)
    assert "rounded" not in capsys.readouterr().err and origin.told(origin.about(made)).endswith(", in float32")
    monkeypatch.setenv("ENDPROMPT_GGUF_DTYPE", "float16")
    with pytest.raises(ValueError, match="ENDPROMPT_GGUF_DTYPE must be bfloat16 or float32: 'float16'"):
        origin.directory_of(path)


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
