"""What the figures read: published numbers (CSV) and result rows (JSON Lines), checked on the way in.

Every number keeps where it came from in the column `origin`: the table or figure of the paper, or file and line of a
row. Of the rest of the project only what reads rows is imported, so that a figure can be drawn from files alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from endprompt.files import read_object
from endprompt.results import REQUIRED, SCHEMA, numbered_rows
from paper_figures import lab

DATA = Path(__file__).resolve().parent / "data"
TEXT = json.JSONEncoder(ensure_ascii=False).encode
DEPTHS = "depth.jsonl"  # how the name of a file of scores by depth ends; it is the name in a run directory
#: A cell that is scored once: two rows that agree in these must agree in their value.
CELL = ("suite", "task", "length", "metric", "method", "seed", "bucket", "depth")
#: Suites without samples that are scored: a timing may be taken again, bounds hold on whatever text, estimates are made
#: of other rows.
NOT_SCORES = ("training-speed", "analysis", "lab", "lab-question")
#: How a method was run, where rows carry it: rows of one method that differ in these are told apart, never averaged.
CONDITIONS = ("window", "target", "steps", "prompt_weight")


class NoData(ValueError):
    """A figure was asked for, and the rows that it draws do not exist."""


@dataclass(frozen=True)
class Inputs:
    """What one figure or table reads, as README.md lists it and as `load` checks it.

    files: CSV below data/ (without .csv) -> the columns used.
    rows: suite of the result rows -> the columns used beyond those that every row has.
    needs_rows: without rows there is nothing to draw; otherwise they stand beside the published numbers.
    lab: what becomes of a lab's rows (those with the column `arm`; see lab.py). `only`: they alone are read. `all`:
        they are, or other rows where there are none. `first`: the same, but of the lab one base and fold (see
        lab.reference). `last`: those only where there are no other rows.
    """

    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs_rows: bool = False
    lab: Literal["only", "all", "first", "last"] = "last"


#: The columns of a row that a figure reads, as messages and README.md name them.
SHOWN = ("task", "length", "value", "method", "seed")
Frames = Mapping[str, pd.DataFrame]


def load(inputs: Inputs, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """One frame for each file and suite of `inputs`; a suite without rows gives an empty frame. Raises NoData if rows
    or columns that are needed do not exist, ValueError for rows that cannot be compared; both name file and column."""
    frames = {name: read_published(name, columns) for name, columns in inputs.files.items()}
    for suite, extras in inputs.rows.items():
        frame = of_lab(rows[rows["suite"] == suite], inputs.lab)
        columns = ", ".join((*SHOWN, *extras))
        if inputs.needs_rows and frame.empty:
            raise NoData(
                f"needs rows of suite {suite!r} in results.jsonl (--results DIR) or data/measured/*.jsonl, "
                f"with the columns {columns}; found none"
            )
        complete = frame.reindex(columns=[*extras]).notna().all(axis=1)
        if len(frame) and not complete.any():
            raise NoData(f"needs the columns {columns} in rows of suite {suite!r}; {frame['origin'].iloc[0]} lacks one")
        check_cells(frame)
        # A figure of several bases and folds tells arms apart by itself.
        several = inputs.lab in ("only", "all") and is_lab(frame)
        frame = frame[complete] if several else distinguish(frame[complete])
        frames[suite] = frame.reindex(columns=dict.fromkeys([*frame.columns, *REQUIRED, *extras, "lo", "hi", "origin"]))
    return frames


def of_lab(rows: pd.DataFrame, choice: str) -> pd.DataFrame:
    """Rows of a lab, or the others, as Inputs.lab says; suites that a lab does not write are left as they are."""
    if not is_lab(rows):
        return rows.iloc[:0] if choice == "only" and "ruler" in set(rows["suite"]) else rows
    mine, others = rows[rows["arm"].notna()], rows[rows["arm"].isna()]
    if choice in ("only", "all"):
        return mine
    return others if choice == "last" and len(others) else lab.reference(mine)


def is_lab(rows: pd.DataFrame) -> bool:
    return "arm" in rows and bool(rows["arm"].notna().any())


def distinguish(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one method under several conditions get the condition in their method: `pose+yarn@steps=300`."""
    rows = rows.copy()
    names = list(rows["method"])
    for column in CONDITIONS:
        if column in rows:
            several = rows.groupby("method")[column].transform("nunique") > 1
            told = zip(names, rows[column], several)
            names = [f"{n}@{column}={value:g}" if apart and value == value else n for n, value, apart in told]
    rows["method"] = names
    return rows


def read_published(name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    path = DATA / f"{name}.csv"
    if not path.is_file():
        raise NoData(f"needs the file {path} with the columns {', '.join(columns)}")
    frame = pd.read_csv(path)
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"{path}: must have the column {missing[0]!r}")
    return frame


def measured_files() -> list[Path]:
    return sorted((DATA / "measured").glob("*.jsonl*"))


def read_results(sources: Iterable[str | Path]) -> pd.DataFrame:
    """Rows of run directories (their results.jsonl) or of JSON Lines files, also of packed ones (.jsonl.gz), one frame.
    `ci95` is split into `lo` and `hi`. Raises ValueError naming file, line and column of the first row that cannot be
    used, OSError for a file that does not exist."""
    rows: list[dict[str, Any]] = []
    for source in map(Path, sources):
        path = source / "results.jsonl" if source.is_dir() else source
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a results directory must have results.jsonl")
        beside = [source / name for name in (DEPTHS, "questions.jsonl")] if source.is_dir() else []
        for file in (path, *filter(Path.is_file, beside)):
            rows.extend(_read_depths(file) if file.name.endswith(DEPTHS) else _read_rows(file))
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*REQUIRED, "lo", "hi", "origin"])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    revision = read_object(path.with_name("environment.json"), optional=True).get("revision")
    for origin, row in _numbered(path, REQUIRED):
        ci95 = row["ci95"]
        if ci95 is not None and not (isinstance(ci95, list) and len(ci95) == 2 and all(map(_is_number, ci95))):
            raise ValueError(f"{origin}: ci95 must be [low, high] or null, is {ci95!r}")
        lo, hi = ci95 or (None, None)
        rows.append({"revision": revision, **row, "lo": lo, "hi": hi, "origin": origin})
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _read_depths(path: Path) -> list[dict[str, Any]]:
    """Scores by depth of the needle, as a scoring run writes them: rows of suite `ruler_depth` at the bins' middles."""
    columns = ("length", "depth_from", "depth_to", "value", "n", "method", "model", "seed")
    named = {"suite": "ruler_depth", "task": "needles", "metric": "share_found", "n_truncated": 0}
    blank = dict.fromkeys(REQUIRED) | named
    rows = []
    for origin, row in _numbered(path, columns):
        middle = (row["depth_from"] + row["depth_to"]) / 2
        rows.append({**row, **blank, **{c: row[c] for c in columns}, "depth": middle, "origin": origin})
    return rows


def _numbered(path: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, row) of each. Raises ValueError naming both for what `numbered_rows` refuses, and half a text."""
    for number, row in numbered_rows(path, required):
        origin = f"{path}, line {number}"
        if row.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"{origin}: rows of schema {row['schema']!r} cannot be read; schema must be {SCHEMA}")
        try:
            TEXT(row).encode()
        except UnicodeEncodeError:
            half = "this one holds half of a surrogate pair"
            raise ValueError(f"{origin}: a row's text must be Unicode, {half}") from None
        yield origin, row


def check_cells(rows: pd.DataFrame) -> None:
    """Rows that are compared must have been scored on the same samples, and a cell must have one value. Raises
    ValueError naming the two rows."""
    rows = rows[~rows["suite"].isin(NOT_SCORES)]
    if rows.empty:
        return
    where = [column for column in ("suite", "task", "length", "seed", "base") if column in rows]
    for first, other in _apart(rows, rows["samples_sha256"].fillna("none"), where):
        raise ValueError(
            f"{other['origin']}: samples_sha256 must be the same for all methods at "
            f"{', '.join(f'{column}={first[column]}' for column in where)}, but {other['method']!r} differs from "
            f"{first['method']!r} ({first['origin']})"
        )
    for first, other in _apart(rows, rows["value"], [c for c in (*CELL, *CONDITIONS, "base") if c in rows]):
        raise ValueError(
            f"{other['origin']}: value={other['value']} of {other['method']!r} differs from "
            f"{first['value']} for the same cell ({first['origin']})"
        )


def _apart(rows: pd.DataFrame, values: pd.Series, by: list[str]) -> Iterator[tuple[pd.Series, pd.Series]]:
    """The first row of a group with several values, and one of the group that has another; nothing where none has."""
    mixed = values.groupby([rows[column] for column in by], dropna=False).transform("nunique") > 1
    if mixed.any():
        first = rows[mixed].iloc[0]
        same = (rows[by].fillna("none") == first[by].fillna("none")).all(axis=1)
        yield first, rows[same & (values != values[mixed].iloc[0])].iloc[0]
