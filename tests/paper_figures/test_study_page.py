"""The page on a published model says what its rows say."""

from __future__ import annotations

import re
from statistics import mean, stdev

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
    line = next(line for line in part.splitlines() if line.startswith(f"| {name} |"))
    printed = [float(found) for found in re.findall(r"\| (-?\d+\.\d) \[", line)]

    def scored(which: str, length: int) -> float:
        lines = [
            one for one in study_page.read("smollm2_small_scores") if (one["arm"], one["length"]) == (which, length)
        ]
        assert len(lines) == 13 * 3 and {one["seed"] for one in lines} == {0, 1, 2}
        return mean(mean(one["scores"]) for one in lines)

    lengths = (4096, 8192, 16384, 32768, 65536)
    control = [scored("contiguous+yarn", n) if heading.startswith("Against") else 0.0 for n in lengths]
    assert printed == pytest.approx([scored(arm, n) - base for n, base in zip(lengths, control)], abs=0.051)


def test_a_printed_interval_is_students_over_the_seeds():
    at_target = [one for one in study_page.read("smollm2_small_scores") if one["length"] == 65536]
    by_seed = [
        mean(mean(one["scores"]) for one in at_target if one["arm"] == "recall+yarn" and one["seed"] == seed)
        - mean(mean(one["scores"]) for one in at_target if one["arm"] == "contiguous+yarn" and one["seed"] == seed)
        for seed in range(3)
    ]
    half = 4.302653 * stdev(by_seed) / 3**0.5  # Student's 97.5% point of two degrees of freedom, from a printed table
    low, high = mean(by_seed) - half, mean(by_seed) + half
    assert f"{mean(by_seed):.1f} [{low:.1f}, {high:.1f}]" in study_page.PAGE.read_text(encoding="utf-8")


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
