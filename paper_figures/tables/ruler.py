"""RULER's tables: thirteen columns and their average, published and measured."""

from __future__ import annotations

import pandas as pd

from paper_figures.averages import average, interval_kind, scale_mark
from paper_figures.figures.score_against_length import ordered_methods
from paper_figures.names import RULER, TASKS, short_length
from paper_figures.table import Row, Section


def published_section(frame: pd.DataFrame) -> tuple[list[str], Section]:
    """Column heads as printed, and one row a method."""
    columns = list(frame["task"].unique())
    rows = []
    for method, part in frame.groupby("method", sort=False):
        scores = part.set_index("task")["score"]
        rows.append(Row(method, [float(scores[task]) for task in columns], f"published: {part['source'].iloc[0]}"))
    return columns, Section("published", rows)


def measured_sections(rows: pd.DataFrame) -> list[Section]:
    """A section of averages over all measured lengths, in the columns of the published tables; none without rows."""
    rows = rows[rows["task"].isin(TASKS)]
    if rows.empty:
        return []
    rows = rows.astype({"value": float})
    methods = ordered_methods(rows)
    by_task = average(rows, ["method", "task"], ["length"]).set_index(["method", "task"])
    whole = average(rows, ["method"]).set_index("method")
    lengths = sorted(rows["length"].unique())
    span = ", ".join(short_length(length) for length in lengths)
    lines = []
    for name, method in methods.items():
        values = [by_task["value"].get((name, task)) for task in RULER.values()]
        origin = "measured: " + "; ".join(rows[rows["method"] == name]["origin"].iloc[[0, -1]])
        lines.append(Row(method.label, [*values, whole["value"].get(name)], origin))
    return [Section(f"{scale_mark(rows)}: lengths {span}", lines)]


def measured_note(rows: pd.DataFrame) -> str:
    """What the measured average covers and how wide its 95% intervals are; empty without rows."""
    rows = rows[rows["task"].isin(TASKS)]
    if rows.empty:
        return ""
    means = average(rows.astype({"value": float}), ["method"])
    parts = [
        f"{m} {v:.1f} [{lo:.1f}, {hi:.1f}]"
        for m, v, lo, hi in zip(means["method"], means["value"], means["lo"], means["hi"])
    ]
    return (
        f"Measured rows: the avg is over the {rows['task'].nunique()} tasks and the lengths measured, not over the "
        f"published ones. Averages with {interval_kind(means)}: {'; '.join(parts)}."
    )
