"""Predicted error in the gap against the number of anchors: how many equally spaced end prompts close the gap."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.inputs import Frames, Inputs

TITLE = "Predicted RMS error in the gap against the number K of anchors"
COLUMNS = ("base", "anchors", "gap_rms", "target", "context", "prompt", "factor", "sigma")
INPUTS = Inputs(files={"computed/gap_rms_against_k": COLUMNS})
MARKERS = ("o", "s", "^", "D")


def draw(frames: Frames) -> Figure:
    table = frames["computed/gap_rms_against_k"]
    fig = style.figure(2.5, 4.6)
    ax = fig.subplots()
    for (base, rows), marker in zip(table.groupby("base"), MARKERS):
        everything = rows[rows["anchors"] == "all"]["gap_rms"].item()
        rows = rows[rows["anchors"] != "all"].astype({"anchors": int})
        (line,) = ax.plot(rows["anchors"], rows["gap_rms"], marker=marker, label=f"RoPE base {base:,}")
        ax.axhline(everything, color=line.get_color(), linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set_ylim(0.002, 1)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xticks(sorted(rows["anchors"]), ["none", *map(str, sorted(rows["anchors"])[1:])])
    ax.set_xlabel("anchors K, equally spaced")
    ax.set_ylabel("RMS error in the gap (score: 1)")
    ax.grid(axis="y")
    highest = table[table["anchors"] == "all"]["gap_rms"].max()
    ax.annotate("every distance observed", (0, highest), (0, 3), textcoords="offset points", fontsize=6.5)
    first = table.iloc[0]
    row = f"{first['context']} + {first['prompt']} tokens in {first['target']}"
    title = f"{row}, PI by {first['factor']}, noise {first['sigma']:g}"
    ax.set_title(title, fontweight="normal", fontsize=6.5)
    ax.legend(loc="upper right")
    return fig
