"""Table 4: LongBench by category, for other bases, extension lengths and numbers of training tokens."""

from __future__ import annotations

from paper_figures.averages import scored
from paper_figures.data import Frames, Inputs
from paper_figures.names import LONGBENCH
from paper_figures.table import Table
from paper_figures.tables.measured import measured_note, measured_section, published_groups

TITLE = "Table 4: LongBench by category, ablations"
INPUTS = Inputs(files={"published/table_4": ("method", "group", "category", "score", "source")}, rows={"longbench": ()})


def build(frames: Frames) -> Table:
    published = frames["published/table_4"]
    rows = scored(frames, "longbench")
    return Table(
        name="table_4",
        caption="LongBench scores (percent) by category for other base models, "
        "extension lengths and numbers of training tokens.",
        first="method",
        columns=list(published["category"].unique()),
        sections=[*published_groups(published, "category"), *measured_section(rows, LONGBENCH)],
        note=measured_note(rows, LONGBENCH),
    )
