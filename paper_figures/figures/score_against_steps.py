"""Question 2 of the lab: the score against the steps of training, for a fixed prompt, the control and `recall`."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures import lab, style
from paper_figures.averages import average, caption, scored
from paper_figures.inputs import Frames, Inputs, NoData
from paper_figures.names import CUE_WEIGHT, short_length

TITLE = "The lab: score against the steps of training, for schemes trained for several"
INPUTS = Inputs(rows={"ruler": lab.COLUMNS[:5]}, needs_rows=True, lab="only")


def draw(frames: Frames) -> Figure:
    rows = lab.tidy(scored(frames, "ruler"))
    weight = rows["prompt_weight"].astype(float).fillna(CUE_WEIGHT)
    rows = rows[(rows["kind"] != "base") & (~rows["cue"].str.startswith("EP_") | (weight == CUE_WEIGHT))]
    rows["line"] = [f"{label}, {lab.scaling_name(s)}" for label, s in zip(rows["label"], rows["scaling"])]
    several = rows.groupby(["base", "fold", "line"])["steps"].transform("nunique") > 1
    rows = rows[several & ~rows["kind"].str.startswith(("full", "longlora"))]
    if rows.empty:
        raise NoData("needs arms that were trained for several numbers of steps (column steps)")
    chosen = list(lab.groups(rows))
    looks = lab.looks(rows)
    fig = style.figure(2.2 * len(chosen) + 0.45)
    grid = fig.subplots(len(chosen), 3, sharey=True, squeeze=False)
    used: dict[str, dict] = {}
    drawn = []
    for axes, (heading, _, _, part) in zip(grid, chosen):
        lengths = sorted(part["length"].unique())
        shown = lengths if len(lengths) <= 3 else [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
        for ax, length in zip(axes, shown):
            for (name, label), lines in part[part["length"] == length].groupby(["line", "label"], sort=False):
                means = average(lines.assign(method="arm"), ["method", "steps"], ["task"]).sort_values("steps")
                drawn.append(means)
                hollow = {"markerfacecolor": "white", "linestyle": (0, (3, 1.2))}
                look = looks[label] | (hollow if lines["scaling"].iloc[0] == "linear" else {})
                used[name] = look
                ax.plot(means["steps"], means["value"], markersize=4, clip_on=False, zorder=3, **look)
                ax.vlines(means["steps"], means["lo"], means["hi"], color=look["color"], linewidth=0.8, clip_on=False)
            style.percent_axis(ax, "score, percent" if ax is axes[0] else None)
            steps = sorted(part["steps"].unique())
            ax.set_xscale("log")
            ax.set_xlim(steps[0] / 1.25, steps[-1] * 1.25)
            ax.set_xticks(steps, [f"{step:,}" for step in steps])
            ax.minorticks_off()
            ax.set_xlabel("training steps")
            at = f"at {short_length(length)}"
            ax.set_title(f"{heading}; {at}" if ax is axes[0] else at, fontsize=7)
    style.note(fig, f"{caption(rows, drawn)}; hollow, dashed: PI")
    fig.legend(handles=lab.handles(used), loc="outside lower center", ncols=min(4, len(used)))
    return fig
