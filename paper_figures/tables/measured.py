"""The measured part of a table: the columns of the published one, in a section of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from paper_figures.averages import average, interval_kind, scale_mark
from paper_figures.names import short_length
from paper_figures.style import ordered_methods
from paper_figures.table import Row, Section


def published_section(frame: pd.DataFrame, column: str, heading: str = "published") -> Section:
    """One row a method, in the order and with the columns as printed."""
    columns = list(frame[column].unique())
    rows = []
    for method, part in frame.groupby("method", sort=False):
        scores = part.set_index(column)["score"]
        rows.append(Row(str(method), [float(scores[c]) for c in columns], f"published: {part['source'].iloc[0]}"))
    return Section(heading, rows)


def published_groups(frame: pd.DataFrame, column: str) -> list[Section]:
    """A section for each `group` of a published table, as it prints them."""
    return [
        published_section(part, column, f"published: {group}") for group, part in frame.groupby("group", sort=False)
    ]


def measured(rows: pd.DataFrame, columns: Mapping[str, Sequence[str]]) -> tuple[list[Section], str]:
    """One row a method: for each column the mean of its tasks over all measured lengths, then the average of all tasks.

    A column of which not all tasks were measured stays empty. Beside it a note: what the averages cover and their 95%
    intervals. Without rows of a whole column neither.
    """
    rows = rows[rows["task"].isin({task for tasks in columns.values() for task in tasks})]
    whole = {name: tasks for name, tasks in columns.items() if set(tasks) <= set(rows["task"])}
    if not whole:
        return [], ""
    by_column = {
        name: average(rows[rows["task"].isin(tasks)], ["method"]).set_index("method")["value"]
        for name, tasks in whole.items()
    }
    means = average(rows, ["method"]).set_index("method")
    lines = []
    for name, method in ordered_methods(rows).items():
        values = [by_column[column].get(name) if column in by_column else None for column in columns]
        origin = "measured: " + "; ".join(dict.fromkeys(rows[rows["method"] == name]["origin"].iloc[[0, -1]]))
        lines.append(Row(method.label, [*values, means["value"].get(name)], origin))
    parts = [
        f"{one.Index} {one.value:.1f}" + (f" [{one.lo:.1f}, {one.hi:.1f}]" if one.lo == one.lo else "")
        for one in means.itertuples()
    ]
    lengths = ", ".join(map(short_length, sorted(rows["length"].dropna().unique())))
    note = (
        f"Measured rows: avg is over the {rows['task'].nunique()} tasks and the lengths measured, not over the "
        f"published ones. Averages with {interval_kind(means)}: {'; '.join(parts)}."
    )
    return [Section(scale_mark(rows) + (f": lengths {lengths}" if lengths else ""), lines)], note


def at_length(rows: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """The measured rows at the length of a published table."""
    return rows[rows["length"].isin(published["length"])]
