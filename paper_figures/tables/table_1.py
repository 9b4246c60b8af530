"""Table 1: RULER, averages over the lengths 4K to 64K, and the rows measured here below them."""

from __future__ import annotations

from paper_figures.data import Frames, Inputs
from paper_figures.table import Table
from paper_figures.tables.ruler import measured_note, measured_sections, published_section

TITLE = "Table 1: RULER, mean over 4K to 64K by task"
INPUTS = Inputs(files={"published/table_1": ("task", "method", "score", "source")}, rows={"ruler": ()})


def build(frames: Frames) -> Table:
    columns, section = published_section(frames["published/table_1"])
    measured = measured_sections(frames["ruler"])
    return Table(
        "table_1",
        "RULER scores (percent), averages over the lengths 4K, 8K, 16K, 32K and 64K.",
        "method",
        columns,
        [section, *measured],
        measured_note(frames["ruler"]),
    )
