"""Makes the CSV files of paper_figures/data/computed: `PYTHONPATH=. python tests/support/figure_data.py` writes them
anew.

The figures read files alone, so what they show of position schemes and of the theory is computed here, from
endprompt.positions, endprompt.rope and plain linear algebra; paper_figures/test_computed.py holds the files to it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from endprompt.positions import observed_distances, position_ids, sample_rng
from endprompt.rope import inverse_frequencies

COMPUTED = Path(__file__).resolve().parents[2] / "paper_figures" / "data" / "computed"
SCHEMES = ("contiguous", "endprompt", "endprompt-random", "anchors", "pose", "endprompt-pose", "sliding")


def figure_1() -> pd.DataFrame:
    """Positions of one row of 12 context and 4 end-prompt tokens in a window of 64.

    Schemes that draw: sample 2 of seed 1, which happens to show them well.
    """
    context, prompt, target = 12, 4, 64
    rows = []
    for name, scheme, length in (("full length", "contiguous", target), *((s, s, context + prompt) for s in SCHEMES)):
        b = prompt if scheme not in ("contiguous", "pose") else 0
        ids = position_ids(scheme, length - b, b, target, sample_rng(1, 2))
        for token, position in enumerate(ids.tolist()):
            part = "end prompt" if token >= length - b else "context"
            rows.append((name, token, part, position, target))
    return pd.DataFrame(rows, columns=["scheme", "token", "part", "position", "target"])


def coverage(samples: int = 512, bins: int = 64) -> pd.DataFrame:
    """Pairs of tokens a row at each distance, by scheme: mean over samples 0.. of seed 0, summed over bins.

    Window 256 extended to 2048, rows of 236 context and 20 end-prompt tokens. `share` is the share of the distances in
    the bin that at least one sample shows.
    """
    context, prompt, target = 236, 20, 2048
    rows = []
    for scheme in SCHEMES:
        b = prompt if scheme not in ("contiguous", "pose") else 0
        counts = np.zeros(target)
        random = scheme not in ("contiguous", "endprompt")
        for index in range(samples if random else 1):
            ids = position_ids(scheme, context + prompt - b, b, target, sample_rng(0, index))
            one_hot = np.zeros(2 * target)
            one_hot[ids] = 1
            spectrum = np.fft.rfft(one_hot)
            pairs = np.fft.irfft(np.abs(spectrum) ** 2)[:target]  # autocorrelation: pairs at each distance
            counts += np.rint(pairs)
        counts /= samples if random else 1
        edges = np.linspace(0, target, bins + 1).astype(int)
        for lo, hi in pairwise(edges):
            part = counts[lo:hi]
            mean, share = round(part.mean(), 6), round((part > 0).mean(), 6)
            rows.append((scheme, lo, hi - 1, mean, share, target, context, prompt))
    columns = ["scheme", "distance_lo", "distance_hi", "pairs", "share", "target", "context", "prompt"]
    return pd.DataFrame(rows, columns=columns)


def gram(omega: np.ndarray, segments: list[tuple[int, int]]) -> np.ndarray:
    """Gram matrix of cos(omega d), sin(omega d) over the integers of the segments, [D, D], by plain summation."""
    total = np.zeros((2 * omega.size, 2 * omega.size))
    for lo, hi in segments:
        for start in range(lo, hi + 1, 8192):
            angle = np.outer(np.arange(start, min(start + 8192, hi + 1)), omega)
            basis = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
            total += basis.T @ basis
    return total


def gap_rms(base: float, anchors: int | None, sigma: float = 0.1, head_dim: int = 128) -> float:
    """Average-case RMS of the score in the gap: (tr(G_gap (I + N G_obs / sigma^2)^-1))^(1/2), G normalised by N and n.

    Score = sum of n = D/2 waves with white prior of total variance 1, observed with noise sigma at every distance that
    a row shows. anchors: number of equally spaced end prompts, 0 for none, None for all distances.
    """
    context, prompt, target, factor = 8172, 20, 65536, 8.0
    omega, _ = inverse_frequencies("linear", base, head_dim, factor, target // 8)
    # One gap for all, the fixed end prompt's, so that the predictions can be compared.
    gap = [(context, target - context - prompt)]
    if anchors is None:
        observed = [(0, target - 1)]
    else:
        ends = [k * target // anchors for k in range(1, anchors + 1)] if anchors else []
        flags = np.zeros(target, dtype=bool)
        flags[:context] = True
        for end in ends:
            for lo, hi in observed_distances(context, prompt, end):
                flags[lo : hi + 1] = True
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
        observed = [(int(lo), int(hi) - 1) for lo, hi in zip(edges[::2], edges[1::2])]
    n = head_dim // 2
    size = sum(hi - lo + 1 for lo, hi in gap)
    inverse = np.linalg.inv(np.eye(2 * n) + gram(omega, observed) / n / sigma**2)
    return float(np.sqrt(np.trace(gram(omega, gap) / n / size @ inverse)))


def gap_rms_against_k() -> pd.DataFrame:
    rows = []
    for base in (10_000.0, 500_000.0, 1_000_000.0):
        for anchors in range(8):
            rows.append((int(base), anchors, round(gap_rms(base, anchors), 6), 65536, 8172, 20, 8, 0.1))
        rows.append((int(base), "all", round(gap_rms(base, None), 6), 65536, 8172, 20, 8, 0.1))
    columns = ["base", "anchors", "gap_rms", "target", "context", "prompt", "factor", "sigma"]
    return pd.DataFrame(rows, columns=columns)


FILES = {"figure_1": figure_1, "coverage": coverage, "gap_rms_against_k": gap_rms_against_k}


if __name__ == "__main__":
    for name, make in FILES.items():
        make().to_csv(COMPUTED / f"{name}.csv", index=False, lineterminator="\n")
