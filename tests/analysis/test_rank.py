"""Rational relations, true suprema, the sweep, the outlook and extended precision."""

import builtins
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import analysis
from analysis.rank import frequency_classes, harmonic_numbers, integer_root, perfect_power
from analysis.sweep import DUFFIN_SCHAEFFER, ORDERS, Sweep


@pytest.mark.parametrize(
    ("base", "head_dim", "rank"),
    [(10000, 128, 16), (1000000, 128, 32), (500000, 128, 64), (10000, 64, 8), (65536, 128, 4), (7, 2, 1), (2.25, 8, 2)],
)
def test_rank(base, head_dim, rank):
    assert analysis.freq_rank(base, head_dim) == rank


def test_rank_from_exact_ratios():
    """An independent route: base^((i-j)/n) is rational iff base^(i-j) is a perfect n-th power."""
    from fractions import Fraction

    for base, head_dim in ((10000, 64), (4096, 48), (1728, 12), (500000, 16)):
        n = head_dim // 2
        classes = frequency_classes(base, head_dim)
        label = {j: number for number, members in enumerate(classes) for j in members}
        for i in range(n):
            for j in range(i):
                rational = integer_root(Fraction(base ** (i - j)).numerator, n) is not None
                assert rational == (label[i] == label[j]), (base, i, j)


@given(st.integers(2, 60), st.integers(1, 12))
def test_perfect_power(r, g):
    from fractions import Fraction

    found = perfect_power(Fraction(r**g))
    assert found % g == 0 and integer_root(r**g, found) ** found == r**g


def test_dependent_frequencies_at_the_usual_base():
    omega, _ = analysis.rope_freqs(10000, 128, "linear", 8, 8192)
    assert [0, 16, 32, 48] in frequency_classes(10000, 128)
    np.testing.assert_array_equal(harmonic_numbers(omega[[0, 16, 32, 48]]), [1000, 100, 10, 1])


def test_true_supremum_by_brute_force():
    """D = 8 at base 16: theta_j = 2^-j, one class, S is periodic: a dense grid over the period finds the supremum."""
    rng = np.random.default_rng(0)
    omega, _ = analysis.rope_freqs(16, 8)
    period = 2 * math.pi / omega[-1]
    d = np.linspace(0, period, 200_001)
    for _ in range(20):
        z = rng.normal(size=4) + 1j * rng.normal(size=4)
        for order in range(3):
            lo, hi = analysis.true_sup(z, omega, 16, 8, order)
            dense = np.abs(analysis.eval_score(z, omega, d, order)).max()
            assert lo <= hi <= analysis.coef_bound(z, omega, order) * (1 + 1e-12)
            assert dense <= hi and dense == pytest.approx(lo, rel=1e-6)


def test_negative_side_counts():
    """-S can be larger than S: 2 cos t - cos 2t has maximum 1.5 and minimum -3."""
    lo, hi = analysis.true_sup([-1, 2], [0.2, 0.1], 4, 4)
    assert lo == pytest.approx(3, rel=1e-5) and hi == pytest.approx(3, rel=1e-5)
    # a constant (the part of a head that RoPE leaves alone) shifts both sides
    lo, hi = analysis.true_sup([-1, 2, 2.0], [0.2, 0.1, 0.0], 4, 4)
    assert lo == pytest.approx(3.5, rel=1e-5) and hi == pytest.approx(3.5, rel=1e-5)


def test_independent_frequencies_reach_the_coefficient_bound():
    rng = np.random.default_rng(1)
    z = rng.normal(size=64) + 1j * rng.normal(size=64)
    omega, _ = analysis.rope_freqs(500000, 128, "linear", 8, 8192)
    for order in range(3):
        bound = float(analysis.coef_bound(z, omega, order))
        lo, hi = analysis.true_sup(z, omega, 500000, 128, order)
        assert lo == pytest.approx(bound, rel=1e-12) and hi == pytest.approx(bound, rel=1e-12)
    # only asymptotically: on the window itself about a third of it
    window = analysis.certified_max(z, omega, 0, 65536, 0, 1e-3)[1]
    assert 0.2 < window / float(analysis.coef_bound(z, omega)) < 0.5


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "dynamic", "yarn", "llama3"])
def test_enclosure_is_above_the_line_for_every_scaling(scaling):
    rng = np.random.default_rng(2)
    omega, _ = analysis.rope_freqs(10000, 32, scaling, 8, 256)
    base = 10000 if scaling not in ("ntk", "dynamic") else float((1 / omega[1]) ** 16)
    z = rng.normal(size=16) + 1j * rng.normal(size=16)
    lo, hi = analysis.true_sup(z, omega, base, 32)
    largest = np.abs(analysis.eval_score(z, omega, rng.uniform(0, 1e6, size=20000))).max()
    assert largest <= hi <= analysis.coef_bound(z, omega) * (1 + 1e-12) and lo <= hi
    if scaling in ("none", "linear"):
        assert hi == pytest.approx(lo, rel=2e-6)


@pytest.mark.parametrize(
    ("scaling", "spacing", "length"),
    [("linear", 1.0, 3000), ("linear", 4.0, 3000), ("yarn", 1.0, 3001), ("none", 0.5, 3000), ("none", 1.0, 1)],
)
def test_sweep_equals_direct_evaluation(scaling, spacing, length):
    """All distances in float64: what the sweep finds in float32 first must be the same to float64's rounding."""
    rng = np.random.default_rng(3)
    omega, _ = analysis.rope_freqs(500000, 128, scaling, 8, 8192)
    omega = np.append(omega, 0.0)
    z = rng.normal(size=(40, 65)) + 1j * rng.normal(size=(40, 65))
    z[0] = 0
    z[1, :-2] = 0  # the slowest frequency and a constant alone
    z[2, 1:] = 0  # the fastest alone
    z[3] *= np.logspace(0, -12, 65)
    z[4] *= np.logspace(-12, 0, 65)
    z[5] *= 1e-60  # out of float32's range
    z[6] *= 1e60
    z[7, :-1] *= 1e-9  # a constant that drowns the rest in float32
    found = Sweep(omega, length, spacing=spacing).maxima(z)
    d = np.arange(0, found.last + spacing / 2, spacing)
    assert length - 1 <= d[-1] < length - 1 + spacing and d[-1] == found.last
    values = [analysis.eval_score(z, omega, d, order) for order in ORDERS]
    for order in ORDERS:
        exact = np.abs(values[order]).max(axis=1)
        assert (np.abs(found.size[order] - exact) <= found.error[order] + 1e-300).all()
        assert (found.error[order] <= 1e-12 * analysis.coef_bound(z, omega, order) + 1e-300).all()
    both = np.sqrt((values[1] ** 2 + (omega.max() * values[0]) ** 2).max(axis=1))
    np.testing.assert_allclose(found.size[DUFFIN_SCHAEFFER], both, rtol=1e-12)
    maxima = {DUFFIN_SCHAEFFER: both} | {order: np.abs(values[order]).max(axis=1) for order in ORDERS}
    for share in (1.0, 0.7):  # of what they are: nothing exceeds the bounds, many do
        bounds = [(kind, share * analysis.coef_bound(z, omega, kind % 3)) for kind in (0, 2, DUFFIN_SCHAEFFER)]
        bounds[2] = DUFFIN_SCHAEFFER, omega.max() * bounds[2][1]
        held = Sweep(omega, length, spacing=spacing).maxima(z, bounds)
        np.testing.assert_array_equal(held.size[1], found.size[1])
        for kind, bound in bounds:
            ratio, exact = (x[1:] / bound[1:] for x in (held.size[kind], maxima[kind]))
            assert (ratio <= exact * (1 + 1e-12)).all() and ratio.max() == pytest.approx(exact.max(), rel=1e-12)
            np.testing.assert_allclose(ratio[exact > 1 + 1e-9], exact[exact > 1 + 1e-9], rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 6.0), st.integers(2, 400))
def test_sweep_certifies_real_distances(seed, spacing, length):
    rng = np.random.default_rng(seed)
    omega, _ = analysis.rope_freqs(10000, 8, "linear", 4, 64)
    z = rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4))
    found = Sweep(omega, length, spacing=spacing).maxima(z)
    for order in ORDERS:
        for pair in range(3):
            lower, upper, _ = analysis.certified_max(z[pair], omega, 0, found.last, order, 1e-4)
            assert found.size[order][pair] - found.error[order][pair] <= upper
            assert lower <= found.size[order][pair] + found.error[order][pair] + found.between[order][pair]


@pytest.mark.gpu
def test_sweep_on_a_gpu_equals_the_cpu():
    rng = np.random.default_rng(0)
    omega, _ = analysis.rope_freqs(500000, 128, "linear", 8, 8192)
    z = rng.normal(size=(3000, 64)) + 1j * rng.normal(size=(3000, 64))
    here, there = (Sweep(omega, 20000, device=d).maxima(z) for d in ("cpu", "cuda"))
    for order in ORDERS:
        assert (np.abs(here.size[order] - there.size[order]) <= here.error[order] + there.error[order]).all()
    np.testing.assert_allclose(here.size[DUFFIN_SCHAEFFER], there.size[DUFFIN_SCHAEFFER], rtol=1e-10)


def test_sweep_names_bad_input():
    with pytest.raises(ValueError, match="must be positive"):
        Sweep([1.0], 0)
    with pytest.raises(ValueError, match="finite"):
        Sweep([1.0], 10).maxima(np.array([[np.nan + 0j]]))
    with pytest.raises(ValueError, match="shape"):
        Sweep([1.0], 10).maxima(np.zeros((1, 2), dtype=complex))


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "bits", "expected"), [(True, 2000, 42.0), (False, 2500, 138.4)])
def test_amplification_with_the_end_prompt_and_without(prompt, bits, expected):
    pytest.importorskip("flint")
    observed, gap = analysis.distance_segments(65536, 8172, 20)
    given = (500000, 128, 8, observed if prompt else [(0, 8171)], gap)
    assert analysis.amplification_log10(*given, bits) == pytest.approx(expected, abs=0.05)


def test_amplification_where_float64_suffices():
    """Two frequencies: the generalised eigenvalue is within reach of scipy."""
    import scipy.linalg

    pytest.importorskip("flint")
    observed, gap = [(0, 30)], [(31, 90)]
    omega, _ = analysis.rope_freqs(100, 4, "linear", 2, 16)
    G_gap, G_obs = analysis.gram(omega, gap), analysis.gram(omega, observed)
    expected = math.log10(scipy.linalg.eigh(G_gap, G_obs, eigvals_only=True)[-1]) / 2
    assert analysis.amplification_log10(100, 4, 2, observed, gap, bits=200) == pytest.approx(expected, rel=1e-6)


def test_too_few_bits_are_refused():
    """D = 32: 300 bits answer 10^32.2 without a sign of trouble, and it is 10^45.3."""
    from analysis import exact

    flint = pytest.importorskip("flint")
    geometry = (500000, 32, 8, [(0, 500)], [(501, 8000)])
    right = analysis.amplification_log10(*geometry, bits=900)
    assert right == pytest.approx(45.3, abs=0.05)
    assert exact._amplification(flint, *geometry, 300) == pytest.approx(32.2, abs=0.05)
    with pytest.raises(ValueError, match="do not carry the answer"):
        analysis.amplification_log10(*geometry, bits=300)


def test_amplification_names_bad_input():
    pytest.importorskip("flint")
    observed, gap = analysis.distance_segments(65536, 8172, 20)
    with pytest.raises(ValueError, match="bits must lie"):
        analysis.amplification_log10(500000, 128, 8, observed, gap, bits=2)
    with pytest.raises(ValueError, match="gap"):
        analysis.amplification_log10(500000, 128, 8, observed, [])


def test_without_flint_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "flint":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="python-flint"):
        analysis.amplification_log10(500000, 128, 8, [(0, 1)], [(2, 3)])
