"""The computed data files against the packages that they show, and against numbers from other routes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from endprompt.positions import gap, observed_distances
from paper_figures.figures.figure_1 import distances
from tests.support.figure_data import COMPUTED, coverage, figure_1, gap_rms, gap_rms_against_k


def stored(name):
    return pd.read_csv(COMPUTED / f"{name}.csv")


def test_position_schemes_are_current():
    pd.testing.assert_frame_equal(stored("figure_1"), figure_1(), check_dtype=False)


def test_figure_1_shows_the_intervals_of_the_formula():
    """[0, a-1], [0, b-1] and [L-a-b+1, L-1] for 12 + 4 tokens in 64, typed by hand; the rest is the gap."""
    table = stored("figure_1")
    seen = distances(table[table["scheme"] == "endprompt"])
    assert seen == [*range(0, 12), *range(49, 64)]
    assert observed_distances(12, 4, 64) == [(0, 11), (49, 63)]
    assert gap(12, 4, 64) == (12, 48)
    assert distances(table[table["scheme"] == "contiguous"]) == [*range(16)]
    assert distances(table[table["scheme"] == "full length"]) == [*range(64)]


def test_coverage_is_current():
    made, kept = coverage(), stored("coverage")
    assert made.drop(columns=["pairs", "share"]).equals(kept.drop(columns=["pairs", "share"]))
    np.testing.assert_allclose(made[["pairs", "share"]], kept[["pairs", "share"]], atol=2e-6)


def test_coverage_counts_every_pair_once():
    """Each row of n tokens has n (n + 1) / 2 pairs, itself included, whatever the scheme."""
    table = stored("coverage")
    widths = table["distance_hi"] - table["distance_lo"] + 1
    totals = (table["pairs"] * widths).groupby(table["scheme"]).sum()
    np.testing.assert_allclose(totals, 256 * 257 / 2, rtol=1e-5)


def test_coverage_of_the_fixed_end_prompt():
    """At distance d: 256 - d pairs in contiguous rows; between context and prompt min(a, b, ...) pairs, at most 20."""
    table = stored("coverage").set_index(["scheme", "distance_lo"])["pairs"]
    assert table["contiguous", 0] == pytest.approx(256 - 15.5)
    assert table["contiguous", 256] == 0
    assert table["endprompt", 1024] == 0
    assert table["endprompt", 1856] == 20


@pytest.mark.parametrize(("anchors", "value"), [(0, 0.643682), (1, 0.506395), (None, 0.003207)])
def test_gap_rms_reproduces_known_values(anchors, value):
    table = stored("gap_rms_against_k")
    row = table[(table["base"] == 500000) & (table["anchors"] == ("all" if anchors is None else str(anchors)))]
    assert row["gap_rms"].item() == value
    assert gap_rms(500000.0, anchors) == pytest.approx(value, abs=2e-6)


@pytest.mark.slow
def test_gap_rms_is_current():
    np.testing.assert_allclose(gap_rms_against_k()["gap_rms"], stored("gap_rms_against_k")["gap_rms"], atol=2e-6)
