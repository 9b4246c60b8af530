"""Predictions of finished runs: read them, show them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scoring import fingerprint
from endprompt.files import sound_lines

#: What every prediction on disk has, and of which kind.
ENTRY: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "index": int,
    "prompt_sha256": str,
    "prediction": str,
    "score": (int, float),
    "outputs": list,
}
#: (task, index, hash of the prompt, tokens it was let generate) → a prediction of one run.
Entries = dict[tuple[str, int, str, int | None], dict[str, Any]]


def complete_lines(path: Path, damaged: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Predictions of a JSON Lines file; a line that is cut off or damaged is left out, its place goes to `damaged`."""
    for number, _, entry in sound_lines(path):
        whole = entry is not None and all(isinstance(entry.get(key), kind) for key, kind in ENTRY.items())
        if entry is not None and whole and math.isfinite(entry["score"]):
            yield entry
        elif damaged is not None:
            damaged.append(f"{path}, line {number}")


def read_run(directory: str | Path, run: str) -> Entries:
    """The predictions of one run, the latest of each; of damaged lines none, since they are predicted again."""
    paths = sorted(Path(directory).glob("predictions*.jsonl"))
    return {
        (e["task"], e["index"], e["prompt_sha256"], e.get("max_new_tokens")): e
        for path in paths
        for e in complete_lines(path)
        if e.get("run") == run
    }


def read_predictions(directory: str | Path) -> dict[tuple[str, int], dict[str, Any]]:
    """{(task, index): entry} of a directory's last run, the latest entry of each; tasks in the order they were run.
    Raises ValueError if the directory holds no predictions, if it cannot be told which run is the last, and for a
    damaged line whose prediction is nowhere else."""
    paths = sorted(Path(directory).glob("predictions*.jsonl"))
    if not paths:
        raise ValueError(f"{directory} must be the output of a finished run: it has no predictions.jsonl")
    damaged: list[str] = []
    whole = [entry for path in paths for entry in complete_lines(path, damaged)]
    told = fingerprint.runs(directory)
    names = {told[-1]["run_sha256"]} if told else {str(entry.get("run")) for entry in whole}
    if len(names) > 1:
        raise ValueError(
            f"{directory}: holds answers of {len(names)} runs, and no {fingerprint.RUNS} that says which is the last: "
            "score again"
        )
    entries = {(e["task"], e["index"]): e for e in whole if str(e.get("run")) in names}
    if not entries:
        raise ValueError(f"{damaged[0] if damaged else paths[0]}: no complete prediction of the last run")
    places: dict[str, set[int]] = {}
    for task, index in entries:
        places.setdefault(task, set()).add(index)
    if damaged and any(found != set(range(max(found) + 1)) for found in places.values()):
        raise ValueError(
            f"{damaged[0]}: not a whole prediction, and it was not made again: score again to complete them"
        )
    return entries


def show(directory: str | Path, task: str, wrong: bool = False) -> list[dict[str, Any]]:
    """Predictions of one task (`vt`, or `vt@4096` for one length), in order; with `wrong` only those under 100."""
    entries = read_predictions(directory)
    names = list(dict.fromkeys(name for name, _ in entries))
    chosen = [name for name in names if task in (name, name.split("@")[0])]
    if not chosen:
        known = [*dict.fromkeys(name.split("@")[0] for name in names), *names]
        near = difflib.get_close_matches(task, known, n=3, cutoff=0.4)
        raise ValueError(
            f"task {task!r} was not run in {directory}; {'did you mean' if near else 'it has'} "
            f"{', '.join(near or known)}?"
        )
    found = [entries[key] for key in sorted(entries, key=lambda key: (names.index(key[0]), key[1])) if key[0] in chosen]
    return [entry for entry in found if not wrong or entry["score"] < 100]


def shown(entries: list[dict[str, Any]]) -> str:
    """Predictions as text for reading."""
    blocks = []
    for entry in entries:
        depth = f", depth {entry['depth']}" if entry.get("depth") else ""
        blocks.append(
            f"{entry['task']} #{entry['index']}: {entry['score']:.0f}{depth}\n"
            f"  wanted     {'; '.join(map(str, entry['outputs']))}\n"
            f"  predicted  {entry['prediction']!r}"
        )
    return "\n".join(blocks)
