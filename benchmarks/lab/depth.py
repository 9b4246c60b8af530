"""Scores by depth of the needle, pooled over the seeds and needle tasks of an arm: from the scores of single samples.

`depth.jsonl` of a run directory, as `endprompt score` writes it too, with the columns that tell the lab's arms apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import summary
from endprompt.files import read_json_lines
from endprompt.results import read_rows, write_rows

#: What a row of depth.jsonl takes over from the arm's rows of scores.
KEPT = ("model", "method", "base", "window", "target", "fold", "arm", "scheme", "scaling", "prompt", "prompt_weight",
        "anchors", "recall_span", "pieces", "steps")  # fmt: skip
Key = tuple[str, int, str]


def depth_rows(rows: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm, length and tenth of the context: percent of the needles there that were found. rows: of
    results.jsonl. samples: of scores.jsonl; those without `depths` are left out. `seeds` says of how many trainings a
    row is made."""
    about: dict[Key, dict[str, Any]] = {}
    for row in rows:
        if row["suite"] == "ruler":
            about.setdefault(_key(row), {column: row[column] for column in KEPT if column in row})
    pooled: dict[Key, list[dict[str, Any]]] = {}
    for line in samples:
        if "depths" in line and (key := _key(line)) in about:
            each = zip(line["depths"], line["scores"], strict=True)
            common = {"length": line["length"], "seed": line["seed"]}
            pooled.setdefault(key, []).extend({**common, "depth": [at], "found": [score / 100]} for at, score in each)
    return [
        {**about[key], "seed": None, "seeds": len({one["seed"] for one in scored}), **cell}
        for key, scored in pooled.items()
        for cell in summary.depth_table(scored)
    ]


def _key(row: Mapping[str, Any]) -> Key:
    return str(row["base"]), int(row["fold"]), str(row["arm"])


def write(run: Path) -> None:
    """Write depth.jsonl of a run directory anew; nothing where the scores of samples were not kept."""
    if (path := run / "scores.jsonl").is_file():
        made = depth_rows(read_rows(run / "results.jsonl"), (row for _, row in read_json_lines(path)))
        write_rows(run / "depth.jsonl", made)
