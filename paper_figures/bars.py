"""Bars of published scores and, hatched in a panel of their own, of measured ones with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.averages import average, interval_kind, is_small_scale, scored
from paper_figures.inputs import Frames
from paper_figures.names import parse_method, short_length

SUITES = {"longbench": "LongBench", "ruler": "RULER"}


class Bar(NamedTuple):
    name: str
    value: float
    lo: float = float("nan")
    hi: float = float("nan")
    color: str = "#0072B2"


def suite_panels(frames: Frames, published: pd.DataFrame, choose: Callable[[list[str]], dict[str, str]]) -> Figure:
    """One panel for each suite of `published` (columns panel, x, value), then one for each suite that was measured.
    choose: of the methods measured those that have a bar -> the name under it."""
    rows = {suite: scored(frames, suite) for suite in SUITES}
    chosen = {suite: choose(list(own["method"].unique())) for suite, own in rows.items()}
    measured = {suite: measured_bars(rows[suite], chosen[suite]) for suite in SUITES}
    panels = [suite for suite in SUITES if suite in set(published["panel"])]
    mine = [suite for suite in SUITES if measured[suite]]
    beside = not any(len(measured[suite]) > 4 for suite in mine)  # many bars stand in a row of their own
    fig = style.figure(2.3 if beside else 2.0 + 2.3 * len(mine), 7.0 if mine else 4.6)
    if beside:
        axes = list(fig.subplots(1, len(panels) + len(mine), squeeze=False)[0])
    else:
        grid = fig.add_gridspec(1 + len(mine), len(panels))
        axes = [fig.add_subplot(grid[0, i]) for i in range(len(panels))]
        axes += [fig.add_subplot(grid[1 + i, :]) for i in range(len(mine))]
    for ax, suite in zip(axes, panels):
        part = published[published["panel"] == suite]
        colors = [style.PUBLISHED.get(x, style.PUBLISHED["EndPrompt"]) for x in part["x"]]
        draw_bars(ax, [Bar(x, v, color=c) for x, v, c in zip(part["x"], part["value"], colors)], digits=2)
        ax.set_title(f"{SUITES[suite]}, published")
    for ax, suite in zip(axes[len(panels) :], mine):
        draw_bars(ax, measured[suite], digits=1, hatch=True)
        ax.set_title(f"{SUITES[suite]}, measured here")
        ax.set_xlabel(measured_note(rows[suite], chosen[suite]), fontsize=6, color="#555555")
    for ax in axes:
        style.percent_axis(ax, "average score, percent" if ax is axes[0] or not beside else None)
        ax.set_ylim(0, 112)  # room for the number above a bar of 100
    return fig


def draw_bars(ax: Axes, bars: Sequence[Bar], digits: int, hatch: bool = False) -> None:
    look: dict[str, Any] = {"hatch": style.MEASURED_HATCH if hatch else None, "line": 0.9, "size": 6.5, "lift": 2}
    for i, bar in enumerate(bars):
        ends = style.on_scale(bar.lo, bar.hi)
        style.bar(ax, i, bar.value, 0.62, ends, f"{bar.value:.{digits}f}", color=bar.color, **look)
    ax.set_xticks(range(len(bars)), [bar.name for bar in bars])
    ax.tick_params(axis="x", length=0)
    middle, half = (len(bars) - 1) / 2, max(len(bars), 3) / 2 + 0.1  # one bar must not fill the panel
    ax.set_xlim(middle - half, middle + half)


def measured_bars(rows: pd.DataFrame, chosen: dict[str, str]) -> list[Bar]:
    """One bar for each method in `chosen` (method -> name under the bar): the average over all its cells."""
    rows = rows[rows["method"].isin(chosen)]
    if rows.empty:
        return []
    means = average(rows, ["method"]).sort_values("method", key=lambda column: column.map([*chosen].index))
    arms = list(dict.fromkeys(parse_method(method).arm for method in chosen))
    return [
        Bar(chosen[m], v, lo, hi, style.arm_style(parse_method(m), arms)["color"])
        for m, v, lo, hi in zip(means["method"], means["value"], means["lo"], means["hi"])
    ]


def measured_note(rows: pd.DataFrame, chosen: dict[str, str]) -> str:
    """What the measured bars average over, for the axis below them."""
    rows = rows[rows["method"].isin(chosen)]
    lengths = rows["length"].dropna()
    span = f", {short_length(lengths.min())} to {short_length(lengths.max())}" if len(lengths) else ""
    kind = interval_kind(average(rows, ["method"]))
    mark = "small scale: " if is_small_scale(rows) else ""
    return f"{mark}{rows['task'].nunique()} tasks{span}\n{kind}"
