"""Question 4 of the lab: where the anchor is, and the score at the target length."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures import lab, style
from paper_figures.averages import average, caption, scored
from paper_figures.inputs import Frames, Inputs, NoData
from paper_figures.names import short_length

TITLE = "The lab: place of the anchor against the score at the target length"
INPUTS = Inputs(rows={"ruler": lab.COLUMNS[:5]}, needs_rows=True, lab="only")
PLACES = {
    "contiguous": "no anchor",
    "endprompt": "at the fixed end",
    "endprompt-random": "at a random place",
    "anchors": "at one of {} ends",
    "endprompt-pose": "at the end, PoSE before it",
    "pose": "PoSE, no anchor",
}
#: What the end prompt is -> marker, its face in the legend, name.
MARKS = {
    "": ("s", "#444444", "no end prompt"),
    "EP_1": ("o", "white", "end prompt EP_1"),
    "recall": ("D", "#444444", "end prompt recall"),
}


def draw(frames: Frames) -> Figure:
    rows = lab.tidy(scored(frames, "ruler"))
    rows = rows[rows["main"] & (rows["length"] == rows["target"]) & rows["scaling"].isin(("linear", "yarn"))]
    rows = rows[~rows["kind"].str.startswith(("base", "full", "longlora"))]
    if rows.empty:
        raise NoData("needs arms with PI or YaRN, scored at their target length (columns scaling and target)")
    places = [kind for kind in PLACES if any(lab.arm_of(k) == kind for k in rows["kind"])]
    places += [kind for kind in dict.fromkeys(map(lab.arm_of, rows["kind"])) if kind not in places]
    chosen = list(lab.groups(rows))
    fig = style.figure(0.19 * len(places) + 1.3, 7.0)
    axes = fig.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    colors = {"linear": style.ARMS["contiguous"][0], "yarn": style.ARMS["endprompt"][0]}
    shown = []
    for ax, (_, _, _, part) in zip(axes, chosen):
        means = average(part, ["method"], ["task"]).set_index("method")
        shown.append(means)
        columns = ["kind", "cue", "scaling", "window", "fold", "target"]
        for arm in means.join(part.drop_duplicates("method").set_index("method")[columns]).itertuples():
            marker, face, _ = MARKS.get(arm.cue, ("v", "#444444", ""))
            color, shift = colors[arm.scaling], 0.13 if arm.scaling == "yarn" else -0.13
            y = places.index(lab.arm_of(arm.kind)) - shift + (0.06 if arm.cue == "EP_1" else -0.06)
            look = {"marker": marker, "color": color, "markerfacecolor": face if face == "white" else color}
            ax.hlines(y, arm.lo, arm.hi, color=color, linewidth=0.8)
            ax.plot(arm.value, y, markersize=3.8, linestyle="none", clip_on=False, zorder=3, **look)
        ax.set_xlim(0, 100)
        ax.set_xticks(range(0, 101, 25))
        ax.grid(axis="x")
        ax.set_title(f"window {arm.window:.0f}, {arm.fold:.0f}-fold", fontsize=7)
        ax.set_xlabel(f"score at {short_length(arm.target)}, percent")
    anchors = "/".join(sorted({f"{n:.0f}" for n in rows["anchors"].dropna()})) or "several"
    names = [PLACES.get(kind, kind).format(anchors) for kind in places]
    axes[0].set_yticks(range(len(places)), names)
    axes[0].set_ylim(len(places) - 0.5, -0.5)
    dot = {"color": "#444444", "linestyle": "none"}
    marks = [mark for cue, mark in MARKS.items() if cue in set(rows["cue"])]
    dots = {label: {"marker": marker, **dot, "markerfacecolor": face} for marker, face, label in marks}
    drawn = {scaling: color for scaling, color in colors.items() if scaling in set(rows["scaling"])}
    lines = {lab.scaling_name(scaling): {"color": color, "linewidth": 2.5} for scaling, color in drawn.items()}
    if not set(rows["cue"]) <= set(MARKS):
        dots["another prompt"] = {"marker": "v", **dot}
    fig.legend(handles=lab.handles(dots | lines), loc="outside lower center", ncols=6)
    style.note(fig, caption(rows, shown))
    return fig
