"""Numbers on pages that carry a mark are those of the committed rows.

A mark is a comment behind a number, `12,070<!-- FILE | TASK | METRIC -->`: the value of that row of the measured rows,
or what its column METRIC holds, rounded as the page prints it. `A / B` is a ratio, in which an empty part is that of A;
`100 * A` is scaled. Rows that differ in another column are told apart by further parts, `COLUMN=VALUE`.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "paper_figures" / "data" / "measured"
MARK = re.compile(r"([-+]?[\d,]+(?:\.\d+)?)<!--\s(.+?)\s-->", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = [(page.name, *found) for page in PAGES for found in MARK.findall(page.read_text(encoding="utf-8"))]


@cache
def rows_of(name: str) -> list[dict]:
    (path,) = MEASURED.rglob(f"{name}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def value_of(words: str, before: list[str]) -> tuple[float, list[str]]:
    """(value, its parts) of `FILE | TASK | METRIC | COLUMN=VALUE ...`; empty parts are those before."""
    parts = [part.strip() for part in words.split("|")]
    parts = [part or before[i] for i, part in enumerate(parts)]
    file, task, metric, *columns = parts
    found = [row for row in rows_of(file) if row["task"] == task]
    for column in columns:
        key, _, value = column.partition("=")
        found = [row for row in found if str(row.get(key)) == value]
    values = {row["value"] for row in found if row["metric"] == metric} or {row.get(metric) for row in found}
    assert len(values) == 1 and values != {None}, f"{len(values)} values for {words!r}"
    return float(values.pop()), parts


def evaluated(mark: str) -> float:
    """The value that a mark stands for."""
    scale, words = re.fullmatch(r"(?:([\d.]+) \* )?(.+)", " ".join(mark.split())).groups()
    first, *others = words.split(" / ")
    value, parts = value_of(first, [])
    for other in others:
        divisor, parts = value_of(other, parts)
        value /= divisor
    return value * float(scale or 1)


@pytest.mark.parametrize(("page", "printed", "mark"), MARKS)
def test_a_marked_number_is_that_of_its_row(page, printed, mark):
    decimals = len(printed.partition(".")[2])
    assert printed.lstrip("+") == f"{evaluated(mark):,.{decimals}f}"


def test_the_demo_table_is_that_of_its_rows():
    """Scores with their intervals; a row's method, length and task are those of the table."""
    lines = [
        line[1:-1].split("|")
        for line in (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
        if line[:1] == "|"
    ]
    head, _, *lines = [[cell.strip() for cell in line] for line in lines]
    assert head[:2] == ["method", "length"] and len(lines) == 5
    for method, length, *cells in lines:
        for task, cell in zip(head[2:], cells, strict=True):
            name = task if task == "vt" else f"niah_{task}"
            (row,) = [
                r for r in rows_of("demo") if (r["method"], r["task"], r["length"]) == (method, name, int(length))
            ]
            assert cell == f"{row['value']:.0f} [{row['ci95'][0]:.0f}, {row['ci95'][1]:.0f}]", (method, length, task)


def test_pages_have_marks():
    assert sum(name == "speed.md" for name, *_ in MARKS) > 30


def test_a_wrong_number_is_found():
    mark = "h200_target | reference | tokens_per_s"
    assert evaluated(mark) == pytest.approx(7832.28, abs=0.01)
    ratio = "h200_target | endprompt, whole step | tokens_per_s / | reference |"
    assert evaluated(ratio) == pytest.approx(1.5411, abs=1e-4)
    with pytest.raises(AssertionError):
        test_a_marked_number_is_that_of_its_row("speed.md", "7,833", mark)
    with pytest.raises(AssertionError, match="0 values"):
        evaluated("h200_target | nothing | tokens_per_s")


def test_measured_rows_are_those_that_their_readme_lists():
    listed = re.findall(r"(?m)^    ([0-9a-f]{64})  (\S+)$", (MEASURED / "README.md").read_text(encoding="utf-8"))
    paths = {path.name: path for path in MEASURED.glob("*.jsonl*")}
    paths |= {f"pages/{path.name}": path for path in (MEASURED / "pages").glob("h200*")}
    paths |= {name: MEASURED / name for _, name in listed if name.startswith("pages/")}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    assert found == {name: digest for digest, name in listed}
