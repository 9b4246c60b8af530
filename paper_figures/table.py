"""A table of scores and its three forms: LaTeX (booktabs), Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    paths = []
    for ending, render in ((".tex", latex), (".md", markdown), (".csv", comma_separated)):
        path = stem.with_suffix(ending)
        path.write_text(render(table), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


#: A LaTeX table of more lines than this breaks over pages.
ONE_PAGE = 45


def latex(table: Table) -> str:
    """A complete `table*` environment that needs the packages booktabs and graphicx only.

    A table too long for one page is a `longtable` (package longtable, in one column of text) in small print instead.
    """
    width = len(table.columns) + 1
    heads = " & ".join(_escape(head) for head in (table.first, *table.columns)) + " \\\\"
    caption = f"\\caption{{{_escape(table.caption)}}}"
    label = f"\\label{{tab:{table.name}}}"
    note = f"\\par\\smallskip\\raggedright {_escape(table.note)}\\par" if table.note else ""
    long = sum(1 + len(section.rows) for section in table.sections) > ONE_PAGE
    between, column = ("\\addlinespace", "p{.96\\linewidth}") if long else ("\\midrule", "l")
    body: list[str] = []
    for section in table.sections:
        body.append(between if body else "\\midrule")
        if section.heading:  # the star keeps it with its first line
            heading = f"\\emph{{{_escape(section.heading)}}}"
            body.append(f"\\multicolumn{{{width}}}{{{column}}}{{{heading}}} \\\\{'*' * long}")
        for row, bold in zip(section.rows, _bold(section)):
            cells = [_text(value, table.digits, "--") for value in row.values]
            cells = [f"\\textbf{{{_escape(c)}}}" if b else _escape(c) for c, b in zip(cells, bold)]
            name = "\\raggedright " * long + _escape(row.name)
            body.append(" & ".join([name, *cells]) + " \\\\")
    names = "p{.4\\linewidth}" if long else "l"  # long names break over lines
    columns = f"{{{names}{'r' * len(table.columns)}}}"
    if long:
        lines = [
            "% needs \\usepackage{booktabs,longtable}",
            "{\\scriptsize\\setlength{\\tabcolsep}{3pt}\\setlength{\\LTcapwidth}{\\linewidth}",
            f"\\begin{{longtable}}{columns}",
            f"{caption}{label} \\\\",
            "\\toprule",
            heads,
            "\\endfirsthead",
            "\\toprule",
            heads,
            "\\midrule",
            "\\endhead",
            *body,
            "\\bottomrule",
            "\\end{longtable}",
            f"{note}}}",
        ]
    else:
        lines = [
            "% needs \\usepackage{booktabs,graphicx}",
            "\\begin{table*}[t]",
            "\\centering",
            "\\footnotesize",
            caption,
            label,
            "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{columns}",
            "\\toprule",
            heads,
            *body,
            "\\bottomrule",
            "\\end{tabular}}",
            *([note] if note else []),
            "\\end{table*}",
        ]
    return "\n".join([*lines, ""])


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
    columns = list(zip(*(row.values for row in section.rows)))
    tops = []
    for column in columns:
        numbers = [value for value in column if isinstance(value, (int, float))]
        tops.append(max(numbers) if section.best and len(numbers) > 1 else None)
    return [[isinstance(v, (int, float)) and v == top for v, top in zip(row.values, tops)] for row in section.rows]


def _text(value: Value, digits: int, absent: str) -> str:
    if value is None or value != value:
        return absent
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _escape(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    special |= {
        "\\": "\\textbackslash{}",
        "±": "$\\pm$",
        "–": "--",
        "×": "$\\times$",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
    }
    return "".join(special.get(character, character) for character in text)
