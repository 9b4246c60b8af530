"""Numbers of a head under a RoPE scaling, before any training, that may say which extension works.

A head is what its queries and keys hold before RoPE, complex numbers q_j, k_j taken to be drawn independently from a
text: energy e_j = E|q_j|^2 E|k_j|^2 of the score at frequency j, mean spectrum m_j = E[q_j] conj(E[k_j]). theta are the
frequencies of pretraining, omega those after scaling (radians per token), L0 the window before, L the one after. Arrays
have the frequencies last, [..., n]; results a number a head, [...]; shares and changes are 0 without energy. All
float64. What is computed from whole attention rows (entropy, sinks, attention moved) is in `analysis.attention`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis import observability
from endprompt.positions import Intervals

TINY = float(np.finfo(np.float64).tiny)
#: Distances over which a head's score is compared with that before scaling, in tokens.
NEAR = (16, 64, 256)


def smoothness(omega: np.ndarray, attention_factor: float) -> float:
    """Constant of the paper's bound (Bernstein): sup|S'| <= omega_max factor^2 sup|S|. Radians per token."""
    return float(np.max(omega) * attention_factor**2)


def turns(omega: np.ndarray, target: int) -> float:
    """Turns of the slowest frequency over the target, omega_min (L - 1) / 2 pi: below 1 without aliasing."""
    return float(np.min(omega) * (target - 1) / (2 * math.pi))


def gap_error(
    omega: np.ndarray,
    rows: tuple[np.ndarray, int] | None,
    gap: Intervals,
    noise: float,
    pretraining: tuple[np.ndarray, int] | None = None,
    prior: np.ndarray | None = None,
) -> float:
    """Predicted error of the score in the gap, in units of its own root mean square; the average case of README.md.
    rows: (Gram matrix of a row's pairs, number of observations), None for no training. pretraining: (theta, L0), the
    distances 0..L0-1 as observations at those frequencies, with the same coefficients. prior: energies [n], scaled to a
    score of mean square 1; None for the same energy at each frequency.
    """
    weighted, number = np.zeros((2 * omega.size,) * 2), 0
    if rows is not None:
        weighted, number = rows[1] * rows[0], rows[1]
    if pretraining is not None:
        theta, window = pretraining
        weighted = weighted + window * observability.gram(theta, [(0, window - 1)])
        number += window
    amplitudes = None if prior is None else 2 * prior / max(float(prior.sum()), TINY)
    target = observability.gram(omega, gap)
    if not number:
        spread = np.full(omega.size, 2 / omega.size) if amplitudes is None else amplitudes
        return math.sqrt(float(np.diag(target) @ np.tile(spread / 2, 2)))
    return observability.posterior_gap_rms(weighted / number, number, target, noise, amplitudes)


def left_range(energy: np.ndarray, theta: np.ndarray, omega: np.ndarray, window: int, target: int) -> np.ndarray:
    """Share of the energy at frequencies whose angles leave the trained range, the usual account of PI, NTK and YaRN:
    those that made no whole turn in pretraining, theta_j L0 < 2 pi, and turn further over the target, omega_j L >
    theta_j L0.
    """
    trained = theta * window
    leaves = (trained < 2 * math.pi) & (omega * target > trained * (1 + 1e-9))
    return share(energy, leaves)


def unseen_angles(
    energy: np.ndarray,
    theta: np.ndarray,
    omega: np.ndarray,
    window: int,
    target: int,
    observed: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """Share of the target's distances 0..L-1, weighted by energy, at angles seen neither in pretraining (the arc from 0
    to theta_j L0) nor in the rows (for each interval of distances the arc from omega_j lo to omega_j hi). Ours:
    `left_range` by degrees, and with what rows add.
    """
    angle = np.multiply.outer(np.arange(target), omega)
    seen = np.mod(angle, 2 * math.pi) <= theta * window
    for lo, hi in observed:
        seen |= np.mod(angle - omega * lo, 2 * math.pi) <= omega * (hi - lo)
    return share(energy, 1.0 - seen.mean(axis=0))


def local_change(energy: np.ndarray, theta: np.ndarray, omega: np.ndarray, distances: int) -> np.ndarray:
    """Root mean square change of the score by scaling over the distances 1..m, in units of the score's own: [2 sum e_j
    mean(1 - cos((omega_j - theta_j) d)) / sum e_j]^(1/2), random phases: 0 for none, 2^(1/2) for a score that has
    nothing to do with the one before.
    """
    return np.sqrt(2 * share(energy, _turned(theta - omega, distances)))


def resolution_lost(energy: np.ndarray, theta: np.ndarray, omega: np.ndarray, distances: int) -> np.ndarray:
    """What interpolation costs near by: 1 - V(omega) / V(theta), V = sum e_j mean(1 - cos(omega_j d)) over d = 1..m,
    half the mean square of S(d) - S(0) with random phases: how far neighbours are told apart. Ours.
    """
    before, after = share(energy, _turned(theta, distances)), share(energy, _turned(omega, distances))
    return np.where(before > 0, 1 - after / np.maximum(before, TINY), 0.0)


def _turned(omega: np.ndarray, distances: int) -> np.ndarray:
    return np.mean(1 - np.cos(np.multiply.outer(np.arange(1, distances + 1), omega)), axis=0)


def distance_share(energy: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """How much of a head's score is carried by distance alone: sum |m_j|^2 / sum e_j, from 0 to 1. Ours, after the
    positional heads of arXiv 2410.08703, which correlates dimensions with distances.
    """
    return np.sum(np.abs(mean) ** 2, axis=-1) / np.maximum(np.sum(energy, axis=-1), TINY)


def distance_change(
    before: np.ndarray, after: np.ndarray, theta: np.ndarray, omega: np.ndarray, distances: int
) -> np.ndarray:
    """Root mean square change of the mean score over the distances 0..m-1, over that of the mean score before. before,
    after: mean spectra at theta and at omega; the same, where nothing was trained.
    """
    d = np.arange(distances)
    curves = [
        np.real(mean @ np.exp(1j * np.multiply.outer(frequencies, d)))
        for mean, frequencies in ((before, theta), (after, omega))
    ]
    size, change = (np.sqrt(np.mean(x**2, axis=-1)) for x in (curves[0], curves[1] - curves[0]))
    return np.where(size > 0, change / np.maximum(size, TINY), 0.0)


def separation(
    q: np.ndarray, k: np.ndarray, power_q: np.ndarray, power_k: np.ndarray, omega: np.ndarray, length: int
) -> np.ndarray:
    """Distance between the means of rotated queries and keys over the root of their variances' sum, no unit. q, k:
    means E[q_j], E[k_j] before RoPE; power: E|q_j|^2, E|k_j|^2; positions uniform on 0..length-1. RoPE shrinks the mean
    of component j by |sum_p exp(i omega_j p)| / length and leaves the power as it is. Ours, after arXiv 2603.18017:
    long inputs pull the two clusters into each other, and sinks fail with them.
    """
    half = omega / 2
    kernel = np.divide(np.sin(half * length), length * np.sin(half), out=np.ones_like(omega), where=np.sin(half) != 0)
    q, k = q * np.abs(kernel), k * np.abs(kernel)
    spread = (power_q - np.abs(q) ** 2 + power_k - np.abs(k) ** 2).sum(-1)
    return np.sqrt((np.abs(k - q) ** 2).sum(-1) / np.maximum(spread, TINY))


def share(energy: np.ndarray, weight: Any) -> np.ndarray:
    """sum e_j w_j / sum e_j, 0 where there is no energy."""
    total = energy.sum(-1)
    return np.where(total > 0, (energy * weight).sum(-1) / np.maximum(total, TINY), 0.0)
