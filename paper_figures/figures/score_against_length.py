"""Score against length: what each way of extending keeps of the task, from the original window to the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from paper_figures import style
from paper_figures.averages import average, interval_kind, scale_mark, scored
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import SCALINGS, TASKS, short_length
from paper_figures.style import Methods, ordered_methods

TITLE = "RULER score against length, all methods, 95% intervals"

INPUTS = Inputs(rows={"ruler": ()}, needs_rows=True)
End = tuple[str, str, float, float]  # label, colour, last length and last value of a line
ONE_PANEL = 6  # more methods than this are drawn in one panel for each RoPE scaling, as averages only


def draw(frames: Frames) -> Figure:
    rows = scored(frames, "ruler")
    tasks = [task for task in TASKS if task in set(rows["task"])]
    methods = ordered_methods(rows)
    means = average(rows, ["method", "length"], ["task"])
    title = f"average of {len(tasks)} tasks" if len(tasks) > 1 else TASKS[tasks[0]]
    if len(methods) > ONE_PANEL:
        fig = by_scaling(rows, means, methods, title)
    else:
        fig = by_task(rows, means, methods, tasks, title)
    style.note(fig, caption(rows, means))
    return fig


def by_task(rows: pd.DataFrame, means: pd.DataFrame, methods: Methods, tasks: list[str], title: str) -> Figure:
    """The average with the methods named at their last point, and a small panel for each task."""
    down = 2 if len(tasks) <= 6 else 3
    across = math.ceil(len(tasks) / down)
    fig = style.figure(1.3 * down + 0.3)
    grid = fig.add_gridspec(down, 1 + across, width_ratios=[2.6, *[2.2 / across] * across])
    panel(fig.add_subplot(grid[:, 0]), rows, means, methods, title)
    for i, task in enumerate(tasks if len(tasks) > 1 else []):
        ax = fig.add_subplot(grid[i // across, 1 + i % across])
        lines(ax, average(rows[rows["task"] == task], ["method", "length"], ["task"]), methods, size=3)
        ax.set_title(TASKS[task], fontsize=7, fontweight="normal")
        style.percent_axis(ax, None)
        mark_window(ax, rows, name=False)
        ax.tick_params(labelleft=i % across == 0, labelbottom=i // across == down - 1 or i + across >= len(tasks))
    return fig


def by_scaling(rows: pd.DataFrame, means: pd.DataFrame, methods: Methods, title: str) -> Figure:
    """The average, one panel for each scaling; the unextended base is in all of them."""
    scalings = list(dict.fromkeys(m.scaling for m in methods.values() if (m.scheme, m.scaling) != ("base", "")))
    across = min(2, len(scalings))
    down = math.ceil(len(scalings) / across)
    fig = style.figure(2.6 * down + 0.3)
    axes = fig.subplots(down, across, squeeze=False).flat
    for scaling, ax in zip(scalings, axes):
        chosen = {k: m for k, m in methods.items() if m.scaling == scaling or (m.scheme, m.scaling) == ("base", "")}
        panel(ax, rows, means, chosen, f"{SCALINGS.get(scaling, scaling or 'no scaling')}: {title}")
    for ax in axes:
        ax.set_axis_off()  # more places than scalings
    return fig


def panel(ax: Axes, rows: pd.DataFrame, means: pd.DataFrame, methods: Methods, title: str) -> None:
    last = lines(ax, means, methods, size=5)
    ax.set_title(title)
    ax.set_xlabel("length, tokens")
    style.percent_axis(ax)
    mark_window(ax, rows)
    end_labels(ax, last)


def lines(ax: Axes, means: pd.DataFrame, methods: Methods, size: float) -> list[End]:
    """One line with intervals a method; returns their ends."""
    arms = list(dict.fromkeys(method.arm for method in methods.values()))
    several = len({method.scaling for method in methods.values() if method.scheme != "base"}) > 1
    looks = {}
    for name, method in methods.items():
        named = several or method.scheme == "base"  # the panel's title names the scaling if there is one only
        label = method.label if named else method._replace(scaling="").label
        looks[name] = label, style.arm_style(method, arms) | {"markeredgecolor": "white", "markeredgewidth": 0.4}
    return labelled_lines(ax, means, looks, size)


def labelled_lines(ax: Axes, means: pd.DataFrame, looks: Mapping[str, tuple[str, dict]], size: float) -> list[End]:
    """Lines against the length of the methods in `looks` (label, style), their intervals side by side."""
    last = []
    for i, (name, (label, look)) in enumerate(looks.items()):
        line = means[means["method"] == name].sort_values("length")
        if line.empty:
            continue
        x = line["length"].to_numpy(float) * 2 ** (0.03 * (i - (len(looks) - 1) / 2))
        ax.plot(x, line["value"], markersize=size, clip_on=False, zorder=3, **look)
        ax.vlines(x, line["lo"], line["hi"], color=look["color"], linewidth=0.9, alpha=0.7, clip_on=False, zorder=2)
        last.append((label, look["color"], x[-1], line["value"].iloc[-1]))
    lengths = sorted(means["length"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [short_length(length) for length in lengths])
    ax.minorticks_off()
    return last


def mark_window(ax: Axes, rows: pd.DataFrame, name: bool = True) -> None:
    """Shade the lengths inside the window that the base was pretrained with, where the rows carry it."""
    if "window" not in rows or rows["window"].isna().any() or rows["window"].nunique() != 1:
        return
    window = rows["window"].iloc[0]
    low = ax.get_xlim()[0]
    if name:
        low /= 1.35  # room for the name inside the shading
        ax.text(low * 1.08, 3, f"window\n{int(window)}", fontsize=6, color="#555555", va="bottom")
    ax.axvspan(low, window * 2**0.2, color="#EEEEEE", zorder=0, linewidth=0)
    ax.set_xlim(left=low)


def end_labels(ax: Axes, last: list[End], gap: float = 7.0) -> None:
    """Names to the right of the last points, moved apart, each tied to its point by a thin line."""
    last = sorted(last, key=lambda entry: entry[3])
    places = spread([entry[3] for entry in last], gap, 0, 100)
    for (label, color, x, value), place in zip(last, places):
        tie = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        look: dict[str, Any] = {"va": "center", "fontsize": 6.5, "color": "#222222", "arrowprops": tie}
        look["annotation_clip"] = False
        beside = ax.get_yaxis_transform()  # beside the axes, at the height of the data
        ax.annotate(f"{label}  {value:.0f}", (x, value), (1.04, place), textcoords=beside, **look)


def spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Rising places at least `gap` apart inside [low, high], as close to the rising values as that allows. The least
    squares of all moves, by isotonic regression of value minus its share of the gaps."""
    gap = min(gap, (high - low) / max(len(values) - 1, 1))
    steps = gap * np.arange(len(values))
    places = isotonic_regression(np.array(values, dtype=float) - steps).x
    return [float(place) for place in np.clip(places, low, high - (len(values) - 1) * gap) + steps]


def caption(rows: pd.DataFrame, means: pd.DataFrame) -> str:
    n = sorted({int(v) for v in rows["n"].dropna()})
    samples = f"{n[0]} samples a cell" if len(n) == 1 else f"{n[0]} to {n[-1]} samples a cell" if n else ""
    return "; ".join(part for part in (scale_mark(rows), samples, interval_kind(means)) if part)
