"""Cost: the score at the longest length against training tokens and GPU-seconds, with the Pareto front."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from paper_figures import scatter, style
from paper_figures.inputs import Frames, Inputs

TITLE = "Score at the longest length against training tokens and GPU-seconds, with the Pareto front"
INPUTS = Inputs(rows={"ruler": ("train_tokens", "gpu_seconds")}, needs_rows=True, lab="only")
AXES = {"train_tokens": "training tokens", "gpu_seconds": "GPU-seconds"}


def draw(frames: Frames) -> Figure:
    """Two panels for each base and fold of a lab; the Pareto front is over all arms."""
    points = scatter.points(frames, tuple(AXES))
    fig, groups = scatter.panels(points, AXES, ("linear", "yarn"))
    for group in groups:
        for ax, column in zip(group.axes, AXES):
            front = pareto(group.means[column], group.means["value"])
            ax.step(front.index, front.to_numpy(), where="post", color="#AAAAAA", linewidth=1, zorder=1)
            style.log_axis(ax, group.means[column], plain)
    style.note(fig, scatter.note(frames, points))
    return fig


def pareto(cost: pd.Series, score: pd.Series) -> pd.Series:
    """Score by cost of the methods that no method of at most their cost outdoes, in rising order of cost."""
    pairs = sorted(zip(cost, -score))
    front: dict[float, float] = {}
    for x, minus in pairs:
        if not front or -minus > max(front.values()):
            front[x] = -minus
    return pd.Series(front)


def plain(value: float) -> str:
    """1200000 -> 1.2M, 300 -> 300."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"
