"""What goes with the score and what only seemed to: measures taken before training against the score at the target."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from paper_figures import lab, style
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import SCALINGS, SCHEMES

TITLE = "Measures of a scaling and a scheme before training against the score, each arm of the lab and of a study"
COLUMNS = ("metric", "arm", "scaling", "score", "base", "target", "half")
INPUTS = Inputs(rows={"analysis": COLUMNS}, needs_rows=True, lab="only")
#: Metric -> name of its axis.
SHOWN = {
    "smoothness": "smoothness constant",
    "gap_rows": "gap error, rows alone",
    "entropy": "entropy, nats over the base's",
    "best_pair": "best pair, points",
}
MARKERS = {"none": "x", "linear": "o", "ntk": "v", "yarn": "s", "llama3": "D"}


def draw(frames: Frames) -> Figure:
    """A row of panels for each base and target; colour tells the scheme, marker the scaling."""
    rows = frames["analysis"]
    rows = rows[rows["task"].eq("predict") & rows["metric"].isin(SHOWN) & ~rows["half"].isin(["later", "controls"])]
    shown = [metric for metric in SHOWN if metric in set(rows["metric"])]
    settings = rows[["window", "target", "base"]].drop_duplicates().sort_values(["window", "target"])
    schemes = list(dict.fromkeys(sorted(map(scheme_of, rows.to_dict("records")))))
    colors = {scheme: style.look(scheme, schemes)[0] for scheme in schemes}
    fig = style.figure(1.45 * len(settings) + 0.9)
    grid = fig.subplots(len(settings), len(shown), sharex="col", sharey="row", squeeze=False)
    for axes, setting in zip(grid, settings.itertuples()):
        part = rows[(rows["base"] == setting.base) & (rows["target"] == setting.target)]
        for ax, metric in zip(axes, shown):
            points = part[part["metric"] == metric]
            for point in points.to_dict("records"):
                look = {"color": colors[scheme_of(point)], "marker": MARKERS.get(point["scaling"], "*")}
                ax.plot(point["value"], point["score"], markersize=3.5, clip_on=False, linestyle="none", **look)
            ax.set_title(correlation(points), loc="right", fontweight="normal", fontsize=6.5)
            ax.grid(axis="y")
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("score, percent")
        base = f"base {setting.base}" if setting.base.isdigit() else setting.base.split("-")[0]
        axes[0].set_title(f"{base}, to {int(setting.target)}", loc="left", fontsize=7)
    for ax, metric in zip(grid[-1], shown):
        ax.set_xlabel(SHOWN[metric])
    drawn = [scaling for scaling in MARKERS if scaling in set(rows["scaling"])]
    marks = {SCALINGS.get(s, s): {"marker": MARKERS[s], "color": "#444444"} for s in drawn}
    handles = [Line2D([], [], color=c, linewidth=2.5, label=SCHEMES.get(s, s)) for s, c in colors.items()]
    fig.legend(handles=handles + lab.handles(marks, line=False), loc="outside lower center", ncols=6)
    note = "one point an arm, mean over seeds and tasks; ρ: rank correlation with the score among the arms of a panel"
    style.note(fig, note)
    return fig


def correlation(points: pd.DataFrame) -> str:
    if len(points) < 3 or points["value"].nunique() < 2 or points["score"].nunique() < 2:
        return ""
    return f"ρ {spearmanr(points['value'], points['score']).statistic:+.2f}"


def scheme_of(row: dict) -> str:
    """The arm's scheme as the lab's figures colour it; what was not trained is `untrained`, full length `full`."""
    if not isinstance(row["scheme"], str):
        return "untrained"
    return "full" if str(row["arm"]).startswith("full") else row["scheme"]
