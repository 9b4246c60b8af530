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


def longbench_rows(methods, sets, n=200):
    """Rows of a LongBench run: no length, a metric a set; method k scores 90 - 10 k less a point a set."""
    return [
        row(method, name, None, max(0, 90 - 10 * k - i), suite="longbench", n=n, half=5.0, metric=f"metric of {name}")
        for k, method in enumerate(methods)
        for i, name in enumerate(sets)
    ]


def write_run(path, rows):
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def lab_rows(methods, seeds=range(5)):
    rows = demo_rows(methods, seeds=seeds, window=256)
    for method in list(methods)[:6]:
        for length in (256, 512, 1024, 2048):
            for depth in (0, 25, 50, 75, 100):
                value = max(0, methods[method][1] - depth / 4 - length / 100)
                rows.append(row(method, "niah_single_1", length, value, suite="ruler_depth", depth=depth))
        for bound, low, middle, high in (("coefficient", 0.08, 0.34, 0.81), ("bernstein", 0.004, 0.03, 0.12)):
            values = {f"slope_over_{bound}_bound_q{q}": v for q, v in (("01", low), ("50", middle), ("99", high))}
            for metric, value in (values | {f"share_within_{bound}_order1": 1.0}).items():
                rows.append({**row(method, "bounds", 2048, value, suite="analysis"), "metric": metric})
        near = row(method, "bounds", 2048, 0.5, suite="analysis", stratum="near")
        rows.append({**near, "metric": "slope_over_coefficient_bound_q50"})
    for method, memory, hours in (("endprompt", 36.0, 24.8), ("full", 42.5, 65.7)):
        for length in (32768, 65536):
            for metric, value in (("peak_gib", memory), ("hours_per_1b_tokens", hours)):
                extra = {"metric": metric, "environment": {"device": {"gpu": "NVIDIA H200"}}, "samples_sha256": None}
                rows.append({**row(method, method, length, value * length / 65536, suite="training-speed"), **extra})
    return rows
