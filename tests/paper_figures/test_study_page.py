"""The page on a published model says what its rows say."""

from __future__ import annotations

from statistics import mean, stdev

from tests.support import study_page


def test_the_page_is_written_from_the_rows():
    assert study_page.PAGE.read_text(encoding="utf-8") == study_page.page(), "run python -m tests.support.study_page"


def test_a_printed_difference_and_its_interval_are_those_of_the_samples():
    """At 65,536, recall less the control: means over tasks seed by seed, and Student's t over them."""
    at_target = [one for one in study_page.read("smollm2_small_scores") if one["length"] == 65536]

    def scored(arm: str, seed: int) -> float:
        lines = [one for one in at_target if (one["arm"], one["seed"]) == (arm, seed)]
        assert len(lines) == 13
        return mean(mean(one["scores"]) for one in lines)

    by_seed = [scored("recall+yarn", seed) - scored("contiguous+yarn", seed) for seed in range(3)]
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
