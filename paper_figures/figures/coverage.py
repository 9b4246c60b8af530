"""Coverage of distances by scheme: how many pairs of tokens of a training row stand at each relative distance."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.inputs import Frames, Inputs

TITLE = "Coverage of relative distances by position scheme"
COLUMNS = ("scheme", "distance_lo", "distance_hi", "pairs", "share", "target", "context", "prompt")
INPUTS = Inputs(files={"computed/coverage": COLUMNS})


def draw(frames: Frames) -> Figure:
    table = frames["computed/coverage"]
    schemes, target = list(table["scheme"].unique()), int(table["target"].iloc[0])
    pairs = table.pivot(index="scheme", columns="distance_lo", values="pairs").loc[schemes]
    edges = [*pairs.columns, target]
    fig = style.figure(2.6)
    ax = fig.subplots()
    values = np.ma.masked_equal(pairs.to_numpy(), 0)
    norm = LogNorm(vmin=10 ** np.floor(np.log10(values.min())), vmax=values.max())
    ax.set_facecolor("#F2F2F2")
    mesh = ax.pcolormesh(edges, np.arange(len(schemes) + 1), values, norm=norm, edgecolors="none")
    for y in range(1, len(schemes)):
        ax.axhline(y, color="white", linewidth=4)
    ax.set_ylim(len(schemes), 0)
    ax.set_yticks(np.arange(len(schemes)) + 0.5, schemes)
    ax.tick_params(axis="y", length=0)
    ax.set_xticks(np.linspace(0, target, 9))
    ax.set_xlabel("relative distance, tokens")
    context, prompt = table[["context", "prompt"]].iloc[0]
    ax.set_title(f"rows of {context + prompt} tokens, {prompt} of them end prompt, extended to {target}")
    for y, scheme in enumerate(schemes):
        rows = table[table["scheme"] == scheme]
        share = (rows["share"] * (rows["distance_hi"] - rows["distance_lo"] + 1)).sum() / target
        ax.text(target * 1.01, y + 0.5, f"{100 * share:.0f}% seen", va="center", fontsize=6.5)
    bar = fig.colorbar(mesh, ax=ax, pad=0.11, aspect=16)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.set_label("pairs a row at a distance")
    bar.outline.set_visible(False)
    return fig
