"""vLLM itself, where it is installed: its predictions are those of transformers, for each scaling.

Each run is a process of its own, as a user starts it. The window of the small base is extended without training, so
that its angles, and with them its answers, depend on the scaling and on nothing else.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scoring import vllm
from endprompt import model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=f"needs vLLM: {vllm.INSTALL}"),
]
BASE = Path(__file__).resolve().parents[3] / "benchmarks" / "base" / "256"


def scored(checkpoint, backend, place, lengths, *more):
    """Predictions by task and index; the run must end well and leave stdout to the results."""
    extra = ["--backend-args", "enforce_eager=True,kv_cache_memory_bytes=268435456"] if backend == "vllm" else []
    command = [
        sys.executable, "-P", "-m", "endprompt.cli", "score", str(checkpoint), "--backend", backend, *extra,
        "--tasks", "niah_single_1,vt", "--lengths", lengths, "--samples", "4", "--shots", "0", "--hops", "3",
        "--max-new-tokens", "30", "--dtype", "float32", "--cache-dir", str(place / "cache"),
        "--output", str(place / backend), "--quiet", *more,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[:2] == sorted(lengths.split(","), key=int)[:2] and "vLLM" not in done.stdout
    lines = (place / backend / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {(e["task"], e["index"]): e["prediction"] for e in map(json.loads, lines)}


def extended(place, scaling, factor):
    """The base with the window and the angles of an extension to 1024, its weights as they were."""
    checkpoint = place / scaling
    shutil.copytree(BASE, checkpoint)
    config = model.load_config(str(BASE))
    model.extended_config(config, scaling, 1024, factor).save_pretrained(checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("scaling", "factor", "lengths"),
    [
        ("none", None, "256,400"),  # beyond the window, where vLLM's table of angles has to be made longer
        ("linear", None, "256,1024"),
        ("ntk", None, "256,1024"),
        ("yarn", None, "256,1024"),
        ("llama3", None, "256,1200"),
        ("longrope", None, "200,256"),  # within the original window: the short factors
        ("longrope", None, "512,1024"),
        ("longrope", 16.0, "512,1024"),  # an attention factor that vLLM would not take by itself
        ("dynamic", None, "200,256"),
    ],
)
def test_predictions_are_those_of_transformers(scaling, factor, lengths, tmp_path):
    checkpoint = BASE if scaling == "none" else extended(tmp_path, scaling, factor)
    more = ["--beyond-window"] if scaling in ("none", "llama3") else []
    expected = scored(checkpoint, "hf", tmp_path, lengths, *more)
    found = scored(checkpoint, "vllm", tmp_path, lengths, *more)
    assert len(expected) == 16 and len(set(expected.values())) > 8
    assert found == expected
