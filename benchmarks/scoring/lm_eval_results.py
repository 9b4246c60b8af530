"""A run's scores as lm-eval itself would have saved them, so that its own tools and others' viewers read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from endprompt.files import write_text
from endprompt.runs import git_revision

#: Names of lm-eval's own tasks: our names of LongBench's sets lack its prefix.
PREFIX = {"longbench": "longbench_", "longbench_e": "longbench_"}


def write(directory: Path, rows: Sequence[dict[str, Any]], checkpoint: str, backend: str) -> Path:
    """Write `results_DATE.json` of one run's rows in place of an earlier one."""
    for old in directory.glob("results_*.json"):
        old.unlink()
    now = datetime.now()
    path = directory / f"results_{now.isoformat().replace(':', '-')}.json"
    content = results(rows, checkpoint, backend) | {"date": now.timestamp()}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def results(rows: Sequence[dict[str, Any]], checkpoint: str, backend: str) -> dict[str, Any]:
    """lm-eval's aggregated results: shares in [0, 1]; RULER's metrics are named by their length, as its own are."""
    found: dict[str, dict[str, Any]] = {}
    better: dict[str, dict[str, bool]] = {}
    last = {PREFIX.get(row["suite"], "") + row["task"]: row for row in rows}
    for row in rows:
        task = PREFIX.get(row["suite"], "") + row["task"]
        metric, _, kind = metric_of(row).partition(",")
        own = found.setdefault(task, {"alias": task})
        own[f"{metric},{kind}"] = row["value"] / 100
        own[f"{metric}_stderr,{kind}"] = "N/A" if row["stderr"] is None else row["stderr"] / 100
        better.setdefault(task, {})[metric] = True
        own |= {"sample_len": row["n"]} if row["n"] is not None else {}
    counted = {task: own["sample_len"] for task, own in found.items() if "sample_len" in own}
    shots = {task: row.get("shots") or 0 for task, row in last.items()}
    first = rows[0]
    arguments = {"pretrained": checkpoint, "dtype": first.get("dtype")}
    return {
        "results": found,
        "group_subtasks": {task: [] for task in found},
        "configs": {task: {"task": task, "num_fewshot": shots[task]} for task in found},
        "versions": {task: row.get("generator", 1) for task, row in last.items()},
        "n-shot": shots,
        "higher_is_better": better,
        "n-samples": {task: {"original": n, "effective": n} for task, n in counted.items()},
        "config": {"model": backend, "model_args": arguments, "random_seed": first["seed"]},
        "git_hash": git_revision(),
        "lm_eval_version": version("lm-eval"),
        "model_source": backend,
        "model_name": first["model"],
        "method": first["method"],
    }


def metric_of(row: dict[str, Any]) -> str:
    """Metric and filter as lm-eval names them: RULER's metric is the length, of the others the one in the row."""
    from benchmarks.scoring.suites.short import SETTINGS

    if row["suite"] == "short":
        return SETTINGS[row["task"]][1]
    return f"{row['length'] if row['suite'] == 'ruler' else row['metric']},none"
