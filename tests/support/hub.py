"""A stand-in of the hub over HTTP, and a GGUF file."""

from __future__ import annotations

import hashlib
import http.server
import json
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlparse

import numpy as np

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
            return self.answer(410, b"", {})  # which is not asked for again and again
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


WIDTH, HEADS, VOCABULARY = 32, 2, 12


def gguf_file(folder: Path, kind: str = "Q8_0", architecture: str = "llama", left: str = "") -> Path:
    """A Llama of one layer, said to be in that quantisation, without the tensor `left`."""
    import gguf

    path = folder / f"tiny.{kind}.gguf"
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
