"""Maxima of S, S', S'' of many spectra over a grid of distances, without ever holding the scores.

P spectra times N distances is a matrix product [P, 2n] x [2n, N], reduced block by block. Inside a block of
half-width Delta around its centre D0 the score has few degrees of freedom, sigma Delta + a few digits, so it goes
through M Chebyshev coefficients:

    exp(i omega (D0 + Delta x)) = exp(i omega D0) sum_m (2 - [m = 0]) i^m J_m(omega Delta) T_m(x),   |x| <= 1

P x 2n x M for the coefficients and M x (grid points of the block) for the values of each order, in place of
2n x (grid points). What is cut off and what rounding adds is bounded frequency by frequency and returned.

Legend: P spectra, n frequencies, N grid distances, K blocks, M coefficients, Q grid points in a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special
import torch

from analysis.certificates import UNIT_ROUNDOFF
from analysis.spectra import check_spectrum

ORDERS = (0, 1, 2)
#: Radians that the fastest frequency turns in half a block: the least work a point (M = 20 to 30 coefficients).
HALF_BLOCK = 8.0
#: Values held at a time on the CPU: a share of the second-level cache. A CUDA device takes more.
CPU_VALUES, CUDA_VALUES = 1 << 18, 1 << 26
UNITS = {"float32": 2.0**-24, "float64": UNIT_ROUNDOFF}


@dataclass(frozen=True)
class Maxima:
    """Largest values of P spectra over the grid 0, h, 2h, ..., at most `last`; float64 [P] each.

    size: order -> max |S^(order)| as computed. error: order -> bound on what truncation and rounding changed.
    between: order -> what |S^(order)| may rise by between grid points, h^2 B_{order+2} / 8; so the maximum over real
    distances lies in [size - error, size + error + between]. duffin_schaeffer: max of (S'^2 + sigma^2 S^2)^(1/2).
    """

    size: dict[int, np.ndarray]
    error: dict[int, np.ndarray]
    between: dict[int, np.ndarray]
    duffin_schaeffer: np.ndarray | None
    last: float


class Sweep:
    """Everything that depends on the frequencies and the grid, and not on the spectra: use it for many of them."""

    def __init__(
        self,
        omega: Any,
        length: int,
        *,
        spacing: float = 1.0,
        dtype: str = "float64",
        device: str = "cpu",
        orders: tuple[int, ...] = ORDERS,
    ):
        """Grid 0, spacing, ..., the last point the first one at or above length - 1.

        Raises ValueError if length or spacing is not positive, or dtype is not float32 or float64.
        """
        _, self.omega = check_spectrum(np.zeros(np.size(omega)), omega)
        if length < 1 or not (spacing > 0 and math.isfinite(spacing)):
            raise ValueError(f"the number of distances and the spacing must be positive: {length=} {spacing=}")
        if dtype not in UNITS:
            raise ValueError(f"dtype must be one of {', '.join(UNITS)}: {dtype=}")
        self.spacing, self.orders, self.device = spacing, orders, torch.device(device)
        self.dtype, unit = getattr(torch, dtype), UNITS[dtype]
        self.sigma = float(np.abs(self.omega).max())
        points = math.ceil((length - 1) / spacing) + 1
        widest = 2 * HALF_BLOCK / max(self.sigma * spacing, 2 * HALF_BLOCK / 256)
        self.per_block = min(points, max(1, int(widest)))  # Q
        self.blocks = math.ceil(points / self.per_block)  # K; the last one begins early, so that it ends with the grid
        half = max((self.per_block - 1) / 2, 0.5) * spacing
        starts = np.minimum(np.arange(self.blocks) * self.per_block, points - self.per_block)
        centres = (starts + (self.per_block - 1) / 2) * spacing
        self.last = float((points - 1) * spacing)
        x = (np.arange(self.per_block) - (self.per_block - 1) / 2) * spacing / half

        turn = np.abs(self.omega) * half
        size, tables = self._expand(x, half, turn, unit)
        coefficients = size.shape[1]
        # c_m = Re(z_j exp(i omega D0) i^m) size_jm: rows for Re z and for Im z, columns (block, m)
        phase = np.exp(1j * np.multiply.outer(self.omega, centres))[:, :, None] * 1j ** np.arange(coefficients)
        # J_m(-t) = (-1)^m J_m(t)
        sign = np.where(self.omega < 0, -1.0, 1.0)[:, None] ** np.arange(coefficients)
        full = phase * (sign * size)[:, None, :]
        encode = np.concatenate([full.real, -full.imag]).reshape(2 * self.omega.size, -1)
        self.encode = torch.as_tensor(encode, dtype=self.dtype, device=self.device)
        self.decode = {r: torch.as_tensor(tables[r], dtype=self.dtype, device=self.device) for r in orders}
        self.coefficients = coefficients
        self.error_per_amplitude = {r: self._error(r, x, half, size, tables[r], unit) for r in orders}

    def _expand(self, x: np.ndarray, half: float, turn: np.ndarray, unit: float) -> tuple[np.ndarray, dict[int, Any]]:
        """Bessel factors [n, M] and, for each order, the Chebyshev polynomials' derivatives on the grid [M, Q]."""
        count = 4
        while True:
            rest = 2 * np.abs(scipy.special.jv(count, turn)) * float(count) ** (2 * max(self.orders))
            if (rest <= unit * np.maximum(turn, 1e-300) ** max(self.orders)).all() or count >= 200:
                break
            count += 1
        m = np.arange(count)
        size = scipy.special.jv(m, turn[:, None]) * np.where(m == 0, 1.0, 2.0)
        tables = {}
        for r in self.orders:
            identity = np.eye(count)
            derived = np.polynomial.chebyshev.chebder(identity, r, axis=0) if r else identity
            tables[r] = (np.polynomial.chebyshev.chebvander(x, len(derived) - 1) @ derived).T / half**r
        return size, tables

    def _error(
        self, r: int, x: np.ndarray, half: float, size: np.ndarray, table: np.ndarray, unit: float
    ) -> np.ndarray:
        """Error bound of the computed S^(r) for each unit of amplitude of each frequency, float64 [n].

        The expansion's own error is measured on the block's grid; rounding is that of two sums, of 2n and of M terms,
        and of the tables' entries, with the angles of the centres rounded in float64.
        """
        exact = (1j * np.abs(self.omega)[:, None]) ** r * np.exp(1j * np.multiply.outer(np.abs(self.omega), x * half))
        powers = 1j ** np.arange(size.shape[1])
        cut = np.abs((size * powers) @ table - exact).max(axis=1)
        reach = (np.abs(size)[:, :, None] * np.abs(table)[None]).sum(axis=1).max(axis=1)
        terms = 2 * self.omega.size + size.shape[1] + 8
        angle = UNIT_ROUNDOFF * np.abs(self.omega) ** (r + 1) * self.last
        return 1.01 * (cut + math.sqrt(2) * unit * terms * reach + angle + 16 * UNIT_ROUNDOFF * reach)

    def maxima(self, z: Any, duffin_schaeffer: bool = False) -> Maxima:
        """Maxima of spectra z, complex [P, n] (numpy or torch)."""
        z = torch.as_tensor(z, device=self.device)
        if z.ndim != 2 or z.shape[1] != self.omega.size:
            raise ValueError(f"spectra must have the shape [P, n]: {tuple(z.shape)} with n={self.omega.size}")
        if duffin_schaeffer and not {0, 1} <= set(self.orders):
            raise ValueError(f"Duffin-Schaeffer needs S and S': orders={self.orders}")
        parts = torch.cat([z.real, z.imag], dim=1).to(self.dtype)
        if not torch.isfinite(parts).all():
            raise ValueError("amplitudes must be finite: found NaN or infinity")
        values = CPU_VALUES if self.device.type == "cpu" else CUDA_VALUES
        # few spectra at a time, so that a stretch of blocks stays in the cache between the two products
        rows = min(len(z), 256 if self.device.type == "cpu" else 8192)
        stretch = max(1, min(self.blocks, values // (rows * self.per_block) or 1))
        size = {r: torch.zeros(len(z), dtype=self.dtype, device=self.device) for r in self.orders}
        square = torch.zeros(len(z), dtype=self.dtype, device=self.device) if duffin_schaeffer else None
        for block in range(0, self.blocks, stretch):
            columns = slice(block * self.coefficients, (block + stretch) * self.coefficients)
            encode = self.encode[:, columns].contiguous()
            for start in range(0, len(z), rows):
                part = slice(start, start + rows)
                c = (parts[part] @ encode).view(-1, self.coefficients)
                count = len(parts[part])
                held = {}
                for r in self.orders:
                    s = (c @ self.decode[r]).view(count, -1)
                    largest = torch.maximum(s.amax(1), s.amin(1).neg_())
                    torch.maximum(size[r][part], largest, out=size[r][part])
                    if duffin_schaeffer and r < 2:
                        held[r] = s
                if square is not None:
                    both = held[1].square_().addcmul_(held[0], held[0], value=self.sigma**2).amax(1)
                    torch.maximum(square[part], both, out=square[part])
        amplitude = z.abs().to(torch.float64).cpu().numpy()
        return Maxima(
            size={r: x.double().cpu().numpy() for r, x in size.items()},
            error={r: amplitude @ self.error_per_amplitude[r] for r in self.orders},
            between={r: 1.01 * self.spacing**2 / 8 * (amplitude @ np.abs(self.omega) ** (r + 2)) for r in self.orders},
            duffin_schaeffer=None if square is None else square.double().sqrt().cpu().numpy(),
            last=self.last,
        )
