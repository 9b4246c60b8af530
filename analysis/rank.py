"""Rational relations between RoPE's frequencies, and the true supremum of |S| that follows from them.

theta_j = base^(-j/n), j = 0..n-1; base = r^g with r no perfect power. theta_i / theta_j is rational exactly if n
divides g (i - j), so j and j + m are related, m = n / gcd(g, n). Positive real roots of rationals whose ratios are
irrational are linearly independent over the rationals (Besicovitch 1940; here also by Capelli, since x^m - r^(g/gcd) is
irreducible): there are m classes, and the rank is m. By Kronecker's theorem the phases of different classes can be
chosen freely (Bohr lift): sup_R S is the sum of the classes' suprema, each of a periodic function. S and -S are done
separately.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from analysis.certificates import enclose_max, roundoff
from analysis.spectra import check_order, check_spectrum, derivative_spectrum
from endprompt.rope import base_frequencies

#: Beyond this harmonic number a class is not solved as one periodic problem.
MAX_HARMONIC = 50_000
#: Denominators tried when a ratio of two frequencies is read as a fraction.
MAX_DENOMINATOR = 10_000


def freq_rank(base: float, head_dim: int) -> int:
    """Dimension over the rationals of the span of theta_0..theta_{n-1}: n / gcd(g, n); scaling by s does not change it.
    base: any rational above 1 (a float is taken exactly). Raises ValueError for an odd head_dim.
    """
    return len(frequency_classes(base, head_dim))


def frequency_classes(base: float, head_dim: int) -> list[list[int]]:
    """Indices j whose frequencies are rational multiples of each other, one list a class."""
    base_frequencies(float(base), head_dim)  # refuses what is no RoPE
    n = head_dim // 2
    m = n // math.gcd(perfect_power(Fraction(base)), n)
    return [list(range(start, n, m)) for start in range(m)]


def perfect_power(x: Fraction) -> int:
    """The largest g for which x > 1 is the g-th power of a rational."""
    for g in range(x.numerator.bit_length(), 1, -1):
        if integer_root(x.numerator, g) is not None and integer_root(x.denominator, g) is not None:
            return g
    return 1


def integer_root(x: int, g: int) -> int | None:
    """The g-th root of a positive integer if it is whole."""
    lo, hi = 1, 1 << (x.bit_length() // g + 1)
    while lo < hi:
        middle = (lo + hi + 1) // 2
        lo, hi = (middle, hi) if middle**g <= x else (lo, middle - 1)
    return lo if lo**g == x else None


def true_sup(z: Any, omega: Any, base: float, head_dim: int, order: int = 0, rtol: float = 1e-6) -> tuple[float, float]:
    """Enclosure (lo, hi) of sup |S^(order)| over the whole real line, for one spectrum z [n].

    omega: the frequencies after scaling, each taken as a rational multiple of base^(-2j/D); one of 0 is a constant.
    Uniform scalings (none, linear, and ntk and dynamic with their changed base) keep a class's frequencies in small
    whole proportions: then hi <= lo (1 + rtol) up to rounding. Where the proportions are too large to be one periodic
    problem (the ramps of yarn and llama3, longrope), hi takes the class's periodic parts as independent and lo is a
    value that the class reaches: the enclosure stays valid and becomes wider.
    """
    z, omega = check_spectrum(z, omega)
    if z.ndim != 1:
        raise ValueError(f"the true supremum is of one spectrum at a time: {z.shape=}")
    classes = frequency_classes(base, head_dim)
    if omega.size not in (head_dim // 2, head_dim // 2 + 1) or (omega.size > head_dim // 2 and omega[-1] != 0):
        raise ValueError(
            f"there must be head_dim/2 frequencies (and a last one of 0 at most): {omega.size=} {head_dim=}"
        )
    zr = derivative_spectrum(z, omega, check_order(order))
    zr, omega = np.where(omega < 0, zr.conj(), zr), np.abs(omega)
    constant = float(zr[omega == 0].real.sum())
    lo, hi = [constant, -constant], [constant, -constant]
    for members in classes:
        index = np.array([j for j in members if zr[j] != 0 and omega[j] != 0], dtype=int)
        if not index.size:
            continue
        for side, sign in enumerate((1, -1)):
            low, high = _class_sup(sign * zr[index], omega[index], rtol)
            lo[side] += low
            hi[side] += high
    return max(lo), max(hi) * (1 + 4 * len(classes) * np.finfo(np.float64).eps)


def _class_sup(z: np.ndarray, omega: np.ndarray, rtol: float) -> tuple[float, float]:
    """Enclosure of sup S for frequencies that are rational multiples of each other."""
    parts = _periodic_parts(omega)
    suprema = [_periodic_sup(z[part], omega[part], rtol) for part in parts]
    if len(parts) == 1:
        return suprema[0]
    # The parts' suprema together are an upper bound; any value on the line is a lower one.
    d = np.linspace(0, 2000 * math.pi / omega.min(), 200_001)
    angle = np.multiply.outer(omega, d)
    reached = float((z.real @ np.cos(angle) - z.imag @ np.sin(angle)).max())
    return reached - float(roundoff(z, omega, float(d[-1]))), sum(high for _, high in suprema)


def _periodic_parts(omega: np.ndarray) -> list[list[int]]:
    """Indices in groups whose frequencies are small whole multiples of a common one."""
    parts: list[list[int]] = []
    for j in range(omega.size):
        for part in parts:
            if harmonic_numbers(omega[[*part, j]]) is not None:
                part.append(j)
                break
        else:
            parts.append([j])
    return parts


def _periodic_sup(z: np.ndarray, omega: np.ndarray, rtol: float) -> tuple[float, float]:
    if z.size == 1:
        return float(abs(z[0])) * (1 - 1e-15), float(abs(z[0])) * (1 + 1e-15)
    harmonics = harmonic_numbers(omega)
    assert harmonics is not None
    low, high, _ = enclose_max(z[None], harmonics, 0.0, 2 * math.pi, rtol, absolute=False)
    return float(low[0]), float(high[0])


def harmonic_numbers(omega: np.ndarray) -> np.ndarray | None:
    """Whole numbers in the proportion of the (positive) frequencies, float64; None if there are no small ones."""
    lowest = omega.min()
    ratios = [Fraction(float(w / lowest)).limit_denominator(MAX_DENOMINATOR) for w in omega]
    if any(abs(float(ratio) * lowest / w - 1) > 1e-13 for ratio, w in zip(ratios, omega, strict=True)):
        return None
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    harmonics = np.array([float(ratio * common) for ratio in ratios])
    return harmonics if harmonics.max() <= MAX_HARMONIC else None
