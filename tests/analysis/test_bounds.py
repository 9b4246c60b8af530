"""Spectra, bounds and certified maxima against 50-digit arithmetic and pure sinusoids."""

import math
import subprocess
import sys

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import analysis
from analysis.bounds import bernstein_bound, coef_bound, windowed_counterexample

mpmath.mp.dps = 50


def exact_score(z, omega, d, order=0):
    """S^(order)(d) in 50 digits from the float64 spectrum."""
    total = mpmath.mpf(0)
    for amplitude, frequency in zip(z, omega, strict=True):
        w, d_ = mpmath.mpf(float(frequency)), mpmath.mpf(float(d))
        a = mpmath.mpc(float(amplitude.real), float(amplitude.imag))
        total += (a * (1j * w) ** order * mpmath.expj(w * d_)).real
    return total


@st.composite
def spectra(draw):
    """Random and adversarial spectra: one frequency, all equal, nearly equal, one huge, some zero."""
    kind = draw(st.sampled_from(["random", "single", "equal", "close", "huge", "zero", "rope"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    n = 1 if kind == "single" else draw(st.integers(1, 8))
    omega = rng.uniform(0.001, 1.5, size=n)
    if kind == "equal":
        omega[:] = omega[0]
    if kind == "close":
        omega = omega[0] * (1 + 1e-9 * np.arange(n))
    if kind == "rope":
        omega, _ = analysis.rope_freqs(10000, 2 * n, "linear", 8, 256)
    z = rng.normal(size=n) + 1j * rng.normal(size=n)
    if kind == "huge":
        z[0] *= 1e12
    if kind == "zero":
        z[rng.integers(n)] = 0
    return z, omega


def test_enclosure_of_one_distance_contains_its_value():
    """No search is left: both ends are the value, widened by the rounding of float64."""
    rng = np.random.default_rng(11)
    omega = 10_000.0 ** -(np.arange(16) / 16)
    for d in rng.uniform(0, 60_000, size=20).tolist():
        z = rng.normal(size=16) + 1j * rng.normal(size=16)
        lower, upper, _ = analysis.certified_max(z, omega, d, d, 0, 1e-12)
        assert lower <= abs(exact_score(z, omega, d, 0)) <= upper


@settings(max_examples=40, deadline=None)
@given(spectra(), st.integers(0, 3), st.integers(0, 2**31))
def test_enclosure_contains_exact_values(spectrum, order, seed):
    z, omega = spectrum
    rng = np.random.default_rng(seed)
    lo = float(rng.uniform(-50, 2000))
    hi = lo + float(rng.choice([0.0, 0.3, 20.0, 400.0]))
    lower, upper, evaluations = analysis.certified_max(z, omega, lo, hi, order, 1e-3)
    assert 0 <= lower <= upper and evaluations > 0
    points = [lo, hi, *rng.uniform(lo, hi, size=12)]
    grid = np.linspace(lo, hi, 4001)
    points.append(float(grid[np.abs(analysis.eval_score(z, omega, grid, order)).argmax()]))
    exact = max(abs(exact_score(z, omega, d, order)) for d in points)
    assert exact <= upper
    scale = float(coef_bound(z, omega, order))
    assert upper <= lower * 1.001 + 1e-11 * scale
    # the lower end is reached: the best grid value is within its cell's parabola of it
    width = (hi - lo) / 4000
    assert float(exact) >= lower - width**2 * float(coef_bound(z, omega, order + 2)) / 8 - 1e-11 * scale


@settings(max_examples=40, deadline=None)
@given(spectra(), st.floats(-3e5, 3e5), st.integers(0, 3))
def test_roundoff_bound_holds(spectrum, d, order):
    z, omega = spectrum
    computed = float(analysis.eval_score(z, omega, [d], order)[0])
    assert abs(exact_score(z, omega, d, order) - mpmath.mpf(computed)) <= float(analysis.roundoff(z, omega, d, order))


def duffin_schaeffer(z, omega, d):
    """(S'(d)^2 + sigma^2 S(d)^2) / (sigma sup|S|)^2: Duffin and Schaeffer 1937, at most 1 at every real distance."""
    score, slope = (analysis.eval_score(z, omega, d, order) for order in (0, 1))
    sigma = np.abs(omega).max()
    return (slope**2 + (sigma * score) ** 2) / max((sigma * np.abs(z).sum()) ** 2, 1e-300)


@settings(max_examples=60, deadline=None)
@given(spectra(), st.integers(0, 2**31))
def test_bounds_hold_on_the_line(spectrum, seed):
    z, omega = spectrum
    d = np.random.default_rng(seed).uniform(-1e4, 1e4, size=400)
    slack = 1 + 1e-9
    for order in range(5):
        largest = np.abs(analysis.eval_score(z, omega, d, order)).max()
        assert largest <= coef_bound(z, omega, order) * slack
        assert coef_bound(z, omega, order) <= bernstein_bound(z, omega, order) * slack
    assert duffin_schaeffer(z, omega, d).max() <= slack


def test_batch_equals_single():
    rng = np.random.default_rng(0)
    omega, _ = analysis.rope_freqs(10000, 16)
    z = rng.normal(size=(5, 8)) + 1j * rng.normal(size=(5, 8))
    lower, upper, _ = analysis.certified_max(z, omega, 0, 300, 1, 1e-4)
    for i in range(5):
        one = analysis.certified_max(z[i], omega, 0, 300, 1, 1e-4)
        assert lower[i] == pytest.approx(one[0], rel=1e-4) and upper[i] == pytest.approx(one[1], rel=1e-4)


def test_certificate_is_cheap_where_it_matters():
    """Llama-3 at 64K: 1e-3 on S' takes about 16 thousand evaluations."""
    rng = np.random.default_rng(1)
    omega, _ = analysis.rope_freqs(500000, 128, "linear", 8, 8192)
    z = rng.normal(size=64) + 1j * rng.normal(size=64)
    _, upper, evaluations = analysis.certified_max(z, omega, 0, 65536, 1, 1e-3)
    assert evaluations < 17000
    # a sampled maximum is not a bound: at integers alone it lies below the enclosure by up to B3 / 8
    sampled = np.abs(analysis.eval_score(z, omega, np.arange(65537), 1)).max()
    assert sampled <= upper and upper - sampled <= coef_bound(z, omega, 3) / 8 + 1e-3 * upper


def test_pure_sinusoid_is_extremal_and_wrong_frequency_fails():
    z, omega = np.array([0.7 - 2.1j]), np.array([0.37])
    lower, _, _ = analysis.certified_max(z, omega, 0, 100, 1, 1e-9)
    assert lower == pytest.approx(float(bernstein_bound(z, omega)), rel=1e-8)
    np.testing.assert_allclose(duffin_schaeffer(z, omega, np.linspace(0, 40, 101)), 1.0, rtol=1e-12)
    assert lower > bernstein_bound(z, omega * 0.99)


def windowed_ratio(z, omega, window):
    """What a wrong checker computes: max|S'| / (sigma max|S|) with both maxima over the window."""
    low = analysis.certified_max(z, omega, *window, 1, 1e-9)[0]
    return low / (np.abs(omega).max() * analysis.certified_max(z, omega, *window, 0, 1e-9)[1])


def test_counterexample_breaks_a_windowed_checker_and_not_ours():
    z, omega, window = windowed_counterexample()
    assert windowed_ratio(z, omega, window) == pytest.approx(2.085829643, abs=1e-8)
    assert analysis.certified_max(z, omega, *window, 1, 1e-9)[0] <= bernstein_bound(z, omega) * (1 + 1e-9)


def turned(vector, x, y, angle):
    """Components x and y of a vector after a rotation by the angle."""
    c, s = math.cos(angle), math.sin(angle)
    return vector[x] * c - vector[y] * s, vector[x] * s + vector[y] * c


@pytest.mark.parametrize(("layout", "stride", "offset"), [("half", 1, 4), ("interleaved", 2, 1)])
def test_spectrum_layouts_reproduce_rotation(layout, stride, offset):
    """S(m - n) from the spectrum equals the dot product of vectors rotated by hand."""
    rng = np.random.default_rng(2)
    omega, _ = analysis.rope_freqs(10000, 8)
    q, k = rng.normal(size=8), rng.normal(size=8)
    m, n = 11, 4
    total = 0.0
    for j, w in enumerate(omega):
        qx, qy = turned(q, stride * j, stride * j + offset, m * w)
        kx, ky = turned(k, stride * j, stride * j + offset, n * w)
        total += qx * kx + qy * ky
    z = analysis.spectrum_from_qk(q, k, layout)
    assert analysis.eval_score(z, omega, [m - n])[0] == pytest.approx(total, rel=1e-12)


def test_spectrum_of_torch_tensors():
    torch = pytest.importorskip("torch")
    q, k = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    expected = analysis.spectrum_from_qk(q.detach().float().numpy(), k.float().numpy())
    np.testing.assert_array_equal(analysis.spectrum_from_qk(q, k), expected)


def test_attention_factor_and_scaling():
    omega, factor = analysis.rope_freqs(500000, 128, "yarn", 8, 8192)
    assert factor**2 == pytest.approx(1.45912908, abs=5e-9)
    assert omega.max() == 1.0
    theta, _ = analysis.rope_freqs(500000, 128)
    assert theta.mean() == pytest.approx(0.084284905, abs=5e-10)
    kept, divided = np.flatnonzero(omega != theta)[0], np.flatnonzero(~np.isclose(omega, theta / 8))[-1]
    assert (kept, divided) == (19, 34)  # the ramp runs from 18 (factor 1) to 35 (factor 1/8)
    rng = np.random.default_rng(4)
    z = rng.normal(size=64) + 1j * rng.normal(size=64)
    linear, _ = analysis.rope_freqs(500000, 128, "linear", 8, 8192)
    yarn, interpolated = analysis.coef_bounds(z, omega, factor), analysis.coef_bounds(z, linear)
    assert yarn["bernstein1"] / interpolated["bernstein1"] == pytest.approx(11.67, abs=0.005)
    for name in ("B1", "B2", "bernstein2", "sum_a"):
        assert yarn[name] == pytest.approx(factor**2 * analysis.coef_bounds(z, omega)[name])


def test_dilation():
    rng = np.random.default_rng(6)
    z = rng.normal(size=8) + 1j * rng.normal(size=8)
    theta, _ = analysis.rope_freqs(10000, 16)
    d = np.arange(0, 64, 8.0)
    np.testing.assert_allclose(analysis.eval_score(z, theta / 8, d), analysis.eval_score(z, theta, d / 8), rtol=1e-12)


def test_softmax_shift_bound_holds_and_is_reached():
    rng = np.random.default_rng(7)
    D, delta = 16, 0.5
    omega, _ = analysis.rope_freqs(10000, D)
    z = rng.normal(size=(40, 8)) + 1j * rng.normal(size=(40, 8))
    B1 = coef_bound(z, omega, 1).max()
    log_bound, tv_bound = analysis.softmax_shift_bound(B1, delta, D)
    d = rng.integers(0, 500, size=40)

    def log_softmax(shift):
        x = np.array([analysis.eval_score(z[i], omega, [d[i] + shift])[0] for i in range(40)]) / math.sqrt(D)
        return x - np.log(np.exp(x - x.max()).sum()) - x.max()

    before, after = log_softmax(0), log_softmax(delta)
    assert np.abs(after - before).max() <= log_bound
    assert 0.5 * np.abs(np.exp(after) - np.exp(before)).sum() <= tv_bound
    # equality: the keys that go up by eta hold the share 1 / (1 + e^eta) of the mass, the others go down by eta
    eta = log_bound / 2
    up = 1 / (1 + math.exp(eta))
    raised, lowered = up * math.exp(eta), (1 - up) * math.exp(-eta)
    assert raised / (raised + lowered) - up == pytest.approx(tv_bound, rel=1e-12)


def test_nonvacuous_radius():
    omega, _ = analysis.rope_freqs(500000, 128, "linear", 8, 8192)
    assert analysis.nonvacuous_radius(omega) == 16


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: analysis.spectrum_from_qk(np.ones(5), np.ones(5)), "head_dim must be even"),
        (lambda: analysis.spectrum_from_qk(np.ones(4), np.ones(6)), "same head_dim"),
        (lambda: analysis.spectrum_from_qk([1, np.nan], [1, 2]), "finite"),
        (lambda: analysis.spectrum_from_qk([1, 2], [1, np.inf]), "finite"),
        (lambda: analysis.spectrum_from_qk([1, 2], [1, 2], "thirds"), "layout must be one of"),
        (lambda: analysis.rope_freqs(10000, 7), "head_dim must be even"),
        (lambda: analysis.eval_score([1, 2], [1.0], [0]), "one amplitude a frequency"),
        (lambda: analysis.eval_score([1], [1.0], [0], order=-1), "order"),
        (lambda: analysis.certified_max([1], [1.0], 3, 2), "interval"),
        (lambda: analysis.certified_max([1], [1.0], 0, np.inf), "interval"),
        (lambda: analysis.certified_max([1], [1.0], 0, 1, rtol=0), "rtol"),
        (lambda: analysis.certified_max([1], [1.0], 0, 1e15), "resolve"),
        (lambda: analysis.softmax_shift_bound(-1, 1, 64), "B1_max"),
    ],
)
def test_impossible_values_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_importing_the_package_is_light():
    code = (
        "import sys, analysis; assert 'numpy' not in sys.modules; analysis.freq_rank; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
