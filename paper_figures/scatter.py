"""Scores at the longest measured length against a number that each method has: one point a method, with interval."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.averages import average, scored
from paper_figures.data import Frames
from paper_figures.figures.score_against_length import ordered_methods
from paper_figures.names import short_length


def points(frames: Frames, columns: tuple[str, ...]) -> tuple[pd.DataFrame, Any]:
    """(one line a method: value, lo, hi and the means of `columns`; the length that the scores are of)."""
    rows = scored(frames, "ruler")
    longest = rows["length"].max()
    rows = rows[rows["length"] == longest]
    means = average(rows, ["method"], ["task"]).set_index("method")
    means[list(columns)] = rows.astype(dict.fromkeys(columns, float)).groupby("method")[list(columns)].mean()
    return means.loc[[name for name in ordered_methods(rows) if name in means.index]], longest


def panels(means: pd.DataFrame, longest: float, axes_of: dict[str, str]) -> tuple[Figure, list[Axes]]:
    """One panel for each column of `axes_of` (column -> axis label), one legend below."""
    methods = ordered_methods(means.reset_index())
    arms = list(dict.fromkeys(method.arm for method in methods.values()))
    fig = style.figure(2.6 + 0.16 * -(-len(methods) // 4))
    axes = list(fig.subplots(1, len(axes_of), sharey=True))
    for ax, (column, label) in zip(axes, axes_of.items()):
        for name in means.index:
            look = style.arm_style(methods[name], arms)
            hollow = {"markerfacecolor": "white"} if methods[name].scaling == "linear" else {}
            x, y = means.loc[name, column], means.loc[name, "value"]
            ax.vlines(x, means.loc[name, "lo"], means.loc[name, "hi"], color=look["color"], linewidth=0.9, alpha=0.7)
            marker = {"color": look["color"], "marker": look["marker"], "linestyle": "none"} | hollow
            ax.plot(x, y, label=methods[name].label, markersize=5, clip_on=False, zorder=3, **marker)
        style.percent_axis(ax, None)
        ax.set_xlabel(label)
    axes[0].set_ylabel(f"score at {short_length(longest)}, percent")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(methods)))
    return fig, axes
