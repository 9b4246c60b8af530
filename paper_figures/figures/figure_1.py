"""Figure 1: the position schemes. Where each puts the tokens of one row, and which relative distances that shows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from paper_figures import style
from paper_figures.inputs import Frames, Inputs

TITLE = "Figure 1: position schemes, and the relative distances that each shows"
INPUTS = Inputs(files={"computed/figure_1": ("scheme", "token", "part", "position", "target")})
CONTEXT, PROMPT, OBSERVED, EMPTY = "#0072B2", "#D55E00", "#555555", "#EEEEEE"


def draw(frames: Frames) -> Figure:
    table = frames["computed/figure_1"]
    schemes = list(table["scheme"].unique())
    target = int(table["target"].iloc[0])
    fig = style.figure(3.1)
    left, right = fig.subplots(1, 2, sharey=True)
    for y, scheme in enumerate(schemes):
        rows = table[table["scheme"] == scheme]
        for ax in (left, right):
            cells(ax, range(target), y, EMPTY)
        for part, color in (("context", CONTEXT), ("end prompt", PROMPT)):
            cells(left, rows[rows["part"] == part]["position"], y, color)
        cells(right, distances(rows), y, OBSERVED)
    names = [f"{scheme}\n{n} tokens" for scheme, n in table.groupby("scheme", sort=False).size().items()]
    left.set_yticks(range(len(schemes)), names)
    left.set_ylim(len(schemes) - 0.4, -0.6)
    for ax, label in ((left, "position"), (right, "relative distance")):
        ax.set_xlim(0, target)
        ticks = [0, *(k * target // 4 - 1 for k in (1, 2, 3, 4))]
        ax.set_xticks([tick + 0.5 for tick in ticks], ticks)
        ax.set_xlabel(label)
        ax.tick_params(axis="y", length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
    left.set_title("where the tokens stand")
    right.set_title("which distances the row shows")
    handles = [Patch(color=CONTEXT, label="context"), Patch(color=PROMPT, label="end prompt")]
    handles += [Patch(color=OBSERVED, label="distance observed"), Patch(color=EMPTY, label="not observed")]
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig


def cells(ax: Axes, places: Iterable[int], y: int, color: str) -> None:
    squares = [(place, 1) for place in places]
    ax.broken_barh(squares, (y - 0.32, 0.64), facecolors=color, edgecolors="white", linewidth=0.3)


def distances(rows: pd.DataFrame) -> list[int]:
    """Distances between any two tokens of a row (each token attends to itself and to all before it)."""
    positions = rows["position"].to_numpy()
    return sorted(set((positions[:, None] - positions[None, :])[np.tril_indices(len(positions))].tolist()))
