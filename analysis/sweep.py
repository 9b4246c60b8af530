"""Maxima of S, S', S'' of many spectra over all integer distances, without ever holding the scores.

P spectra times N distances is a matrix product [P, 2n] x [2n, N]; each block of it is reduced at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.certificates import roundoff
from analysis.spectra import check_spectrum, derivative_spectrum

ORDERS = (0, 1, 2)


@dataclass(frozen=True)
class Maxima:
    """Largest values over the distances 0..length-1, float64 [P] each, and what rounding may have added to them.

    size: order -> max |S^(order)|. error: order -> bound on its rounding error.
    duffin_schaeffer: max of (S'^2 + sigma^2 S^2)^(1/2).
    """

    size: dict[int, np.ndarray]
    error: dict[int, np.ndarray]
    duffin_schaeffer: np.ndarray
    length: int


def maxima(z: Any, omega: Any, length: int, block: int = 4096, rows: int = 1024) -> Maxima:
    """Float64 maxima of spectra z [P, n] over 0..length-1."""
    z, omega = check_spectrum(z, omega)
    if length < 1:
        raise ValueError(f"the number of distances must be positive: {length=}")
    sigma = np.abs(omega).max()
    size = {order: np.zeros(len(z)) for order in ORDERS}
    square = np.zeros(len(z))
    spectra = [derivative_spectrum(z, omega, order) for order in ORDERS]
    coefficients = [np.concatenate([x.real, -x.imag], axis=1) for x in spectra]
    for start in range(0, length, block):
        angle = np.multiply.outer(omega, np.arange(start, min(start + block, length)))
        basis = np.concatenate([np.cos(angle), np.sin(angle)])
        for first in range(0, len(z), rows):
            part = slice(first, first + rows)
            values = [c[part] @ basis for c in coefficients]
            for order in ORDERS:
                np.maximum(size[order][part], np.abs(values[order]).max(axis=1), out=size[order][part])
            both = values[1] ** 2 + (sigma * values[0]) ** 2
            np.maximum(square[part], both.max(axis=1), out=square[part])
    error = {order: roundoff(z, omega, length, order) for order in ORDERS}
    return Maxima(size, error, np.sqrt(square), length)
