"""Two runs side by side: their verdicts, and what it changes to train the same cells a second time.

endprompt lab ... --only arm=contiguous+yarn seed=0 --output AGAIN
python -m benchmarks.lab.again RUN AGAIN
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import estimates
from benchmarks.lab.arms import Row, check_samples
from endprompt.files import read_json_lines
from endprompt.results import read_rows, result_row


def repeated(first: str | Path, second: str | Path) -> list[Row]:
    """For every cell, suite and length that both runs have: the mean score of `second` less that of `first`, its 95%
    interval over the samples (drawn anew; of how much a further training would differ it says nothing), and `changed`,
    percent of the samples with another score. Raises ValueError if no cell is the same, or samples of one differ."""
    check_samples([r for run in (first, second) for r in read_rows(Path(run, "results.jsonl")) if r["samples_sha256"]])
    sides: list[dict[tuple, dict[str, np.ndarray]]] = []
    keys = ("cell", "suite", "length", "base", "fold", "arm", "seed")
    for run in (first, second):
        sides.append({})
        for _, line in read_json_lines(Path(run, "scores.jsonl")):
            scores = np.asarray(line["scores"], dtype=np.float64)
            sides[-1].setdefault(tuple(line.get(key) for key in keys), {})[line["task"]] = scores
    found = []
    for key, a in sides[0].items():
        if (b := sides[1].get(key, {})).keys() != a.keys():  # not there, or not whole
            continue
        parts = [b[task] - a[task] for task in a]
        (cell, suite, length, base, fold, arm, seed), changed = key, np.concatenate(parts) != 0
        row = result_row(
            suite="lab-repeat", task=suite or "ruler", metric="score_difference", model=f"base {base}", method=arm,
            value=float(np.mean([part.mean() for part in parts])), ci95=estimates.nested_bootstrap([parts]),
            n=changed.size, seed=seed, length=length, fold=fold, cell=cell, changed=100 * float(changed.mean()),
        )  # fmt: skip
        found.append(row)
    if not found:
        raise ValueError(f"{second} must have a cell of {first}, with the scores of its samples: there is none")
    return found


def compare(first: str | Path, second: str | Path) -> list[Row]:
    """Verdicts of two runs side by side, for every estimate that either has. A line each: task, metric, method, base,
    fold, scaling, length, source, claim, `first` and `second` (the verdicts, None where a run lacks it; for a claim
    whether it holds: agrees, does not agree, not decided), `same`. A claim is one and the same whatever settings and
    arms a run answers it from. Raises OSError if a run has no questions.jsonl."""
    keys = ("task", "metric", "family", "method", "base", "fold", "scaling", "length", "against", "source", "claim")

    def key(row: Row) -> tuple[Any, ...]:
        kept = ("task", "metric", "source", "claim") if row["metric"] == "claim" else keys
        return tuple(row.get(k) if k in kept else None for k in keys)

    sides = [{key(row): row for row in read_rows(Path(run) / "questions.jsonl")} for run in (first, second)]
    out = []
    for found in dict.fromkeys([*sides[0], *sides[1]]):
        both = (side.get(found) for side in sides)
        a, b = (row and row["agrees" if row["metric"] == "claim" else "verdict"] for row in both)
        out.append({**dict(zip(keys, found)), "first": a, "second": b, "same": a == b})
    return out


def main(first: str, second: str) -> None:
    for row in repeated(first, second):
        lo, hi = row["ci95"]
        where = f"{row['method']}, seed {row['seed']}, {row['task']} at {row['length']}"
        print(
            f"{where}: {row['value']:+.1f} points [{lo:+.1f}, {hi:+.1f}], {row['changed']:.0f}% of {row['n']} changed"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
