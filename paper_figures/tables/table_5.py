"""Table 5: short-text benchmarks after instruction tuning."""

from __future__ import annotations

from paper_figures.averages import scored
from paper_figures.data import Frames, Inputs
from paper_figures.names import SHORT
from paper_figures.table import Table
from paper_figures.tables.measured import measured_note, measured_section, published_section

TITLE = "Table 5: short-text benchmarks"
INPUTS = Inputs(files={"published/table_5": ("method", "task", "score", "source")}, rows={"short": ()})
COLUMNS = {task: (task,) for task in SHORT}


def build(frames: Frames) -> Table:
    published = frames["published/table_5"]
    rows = scored(frames, "short")
    return Table(
        name="table_5",
        caption="Short-text benchmarks (percent) after instruction tuning.",
        first="method",
        columns=list(published["task"].unique()),
        sections=[published_section(published, "task"), *measured_section(rows, COLUMNS)],
        note=measured_note(rows, COLUMNS),
    )
