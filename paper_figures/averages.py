"""Averages of result rows and their 95% intervals.

One seed: the intervals of the cells (over samples) are combined by squares, separately below and above, so that cells
near 0 and 100 keep their one-sided intervals (Zou and Donner 2008). Two seeds and more: Student's t over the seeds'
averages. A method that lacks a cell which others have gets no average: cells are never left out silently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from paper_figures.inputs import Frames
from paper_figures.names import SUITE_TASKS

PAPER_LENGTHS = (4096, 8192, 16384, 32768, 65536)  # lengths that the paper's RULER average is taken over


def average(rows: pd.DataFrame, by: Sequence[str], over: Sequence[str] = ("task", "length")) -> pd.DataFrame:
    """Mean over the cells `over` for each group `by`: columns by + value, lo, hi, seeds, cells, origin. lo and hi are
    NaN where the rows carry no interval. All groups are held to the same cells: those that any group with the same `by`
    (without `method`) has."""
    cells = list(dict.fromkeys([*by, *over, "seed"]))
    rows = rows.drop_duplicates(cells)[[*cells, "value", "lo", "hi", "origin"]]
    peers = [column for column in by if column != "method"]
    place = rows.groupby(list(over), dropna=False).ngroup()
    of_peers = place.groupby([rows[column] for column in peers], dropna=False).transform if peers else place.agg
    rows = rows.assign(needed=of_peers("nunique"))
    out = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        key, needed = key if isinstance(key, tuple) else (key,), int(group["needed"].iloc[0])
        seeds = _by_seed(group, needed)
        if not seeds:
            continue
        value, lo, hi = _over_seeds([cells for cells, _ in seeds])
        origin = "; ".join(first + (" ff." if len(cells) > 1 else "") for cells, first in seeds)
        out.append([*key, value, lo, hi, len(seeds), needed, origin])
    return pd.DataFrame(out, columns=[*by, "value", "lo", "hi", "seeds", "cells", "origin"])


def _by_seed(group: pd.DataFrame, needed: int) -> list[tuple[np.ndarray, str]]:
    """(value, lo and hi of each cell; origin of the first) of each seed, in order, that has all the cells."""
    numbers, names = pd.factorize(group["seed"], sort=True, use_na_sentinel=False)
    cells, origins = group[["value", "lo", "hi"]].to_numpy(float), group["origin"].to_numpy()
    places = [np.flatnonzero(numbers == number) for number in range(len(names))]
    return [(cells[place], origins[place[0]]) for place in places if len(place) == needed]


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of at least two values with Student's 95% interval."""
    means = np.asarray(values, dtype=float)
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    return means.mean(), means.mean() - half, means.mean() + half


def _over_seeds(seeds: list[np.ndarray]) -> tuple[float, float, float]:
    if len(seeds) > 1:
        return over_seeds([seed[:, 0].mean() for seed in seeds])
    value, low, high = seeds[0].T
    below = np.sqrt(((value - low) ** 2).sum()) / len(value)
    above = np.sqrt(((high - value) ** 2).sum()) / len(value)
    return value.mean(), value.mean() - below, value.mean() + above


def interval_kind(averages: pd.DataFrame) -> str:
    """How the intervals of these averages were made, for a caption."""
    least, most = int(averages["seeds"].min()), int(averages["seeds"].max())
    seeds = f"{most} seeds" if least == most else f"{least} to {most} seeds"
    return f"95% intervals over {'samples, one seed' if most == 1 else seeds}"


def caption(rows: pd.DataFrame, means: Sequence[pd.DataFrame]) -> str:
    """What a figure of averages over tasks rests on."""
    return f"{scale_mark(rows)}; average of {rows['task'].nunique()} tasks; {interval_kind(pd.concat(means))}"


def scored(frames: Frames, suite: str) -> pd.DataFrame:
    """Rows of the suite's own tasks (no averages, no buckets), values as floats."""
    rows = frames[suite]
    rows = rows[rows["task"].isin(SUITE_TASKS[suite])]
    for task, group in rows.groupby("task"):
        if group["metric"].nunique() > 1:
            other = group[group["metric"] != group["metric"].iloc[0]].iloc[0]
            raise ValueError(
                f"{other['origin']}: metric must be the same in all rows of task {task!r} to be averaged: "
                f"metric={other['metric']!r} beside {group['metric'].iloc[0]!r} ({group['origin'].iloc[0]})"
            )
    return rows.astype({"value": float, "lo": float, "hi": float})


def is_small_scale(rows: pd.DataFrame) -> bool:
    """Rows that stop short of the longest length that the paper scores (by length or target) are marked so."""
    reach = rows.reindex(columns=["length", "target"]).astype(float).max().max()
    return not reach >= PAPER_LENGTHS[-1]


def scale_mark(rows: pd.DataFrame) -> str:
    return "measured here, small scale" if is_small_scale(rows) else "measured here"
