"""Estimates over training seeds: intervals, corrections, and the rule by which numbers become words.

The unit is the training seed. Two arms of one seed share documents, their order and the samples they are scored on, so
differences are taken seed by seed. Reads no files.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from benchmarks.summary import holm as holm

MARGIN = 5.0  # a difference smaller than this many points is not called one; percent of samples, on the mean over tasks
FLOOR = 5.0  # below this mean score (percent) of both arms a length is out of reach of both: nothing is compared there
LEVEL = 0.05  # two-sided error of a claim of a difference, over all comparisons that are corrected together (Holm)
RESAMPLES = 2000

HELPS, HURTS, SAME, OPEN, BOTH_FAIL = "helps", "hurts", "no difference", "not decided", "both fail"


class Estimate(NamedTuple):
    """A mean over `n` seeds with its 95% interval (none for one seed) and the p-value of the mean being 0."""

    value: float
    lo: float | None
    hi: float | None
    stderr: float | None
    p: float | None
    n: int


def over_seeds(values: Sequence[float]) -> Estimate:
    """Student's t over the seeds' values. Raises ValueError without any."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("an estimate needs at least one seed")
    if array.size == 1:
        return Estimate(float(array[0]), None, None, None, None, 1)
    return _student(float(array.mean()), float(array.std(ddof=1) / math.sqrt(array.size)), array.size - 1, array.size)


def _student(value: float, error: float, freedom: float, n: int) -> Estimate:
    if error == 0:  # every seed agrees to the digit (all samples right, or all wrong)
        return Estimate(value, value, value, 0.0, 1.0 if value == 0 else 0.0, n)
    half = float(special.stdtrit(freedom, 0.975)) * error
    return Estimate(value, value - half, value + half, error, float(2 * special.stdtr(freedom, -abs(value) / error)), n)


def over_settings(parts: Sequence[Estimate]) -> Estimate:
    """The mean of estimates from different seeds, which are taken as independent (Welch and Satterthwaite's t). n: the
    fewest seeds of a part. Without an interval if a part has none."""
    value, n = float(np.mean([part.value for part in parts])), min(part.n for part in parts)
    if any(part.stderr is None for part in parts):
        return Estimate(value, None, None, None, None, n)
    squares = np.array([(part.stderr or 0.0) ** 2 for part in parts])
    below = sum(s**2 / (part.n - 1) for s, part in zip(squares, parts))
    freedom = float(squares.sum() ** 2 / below) if below else 1.0
    return _student(value, float(math.sqrt(squares.sum()) / len(parts)), freedom, n)


def decide(estimate: Estimate, p: float | None, margin: float = MARGIN) -> str:
    """`helps` or `hurts`: p (corrected) below 0.05, the 95% interval free of 0, and a mean of at least the margin. `no
    difference`: the 95% interval lies within the margin on both sides. Else `not decided`, as with one seed."""
    if estimate.lo is None or estimate.hi is None or p is None:
        return OPEN
    if p < LEVEL and estimate.lo > 0 and estimate.value >= margin:
        return HELPS
    if p < LEVEL and estimate.hi < 0 and estimate.value <= -margin:
        return HURTS
    if -margin < estimate.lo and estimate.hi < margin:
        return SAME
    return OPEN


def nested_bootstrap(differences: Sequence[Sequence[np.ndarray]], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean difference when both seeds and samples are drawn anew. differences: for each
    training seed, for each task, the differences of the paired samples. A resample draws seeds with replacement, and
    within each drawn seed and task its samples with replacement."""
    rng = np.random.default_rng([seed, len(differences)])
    means = np.zeros(RESAMPLES)
    for _ in differences:
        drawn = rng.integers(0, len(differences), RESAMPLES)
        for index, tasks in enumerate(differences):
            mine = np.flatnonzero(drawn == index)
            for task in tasks:
                picks = rng.integers(0, len(task), (mine.size, len(task)))
                means[mine] += task[picks].mean(axis=1) / len(tasks)
    low, high = np.percentile(means / len(differences), [2.5, 97.5])
    return float(low), float(high)


class Correlation(NamedTuple):
    """Spearman's rank correlation over `n` arms, 95% percentile interval over drawn arms and seeds."""

    value: float
    lo: float
    hi: float
    n: int


def rank_correlation(
    x: Sequence[float], scores: np.ndarray, groups: Sequence[Hashable], seed: int = 0
) -> Correlation | None:
    """Spearman's correlation of `x` [arms] with the mean of `scores` [arms, seeds]; None if either is constant. The
    correlation is taken inside each of `groups` (a label for each arm) of three arms or more in which x and the score
    both vary, and averaged by the number of arms. A resample draws arms with replacement (inside their group) and seeds
    with replacement; one in which nothing varies is left out."""
    members = {label: [i for i, own in enumerate(groups) if own == label] for label in dict.fromkeys(groups)}
    rng = np.random.default_rng([seed, len(x)])
    predictor = np.asarray(x, dtype=np.float64)
    columns = rng.integers(0, scores.shape[1], (RESAMPLES, scores.shape[1]))
    resampled = scores[:, columns].mean(axis=2).T  # [resamples, arms]
    total, weight = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    value, arms = 0.0, 0
    for group in members.values():
        whole = spearman(predictor[group][None], scores[group].mean(axis=1)[None])[0]
        if len(group) < 3 or np.isnan(whole):
            continue
        value, arms = value + len(group) * whole, arms + len(group)
        picks = np.asarray(group)[rng.integers(0, len(group), (RESAMPLES, len(group)))]
        drawn = spearman(predictor[picks], np.take_along_axis(resampled, picks, axis=1))
        found = ~np.isnan(drawn)
        total[found] += len(group) * drawn[found]
        weight[found] += len(group)
    if not arms:
        return None
    low, high = np.percentile(total[weight > 0] / weight[weight > 0], [2.5, 97.5])
    value = float(value / arms)
    return Correlation(value, min(float(low), value), max(float(high), value), arms)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of each row [rows, arms]; NaN where a row does not vary."""
    a, b = stats.rankdata(x, axis=1), stats.rankdata(y, axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return np.where(norm > 0, (a * b).sum(axis=1) / np.where(norm > 0, norm, 1), np.nan)


def shared_scores(scores: Sequence[Mapping[int, float]]) -> tuple[list[int], np.ndarray]:
    """(the seeds that every arm has, sorted; the arms' scores of them [arms, seeds])."""
    seeds = sorted(set.intersection(*map(set, scores)))
    return seeds, np.array([[own[seed] for seed in seeds] for own in scores])


def pareto(cost: Sequence[float], score: Sequence[float]) -> list[bool]:
    """Which points no other point outdoes: none costs at most as much and scores at least as much, one of the two
    strictly."""
    points = list(zip(cost, score))
    return [not any(c <= x and s >= y and (c < x or s > y) for c, s in points) for x, y in points]


def pareto_shares(cost: Sequence[float], scores: Sequence[Mapping[int, float]], seed: int = 0) -> list[float]:
    """Share of the resamples of seeds in which each arm (a line of `scores`, seed -> score) is in the Pareto set. Seeds
    are drawn with replacement from those that every arm has. Raises ValueError if there are none."""
    shared, table = shared_scores(scores)
    if not shared:
        raise ValueError("a Pareto set needs a seed that every arm has")
    rng = np.random.default_rng([seed, len(shared)])
    drawn = table[:, rng.integers(0, len(shared), (RESAMPLES // 2, len(shared)))].mean(axis=2)  # [arms, resamples]
    price = np.asarray(cost, dtype=np.float64)[:, None, None]
    cheaper, better = price <= price[:, 0], drawn[:, None] >= drawn
    beaten = (cheaper & better & ((price < price[:, 0]) | (drawn[:, None] > drawn))).any(axis=0)
    return [float(share) for share in 1 - beaten.mean(axis=1)]
