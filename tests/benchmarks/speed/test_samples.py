"""The benchmark of building samples: its clock, its table; the measured rows are those that their README lists."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

import pytest

from benchmarks import ruler
from benchmarks.speed.samples import BEGIN, END, sample_seconds, with_table
from endprompt import results

ROOT = Path(__file__).resolve().parents[3]
MEASURED = ROOT / "paper_figures" / "data" / "measured"


def test_the_clock_tells_sizing_from_samples():
    from lm_eval.tasks.ruler import cwe_utils

    def spin(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def generator():
        spin(0.2)
        for _ in cwe_utils.tqdm(range(3), desc="samples"):
            spin(0.05)

    sizing, samples = sample_seconds(generator, "cwe_utils")
    assert sizing == pytest.approx(0.2, abs=0.04)
    assert samples == pytest.approx([0.05] * 3, abs=0.03)


def test_the_table_has_a_column_a_length_and_the_worst_fill_of_each_family():
    def row(length, task, metric, value, method="ours"):
        return {"length": length, "task": task, "metric": metric, "value": value, "method": method}

    made = []
    for length, seconds in ((65536, 12.04), (4096, 4.0)):
        made += [row(length, task, "fill", 99.9) for task in ruler.TASKS]
        made += [row(length, task, "largest_fill", 99.95) for task in ruler.TASKS]
        made += [row(length, "all", "cpu_seconds", seconds), row(length, "all", "cpu_seconds", 1234.5, "lm-eval")]
        made += [row(length, "all", "wall_seconds", 7.5), row(length, "all", "wall_seconds", 0.126, "ours, cached")]
        made += [row(length, "all", "peak_gib", 0.25), row(length, "all", "times_faster", 41.26)]
        made += [row(length, "cwe", "cpu_seconds", 3.0, "lm-eval")]
    made += [row(4096, "vt", "fill", 99.5), row(4096, "qa_1", "fill", 98.25), row(65536, "fwe", "largest_fill", 100.0)]
    page = f"before {BEGIN}\nold\n{END} after"
    new = with_table(page, made)
    lines = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for line in new.split("\n")
             if len(cells := line.split("|")) > 3}  # fmt: skip
    assert lines[""] == ["4,096 tokens", "65,536 tokens"]
    assert lines["CPU seconds"] == ["4.0", "12.0"]
    assert lines["lm-eval's generators, CPU seconds"] == ["1,234", "1,234"]
    assert lines["mean fill at least, NIAH, VT, CWE, %"] == ["99.50", "99.90"]
    assert lines["mean fill at least, FWE, QA, %"] == ["98.25", "99.90"]
    assert lines["largest fill of a sample, %"] == ["99.95", "100.00"]
    assert new.startswith("before ") and new.endswith(" after") and "old" not in new
    assert with_table(new, made) == new
    with pytest.raises(ValueError, match="must have the marks"):
        with_table("no marks", made)


def test_the_page_has_the_table_of_the_measured_rows():
    page = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")
    path = MEASURED / "cpu_samples.jsonl"
    if path.is_file():
        assert with_table(page, results.read_rows(path)) == page, "run sample_speed --page --rows"
    else:
        assert f"{BEGIN}\n{END}" in page


def test_measured_rows_are_those_that_their_readme_lists():
    listed = re.findall(r"(?m)^    ([0-9a-f]{64})  (\S+)$", (MEASURED / "README.md").read_text(encoding="utf-8"))
    paths = {path.name: path for path in MEASURED.glob("*.jsonl*")}
    paths |= {f"pages/{path.name}": path for path in (MEASURED / "pages").glob("h200*")}
    paths |= {name: MEASURED / name for _, name in listed if name.startswith("pages/")}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    assert found == {name: digest for digest, name in listed}
