"""Depth by length: the score where the needle stands at each depth of contexts of each length, a map a method."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from paper_figures import lab, style
from paper_figures.averages import average
from paper_figures.inputs import Frames, Inputs, is_lab
from paper_figures.names import short_length
from paper_figures.style import ordered_methods

TITLE = "Needle depth by context length, a heat map for each method"
INPUTS = Inputs(rows={"ruler_depth": ("depth",)}, needs_rows=True, lab="all")
SCALINGS = ("linear", "yarn")  # the scalings of a lab that are drawn


def draw(frames: Frames) -> Figure:
    rows = frames["ruler_depth"].astype(dict.fromkeys(("value", "depth", "lo", "hi"), float))
    return lab_maps(lab.tidy(rows)) if is_lab(rows) else maps(rows)


def maps(rows: pd.DataFrame) -> Figure:
    methods = ordered_methods(rows)
    means = average(rows, ["method", "length", "depth"], ["task"])
    lengths, depths = sorted(means["length"].unique()), sorted(means["depth"].unique())
    across = min(4, len(methods))
    down = math.ceil(len(methods) / across)
    fig = style.figure(0.5 + 1.6 * down, 0.9 + 1.52 * across)
    axes = fig.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for (name, method), ax in zip(methods.items(), axes):
        part = means[means["method"] == name]
        image = heat(ax, part, lengths, depths, numbers=len(depths) * len(lengths) <= 30)
        ax.set_title(method.label, fontsize=7, fontweight="normal")
        ax.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
        depth_axis(ax, depths)
    for ax in axes:
        ax.set_axis_off()  # more places than methods
    fig.supxlabel("length, tokens", fontsize=7)
    fig.supylabel("depth of the needle, percent", fontsize=7)
    fig.colorbar(image, ax=fig.axes, label="score, percent", aspect=20).outline.set_visible(False)
    return fig


def lab_maps(rows: pd.DataFrame) -> Figure:
    """A line of maps for each base, fold and scaling of a lab: the arms that all of its bases and folds have."""
    rows = rows[rows["main"] & rows["scaling"].isin(SCALINGS)]
    labels = list(lab.looks(rows))
    groups = [
        (f"window {part['window'].iloc[0]:.0f},\n{fold}-fold, {lab.scaling_name(scaling)}", part)
        for _, _, fold, whole in lab.groups(rows)
        for scaling, part in whole.groupby("scaling")
    ]
    shared = set.intersection(*(set(part["label"]) for _, _, _, part in lab.groups(rows)))
    columns = [label for label in labels if label in shared]
    fig = style.figure(0.82 * len(groups) + 0.7)
    grid = fig.subplots(len(groups), len(columns), squeeze=False)
    for axes, (heading, part) in zip(grid, groups):
        means = average(part, ["label", "length", "depth"], ["task"])
        lengths, depths = sorted(means["length"].unique()), sorted(means["depth"].unique())
        for ax, label in zip(axes, columns):
            mine = means[means["label"] == label]
            if mine.empty:  # a place without its arm; the first line keeps the titles
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                continue
            image = heat(ax, mine, lengths, depths)
            ax.set_xticks(range(len(lengths)), [short_length(length) for length in lengths], fontsize=6)
            depth_axis(ax, depths, shown=ax is axes[0])
        axes[0].set_ylabel(heading, fontsize=6.5)
    for ax, label in zip(grid[0], columns):
        ax.set_title("\n".join(textwrap.wrap(label, 11)), fontsize=6.5, fontweight="normal")
    fig.align_ylabels(grid[:, 0])
    fig.supxlabel("length, tokens", fontsize=7)
    fig.supylabel("depth of the needle, percent", fontsize=7)
    fig.colorbar(image, ax=fig.axes, label="needles found, percent", aspect=30, shrink=0.6).outline.set_visible(False)
    seeds = " or ".join(sorted({f"{seeds:.0f}" for seeds in rows["seeds"]}, key=int))
    style.note(fig, f"measured here, small scale; needles of three tasks, {seeds} seeds together")
    return fig


def heat(ax: Axes, part: pd.DataFrame, lengths: list, depths: list, numbers: bool = False) -> AxesImage:
    """One map; numbers: write the scores into it."""
    grid = part.pivot(index="depth", columns="length", values="value").reindex(index=depths, columns=lengths)
    values = grid.to_numpy(float)
    image = ax.imshow(values, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    for (i, j), value in np.ndenumerate(values):
        if numbers and value == value:
            color = "white" if value < 55 else "black"
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color=color)
    return image


def depth_axis(ax: Axes, depths: list, shown: bool = True) -> None:
    step = math.ceil(len(depths) / 6)
    ax.set_yticks(range(0, len(depths), step), [f"{depth:.0f}" for depth in depths[::step]])
    ax.tick_params(length=0, labelleft=shown)
    ax.spines[:].set_visible(False)
