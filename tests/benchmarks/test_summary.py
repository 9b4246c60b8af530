"""Summary rules on figures known by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from benchmarks import summary

GPT_4 = dict(zip((4096, 8192, 16384, 32768, 65536, 131072), (96.6, 96.3, 95.2, 93.2, 87.0, 81.2)))


def test_the_published_row_of_gpt_4():
    assert round(summary.average(GPT_4), 1) == 91.6
    assert round(summary.weighted_average(GPT_4, "inc"), 1) == 89.0
    assert round(summary.weighted_average(GPT_4, "dec"), 1) == 94.1
    assert summary.effective_length(GPT_4) == 65536


def test_effective_length_is_the_longest_at_or_over_the_threshold():
    assert summary.effective_length({4096: 85.6, 8192: 85.5}) == 4096
    assert summary.effective_length({4096: 80.0, 8192: 10.0}) == 0
    assert summary.effective_length({256: 100.0, 512: 60.0}, threshold=50) == 512


def test_weights_follow_the_length_not_the_order_of_the_mapping():
    assert summary.weighted_average({2: 0.0, 1: 3.0}, "inc") == 1.0
    assert summary.weighted_average({2: 0.0, 1: 3.0}, "dec") == 2.0
    with pytest.raises(ValueError, match="inc"):
        summary.weighted_average({1: 1.0}, "up")  # type: ignore[arg-type]


def test_wilson_interval_agrees_with_scipy_and_has_width_at_the_ends():
    for hits, n in ((0, 25), (25, 25), (7, 25), (1, 3)):
        expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
        (low, high), name = summary.interval([100.0] * hits + [0.0] * (n - hits))
        assert name == "wilson"
        assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert summary.interval([100.0] * 25)[0][0] < 90


def test_bootstrap_interval_agrees_with_scipy():
    values = np.random.default_rng(3).choice([0.0, 25.0, 50.0, 75.0, 100.0], 60)
    (low, high), name = summary.interval(list(values))
    assert name == "bootstrap"
    expected = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert abs(low - expected.low) < 1 and abs(high - expected.high) < 1


def row(task, length, value):
    return {"suite": "ruler", "task": task, "length": length, "value": value}


def test_a_single_length_is_summed_up_alone():
    made = summary.ruler_summary([row("vt", 8192, 50.0), row("cwe", 8192, 100.0)])
    assert {entry["length"] for entry in made} == {8192, None}
    by_metric = {entry["metric"]: entry["value"] for entry in made}
    assert by_metric["mean_over_tasks"] == by_metric["average"] == by_metric["weighted_average_inc"] == 75.0
    assert by_metric["effective_length"] == 0


def test_a_length_with_tasks_missing_has_no_average():
    rows = [row("vt", 4096, 50.0), row("cwe", 4096, 100.0), row("vt", 8192, 10.0)]
    assert summary.length_averages(rows) == {4096: 75.0}
    assert "8192" in summary.table(rows) and "-1" not in summary.table(rows)


def test_heat_map_puts_each_answer_at_its_depth():
    scored = [
        {"length": 512, "depth": [0.0, 100.0], "found": [True, False]},
        {"length": 512, "depth": [95.0], "found": [True]},
        {"length": 1024, "depth": [49.9], "found": [False]},
    ]
    cells = {(c["length"], c["depth_from"]): (c["value"], c["n"]) for c in summary.depth_table(scored)}
    assert cells == {(512, 0.0): (100.0, 1), (512, 90.0): (50.0, 2), (1024, 40.0): (0.0, 1)}


def test_table_shows_intervals_and_stays_within_the_width():
    """Read back from the text: every cell under its length, the averages, and no line that is too wide."""
    rows, expected = [], {}
    for place, length in enumerate((4096, 8192, 16384, 32768, 65536)):
        for task, value in (("niah_single_1", 100.0 - place), ("vt", 7.25 * place)):
            if (task, length) != ("vt", 65536):
                rows.append({**row(task, length, value), "ci95": (value - 3, value + 2) if place else None})
                expected[task, length] = (value, (value - 3, value + 2) if place else None)
    for width, blocks in ((200, 1), (80, 2), (20, 5)):
        found, means = {}, {}
        text = summary.table(rows, width)
        assert len(text.split("\n\n")) == blocks and max(map(len, text.splitlines())) <= max(width, 31)
        for block in text.split("\n\n"):
            head, *lines = block.splitlines()
            ends = {int(m[0]): m.end() for m in re.finditer(r"\d+", head)}
            for line in lines:
                task = line.split()[0]
                for length, end in ends.items():
                    cell = re.fullmatch(r"\s*([\d.]+)(?: \[(-?\d+), (\d+)\])?", line[end - summary.CELL : end].ljust(1))
                    if cell is None:
                        continue
                    (means if task == "average" else found)[task, length] = (
                        float(cell[1]), (int(cell[2]), int(cell[3])) if cell[2] else None
                    )  # fmt: skip
        assert found == {
            key: (round(value, 1), tuple(round(end) for end in ci) if ci else None)
            for key, (value, ci) in expected.items()
        }
        assert means == {("average", n): (round(summary.length_averages(rows)[n], 1), None) for n in
                         (4096, 8192, 16384, 32768)}  # fmt: skip


def test_standard_error_is_that_of_the_sample_standard_deviation():
    scores = [0.0, 100.0, 50.0, 50.0, 0.0]
    assert summary.standard_error(scores) == pytest.approx(stats.sem(scores), rel=1e-12)
    assert summary.standard_error([40.0]) is None


def test_a_paired_p_counts_both_sides_and_is_never_smaller_than_a_resample():
    """Two-sided, against the same resamples taken one by one; 20 equal differences have no resample beyond 0."""
    gains = np.array([4.0, -3, 5, 1, -2, 6, -4, 3, 2, -1, 4, -2])
    draws = np.random.default_rng(5).choice(gains, (40_000, 12)).mean(1)
    drawn = summary.resampled_means(gains, np.random.default_rng(0))
    assert summary.two_sided(drawn) == pytest.approx(2 * (draws <= 0).mean(), abs=0.02)
    assert summary.two_sided(np.ones(20)) == 1 / summary.RESAMPLES and summary.two_sided(np.zeros(20)) == 1
