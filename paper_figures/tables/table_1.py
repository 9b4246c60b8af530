"""Table 1: RULER, averages over the lengths 4K to 64K, and the rows measured here below them."""

from __future__ import annotations

from paper_figures.averages import scored
from paper_figures.data import Frames, Inputs
from paper_figures.names import RULER
from paper_figures.table import Table
from paper_figures.tables.measured import measured_note, measured_section, published_section

TITLE = "Table 1: RULER, mean over 4K to 64K by task"
INPUTS = Inputs(files={"published/table_1": ("task", "method", "score", "source")}, rows={"ruler": ()})
COLUMNS = {column: (task,) for column, task in RULER.items()}


def build(frames: Frames) -> Table:
    published = frames["published/table_1"]
    rows = scored(frames, "ruler")
    return Table(
        name="table_1",
        caption="RULER scores (percent), averages over the lengths 4K, 8K, 16K, 32K and 64K.",
        first="method",
        columns=list(published["task"].unique()),
        sections=[published_section(published, "task"), *measured_section(rows, COLUMNS)],
        note=measured_note(rows, COLUMNS),
    )
