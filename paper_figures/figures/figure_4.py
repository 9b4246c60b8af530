"""Figure 4: what training costs. Memory and hours per billion tokens at 32K and 64K, published and measured."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.data import Frames, Inputs
from paper_figures.figures.score_against_length import ordered_methods
from paper_figures.names import short_length

TITLE = "Figure 4: memory and time of training at 32K and 64K"
INPUTS = Inputs(
    files={"published/figure_4": ("panel", "x", "series", "value", "reading_error", "device", "source")},
    rows={"speed": ("metric", "device")},
)
#: Panels of the published figure -> axis label, and the metric of the rows that stands beside it.
PANELS = {
    "memory_gb": ("peak memory, GB per GPU", "peak_memory_gb"),
    "time_h": ("hours per billion tokens", "hours_per_1b_tokens"),
}


def draw(frames: Frames) -> Figure:
    published, rows = frames["published/figure_4"], frames["speed"]
    rows = rows[rows["metric"].isin(metric for _, metric in PANELS.values())]
    methods = ordered_methods(rows)
    fig = style.figure(4.2 if methods else 2.2)
    axes = fig.subplots(2 if methods else 1, 2, squeeze=False)
    for column, (panel, (label, metric)) in enumerate(PANELS.items()):
        part = published[published["panel"] == panel]
        values = part.pivot(index="series", columns="x", values="value").loc[part["series"].unique()]
        errors = part.pivot(index="series", columns="x", values="reading_error")
        colors = {series: style.PUBLISHED[series] for series in values.index}
        grouped_bars(axes[0, column], values, colors, errors)
        axes[0, column].set_title(f"published, {part['device'].iloc[0]}")
        if methods:
            part = rows[rows["metric"] == metric]
            means = part.pivot_table(index="method", columns="length", values="value", sort=False)
            means = means.loc[[name for name in methods if name in means.index]]
            arms = list(dict.fromkeys(method.arm for method in methods.values()))
            colors = {name: style.arm_style(methods[name], arms)["color"] for name in means.index}
            means.index = [methods[name].label for name in means.index]
            colors = dict(zip(means.index, colors.values()))
            grouped_bars(axes[1, column], means, colors, None)
            axes[1, column].set_title(f"measured here, {', '.join(rows['device'].unique())}")
        for ax in axes[:, column]:
            ax.set_ylabel(label)
    for line in axes:
        line[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def grouped_bars(ax: Axes, values: pd.DataFrame, colors: dict[str, str], errors: pd.DataFrame | None) -> None:
    """Groups by length, one bar a method; published bars that were read off the chart carry the error of reading."""
    width = 0.8 / len(values)
    for i, name in enumerate(values.index):
        for group, length in enumerate(values.columns):
            value = values.loc[name, length]
            if value != value:
                continue
            x = group + (i - (len(values) - 1) / 2) * width
            hatch = style.MEASURED_HATCH if errors is None else None
            label = name if group == 0 else None
            ax.bar(x, value, width * 0.92, color=colors[name], hatch=hatch, label=label, zorder=2)
            error = 0.0 if errors is None else errors.loc[name, length]
            if error:
                ax.vlines(x, value - error, value + error, color="#222222", linewidth=0.8, zorder=3)
            text = f"{value:.1f}"
            ax.annotate(text, (x, value + error), (0, 1.5), textcoords="offset points", ha="center", fontsize=6)
    ax.set_xticks(range(len(values.columns)), [short_length(length) for length in values.columns])
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, float(values.max().max()) * 1.15)
    ax.grid(axis="y")
