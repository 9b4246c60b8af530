"""Bound against measured: how much of the coefficient bound on the score's slope real heads use."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.data import Frames, Inputs
from paper_figures.figures.score_against_length import ordered_methods

TITLE = "Slope of the attention score over its bound, quantiles over heads and pairs"
INPUTS = Inputs(rows={"analysis": ("metric",)}, needs_rows=True)
#: Metrics of the rows: 1st, 50th and 99th percentile of max |S'| / sum a_j omega_j, and the share within the bound.
QUANTILES = ("slope_over_coefficient_bound_q01", "slope_over_coefficient_bound_q50", "slope_over_coefficient_bound_q99")
WITHIN = "share_within_coefficient_order1"


def draw(frames: Frames) -> Figure:
    rows = frames["analysis"].drop_duplicates(["method", "metric", "seed"])
    values = rows.pivot_table(index="method", columns="metric", values="value", aggfunc="mean")
    for metric in (*QUANTILES, WITHIN):
        if metric not in values:
            raise ValueError(f"{rows['origin'].iloc[0]}: the column 'metric' of suite 'analysis' must have {metric!r}")
    methods = ordered_methods(rows)
    fig = style.figure(0.9 + 0.28 * len(methods), 5.2)
    ax = fig.subplots()
    arms = list(dict.fromkeys(method.arm for method in methods.values()))
    for y, (name, method) in enumerate(methods.items()):
        low, middle, high = (values.loc[name, metric] for metric in QUANTILES)
        look = style.arm_style(method, arms)
        ax.plot([low, high], [y, y], color=look["color"], linewidth=3, alpha=0.45, solid_capstyle="butt")
        ax.plot(middle, y, color=look["color"], marker=look["marker"], markersize=5)
        share = values.loc[name, WITHIN]
        ax.text(1.06, y, f"{100 * share:.4g}% within", va="center", fontsize=6.5)
    ax.axvline(1, color="#222222", linewidth=1)
    ax.set_xlim(0, 1.0)
    ax.set_yticks(range(len(methods)), [method.label for method in methods.values()])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_xlabel(
        "largest slope of the score over all distances / coefficient bound\n(1st to 99th percentile, median marked)"
    )
    ax.grid(axis="x")
    return fig
