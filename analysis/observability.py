"""What training on some distances says about the score at the others.

S lies in the span V of cos(omega_j d), sin(omega_j d), j = 0..n-1, dimension D = 2n. Its coefficients
c = (cosine part [n], sine part [n]) are fixed by the observed distances as far as the Gram matrix there says. Gram
matrices are means over integer distances: c' G c is the mean square of the score. All float64; what float64 cannot
carry is refused.
"""

import math
from typing import Any

import numpy as np
import scipy.linalg

from endprompt import positions
from endprompt.positions import Intervals

SCHEMES = tuple(positions.SCHEMES)


def with_room_for(prompt: int) -> tuple[str, ...]:
    """Schemes that make sense with an end prompt of so many tokens: without one, those that place it drop out."""
    return tuple(scheme for scheme in SCHEMES if prompt or scheme not in positions.WITH_PROMPT)


def distance_segments(
    target: int, context: int, prompt: int, scheme: str = "endprompt", *, count: int = 4
) -> tuple[Intervals, Intervals]:
    """(observed, gap): inclusive intervals of relative distances 0..target-1, over all rows that a scheme can draw.
    count: number of anchors (scheme `anchors`). The gap may be empty. Raises ValueError if the sizes do not fit
    together, or the end prompt is longer than the context.
    """
    seen = pair_counts(scheme, context, prompt, target, count=count) > 0
    return runs(seen), runs(~seen)


def runs(flags: np.ndarray) -> Intervals:
    """Inclusive intervals of the indices where a boolean array is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(lo), int(hi) - 1) for lo, hi in edges.reshape(-1, 2)]


def size(segments: Intervals) -> int:
    return sum(hi - lo + 1 for lo, hi in segments)


class _Counter:
    """Pairs at each distance, summed over outcomes, exact in int64. The pairs between a run of p tokens and a run of q
    tokens form a trapezoid over the distance: the second integral of four impulses. Moved by every shift of a range it
    is the third integral of eight; if both runs are moved, the fourth of sixteen. So a whole scheme costs a few
    impulses an outcome and four running sums.
    """

    def __init__(self, target: int):
        self.impulses = np.zeros(3 * target + 4, dtype=np.int64)
        self.offset = target  # cross pairs start at negative indices before the ramps are complete
        self.target = target

    def add(self, first: Any, second: Any, start: Any, shifts: Any = 1, weight: int = 1, *, backward: Any = 1) -> None:
        """Pairs of a run of `first` tokens with a later run of `second`, starts `start` apart, over `shifts` shifts.
        backward: shifts of the first run, which bring the two together. Arrays stand for that many outcomes.
        """
        first, second, start, shifts, backward = np.broadcast_arrays(first, second, start, shifts, backward)
        low = start - first - backward + 2 + self.offset
        for step, sign in ((0 * first, 1), (first, -1), (second, -1), (first + second, 1)):
            for moved, turn in ((0, 1), (shifts, -1), (backward, -1), (shifts + backward, 1)):
                np.add.at(self.impulses, low + step + moved, turn * sign * weight)

    def within(self, length: Any, weight: int = 1) -> None:
        """Pairs inside a run, a token with itself included: the trapezoid around 0, of which d >= 0 is read."""
        self.add(length, length, 0, 1, weight)

    def total(self) -> np.ndarray:
        counts = np.cumsum(np.cumsum(np.cumsum(np.cumsum(self.impulses))))
        return counts[self.offset : self.offset + self.target]


def pair_counts(scheme: str, context: int, prompt: int, target: int, *, count: int = 4) -> np.ndarray:
    """Expected number of (query, key) pairs of a row at each relative distance 0..target-1, float64 [target]. Exact:
    the sum over all outcomes of the scheme's draws, divided by their number. A token with itself counts (d = 0). count:
    number of anchors (scheme `anchors`). Sentences are taken to be of equal length.
    """
    positions.check_sizes(context, prompt, target, scheme)
    if prompt > context:
        raise ValueError(f"the end prompt must not be longer than the context: {prompt=} {context=}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}: {scheme=}")
    n = context + prompt
    counter = _Counter(target)
    outcomes = 1
    if scheme == "contiguous":
        counter.within(n)
    elif scheme == "pose":
        outcomes = _add_two_chunks(counter, n, target - n)
    elif scheme == "sentences":
        outcomes = _add_spread(counter, positions.sentence_starts(n), n, target - n, scheme)
    elif scheme == "endprompt-sentences":
        starts, room = positions.sentence_starts(context), target - n
        outcomes = _add_spread(counter, starts, context, room, scheme)
        counter.within(prompt, weight=outcomes)
        width = positions.stratum(len(starts) - 1, room, scheme)
        for piece, (start, stop) in enumerate(zip(starts, [*starts[1:], context])):
            shift = piece * width - 1 if piece else 0  # the farthest that the piece is moved towards the end
            counter.add(
                stop - start,
                prompt,
                target - prompt - start - shift,
                width if piece else 1,
                outcomes if not piece else width,
            )
    elif scheme == "sliding":
        outcomes = target - n + 1
        counter.within(1, weight=outcomes)
        counter.within(context - 1, weight=outcomes)
        counter.within(prompt, weight=outcomes)
        counter.add(1, context - 1, 1, outcomes)
        counter.add(1, prompt, target - prompt, weight=outcomes)
        counter.add(context - 1, prompt, context - 1, outcomes)
    elif scheme == "endprompt-pose":
        room = target - prompt - context
        outcomes = _add_two_chunks(counter, context, room)
        if prompt:
            first = np.arange(1, (context + 1) // 2 + 1)
            counter.within(prompt, weight=outcomes)
            counter.add(first, prompt, target - prompt, 1, weight=room + 1)
            # the second chunk starts at first + u: seen from the end prompt all shifts of u are one range
            counter.add(context - first, prompt, target - prompt - first - room, room + 1)
    else:
        counter.within(context)
        if prompt:
            counter.within(prompt)
            if scheme == "endprompt":
                starts, width = [target - prompt], 1
            elif scheme == "endprompt-random":
                starts, width = [context], target - prompt - context + 1
            else:
                starts, width = [end - prompt for end in positions.anchor_ends(context, prompt, target, count)], 1
            outcomes = len(starts) * width
            counter.impulses *= outcomes
            counter.add(context, prompt, np.array(starts), width)
    return counter.total() / outcomes


def _add_two_chunks(counter: _Counter, tokens: int, room: int) -> int:
    """PoSE's two chunks, over all lengths of the first and all skips of the second; returns the number of outcomes."""
    first = np.arange(1, (tokens + 1) // 2 + 1)
    counter.add(first, first, 0, 1, weight=room + 1)
    counter.add(tokens - first, tokens - first, 0, 1, weight=room + 1)
    counter.add(first, tokens - first, first, room + 1)
    return len(first) * (room + 1)


def _add_spread(counter: _Counter, starts: list[int], n: int, room: int, scheme: str) -> int:
    """A first piece that stays and others, each uniform in its own stratum; returns the outcomes of two draws."""
    width = positions.stratum(len(starts) - 1, room, scheme)
    sizes = np.diff([*starts, n])
    for size_ in sizes:
        counter.within(size_, weight=width**2)
    for i, (start, length) in enumerate(zip(starts[1:], sizes[1:])):
        counter.add(sizes[0], length, start + i * width, width, width)
        for j in range(i):
            counter.add(sizes[j + 1], length, start - starts[j + 1] + (i - j) * width, width, backward=width)
    return width**2


def gram(omega: Any, segments: Intervals) -> np.ndarray:
    """Gram matrix of cos(omega_j d), sin(omega_j d) over integer intervals, float64 [2n, 2n]: the mean over distances.
    Closed form: the sums of cos(alpha d) and sin(alpha d) are Dirichlet kernels at omega_i +- omega_j. Raises
    ValueError if there is no distance.
    """
    omega = np.asarray(omega, dtype=np.float64)
    distances = size(segments)
    if not distances:
        raise ValueError("a Gram matrix needs at least one distance, got no interval")
    if any(lo > hi for lo, hi in segments):
        raise ValueError(f"intervals must be inclusive and not empty: {segments=}")
    minus, plus = omega[:, None] - omega, omega[:, None] + omega
    cos_minus, sin_minus = _exponential_sum(minus, segments)
    cos_plus, sin_plus = _exponential_sum(plus, segments)
    cc, ss = (cos_minus + cos_plus) / 2, (cos_minus - cos_plus) / 2
    cs = (sin_plus - sin_minus) / 2  # cos(omega_i d) sin(omega_j d)
    return np.block([[cc, cs], [cs.T, ss]]) / distances


def _exponential_sum(alpha: np.ndarray, segments: Intervals) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of sum exp(i alpha d) over the intervals."""
    real, imag = np.zeros_like(alpha), np.zeros_like(alpha)
    half = np.sin(alpha / 2)
    for lo, hi in segments:
        number = hi - lo + 1
        kernel = np.divide(np.sin(alpha * number / 2), half, out=np.full_like(alpha, number), where=half != 0)
        middle = alpha * ((lo + hi) / 2)
        real += kernel * np.cos(middle)
        imag += kernel * np.sin(middle)
    return real, imag


def gram_weighted(omega: Any, weights: Any, block: int = 8192) -> np.ndarray:
    """Gram matrix over the distances 0, 1, ... with a weight each [..., L], float64 [..., 2n, 2n], over the sum of the
    weights. Many sets of weights share the cosines, which take longest.
    """
    omega, weights = np.asarray(omega, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    sums = weights.sum(-1)[..., None, None]
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (sums > 0).all()):
        raise ValueError("weights of distances must be finite, not negative and not all zero")
    total = np.zeros((*weights.shape[:-1], 2 * omega.size, 2 * omega.size))
    for start in range(0, weights.shape[-1], block):
        part = weights[..., start : start + block]
        angle = np.multiply.outer(omega, np.arange(start, start + part.shape[-1]))
        basis = np.concatenate([np.cos(angle), np.sin(angle)])
        for which in np.ndindex(weights.shape[:-1]):
            weighted = basis * np.sqrt(part[which])
            total[which] += weighted @ weighted.T
    return total / sums


def reference_gap(window: int, target: int) -> Intervals:
    """The distances at which schemes are compared: those that rows of the window, the last of them an end prompt's at
    the far end, do not show. Up to twice the window these show all, so it is every distance that is new.
    """
    return [(window, target - window if target > 2 * window else target - 1)]


def posterior_gap_rms(G_obs: Any, n_obs: float, G_gap: Any, sigma: float, prior: Any = None) -> float:
    """Root mean square error of the score in the gap that is left after n_obs noisy observations: the average case.

    Coefficients c ~ N(0, prior), one observation with noise sigma for each of n_obs distances: r^2 = tr(G_gap (prior^-1
    + n_obs G_obs / sigma^2)^-1). prior: None for I/n (white, a score of mean square 1), an array [n] of mean-square
    amplitudes a_j^2 (half of it to the cosine, half to the sine; their sum is twice the score's mean square), or a
    covariance [2n, 2n]. G_gap may be taken at other frequencies than G_obs (interpolation after pretraining). Raises
    ValueError if sigma or n_obs is not positive, the matrices do not fit, or rounding would be mistaken for
    information.
    """
    G_obs, G_gap = _check_grams(G_obs, G_gap)
    if not (sigma > 0 and math.isfinite(sigma) and n_obs > 0 and math.isfinite(n_obs)):
        raise ValueError(f"noise and number of observations must be positive: {sigma=} {n_obs=}")
    root = _root_of_prior(prior, len(G_obs))
    information = (n_obs / sigma**2) * (root.T @ G_obs @ root)
    lost = len(G_obs) * np.finfo(np.float64).eps * np.abs(information).sum(axis=1).max()
    if lost > 1e-3:  # against the 1 of the prior, where nothing was observed
        raise ValueError(f"float64 cannot carry so many observations at so little noise: {n_obs=} {sigma=}")
    inner = np.eye(len(G_obs)) + information
    target = root.T @ G_gap @ root
    return math.sqrt(max(float(np.trace(np.linalg.solve(inner, target))), 0.0))


def _root_of_prior(prior: Any, dimension: int) -> np.ndarray:
    if prior is None:
        return np.eye(dimension) / math.sqrt(dimension // 2)
    prior = np.asarray(prior, dtype=np.float64)
    if prior.shape == (dimension // 2,):
        if not (np.isfinite(prior).all() and (prior >= 0).all()):
            raise ValueError("a prior's mean-square amplitudes must be finite and not negative")
        return np.diag(np.sqrt(np.tile(prior, 2) / 2))
    if prior.shape != (dimension, dimension):
        raise ValueError(f"a prior must have the shape [n] or [2n, 2n]: {prior.shape=} {dimension=}")
    values, vectors = np.linalg.eigh(prior)
    if values[0] < -1e-10 * max(values[-1], 0):
        raise ValueError(f"a prior covariance must have no negative eigenvalue: smallest {values[0]}")
    return vectors * np.sqrt(np.maximum(values, 0))


def _check_grams(G_obs: Any, G_gap: Any) -> tuple[np.ndarray, np.ndarray]:
    G_obs, G_gap = np.asarray(G_obs, dtype=np.float64), np.asarray(G_gap, dtype=np.float64)
    if G_obs.ndim != 2 or G_obs.shape[0] != G_obs.shape[1] or G_obs.shape != G_gap.shape or len(G_obs) % 2:
        raise ValueError(f"Gram matrices must be square, even-sized and alike: {G_obs.shape=} {G_gap.shape=}")
    if not (np.isfinite(G_obs).all() and np.isfinite(G_gap).all()):
        raise ValueError("Gram matrices must be finite: found NaN or infinity")
    return G_obs, G_gap


def worst_gap(G_obs: Any, G_gap: Any, eps: float, rtol: float = 1e-6) -> tuple[float, np.ndarray]:
    """(value, coefficients of an extremal score [2n]): largest root mean square in the gap of a score with ‖c‖ <= 1 and
    at most eps on the observed distances.

    By duality [min_{t >= 0} max(lambda_max(G_gap - t G_obs), 0) + t eps^2]^(1/2), the S-lemma, exact: a semidefinite
    program with two constraints has a solution of rank one (Pataki 1998). The positive part matters where eps alone
    holds the coefficients below norm 1. Raises ValueError if eps is not positive, or so small that float64 cannot carry
    the answer: the primal value of the returned coefficients and the dual value, a lower and an upper bound, must agree
    to rtol.
    """
    A, B = _check_grams(G_gap, G_obs)
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(
            f"eps must be positive: with {eps=} the worst case is unregularised, see amplification_log10, which "
            "needs extended precision"
        )
    budget = eps**2
    weakest = _inside_the_ball(A, B, eps)
    if weakest is not None:
        return weakest

    def top(t: float) -> tuple[float, np.ndarray]:
        values, vectors = np.linalg.eigh(A - t * B)
        return values[-1], vectors[:, -1]

    def primal(c: np.ndarray) -> tuple[float, np.ndarray]:
        observed = c @ B @ c
        c = c * min(1.0, math.sqrt(budget / observed)) if observed > 0 else c
        return float(c @ A @ c), c

    # The dual is convex in t with slope eps^2 - c'Bc at its top eigenvector c: find where the slope changes sign.
    value, c_low = top(0.0)
    dual, (best, coefficients) = value, primal(c_low)
    if c_low @ B @ c_low > budget:
        t_low, t_high = 0.0, 1.0
        while True:
            value, c_high = top(t_high)
            dual = min(dual, max(value, 0.0) + t_high * budget)
            if value <= 0 or c_high @ B @ c_high <= budget:
                break
            t_low, c_low, t_high = t_high, c_high, 4 * t_high
            if t_high > 1e18:
                raise ValueError(_refusal(eps))
        for _ in range(200):
            best, coefficients = max(
                (best, coefficients), primal(c_high), primal(_blend(c_low, c_high, B, budget)), key=lambda pair: pair[0]
            )
            if dual - best <= rtol * dual or t_high - t_low <= 1e-15 * t_high:
                break
            t = math.sqrt(t_low * t_high) if t_low > 0 and t_high > 4 * t_low else (t_low + t_high) / 2
            value, c = top(t)
            dual = min(dual, max(value, 0.0) + t * budget)
            if value <= 0 or c @ B @ c <= budget:
                t_high, c_high = t, c
            else:
                t_low, c_low = t, c
        noise = t_high * len(A) * np.finfo(np.float64).eps * np.abs(np.linalg.eigvalsh(B)).max()
        if dual - best > rtol * dual or noise > 1e-3 * dual:
            raise ValueError(_refusal(eps))
    return math.sqrt(max(dual, 0.0)), coefficients


def _refusal(eps: float) -> str:
    return (
        f"float64 cannot carry the worst case at {eps=}: take a larger eps, or amplification_log10 for the limit of 0"
    )


def _inside_the_ball(A: np.ndarray, B: np.ndarray, eps: float) -> tuple[float, np.ndarray] | None:
    """The worst case where the observed distances alone hold the coefficients below norm 1; else None."""
    spectrum = np.linalg.eigvalsh(B)
    if spectrum[0] <= 1e-10 * spectrum[-1]:
        return None
    values, vectors = scipy.linalg.eigh(A, B)  # normalised to c'Bc = 1
    c = eps * vectors[:, -1]
    return (eps * math.sqrt(max(values[-1], 0.0)), c) if np.linalg.norm(c) <= 1 else None


def _blend(u: np.ndarray, v: np.ndarray, B: np.ndarray, budget: float) -> np.ndarray:
    """The unit vector in the plane of u and v, between them, whose observed mean square is the budget: where two
    eigenvalues of the dual cross, the extremal score is a mixture of the two eigenvectors.
    """
    if u @ v < 0:
        v = -v
    lo, hi = 0.0, 1.0  # the share of v: too much is observed at u, not too much at v
    for _ in range(60):
        share = (lo + hi) / 2
        c = (1 - share) * u + share * v
        c = c / np.linalg.norm(c)
        lo, hi = (share, hi) if c @ B @ c > budget else (lo, share)
    c = (1 - hi) * u + hi * v
    return c / np.linalg.norm(c)
