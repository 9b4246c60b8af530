"""The paper's nine tables, each with the rows measured here below them.

A table has what the module of a figure has: TITLE, INPUTS (what it reads) and build(frames) -> Table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from paper_figures.averages import average, interval_kind, scale_mark, scored
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import LONGBENCH, RULER, SHORT, TASK_GROUPS, short_length
from paper_figures.style import ordered_methods
from paper_figures.table import Row, Section, Table


def published_section(frame: pd.DataFrame, column: str, heading: str) -> Section:
    """One row a method, in the order and with the columns as printed."""
    columns = list(frame[column].unique())
    rows = []
    for method, part in frame.groupby("method", sort=False):
        scores = part.set_index(column)["score"]
        rows.append(Row(str(method), [float(scores[c]) for c in columns], f"published: {part['source'].iloc[0]}"))
    return Section(heading, rows)


def measured(rows: pd.DataFrame, columns: Mapping[str, Sequence[str]]) -> tuple[list[Section], str]:
    """One row a method: for each column the mean of its tasks over all measured lengths, then the average of all tasks.
    A column of which not all tasks were measured stays empty. Beside it a note: what the averages cover and their 95%
    intervals. Without rows of a whole column neither."""
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


TASKS = {column: (task,) for column, task in RULER.items()}
ABLATIONS = "for other base models, extension lengths and numbers of training tokens."


@dataclass(frozen=True)
class Published:
    """A table of the paper.

    what: its title. reads: the columns of its file. by: which of them makes the table's columns. columns: each of these
    -> the tasks that were measured for it, of `suite`.
    """

    number: int
    what: str
    caption: str
    suite: str
    reads: tuple[str, ...]
    by: str
    columns: Mapping[str, Sequence[str]]

    @property
    def name(self) -> str:
        return f"table_{self.number}"

    @property
    def TITLE(self) -> str:
        return f"Table {self.number}: {self.what}"

    @property
    def INPUTS(self) -> Inputs:
        return Inputs(files={f"published/{self.name}": (*self.reads, "score", "source")}, rows={self.suite: ()})

    def build(self, frames: Frames) -> Table:
        published, rows = frames[f"published/{self.name}"], scored(frames, self.suite)
        if "length" in self.reads:
            rows = rows[rows["length"].isin(published["length"])]
        parts: list[tuple[str, pd.DataFrame]] = [("published", published)]
        if "group" in self.reads:  # as the paper prints them
            parts = [(f"published: {group}", own) for group, own in published.groupby("group", sort=False)]
        sections = [published_section(own, self.by, heading) for heading, own in parts]
        own, note = measured(rows, self.columns)
        columns = list(published[self.by].unique())
        return Table(self.name, self.caption, "method", columns, [*sections, *own], note)


def at(number: int, length: str) -> Published:
    """RULER at one length, by task."""
    return Published(
        number, f"RULER at {length} by task", f"RULER scores (percent) at a length of {length}.", "ruler",
        ("length", "task", "method"), "task", TASKS,
    )  # fmt: skip


GROUPS = {group: [RULER[head] for head in heads] for group, heads in TASK_GROUPS.items()}
ALL = (
    Published(
        1, "RULER, mean over 4K to 64K by task",
        "RULER scores (percent), averages over the lengths 4K, 8K, 16K, 32K and 64K.", "ruler",
        ("task", "method"), "task", TASKS,
    ),
    Published(
        2, "LongBench by category",
        "LongBench scores (percent) by category, and the average over the 16 English sets.", "longbench",
        ("method", "category"), "category", LONGBENCH,
    ),
    Published(
        3, "RULER by task group, ablations",
        f"RULER scores (percent) by group of tasks, averages over the lengths, {ABLATIONS}", "ruler",
        ("method", "group", "task_group"), "task_group", GROUPS,
    ),
    Published(
        4, "LongBench by category, ablations", f"LongBench scores (percent) by category {ABLATIONS}", "longbench",
        ("method", "group", "category"), "category", LONGBENCH,
    ),
    Published(
        5, "short-text benchmarks", "Short-text benchmarks (percent) after instruction tuning.", "short",
        ("method", "task"), "task", {task: (task,) for task in SHORT},
    ),
    *(at(number, length) for number, length in zip(range(6, 10), ("4K", "8K", "16K", "32K"))),
)  # fmt: skip
TABLES = {table.name: table for table in ALL}
