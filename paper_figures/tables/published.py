"""The paper's nine tables, each with the rows measured here below them.

A table has what the module of a figure has: TITLE, INPUTS (what it reads) and build(frames) -> Table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paper_figures.averages import scored
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import LONGBENCH, RULER, SHORT, TASK_GROUPS
from paper_figures.table import Table
from paper_figures.tables.measured import at_length, measured, published_groups, published_section

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
            rows = at_length(rows, published)
        grouped = "group" in self.reads
        sections = published_groups(published, self.by) if grouped else [published_section(published, self.by)]
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
