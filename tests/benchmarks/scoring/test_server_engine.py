"""A real server of vLLM's beside the backend hf: slow, and only where `vllm` is installed (or named by VLLM)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from benchmarks.scoring import ScoreConfig, score

VLLM = os.environ.get("VLLM") or shutil.which("vllm")
BASE = Path(__file__).parents[3] / "benchmarks" / "base" / "256"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = tmp_path_factory.mktemp("vllm") / "log"
    command = [VLLM, "serve", str(BASE), "--served-model-name", "base", "--port", str(port), "--dtype", "float32"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        told.open("w") as log,
        subprocess.Popen(
            [*command, "--enforce-eager", "--max-model-len", "256"], stdout=log, stderr=log, env=environment
        ) as process,
    ):
        address = f"http://127.0.0.1:{port}/v1"
        for _ in range(400):
            assert process.poll() is None, told.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/models").close()
                break
            except OSError:
                time.sleep(1)
        yield address
        process.terminate()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not VLLM, reason="vllm is not installed")
def test_answers_of_a_real_server_are_those_of_the_own_backend(url, tmp_path):
    common = dict(tasks="niah_single_1,vt", lengths=256, samples=6, shots=0, max_new_tokens=20, quiet=True)
    common |= dict(cache_dir=str(tmp_path / "cache"))
    server = dict(backend="server", url=url, concurrency=8)
    score(ScoreConfig(str(BASE), output=str(tmp_path / "server"), **common, **server))
    own = dict(dtype="float32", device="cpu", whole_answers=True)
    score(ScoreConfig(str(BASE), output=str(tmp_path / "hf"), **common, **own))

    def texts(run):
        lines = map(json.loads, (tmp_path / run / "predictions.jsonl").read_text().splitlines())
        return {(e["task"], e["index"]): e["prediction"] for e in lines}

    assert texts("server") == texts("hf") and len(texts("hf")) == 12
    with pytest.raises(ValueError, match=r"lengths must be at most the window 256: \[512\]"):
        score(ScoreConfig(str(BASE), output=str(tmp_path / "over"), **common | dict(lengths=512), **server))
    with pytest.raises(ValueError, match="model must be one of the server's, base: model='other'"):
        score(ScoreConfig(str(BASE), output=str(tmp_path / "name"), **common, **server, model="other"))
