"""Result rows: the one definition of what a number carries with it.

A missing value is an absent row, never -1 and never 0. This module imports no torch.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from endprompt.files import read_json_lines, read_object, write_text

SCHEMA = 1

REQUIRED = (
    *("suite", "task", "length", "metric", "value", "stderr", "ci95", "n", "n_truncated"),
    *("model", "method", "seed", "samples_sha256"),
)

#: What columns by which rows are told apart and counted hold.
KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("suite", "task", "metric", "model", "method"), (str, "text")),
    **dict.fromkeys(("length", "n", "seed"), (int | None, "a whole number or null")),
    **dict.fromkeys(("samples_sha256", "run_sha256"), (str | None, "text or null")),
}


def result_row(
    *,
    suite: str,
    task: str,
    metric: str,
    value: float,
    model: str,
    method: str,
    seed: int | None,
    length: int | None = None,
    stderr: float | None = None,
    ci95: tuple[float, float] | list[float] | None = None,
    n: int | None = None,
    n_truncated: int = 0,
    samples_sha256: str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One row of results. Scores are percent; `method` is `base` for an unextended model; `seed` None for an estimate
    over several seeds; `extra` adds columns. Raises ValueError if the value is not finite or lies outside its own
    interval.
    """
    if not math.isfinite(value):
        raise ValueError(f"a result must be finite (leave the row out instead): {suite=} {task=} {metric=} {value=}")
    if ci95 is not None:
        lo, hi = float(ci95[0]), float(ci95[1])
        slack = 1e-9 * max(1.0, abs(lo), abs(hi))
        if not lo - slack <= value <= hi + slack:
            raise ValueError(f"a result must lie in its interval: {suite=} {task=} {metric=} {value=} ci95={[lo, hi]}")
        ci95 = [lo, hi]
    columns = (suite, task, length, metric, float(value), stderr, ci95, n, n_truncated, model, method, seed)
    return {"schema": SCHEMA, **dict(zip(REQUIRED, (*columns, samples_sha256), strict=True)), **extra}


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file, whole lines only, flushed to the disk before it returns."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash cut the line before off: leave it to be reported, do not glue onto it
                file.write(b"\n")
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file anew, complete or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file. Raises ValueError naming file, line and column if one is broken."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(
    path: str | os.PathLike[str], required: Sequence[str] = REQUIRED
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each, as `read_rows`; also of a packed file (.gz)."""
    for number, row in read_json_lines(path):
        missing = [key for key in required if key not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: a row of results must have the columns {missing}")
        value = row.get("value", 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}, line {number}: value must be a finite number, is {value!r}")
        for key, (kind, name) in KINDS.items():
            if not isinstance(row.get(key, kind() if isinstance(kind, type) else None), kind):
                raise ValueError(f"{path}, line {number}: {key} must be {name}, is {row[key]!r}")
        yield number, row


#: What a finished output says of its making.
RECORD = "endprompt.json"


def recorded(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The record that `extend` wrote into a checkpoint, {} where there is none. Raises ValueError if it is damaged."""
    return read_object(Path(directory) / RECORD, optional=True)
