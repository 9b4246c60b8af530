"""Scores at the longest measured length against a number that each method has: one point a method, with interval."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import lab, style
from paper_figures.averages import average, caption, scored
from paper_figures.inputs import Frames
from paper_figures.names import SCHEMES

#: What the end prompt is -> marker and name; of a lab's arms the colour tells the place, the face the scaling.
MARKERS = {"": ("s", "no end prompt"), "EP_1": ("o", "end prompt EP_1"), "recall": ("D", "end prompt recall")}
OTHER = {"color": "#BBBBBB", "marker": ".", "linestyle": "none"}


class Group(NamedTuple):
    """Arms of one base and fold at the target length: means (index: arm), and its two panels."""

    heading: str
    means: pd.DataFrame
    axes: list[Axes]


def points(frames: Frames, columns: tuple[str, ...]) -> list[tuple[str, pd.DataFrame]]:
    """(heading, one line an arm: value, lo, hi, what it is, the medians of `columns`) of each base and fold."""
    rows = lab.tidy(scored(frames, "ruler"))
    rows = rows[(rows["length"] == rows["target"]) & (rows["kind"] != "base")]
    found = []
    for heading, _, _, part in lab.groups(rows):
        means = average(part, ["method"], ["task"]).set_index("method")
        first = part.drop_duplicates("method").set_index("method")
        means[["kind", "cue", "scaling", "main"]] = first[["kind", "cue", "scaling", "main"]]
        numbers = part.astype(dict.fromkeys(columns, float)).groupby("method")[list(columns)]
        means[list(columns)] = numbers.median()  # over the seeds
        found.append((heading, means))
    return found


def panels(
    points: list[tuple[str, pd.DataFrame]], axes_of: dict[str, str], scalings: Collection[str]
) -> tuple[Figure, list[Group]]:
    """A row of panels for each base and fold: main arms of `scalings` in colour, all others as grey dots."""
    kinds = list(dict.fromkeys(kind for _, means in points for kind in means["kind"]))
    arms = list(dict.fromkeys(map(lab.arm_of, kinds)))
    shown: dict[str, dict[str, Any]] = {}
    marks = {name: {"marker": marker, "color": "#444444"} for marker, name in MARKERS.values()}
    others = False
    fig = style.figure(2.15 * len(points) + 0.3 + 0.16 * -(-(len(arms) + 6) // 5))
    grid = fig.subplots(len(points), len(axes_of), sharey=True, squeeze=False)
    groups = []
    for axes, (heading, means) in zip(grid, points):
        for ax, (column, label) in zip(axes, axes_of.items()):
            known = means[means[column].notna()]
            colored = known["main"] & known["scaling"].isin(scalings)
            rest = known[~colored]
            if len(rest):
                ax.plot(rest[column], rest["value"], markersize=4, clip_on=False, **OTHER)
                others = True
            for arm, x in zip(known[colored].itertuples(), side_by_side(known.loc[colored, column])):
                name = lab.arm_of(arm.kind)
                color, _ = style.look(name, arms)
                shown[SCHEMES.get(name, name)] = {"color": color, "linewidth": 2.5}
                ax.vlines(x, arm.lo, arm.hi, color=color, linewidth=0.8, alpha=0.7)
                face = "white" if arm.scaling == "linear" else color
                marker = MARKERS.get(arm.cue, ("v", ""))[0]
                ax.plot(x, arm.value, marker=marker, color=color, markerfacecolor=face, markersize=4.5,
                        clip_on=False, zorder=3, linestyle="none")  # fmt: skip
            style.percent_axis(ax, None)
            ax.set_xlabel(label)
        axes[0].set_title(heading, fontsize=7)
        axes[0].set_ylabel("score, percent")
        groups.append(Group(heading, means, list(axes)))
    marks["PI"] = {"marker": "o", "color": "#444444", "markerfacecolor": "white"}
    marks |= {"all other arms": OTHER} if others else {}
    handles = lab.handles(shown) + lab.handles(marks, line=False)
    fig.legend(handles=handles, loc="outside lower center", ncols=5)
    return fig, groups


def side_by_side(values: pd.Series, width: float = 0.08) -> list[float]:
    """Values for a logarithmic axis, those that are equal (within 1%) moved apart, over `width` of the axis at most."""
    log = np.log(values.to_numpy(float))
    span = float(np.ptp(log)) + 0.5  # of the axis, margins included
    places = log.copy()
    for i, value in enumerate(log):
        alike = np.flatnonzero(np.abs(log - value) < 0.01)
        step = min(0.012, width / len(alike)) * span
        places[i] += (int(np.searchsorted(alike, i)) - (len(alike) - 1) / 2) * step
    return [float(place) for place in np.exp(places)]


def note(frames: Frames, points: list[tuple[str, pd.DataFrame]]) -> str:
    main = [means[means["main"]] for _, means in points]  # the others have no interval drawn
    first = caption(scored(frames, "ruler"), main, " at the target length")
    return f"{first}\nhollow: PI; arms of equal place on the x axis stand side by side"
