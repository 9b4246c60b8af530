"""The list of all figures and tables, in the order of the paper, and how one of them is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from paper_figures import questions, style
from paper_figures.inputs import Frames, load
from paper_figures.table import write
from paper_figures.tables import published

FIGURES = (
    "figure_1",
    "figure_2",
    "figure_3",
    "figure_4",
    "score_against_length",
    "depth_by_length",
    "longbench_bars",
    "measure_against_score",
    "lab_scores",
    "score_against_steps",
    "loss_by_position",
    "anchor_place",
    "coverage",
    "gap_rms_against_k",
    "bound_against_measured",
)
TABLES = published.TABLES | questions.TABLES
NAMES = (*FIGURES, *TABLES)


def module(name: str) -> Any:
    """The module that draws the figure `name`, or the table of that name. Raises ValueError for a name that is in
    neither list."""
    if name not in NAMES:
        raise ValueError(f"only must name figures or tables of {', '.join(NAMES)}: only={name!r}")
    return TABLES[name] if name in TABLES else import_module(f"paper_figures.figures.{name}")


def source(name: str) -> str:
    """The file of `name`, from the package's folder."""
    if name in FIGURES:
        return f"figures/{name}.py"
    return "tables/published.py" if name in published.TABLES else "questions.py"


def make(name: str, rows: pd.DataFrame, output: Path) -> list[Path]:
    """Draw one figure or table into the directory `output`; returns the files written. Raises NoData if its data do not
    exist, ValueError if they cannot be used."""
    item = module(name)
    frames = load(item.INPUTS, rows)
    output.mkdir(parents=True, exist_ok=True)
    if name in TABLES:
        return write(item.build(frames), output / name)
    with style.journal():
        paths = style.save(item.draw(frames), output / name)
    return paths + write_rows(frames, item.INPUTS.rows, output / f"{name}.rows.csv")


def write_rows(frames: Frames, suites: Iterable[str], path: Path) -> list[Path]:
    """The rows that a figure read, each with its file, line and the revision that made it; nothing without rows."""
    read = [frames[suite] for suite in suites if len(frames[suite])]
    if not read:
        return []
    columns = ("suite", "task", "length", "metric", "value", "lo", "hi", "n", "method", "seed", "revision", "origin")
    pd.concat([frame.reindex(columns=columns) for frame in read]).to_csv(path, index=False, lineterminator="\n")
    return [path]
