"""Maxima of S, S', S'' of many spectra over a grid of distances, without ever holding the scores.

In a block of the grid around its centre D0, with A + iB = z exp(i omega D0), the score is an even part and an odd one,

    S(D0 + x) = sum_j A_j cos(omega_j x) - sum_j B_j sin(omega_j x),      max |S(D0 +- x)| = |even| + |odd|

so two matrix products over half of the block give all of it; S' and S'' likewise. That is done in float32, of S at
some distances, of S' and S'' without frequencies that hardly add to them. What this and rounding could hide is counted,
and the blocks that may hold the maximum are computed again, whole and in float64: its values, in float32's time.
Legend: P spectra, n frequencies, K blocks, H distances in half a block.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from analysis.certificates import UNIT_ROUNDOFF
from analysis.spectra import check_spectrum

ORDERS = (0, 1, 2)
HALF_BLOCK = 256
#: S is looked at first at every so many distances.
STRIDE = 4
#: Frequencies whose power is below this share of the largest one's are left out at first.
SLOW = 1e-4
#: Spectra, or blocks to be computed again, at a time: as many as stay in the cache of a core; a CUDA device takes more.
CPU_ROWS, CUDA_ROWS = 384, 8192
UNITS = {torch.float32: 2.0**-24, torch.float64: UNIT_ROUNDOFF}
#: Beside the orders: max of (S'^2 + sigma^2 S^2)^(1/2).
DUFFIN_SCHAEFFER = 3


@dataclass(frozen=True)
class Maxima:
    """Largest values of P spectra over the grid 0, h, 2h, ..., at most `last`; float64 [P] each, by order; size and
    error also of DUFFIN_SCHAEFFER. size: max |S^(order)| as computed. error: bound on what rounding changed. between:
    what |S^(order)| may rise by between grid points, h^2 B_{order+2} / 8; so the maximum over real distances lies in
    [size - error, size + error + between].
    """

    size: dict[int, np.ndarray]
    error: dict[int, np.ndarray]
    between: dict[int, np.ndarray]
    last: float


class Sweep:
    """Everything that depends on the frequencies and the grid, and not on the spectra: use it for many of them."""

    def __init__(self, omega: Any, length: int, *, spacing: float = 1.0, device: str = "cpu"):
        """Grid 0, spacing, ..., to the first point at or above length - 1. Raises ValueError if one is not positive."""
        _, omega = check_spectrum(np.zeros(np.size(omega)), omega)
        self.fastest_first = np.argsort(-np.abs(omega), kind="stable")
        self.omega = omega[self.fastest_first]
        if length < 1 or not (spacing > 0 and math.isfinite(spacing)):
            raise ValueError(f"the number of distances and the spacing must be positive: {length=} {spacing=}")
        self.spacing, self.device = spacing, torch.device(device)
        self.sigma = float(np.abs(self.omega).max())
        points = math.ceil((length - 1) / spacing) + 1
        self.last = float((points - 1) * spacing)
        half = max(1, min(HALF_BLOCK, points // 2))
        # the last block begins early, so that it ends with the grid
        starts = np.clip(np.arange(math.ceil(points / (2 * half))) * 2 * half, 0, max(points - 2 * half, 0))
        x = (np.arange(half) + 0.5) * spacing if points > 1 else np.zeros(1)
        centres = starts * spacing + x[-1]
        angle, turn = np.multiply.outer(self.omega, x), np.multiply.outer(centres, self.omega)
        cos, sin = np.cos(angle), np.sin(angle)
        even_and_odd = (cos, -sin, -cos), (-sin, -cos, sin)  # A's and B's parts of S, S', S'' but for omega^r
        tables = [np.cos(turn), np.sin(turn)]
        tables += [part * self.omega[:, None] ** r for parts in even_and_odd for r, part in enumerate(parts)]
        self.blocks = len(centres)
        size = np.abs(self.omega)
        self.kept = [max(1, int((size**r >= SLOW * self.sigma**r).sum())) for r in ORDERS]
        some = np.union1d(np.arange(1, half, STRIDE), half - 1)  # with a block's ends
        self.gap = float(np.diff(x[some], prepend=-x[some[0]]).max())  # between distances of S at first
        at_first = [some, slice(None), slice(None)]
        few = tables[:2] + [table[: self.kept[i % 3], at_first[i % 3]] for i, table in enumerate(tables[2:])]
        self.tables = {
            dtype: [torch.as_tensor(table.copy(), dtype=dtype, device=self.device) for table in chosen]
            for dtype, chosen in ((torch.float32, few), (torch.float64, tables))
        }

    def error_per_amplitude(self, order: int, dtype: torch.dtype) -> np.ndarray:
        """Bound on the rounding of S^(order) computed in dtype, for each unit of amplitude of each frequency [n]: of a
        sum of n products twice, of the factors, and of the angles in float64; whole for what float32 leaves out.
        """
        size = np.abs(self.omega)
        share = UNITS[dtype] * (size.size + 16) + 2 * UNIT_ROUNDOFF * size * self.last
        if dtype == torch.float32:
            share[self.kept[order] :] = 1.0
        return 1.01 * size**order * share

    def maxima(self, z: Any, bounds: Sequence[tuple[int, np.ndarray]] = ()) -> Maxima:
        """Maxima of spectra z, complex [P, n] (numpy or torch). bounds: (order or DUFFIN_SCHAEFFER, bound [P]) of those
        that are only held against bounds: exact are the largest one over each bound and all above one; `size` of the
        others is what they certainly reach.
        """
        z = torch.as_tensor(z, device=self.device).to(torch.complex128)
        if z.ndim != 2 or z.shape[1] != self.omega.size:
            raise ValueError(f"spectra must have the shape [P, n]: {tuple(z.shape)} with n={self.omega.size}")
        z = z[:, torch.as_tensor(self.fastest_first, device=self.device)]
        parts = [z.real.contiguous(), z.imag.contiguous()]
        if not all(torch.isfinite(part).all() for part in parts):
            raise ValueError("amplitudes must be finite: found NaN or infinity")
        amplitude = z.abs()
        scale = amplitude.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        peaks = self._peaks([(part / scale).float() for part in parts])
        hidden, error = (
            [amplitude @ torch.as_tensor(self.error_per_amplitude(r, dtype), device=self.device) for r in ORDERS]
            for dtype in UNITS
        )
        # what the largest value may exceed the largest one seen by, and that may be above the true one by
        hidden = [2.1 * part for part in hidden]
        hidden[0] += amplitude @ torch.as_tensor(1.01 * self.gap**2 / 8 * self.omega**2, device=self.device)
        # kind -> (seen in each block [P, K], reached [P], hidden [P])
        seen = {r: (peaks[r], peaks[r].amax(1), hidden[r]) for r in ORDERS}
        slope, score = peaks[1], self.sigma * peaks[0]
        reached = torch.maximum(slope, score).amax(1)
        seen[DUFFIN_SCHAEFFER] = torch.hypot(slope, score), reached, hidden[1] + self.sigma * hidden[0]
        size = {}
        for kind, (there, reached, unseen) in seen.items():
            certain = (reached * scale[:, 0] - unseen).clamp_min(0)
            possible = there.amax(1) * scale[:, 0] + unseen
            unseen = (unseen / scale[:, 0]).float()
            may_hold_it = (there >= (reached - unseen)[:, None]) & (unseen > 0)[:, None]
            largest = torch.zeros(len(z), dtype=torch.float64, device=self.device)
            if limits := [torch.as_tensor(bound, device=self.device) for of, bound in bounds if of == kind]:
                shares = [certain / limit.clamp_min(torch.finfo(torch.float64).tiny) for limit in limits]
                asked = [possible >= limit * share.max().clamp_max(1) for limit, share in zip(limits, shares)]
                may_hold_it &= torch.stack(asked).any(0)[:, None]
                largest.copy_(certain)
            pair, block = torch.nonzero(may_hold_it, as_tuple=True)
            largest.scatter_reduce_(0, pair, self._again(parts, pair, block, kind), "amax")
            size[kind] = largest.cpu().numpy()
        a = amplitude.cpu().numpy()
        errors = {r: error[r].cpu().numpy() for r in ORDERS}
        return Maxima(
            size=size,
            error=errors | {DUFFIN_SCHAEFFER: errors[1] + self.sigma * errors[0]},
            between={r: 1.01 * self.spacing**2 / 8 * (a @ np.abs(self.omega) ** (r + 2)) for r in ORDERS},
            last=self.last,
        )

    def _peaks(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of each order the largest value in each block, [P, K], of spectra of which the parts are given, float32."""
        peaks = [parts[0].new_empty(len(parts[0]), self.blocks) for _ in ORDERS]

        def look(rows: slice) -> None:
            few = [part[rows] for part in parts]
            held = [few[0].new_empty(2, len(few[0]), self.tables[torch.float32][2 + r].shape[1]) for r in ORDERS]
            for block in range(self.blocks):
                a, b = self._turned(few, block)
                for r in ORDERS:
                    even, odd = self._halves(a, b, r, held[r]).abs_()
                    peaks[r][rows, block] = even.add_(odd).amax(1)

        self._each(look, len(parts[0]))
        return peaks

    def _again(self, parts: list[torch.Tensor], pair: torch.Tensor, block: torch.Tensor, kind: int) -> torch.Tensor:
        """The largest value of spectrum pair[i] in block[i], in the parts' own dtype."""
        value = parts[0].new_empty(len(pair))

        def look(rows: slice) -> None:
            a, b = self._turned([part[pair[rows]] for part in parts], block[rows])
            if kind == DUFFIN_SCHAEFFER:
                (u, v), (du, dv) = self.sigma * self._halves(a, b, 0), self._halves(a, b, 1)
                square = u**2 + v**2 + du**2 + dv**2 + 2 * (u * v + du * dv).abs()
                value[rows] = square.amax(1).sqrt()
            else:
                value[rows] = self._halves(a, b, kind).abs().sum(0).amax(1)

        self._each(look, len(pair))
        return value

    def _turned(self, parts: list[torch.Tensor], block: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B [rows, n] of spectra at the centre of a block: a number, or one for each row."""
        (re, im), (cos, sin, *_) = parts, self.tables[parts[0].dtype]
        return re * cos[block] - im * sin[block], re * sin[block] + im * cos[block]

    def _halves(self, a: torch.Tensor, b: torch.Tensor, order: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """A's and B's parts of S^(order) at distances of half a block, [2, rows, .]: one is even, one odd."""
        of_a, of_b = (self.tables[a.dtype][place + order] for place in (2, 2 + len(ORDERS)))
        out = a.new_empty(2, len(a), of_a.shape[1]) if out is None else out
        torch.mm(a[:, : len(of_a)], of_a, out=out[0])
        torch.mm(b[:, : len(of_b)], of_b, out=out[1])
        return out

    def _each(self, work: Callable[[slice], None], number: int) -> None:
        """On a CPU every thread takes the next rows by itself: none waits for another that shares a busy core."""
        rows, threads = (CPU_ROWS, torch.get_num_threads()) if self.device.type == "cpu" else (CUDA_ROWS, 1)
        pieces = [slice(start, min(start + rows, number)) for start in range(0, number, rows)]
        if min(threads, len(pieces)) <= 1:
            for piece in pieces:
                work(piece)
            return
        torch.set_num_threads(1)  # those of the pool take this over
        try:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, pieces))
        finally:
            torch.set_num_threads(threads)
