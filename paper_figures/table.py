"""A table of scores and its three forms: LaTeX (booktabs), Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from paper_figures.inputs import DATA

Value = float | str | None


@dataclass(frozen=True)
class Row:
    """One line: its name, a number (or text, or None) for each column, and where the numbers came from."""

    name: str
    values: Sequence[Value]
    origin: str


@dataclass(frozen=True)
class Section:
    """Lines under one heading. `best`: the highest number of each column is set in bold."""

    heading: str
    rows: Sequence[Row]
    best: bool = True


@dataclass(frozen=True)
class Table:
    """columns: heads of the number columns. digits: decimals. note: stands below in LaTeX and Markdown."""

    name: str
    caption: str
    first: str
    columns: Sequence[str]
    sections: Sequence[Section]
    note: str = ""
    digits: int = 2


def write(table: Table, stem: Path) -> list[Path]:
    made = {".tex": latex(table), ".md": markdown(table), ".csv": comma_separated(table)}
    for ending, text in made.items():
        stem.with_suffix(ending).write_text(text, encoding="utf-8", newline="\n")
    return [stem.with_suffix(ending) for ending in made]


ONE_PAGE = 45  # a LaTeX table of more lines than this breaks over pages


def latex(table: Table) -> str:
    """A complete `table*` environment that needs the packages booktabs and graphicx only. A table too long for one page
    is a `longtable` (package longtable, in one column of text) in small print instead."""
    environment = Environment(
        variable_start_string="<<", variable_end_string=">>", block_start_string="<%", block_end_string="%>",
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["tex"] = _escape
    template = environment.from_string(DATA.joinpath("table.tex").read_text(encoding="utf-8"))

    def lines(section: Section) -> Iterator[tuple[str, list[str]]]:
        for row, bold in zip(section.rows, _bold(section)):
            cells = [_escape(_text(value, table.digits, "--")) for value in row.values]
            yield row.name, [f"\\textbf{{{c}}}" if b else c for c, b in zip(cells, bold)]

    long = sum(1 + len(section.rows) for section in table.sections) > ONE_PAGE
    return template.render(table=table, lines=lines, long=long)


def markdown(table: Table) -> str:
    """A pipe table; sections are lines with an italic heading."""
    heads = [table.first, *table.columns]
    lines = [f"**{table.caption}**", "", _pipes(heads), _pipes([":--"] + ["--:"] * len(table.columns))]
    for section in table.sections:
        if section.heading:
            lines.append(_pipes([f"*{section.heading}*", *[""] * len(table.columns)]))
        for row, bold in zip(section.rows, _bold(section)):
            cells = [_text(value, table.digits, "–") for value in row.values]
            lines.append(_pipes([row.name, *(f"**{c}**" if b else c for c, b in zip(cells, bold))]))
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines) + "\n"


def comma_separated(table: Table) -> str:
    """section, name, one column a number, origin; an empty cell is a number that does not exist."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["section", table.first, *table.columns, "origin"])
    for section in table.sections:
        for row in section.rows:
            writer.writerow([section.heading, row.name, *(_text(v, table.digits, "") for v in row.values), row.origin])
    return out.getvalue()


def _bold(section: Section) -> list[list[bool]]:
    """Per row and column: is it the highest number of its column (in a section of at least two lines)?"""
    tops = []
    for column in zip(*(row.values for row in section.rows)):
        numbers = [value for value in column if isinstance(value, (int, float))]
        tops.append(max(numbers) if section.best and len(numbers) > 1 else None)
    return [[isinstance(v, (int, float)) and v == top for v, top in zip(row.values, tops)] for row in section.rows]


def _text(value: Value, digits: int, absent: str) -> str:
    if value is None or value != value:
        return absent
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


#: What LaTeX reads as more than itself.
TEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}"}
    | {"±": "$\\pm$", "–": "--", "×": "$\\times$", "<": "$<$", ">": "$>$", "|": "$|$"}
)


def _escape(text: str) -> str:
    return text.translate(TEX)
