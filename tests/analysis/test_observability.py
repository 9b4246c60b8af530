"""Observed distances, pair counts, Gram matrices, worst and average case."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import analysis
from analysis import observability
from endprompt import positions

L, A, B = 65536, 8172, 20  # Llama-3 at 8-fold


@pytest.fixture(scope="module")
def llama3():
    omega, _ = analysis.rope_freqs(500000, 128, "linear", 8, 8192)
    observed, gap = analysis.distance_segments(L, A, B, "endprompt")
    return omega, observed, gap


def outcomes(scheme, context, prompt, target, count):
    """Every row that a scheme can draw, laid out by hand."""
    c, p = list(range(context)), lambda start: list(range(start, start + prompt))
    n = context + prompt

    def two_chunks(tokens, room):
        return [
            [i if i < first else i + skip for i in range(tokens)]
            for first in range(1, (tokens + 1) // 2 + 1)
            for skip in range(room + 1)
        ]

    def spread(starts, tokens=n):
        """The first piece stays; the others are moved within strata of the room, one each."""
        width = (target - n + 1) // (len(starts) - 1)
        ends = [*starts[1:], tokens]
        return [
            [
                place + (piece - 1) * width + moves[piece - 1] if piece else place
                for piece in range(len(starts))
                for place in range(starts[piece], ends[piece])
            ]
            for moves in itertools.product(range(width), repeat=len(starts) - 1)
        ]

    thirds = [0, context // 3, 2 * context // 3] if context > 2 else list(range(context))

    return {
        "contiguous": lambda: [list(range(n))],
        "endprompt": lambda: [c + p(target - prompt)],
        "endprompt-random": lambda: [c + p(start) for start in range(context, target - prompt + 1)],
        "anchors": lambda: [c + p(k * target // count - prompt) for k in range(1, count + 1)],
        "pose": lambda: two_chunks(n, target - n),
        "sliding": lambda: [[0, *range(1 + u, context + u), *p(target - prompt)] for u in range(target - n + 1)],
        "sentences": lambda: spread([0, n // 3, 2 * n // 3]),
        "endprompt-sentences": lambda: [row + p(target - prompt) for row in spread(thirds, context)],
        "endprompt-pose": lambda: [r + p(target - prompt) for r in two_chunks(context, target - prompt - context)],
    }[scheme]()


@pytest.mark.parametrize("scheme", list(positions.SCHEMES))
@pytest.mark.parametrize(("context", "prompt", "target", "count"), [(5, 2, 17, 2), (4, 3, 30, 3), (2, 2, 9, 2)])
def test_pair_counts_equal_enumeration(scheme, context, prompt, target, count):
    rows = np.array(outcomes(scheme, context, prompt, target, count))
    query, key = np.tril_indices(context + prompt)
    expected = np.bincount((rows[:, query] - rows[:, key]).ravel(), minlength=target) / len(rows)
    found = analysis.pair_counts(scheme, context, prompt, target, count=count)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_enumeration_is_what_the_trainer_draws():
    for scheme in positions.SCHEMES:
        context, prompt = 4, 3
        rows = {tuple(ids) for ids in outcomes(scheme, context, prompt, 14, 2)}
        options = {"count": 2} if scheme == "anchors" else {}
        drawn = {
            tuple(positions.position_ids(scheme, context, prompt, 14, positions.sample_rng(0, i), **options).tolist())
            for i in range(600)
        }
        assert drawn == rows, scheme


@pytest.mark.parametrize(("context", "prompt", "target"), [(8172, 20, 65536), (236, 20, 2048), (9, 9, 40)])
def test_fixed_end_prompt_agrees_with_positions(context, prompt, target):
    observed, gap = analysis.distance_segments(target, context, prompt)
    assert observed == positions.observed_distances(context, prompt, target)
    assert gap == [positions.gap(context, prompt, target)]


def test_gram_equals_sum_over_distances():
    omega = np.array([0.0, 1e-9, 1e-3, 0.4, 0.4 + 1e-9, 1.0])
    segments = [(0, 6), (30, 30), (100, 250)]
    d = np.concatenate([np.arange(lo, hi + 1) for lo, hi in segments])
    basis = np.concatenate([np.cos(np.outer(omega, d)), np.sin(np.outer(omega, d))])
    np.testing.assert_allclose(analysis.gram(omega, segments), basis @ basis.T / d.size, atol=1e-13)
    weights = np.zeros(251)
    weights[d] = 2.0
    np.testing.assert_allclose(analysis.gram_weighted(omega, weights, block=37), basis @ basis.T / d.size, atol=1e-13)
    several = np.stack([weights, np.arange(weights.size)])
    of_each = [analysis.gram_weighted(omega, one, block=37) for one in several]
    np.testing.assert_array_equal(analysis.gram_weighted(omega, several, block=37), np.stack(of_each))


def test_average_case_golden_values(llama3):
    omega, observed, gap = llama3
    G_gap = analysis.gram(omega, gap)

    def rms(segments):
        return analysis.posterior_gap_rms(analysis.gram(omega, segments), observability.size(segments), G_gap, 0.1)

    assert rms([(0, A - 1)]) == pytest.approx(0.643682, abs=5e-7)
    assert rms(observed) == pytest.approx(0.506395, abs=5e-7)
    assert rms([(0, L - 1)]) == pytest.approx(0.003207, abs=5e-7)


def test_posterior_equals_gaussian_regression():
    """An independent route: condition the joint covariance of observed and hidden scores."""
    rng = np.random.default_rng(3)
    omega, observed, gap, sigma = np.array([0.9, 0.31, 0.02]), [(0, 4), (20, 22)], [(5, 19)], 0.3
    root = rng.normal(size=(6, 6))
    for prior, covariance in (
        (None, np.eye(6) / 3),
        ([1.0, 0.2, 3.0], np.diag([1, 0.2, 3] * 2) / 2),
        (root @ root.T,) * 2,
    ):
        basis = {}
        for name, segments in (("o", observed), ("g", gap)):
            d = np.concatenate([np.arange(lo, hi + 1) for lo, hi in segments])
            basis[name] = np.concatenate([np.cos(np.outer(omega, d)), np.sin(np.outer(omega, d))]).T
        K = {a + b: basis[a] @ covariance @ basis[b].T for a in "og" for b in "og"}
        left = K["gg"] - K["go"] @ np.linalg.solve(K["oo"] + sigma**2 * np.eye(8), K["og"])
        value = analysis.posterior_gap_rms(analysis.gram(omega, observed), 8, analysis.gram(omega, gap), sigma, prior)
        assert value == pytest.approx(math.sqrt(np.trace(left) / 15), rel=1e-9)


def test_what_float64_cannot_carry_is_refused(llama3):
    omega, observed, gap = llama3
    with pytest.raises(ValueError, match="float64 cannot carry"):
        analysis.worst_gap(analysis.gram(omega, observed), analysis.gram(omega, gap), 1e-8)


@pytest.mark.parametrize("eps", [0.5, 0.1, 1e-2, 1e-3])
def test_worst_gap_is_feasible_and_optimal(llama3, eps):
    omega, observed, gap = llama3
    G_obs, G_gap = analysis.gram(omega, observed), analysis.gram(omega, gap)
    value, c = analysis.worst_gap(G_obs, G_gap, eps)
    assert np.linalg.norm(c) <= 1 + 1e-12
    assert math.sqrt(c @ G_obs @ c) <= eps * (1 + 1e-9)
    assert math.sqrt(c @ G_gap @ c) == pytest.approx(value, rel=1e-6)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.floats(0.02, 1.5))
def test_worst_gap_against_direct_search(seed, n, eps):
    """The S-lemma's value against a search over coefficients."""
    rng = np.random.default_rng(seed)
    omega = rng.uniform(0.01, 2, size=n)
    G_obs, G_gap = analysis.gram(omega, [(0, 5)]), analysis.gram(omega, [(6, 19)])
    value, c = analysis.worst_gap(G_obs, G_gap, eps)
    assert np.linalg.norm(c) <= 1 + 1e-9 and math.sqrt(c @ G_obs @ c) <= eps * (1 + 1e-9)
    assert math.sqrt(c @ G_gap @ c) == pytest.approx(value, rel=1e-5)

    def scaled(direction):
        direction = direction / np.linalg.norm(direction)
        return direction * min(1.0, eps / math.sqrt(max(direction @ G_obs @ direction, 1e-300)))

    best = 0.0
    for start in rng.normal(size=(3, 2 * n)):
        found = scipy.optimize.minimize(
            lambda x: -(scaled(x) @ G_gap @ scaled(x)),
            start,
            method="Nelder-Mead",
            options={"maxiter": 4000, "xatol": 1e-9},
        )
        best = max(best, math.sqrt(-found.fun))
    assert best <= value * (1 + 1e-6)
    assert best == pytest.approx(value, rel=1e-2)


def test_extremal_score_where_two_eigenvalues_cross():
    """G_gap - t G_obs is a multiple of the identity at t = 1: the extremal score is a mixture of both directions."""
    value, c = analysis.worst_gap(np.diag([0.0, 1.0]), np.diag([1.0, 2.0]), 0.5)
    assert value**2 == pytest.approx(1.25, rel=1e-6)
    np.testing.assert_allclose(c**2, [0.75, 0.25], rtol=1e-5)


def test_small_eps_holds_the_coefficients_below_norm_one():
    """lambda_max(G_gap - t G_obs) is negative for large t here: without its positive part the dual has no minimum."""
    value, c = analysis.worst_gap(np.diag([1.0, 2.0]), np.diag([3.0, 1.0]), 0.1)
    assert value == pytest.approx(0.1 * math.sqrt(3), rel=1e-12)
    assert np.linalg.norm(c) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: analysis.worst_gap(np.eye(4), np.eye(4), 0.0), "eps must be positive"),
        (lambda: analysis.worst_gap(np.eye(4), np.eye(6), 0.1), "alike"),
        (lambda: analysis.worst_gap(np.eye(4) * np.nan, np.eye(4), 0.1), "finite"),
        (lambda: analysis.posterior_gap_rms(np.eye(4), 10, np.eye(4), 0.0), "noise"),
        (lambda: analysis.posterior_gap_rms(np.eye(4), 10, np.eye(4), 1e-8), "float64 cannot carry"),
        (lambda: analysis.posterior_gap_rms(np.eye(4), 10, np.eye(4), 0.1, prior=[1.0]), "prior"),
        (lambda: analysis.posterior_gap_rms(np.eye(4), 10, np.eye(4), 0.1, prior=[1.0, -1.0]), "prior"),
        (lambda: analysis.gram([1.0], []), "at least one distance"),
        (lambda: analysis.distance_segments(10, 4, 20), "end prompt must be shorter"),
        (lambda: analysis.distance_segments(10, 8, 4), "must fit"),
        (lambda: analysis.distance_segments(40, 4, 9), "longer than the context"),
        (lambda: analysis.distance_segments(10, 4, 2, "nearest"), "scheme must be one of"),
        (lambda: analysis.gram_weighted([1.0], [0.0, 0.0]), "weights"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
