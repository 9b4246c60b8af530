"""Bounds that hold at every real distance, so also where nothing was observed.

S(d) = sum_j a_j cos(omega_j d + phi_j) is an entire function of exponential type sigma = max |omega_j| and bounded on
the real line. Every supremum here is over the whole line: over a window Bernstein's inequality is false
(`windowed_counterexample`).
"""

import math
from typing import Any

import numpy as np

from analysis.spectra import check_order, check_spectrum


def coef_bound(z: Any, omega: Any, order: int = 0) -> np.ndarray:
    """B_r = sum_j a_j |omega_j|^r >= sup_R |S^(r)|, float64 [...], for spectra z [..., n]. Equality if the frequencies
    are linearly independent over the rationals (Kronecker).
    """
    z, omega = check_spectrum(z, omega)
    return np.abs(z) @ np.abs(omega) ** check_order(order)


def bernstein_bound(z: Any, omega: Any, order: int = 1, supremum: Any = None) -> np.ndarray:
    """sigma^r sup_R |S| >= sup_R |S^(r)|. Bernstein 1923; equality for a single frequency. supremum: of |S| over the
    whole line or anything above it, [...]; default sum_j a_j. The maximum over a window is not that, and gives a wrong
    bound. sigma is the largest frequency, whether its amplitude is zero or not.
    """
    z, omega = check_spectrum(z, omega)
    supremum = coef_bound(z, omega) if supremum is None else np.asarray(supremum, dtype=np.float64)
    return np.abs(omega).max() ** check_order(order) * supremum


def coef_bounds(z: Any, omega: Any, attention_factor: float = 1.0) -> dict[str, np.ndarray]:
    """All bounds of spectra z [..., n], each float64 [...], times the attention factor squared: sum_a >= |S|, B1 and
    bernstein1 >= |S'|, B2 and bernstein2 >= |S''|.
    """
    scale = attention_factor**2
    return {
        "sum_a": scale * coef_bound(z, omega, 0),
        "B1": scale * coef_bound(z, omega, 1),
        "B2": scale * coef_bound(z, omega, 2),
        "bernstein1": scale * bernstein_bound(z, omega, 1),
        "bernstein2": scale * bernstein_bound(z, omega, 2),
    }


def nonvacuous_radius(omega: Any) -> float:
    """Tokens |D| below which sigma |D| sup|S| says more about |S(d+D) - S(d)| than the trivial 2 sup|S|: 2 / sigma."""
    sigma = float(np.abs(np.asarray(omega, dtype=np.float64)).max())
    return 2 / sigma if sigma > 0 else math.inf


def softmax_shift_bound(
    B1_max: float, delta: float, head_dim: int, attention_factor: float = 1.0
) -> tuple[float, float]:
    """(bound on the change of log p_i, bound on the total variation) of a softmax row by a shift of all distances by
    delta tokens, content and set of keys fixed: 2 eta and tanh(eta / 2), where eta = |delta| max_k B1_k
    attention_factor^2 / sqrt(D) bounds each logit's change.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim must be even and at least 2: {head_dim=}")
    if not (B1_max >= 0 and math.isfinite(B1_max) and math.isfinite(delta)):
        raise ValueError(f"B1_max must be finite and not negative, delta finite: {B1_max=} {delta=}")
    return softmax_change(abs(delta) * B1_max * attention_factor**2 / math.sqrt(head_dim))


def softmax_change(eta: float) -> tuple[float, float]:
    """(bound on |change of log p_i|, bound on the total variation) if no logit moves by more than eta."""
    return 2 * eta, math.tanh(eta / 2)


def windowed_counterexample() -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """(z, omega, window) of S(d) = sin(d/8) on [0, 4], where max|S'| / (sigma max|S|) = 1 / sin(1/2) = 2.0858: a
    checker that takes the supremum over the window reports a broken theorem. Random spectra do not show it.
    """
    return np.array([-1j]), np.array([1 / 8]), (0.0, 4.0)
