"""Table 3: RULER by task group, for other bases, extension lengths and numbers of training tokens."""

from __future__ import annotations

from paper_figures.averages import scored
from paper_figures.data import Frames, Inputs
from paper_figures.names import TASK_GROUPS
from paper_figures.table import Table
from paper_figures.tables.measured import measured_note, measured_section, published_groups

TITLE = "Table 3: RULER by task group, ablations"
INPUTS = Inputs(files={"published/table_3": ("method", "group", "task_group", "score", "source")}, rows={"ruler": ()})


def build(frames: Frames) -> Table:
    published = frames["published/table_3"]
    rows = scored(frames, "ruler")
    return Table(
        name="table_3",
        caption="RULER scores (percent) by group of tasks, averages over the lengths, for other base models, "
        "extension lengths and numbers of training tokens.",
        first="method",
        columns=list(published["task_group"].unique()),
        sections=[*published_groups(published, "task_group"), *measured_section(rows, TASK_GROUPS)],
        note=measured_note(rows, TASK_GROUPS),
    )
