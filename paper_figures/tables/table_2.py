"""Table 2: LongBench by category."""

from __future__ import annotations

from paper_figures.averages import scored
from paper_figures.data import Frames, Inputs
from paper_figures.names import LONGBENCH
from paper_figures.table import Table
from paper_figures.tables.measured import measured_note, measured_section, published_section

TITLE = "Table 2: LongBench by category"
INPUTS = Inputs(files={"published/table_2": ("method", "category", "score", "source")}, rows={"longbench": ()})


def build(frames: Frames) -> Table:
    published = frames["published/table_2"]
    rows = scored(frames, "longbench")
    return Table(
        name="table_2",
        caption="LongBench scores (percent) by category, and the average over the 16 English sets.",
        first="method",
        columns=list(published["category"].unique()),
        sections=[published_section(published, "category"), *measured_section(rows, LONGBENCH)],
        note=measured_note(rows, LONGBENCH),
    )
