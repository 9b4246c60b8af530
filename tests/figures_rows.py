"""Rows of results as a run writes them, made up for the tests of the figures (never shipped)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

DEMO = {
    "base": (100, 0, 0, 0),
    "contiguous+linear": (96, 92, 80, 24),
    "endprompt+EP_1+linear": (98, 94, 82, 34),
    "recall+yarn": (100, 98, 98, 96),
}
DEMO_TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "vt")


def row(method, task, length, value, seed=0, suite="ruler", n=50, half=8.0, **extra):
    digest = hashlib.sha256(f"{task} {length} {seed}".encode()).hexdigest()
    return {
        "schema": 1,
        "suite": suite,
        "task": task,
        "length": length,
        "metric": "string_match_all",
        "value": float(value),
        "stderr": half / 2,
        "ci95": [max(0.0, value - half), min(100.0, value + half)],
        "n": n,
        "n_truncated": 0,
        "model": "runs/demo",
        "method": method,
        "seed": seed,
        "samples_sha256": digest,
        **extra,
    }


def demo_rows(methods=None, tasks=DEMO_TASKS, lengths=(256, 512, 1024, 2048), seeds=(0,), **extra):
    return [
        row(method, task, length, max(0, value - 2 * k - 3 * (seed % 3)), seed, **extra)
        for method, values in (methods or DEMO).items()
        for seed in seeds
        for k, task in enumerate(tasks)
        for length, value in zip(lengths, values)
    ]


def write_run(path, rows):
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
