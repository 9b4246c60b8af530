"""Bound against measured: how much of the bounds on the score's slope real heads use."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures import style
from paper_figures.inputs import Frames, Inputs
from paper_figures.style import ordered_methods

TITLE = "Slope of the attention score over its bounds, quantiles over heads and pairs"
INPUTS = Inputs(rows={"analysis": ("metric",)}, needs_rows=True)
#: Bound -> share of pairs within it, name, look. The slope's 1st, 50th and 99th percentile over the bound are the
#: metrics slope_over_BOUND_bound_q01, _q50 and _q99.
BOUNDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "coefficient": ("share_within_coefficient_order1", "coefficient bound", {"color": "#0072B2", "marker": "o"}),
    "bernstein": ("share_within_bernstein_order1", "Bernstein bound", {"color": "#D55E00", "marker": "D"}),
}


def draw(frames: Frames) -> Figure:
    rows = frames["analysis"]
    rows = rows[rows["task"] == "bounds"]
    for column in ("stratum", "layer"):  # parts of the whole
        if column in rows:
            rows = rows[rows[column].isna()]
    values = rows.pivot_table(index="method", columns="metric", values="value", aggfunc="mean")
    methods = ordered_methods(rows)
    fig = style.figure(1.2 + 0.34 * len(methods), 5.4)
    ax = fig.subplots()
    for y, name in enumerate(methods):
        for (bound, (within, _, look)), shift in zip(BOUNDS.items(), (-0.14, 0.14)):
            quantiles = [f"slope_over_{bound}_bound_q{q}" for q in ("01", "50", "99")]
            for metric in (*quantiles, within):
                if metric not in values or values.loc[name, metric] != values.loc[name, metric]:
                    origin = rows[rows["method"] == name]["origin"].iloc[0]
                    raise ValueError(f"{origin}: rows of {name!r} must have {metric!r} in the column 'metric'")
            low, middle, high = values.loc[name, quantiles]
            ax.plot([low, high], [y + shift] * 2, color=look["color"], linewidth=3, alpha=0.45, solid_capstyle="butt")
            ax.plot(middle, y + shift, markersize=4.5, linestyle="none", **look)
        shares = " / ".join(f"{100 * values.loc[name, within]:.4g}%" for within, *_ in BOUNDS.values())
        place: dict[str, Any] = {"va": "center", "fontsize": 6.5, "annotation_clip": False}
        ax.annotate(shares, (1, y), (6, 0), textcoords="offset points", **place)
    ax.axvline(1, color="#222222", linewidth=1)
    ax.set_xscale("log")
    ax.set_xlim(right=1)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: "")
    ax.set_yticks(range(len(methods)), [method.label for method in methods.values()])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_xlabel("largest slope of the score over all distances / bound (1st to 99th percentile, median)")
    ax.set_title("share within both bounds", loc="right", fontsize=6.5, fontweight="normal")
    ax.grid(axis="x")
    handles = [Line2D([], [], linewidth=3, label=name, **look) for _, name, look in BOUNDS.values()]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig
