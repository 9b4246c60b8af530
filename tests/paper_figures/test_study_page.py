"""The page on a published model says what its rows say."""

from __future__ import annotations

import re
from statistics import mean

import pytest

from tests.support import study_page


def test_the_page_is_written_from_the_rows():
    assert study_page.PAGE.read_text(encoding="utf-8") == study_page.page(), "run python -m tests.support.study_page"


@pytest.mark.parametrize(
    ("heading", "arm", "name"),
    [
        ("RULER, mean", "recall+yarn", "endprompt recall, YaRN"),
        ("RULER, mean", "untrained+none", "base, as it is"),
        ("Against the control", "pose+yarn", "PoSE, YaRN"),
    ],
)
def test_a_printed_score_is_the_mean_over_tasks_of_the_samples(heading, arm, name):
    part = study_page.PAGE.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    (line,) = [line for line in part.splitlines() if line.startswith(f"| {name} |")]
    printed = [float(found) for found in re.findall(r"\| (-?\d+\.\d) \[", line)]

    def scored(which: str, length: int) -> float:
        lines = [
            one for one in study_page.read("smollm2_small_scores") if (one["arm"], one["length"]) == (which, length)
        ]
        assert len(lines) == 13
        return mean(mean(one["scores"]) for one in lines)

    lengths = (4096, 8192, 16384, 32768, 65536)
    control = [scored("contiguous+yarn", n) if heading.startswith("Against") else 0.0 for n in lengths]
    assert printed == pytest.approx([scored(arm, n) - base for n, base in zip(lengths, control)], abs=0.051)


def test_the_rates_are_those_with_the_lowest_loss():
    used = {row["arm"]: row["lr"] for row in study_page.read("smollm2_small") if row.get("lr")}
    for arm in ("contiguous+linear", "contiguous+yarn", "pose+linear", "pose+yarn"):
        tried = {
            row["lr"]: row["value"]
            for row in study_page.read("smollm2_rates")
            if row["arm"].startswith(f"{arm}@") and row["task"] == "loss" and row["length"] == 65536
        }
        assert len(tried) == 3 and used[arm] == min(tried, key=tried.__getitem__)
    assert {used[f"{prompt}+yarn"] for prompt in ("endprompt", "recall")} == {used["contiguous+yarn"]}
