"""Table 9: RULER at 32K by task."""

from __future__ import annotations

from paper_figures.averages import scored
from paper_figures.data import Frames, Inputs
from paper_figures.names import RULER
from paper_figures.table import Table
from paper_figures.tables.measured import at_length, measured_note, measured_section, published_section

TITLE = "Table 9: RULER at 32K by task"
INPUTS = Inputs(files={"published/table_9": ("length", "task", "method", "score", "source")}, rows={"ruler": ()})
COLUMNS = {column: (task,) for column, task in RULER.items()}


def build(frames: Frames) -> Table:
    published = frames["published/table_9"]
    rows = at_length(scored(frames, "ruler"), published)
    return Table(
        name="table_9",
        caption="RULER scores (percent) at a length of 32K.",
        first="method",
        columns=list(published["task"].unique()),
        sections=[published_section(published, "task"), *measured_section(rows, COLUMNS)],
        note=measured_note(rows, COLUMNS),
    )
