"""Depth by length: the score where the needle stands at each depth of contexts of each length, a map a method."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.averages import average
from paper_figures.data import Frames, Inputs
from paper_figures.figures.score_against_length import ordered_methods
from paper_figures.names import short_length

TITLE = "Needle depth by context length, a heat map for each method"
INPUTS = Inputs(rows={"ruler_depth": ("depth",)}, needs_rows=True)


def draw(frames: Frames) -> Figure:
    rows = frames["ruler_depth"].astype({"value": float, "depth": float, "lo": float, "hi": float})
    methods = ordered_methods(rows)
    means = average(rows, ["method", "length", "depth"], ["task"])
    lengths, depths = sorted(means["length"].unique()), sorted(means["depth"].unique())
    across = min(4, len(methods))
    down = math.ceil(len(methods) / across)
    fig = style.figure(0.5 + 1.6 * down, 0.9 + 1.52 * across)
    axes = fig.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for (name, method), ax in zip(methods.items(), axes):
        part = means[means["method"] == name]
        grid = part.pivot(index="depth", columns="length", values="value").reindex(index=depths, columns=lengths)
        image = ax.imshow(grid.to_numpy(float), vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        for (i, j), value in np.ndenumerate(grid.to_numpy(float)):
            if value == value and len(depths) * len(lengths) <= 30:
                color = "white" if value < 55 else "black"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color=color)
        ax.set_title(method.label, fontsize=7, fontweight="normal")
        ax.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
        step = math.ceil(len(depths) / 6)
        ax.set_yticks(range(0, len(depths), step), [f"{depth:.0f}" for depth in depths[::step]])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    for ax in axes:
        ax.set_axis_off()  # more places than methods
    fig.supxlabel("length, tokens", fontsize=7)
    fig.supylabel("depth of the needle, percent", fontsize=7)
    fig.colorbar(image, ax=fig.axes, label="score, percent", aspect=20).outline.set_visible(False)
    return fig
