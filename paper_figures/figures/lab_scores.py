"""The lab's scores against length: every scheme, one panel for each base, fold and scaling."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import lab, style
from paper_figures.averages import average, caption, scored
from paper_figures.figures.score_against_length import end_labels, labelled_lines, mark_window
from paper_figures.inputs import Frames, Inputs

TITLE = "The lab: RULER score against length, all schemes, by base, fold and scaling"
INPUTS = Inputs(rows={"ruler": lab.COLUMNS[:5]}, needs_rows=True, lab="only")
SCALINGS = ("linear", "yarn")  # the columns of the figure
FRAME, LABEL = 0.65, 0.12


def draw(frames: Frames) -> Figure:
    rows = lab.tidy(scored(frames, "ruler"))
    rows = rows[rows["main"] & (rows["scaling"].isin(SCALINGS) | (rows["label"] == "base"))]
    looks = lab.looks(rows)
    groups = list(lab.groups(rows))
    # what stands above and below a panel, and the labels beside it, in inches
    heights = [FRAME + max(1.6, LABEL * part.groupby("scaling")["label"].nunique().max()) for *_, part in groups]
    fig = style.figure(sum(heights) + 0.25)
    grid = fig.subplots(len(groups), len(SCALINGS), squeeze=False, height_ratios=heights)
    shown = []
    for axes, (heading, _, _, part), height in zip(grid, groups, heights):
        for ax, scaling in zip(axes, SCALINGS):
            mine = part[(part["scaling"] == scaling) | (part["label"] == "base")]
            if (mine["label"] == "base").all():
                ax.set_axis_off()
                continue
            means = average(mine, ["method", "length"], ["task"])
            labels = mine.drop_duplicates("method").set_index("method")["label"].to_dict()
            panel(ax, means, labels, looks, gap=100 * LABEL / (height - FRAME))
            mark_window(ax, mine)
            ax.set_title(f"{heading}, {lab.scaling_name(scaling)}", fontsize=7)
            shown.append(means)
    style.note(fig, f"{caption(rows, shown)}; hollow, dashed: an end prompt of fixed words")
    return fig


def panel(ax: Axes, means: pd.DataFrame, labels: dict[str, str], looks: dict[str, dict], gap: float) -> None:
    """gap: between labels at the lines' ends, in percent of the axis."""
    names = sorted(means["method"].unique(), key=lambda name: list(looks).index(labels[name]))
    last = labelled_lines(ax, means, {n: (labels[n], looks[labels[n]] | {"markeredgewidth": 0.7}) for n in names}, 3.5)
    style.percent_axis(ax)
    ax.set_xlabel("length, tokens")
    end_labels(ax, last, gap=gap)
