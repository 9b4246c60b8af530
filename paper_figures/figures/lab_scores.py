"""The lab's scores against length: every scheme, one panel for each base, fold and scaling."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import lab, style
from paper_figures.averages import average, interval_kind, scale_mark, scored
from paper_figures.figures.score_against_length import end_labels, mark_window
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import short_length

TITLE = "The lab: RULER score against length, all schemes, by base, fold and scaling"
INPUTS = Inputs(rows={"ruler": lab.COLUMNS[:5]}, needs_rows=True, lab="only")
#: The columns of the figure; the other scalings stand in `smoothness_against_score`.
SCALINGS = ("linear", "yarn")
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
    note = f"{scale_mark(rows)}; average of {rows['task'].nunique()} tasks; {interval_kind(pd.concat(shown))}; "
    note += "hollow, dashed: an end prompt of fixed words"
    fig.suptitle(note, fontsize=6.5, color="#555555", x=0.01, ha="left")
    return fig


def panel(ax: Axes, means: pd.DataFrame, labels: dict[str, str], looks: dict[str, dict], gap: float) -> None:
    """gap: between labels at the lines' ends, in percent of the axis."""
    last = []
    names = sorted(means["method"].unique(), key=lambda name: list(looks).index(labels[name]))
    for i, name in enumerate(names):
        line = means[means["method"] == name].sort_values("length")
        look = looks[labels[name]]
        x = line["length"].to_numpy(float) * 2 ** (0.03 * (i - (len(names) - 1) / 2))  # intervals side by side
        ax.plot(x, line["value"], markersize=3.5, markeredgewidth=0.7, clip_on=False, zorder=3, **look)
        ax.vlines(x, line["lo"], line["hi"], color=look["color"], linewidth=0.7, alpha=0.6, clip_on=False)
        last.append((labels[name], look["color"], x[-1], line["value"].iloc[-1]))
    lengths = sorted(means["length"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [short_length(length) for length in lengths])
    ax.minorticks_off()
    style.percent_axis(ax)
    ax.set_xlabel("length, tokens")
    end_labels(ax, last, gap=gap)
