"""Enclosures of max |S^(r)| over an interval of real distances: never a sampled maximum that is called a bound.

On a cell [x, x + h] a function lies within h^2 max|f''| / 8 of the chord through its ends, so

    max |S^(r)| <= max(|S^(r)(x)|, |S^(r)(x+h)|) + h^2 B_{r+2} / 8,        B_r = sum_j a_j |omega_j|^r

Cells that may exceed m (1 + rtol), m the largest value seen, are halved until none is left. Rounding is counted.
"""

import math
from typing import Any

import numpy as np

from analysis.spectra import check_order, check_spectrum, derivative_spectrum

UNIT_ROUNDOFF = 2.0**-53
#: numpy's vectorised sine and cosine stay within 4 units in the last place
TRIG_ULPS = 4
BLOCK = 1 << 21  # complex numbers held at a time


def roundoff(z: Any, omega: Any, reach: float, order: int = 0, unit: float = UNIT_ROUNDOFF) -> np.ndarray:
    """Bound on the error of a computed S^(order)(d), |d| <= reach, float64 [...]: the frequencies are taken as exact. u
    sum_j a_j |omega_j|^r (2n + c + |omega_j| reach): 2n for a sum of 2n products in any order (Higham, Accuracy and
    Stability, 3.1), |omega_j| reach for the rounded angle, c for the sines, the power and the amplitude.
    """
    z, omega = check_spectrum(z, omega)
    size = np.abs(omega)
    constant = 2 * omega.size + 2 * TRIG_ULPS + order + 8
    # 1.01 covers the terms of second order and the rounding of this sum itself
    return 1.01 * unit * (np.abs(z) @ (size**order * (constant + size * abs(reach))))


def certified_max(z: Any, omega: Any, lo: float, hi: float, order: int = 0, rtol: float = 1e-3) -> tuple[Any, Any, int]:
    """(lower, upper, evaluations): rigorous enclosure of max |S^(order)| over the real interval [lo, hi]. z: complex
    [n] gives floats, [P, n] float64 [P]. upper <= lower (1 + rtol) up to rounding; where the maximum itself is at the
    level of rounding, the enclosure is as narrow as rounding allows. Raises ValueError if the interval is empty or not
    finite, or rtol is not in (0, 1).
    """
    z, omega = check_spectrum(z, omega)
    order = check_order(order)
    if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
        raise ValueError(f"the interval must be finite and not empty: {lo=} {hi=}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie strictly between 0 and 1: {rtol=}")
    if z.ndim > 2:
        raise ValueError(f"spectra must have the shape [n] or [P, n]: {z.shape=}")
    zr = derivative_spectrum(np.atleast_2d(z), omega, order)
    lower, upper, evaluations = enclose_max(zr, omega, float(lo), float(hi), rtol, absolute=True)
    if z.ndim == 1:
        return float(lower[0]), float(upper[0]), evaluations
    return lower, upper, evaluations


def enclose_max(
    z: np.ndarray, omega: np.ndarray, lo: float, hi: float, rtol: float, *, absolute: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Enclosure of max |S| (absolute) or max S over [lo, hi], z [P, n], to rtol of it, or of sum a where max S <= 0."""
    reach = max(abs(lo), abs(hi))
    if np.abs(omega).max() * reach > 2**40:
        raise ValueError(f"float64 cannot resolve angles this large: {reach=} tokens at {np.abs(omega).max()} radians")
    size = np.abs(z) @ np.ones_like(omega)
    error = roundoff(z, omega, reach)
    curvature = 1.01 * (np.abs(z) @ omega**2) / 8  # times h^2; 1.01 covers its rounding
    count = max(1, math.ceil((hi - lo) * np.abs(omega).max() * 2)) if hi > lo else 1
    grid = np.linspace(lo, hi, count + 1)
    grid[0], grid[-1] = lo, hi

    def goal(largest: np.ndarray) -> np.ndarray:
        return largest + np.maximum(rtol * np.where(largest > 0, largest, size), error)

    largest = np.full(len(z), -np.inf)
    evaluations = len(z) * len(grid)
    cells: list[tuple[np.ndarray, ...]] = []
    rows = max(1, BLOCK // len(grid))
    angle = np.multiply.outer(omega, grid)
    cosine, sine = np.cos(angle), np.sin(angle)
    for start in range(0, len(z), rows):
        block = slice(start, start + rows)
        value = z[block].real @ cosine - z[block].imag @ sine
        if absolute:
            np.abs(value, out=value)
        largest[block] = value.max(axis=1)
        bound = np.maximum(value[:, :-1], value[:, 1:]) + np.diff(grid) ** 2 * curvature[block, None]
        pair, cell = np.nonzero(bound > goal(largest)[block, None])
        cells.append((pair + start, grid[cell], grid[cell + 1], value[pair, cell], value[pair, cell + 1]))
    pair, left, right, at_left, at_right = (np.concatenate(parts) for parts in zip(*cells, strict=True))

    # A cell that is let go never exceeds the goal, and the goal only rises with the largest value seen.
    while pair.size:
        middle = left + (right - left) / 2
        at_middle = _pointwise(z, omega, pair, middle)
        if absolute:
            np.abs(at_middle, out=at_middle)
        evaluations += pair.size
        np.maximum.at(largest, pair, at_middle)
        pair, left, right, at_left, at_right = (
            np.concatenate(halves)
            for halves in ((pair, pair), (left, middle), (middle, right), (at_left, at_middle), (at_middle, at_right))
        )
        keep = np.maximum(at_left, at_right) + (right - left) ** 2 * curvature[pair] > goal(largest)[pair]
        pair, left, right, at_left, at_right = (x[keep] for x in (pair, left, right, at_left, at_right))
    lower, upper = largest - error, goal(largest) + error
    return (np.maximum(lower, 0.0) if absolute else lower), upper, evaluations


def _pointwise(zr: np.ndarray, omega: np.ndarray, pair: np.ndarray, d: np.ndarray) -> np.ndarray:
    """S of pair[i] at d[i]."""
    out = np.empty(d.size)
    rows = max(1, BLOCK // omega.size)
    for start in range(0, d.size, rows):
        block = slice(start, start + rows)
        angle = d[block, None] * omega
        chosen = zr[pair[block]]
        out[block] = np.sum(chosen.real * np.cos(angle) - chosen.imag * np.sin(angle), axis=1)
    return out
