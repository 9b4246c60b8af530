"""Numbers over scores: intervals, averages, effective length, paired comparisons. Reads no files, draws nothing.

Scores are percent. RULER's own rules: weighted averages weigh the lengths 1, 2, 3, ... from the shortest ("inc") or
from the longest ("dec"); the effective length is the longest one that scores at least what Llama-2-7B does at 4K.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

THRESHOLD = 85.6
RESAMPLES = 10_000


def effective_length(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int:
    """The longest length whose score is at least `threshold`; 0 if none is."""
    return max((length for length, score in scores.items() if score >= threshold), default=0)


def weighted_average(scores: Mapping[int, float], direction: Literal["inc", "dec"]) -> float:
    """Average over lengths with weights 1, 2, ... growing with the length ("inc") or falling with it ("dec")."""
    if direction not in ("inc", "dec"):
        raise ValueError(f"direction must be 'inc' or 'dec': {direction!r}")
    if not scores:
        raise ValueError("a weighted average needs at least one length")
    values = [scores[length] for length in sorted(scores, reverse=direction == "dec")]
    return sum(i * value for i, value in enumerate(values, 1)) / (len(values) * (len(values) + 1) / 2)


def average(scores: Mapping[int, float]) -> float:
    """Plain average over lengths."""
    if not scores:
        raise ValueError("an average needs at least one length")
    return sum(scores.values()) / len(scores)


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean; None for a single score."""
    if len(scores) < 2:
        return None
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def interval(scores: Sequence[float], seed: int = 0) -> tuple[tuple[float, float], str]:
    """(95% interval of the mean, its name) of scores in [0, 100]: Wilson's where every score is 0 or 100, or where all
    are the same (a bootstrap would have no width there); else the percentile bootstrap.
    """
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    if set(np.unique(values)) <= {0.0, 100.0} or np.ptp(values) == 0:
        return wilson(mean / 100, len(values)), "wilson"
    means = resampled_means(values, np.random.default_rng([seed, len(values)]))
    low, high = np.percentile(means, [2.5, 97.5])
    return (min(float(low), mean), max(float(high), mean)), "bootstrap"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion, in percent."""
    z = 1.959963984540054
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if share == 0 else max(0.0, center - half)
    high = 1.0 if share == 1 else min(1.0, center + half)
    return 100 * min(low, share), 100 * max(high, share)


def resampled_means(values: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """float64 [resamples]: means of samples drawn with replacement."""
    means = np.empty(resamples)
    step = max(1, 4_000_000 // len(values))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = values[rng.integers(0, len(values), (size, len(values)))].mean(axis=1)
    return means


def two_sided(means: np.ndarray) -> float:
    """p of a mean other than 0 from resampled ones: twice the share on the other side, at least 1 / RESAMPLES."""
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return min(1.0, max(2 * tail, 1 / RESAMPLES))


def newcombe(
    first: float, first_ci: tuple[float, float], second: float, second_ci: tuple[float, float]
) -> tuple[float, float]:
    """Interval of second - first from each one's own, which knows no pairs (Newcombe's hybrid, 1998)."""
    difference = second - first
    return (
        difference - math.hypot(second - second_ci[0], first_ci[1] - first),
        difference + math.hypot(second_ci[1] - second, first - first_ci[0]),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Holm 1979, Scand. J. Statist. 6, 65)."""
    order = np.argsort(p_values, kind="stable")
    steps = np.arange(len(p_values), 0, -1) * np.asarray(p_values)[order]
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, steps))
    return [float(p) for p in adjusted]


def by_length(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """{length: {task: score}} of RULER's task rows."""
    table: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "ruler" and row["length"] is not None:
            table.setdefault(int(row["length"]), {})[row["task"]] = float(row["value"])
    return dict(sorted(table.items()))


def length_averages(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """{length: mean over tasks}. Lengths without every task that any length has are left out."""
    table = by_length(rows)
    tasks = {task for scores in table.values() for task in scores}
    return {length: sum(own.values()) / len(own) for length, own in table.items() if set(own) == tasks}


def ruler_summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """RULER's summary of one model's task rows, as (task, length, metric, value): lengths that were run, no others."""
    averages = length_averages(rows)
    out = [
        {"task": "average", "length": length, "metric": "mean_over_tasks", "value": value}
        for length, value in averages.items()
    ]
    if averages:
        over_lengths = {
            "average": average(averages),
            "weighted_average_inc": weighted_average(averages, "inc"),
            "weighted_average_dec": weighted_average(averages, "dec"),
            "effective_length": float(effective_length(averages)),
        }
        out += [{"task": "average", "length": None, "metric": name, "value": v} for name, v in over_lengths.items()]
    return out


def depth_table(scored: Sequence[Mapping[str, Any]], bins: int = 10) -> list[dict[str, Any]]:
    """Mean score of answers by length and needle's depth. scored: `length`, and of each answer `depth` (%), `found`."""
    cells: dict[tuple[int, int], list[float]] = {}
    for sample in scored:
        for depth, found in zip(sample["depth"], sample["found"]):
            place = min(bins - 1, int(depth * bins / 100))
            cells.setdefault((int(sample["length"]), place), []).append(100.0 * found)
    table = []
    for (length, place), values in sorted(cells.items()):
        where = {"length": length, "depth_from": 100 * place / bins, "depth_to": 100 * (place + 1) / bins}
        table.append({**where, "value": sum(values) / len(values), "n": len(values)})
    return table


CELL = 18  # columns of a table's cell: `100.0 [99, 100]`


def table(rows: Sequence[Mapping[str, Any]], width: int = 120) -> str:
    """Tasks by lengths, percent [95% interval], as text no wider than `width`: lengths that do not fit stand below. The
    last line of a block has the averages, where more than one task was run.
    """
    cells = {(row["task"], row["length"]): row for row in rows if row["suite"] == "ruler" and row["length"] is not None}
    averages = length_averages(rows)
    tasks = list(dict.fromkeys(task for task, _ in cells))
    head = max(map(len, [*tasks, "average"]))
    lengths = sorted({length for _, length in cells})
    blocks = []
    for first in range(0, len(lengths), fitting := max(1, (width - head) // CELL)):
        own = lengths[first : first + fitting]
        lines = [" " * head + "".join(f"{length:>{CELL}}" for length in own)]
        for task in tasks:
            shown = (scored(cells.get((task, length))) for length in own)
            lines.append(f"{task:<{head}}" + "".join(f"{text:>{CELL}}" for text in shown))
        if len(tasks) > 1:
            means = (f"{averages[length]:.1f}" if length in averages else "" for length in own)
            lines.append(f"{'average':<{head}}" + "".join(f"{text:>{CELL}}" for text in means))
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def scored(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    interval = row.get("ci95")
    return f"{row['value']:.1f}" + (f" [{interval[0]:.0f}, {interval[1]:.0f}]" if interval else "")
