"""Figure 4: what training costs. Memory and hours per billion tokens at 32K and 64K, published and measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import short_length

TITLE = "Figure 4: memory and time of training at 32K and 64K"
INPUTS = Inputs(
    files={"published/figure_4": ("panel", "x", "series", "value", "reading_error", "device", "source")},
    rows={"training-speed": ("metric", "environment")},
)
#: Panels of the published figure -> axis labels, published and measured, and the metric of the measured rows.
PANELS = {
    "memory_gb": ("peak memory, GB per GPU", "peak memory, GiB per GPU", "peak_gib"),
    "time_h": ("hours per billion tokens", "hours per billion tokens", "hours_per_1b_tokens"),
}
#: Methods of the measured rows, and the published one that each repeats.
METHODS = {"reference": "LCEG", "longlora": "LongLoRA", "full": "Full FT", "endprompt": "EndPrompt"}


def draw(frames: Frames) -> Figure:
    published, rows = frames["published/figure_4"], fastest(frames["training-speed"])
    fig = style.figure(4.2 if len(rows) else 2.2)
    axes = fig.subplots(2 if len(rows) else 1, 2, squeeze=False)
    for column, (panel, (label, measured_label, metric)) in enumerate(PANELS.items()):
        part = published[published["panel"] == panel]
        values = part.pivot(index="series", columns="x", values="value").loc[part["series"].unique()]
        errors = part.pivot(index="series", columns="x", values="reading_error")
        grouped_bars(axes[0, column], values, style.PUBLISHED, errors)
        axes[0, column].set_title(f"published, {part['device'].iloc[0]}")
        axes[0, column].set_ylabel(label)
        if len(rows):
            means = rows.pivot_table(index="method", columns="length", values=metric)
            means = means.loc[[method for method in METHODS if method in means.index]]
            colors = {method: style.PUBLISHED[name] for method, name in METHODS.items()}
            least = rows[rows["least"]] if metric == "peak_gib" else rows.iloc[:0]
            grouped_bars(axes[1, column], means, colors, None, set(zip(least["method"], least["length"])))
            if len(least):
                why = "≥: taken before AdamW's moments stood beside activations"
                axes[1, column].set_xlabel(why, fontsize=6, color="#555555")
            axes[1, column].set_title(f"measured here, {', '.join(rows['device'].unique())}")
            axes[1, column].set_ylabel(measured_label)
    for line in axes:
        line[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """The fastest measurement of each method at each published length: method, length, device and both metrics. Methods
    are compared at one precision and on one GPU: rows with float8 products, short gradient sums or several processes
    are left out."""
    lengths = (32768, 65536)
    if "setting" in rows:
        rows = rows[rows["setting"].map(comparable).astype(bool)]
    rows = rows[rows["method"].isin(METHODS) & rows["length"].isin(lengths)]
    metrics = [metric for *_, metric in PANELS.values()]
    if not set(metrics) <= set(rows["metric"]):
        return rows.iloc[:0]
    times = rows["environment"].map(lambda environment: environment.get("time", ""))  # a task may be run again
    rows = rows.assign(device=rows["environment"].map(device_name), time=times)
    rows["least"] = peak_is_a_bound(rows)
    keys = ["method", "length", "device", "task", "time", "least"]
    wide = rows.pivot_table(index=keys, columns="metric", values="value", aggfunc="last")
    wide = wide[metrics].dropna().reset_index()
    return wide.sort_values("hours_per_1b_tokens").drop_duplicates(["method", "length"])


def comparable(setting: Any) -> bool:
    """Whether a row is of one GPU, its products in bfloat16 and its gradients summed in float32. So it is where it does
    not say otherwise."""
    setting = setting if isinstance(setting, dict) else {}
    usual = {"float8": "none", "sums": "float32", "processes": 1}
    return all(setting.get(key, value) == value for key, value in usual.items())


def peak_is_a_bound(rows: pd.DataFrame) -> pd.Series:
    """Whether a row's peak is only a lower bound. So it is with AdamW where the memory held before the peak was taken
    (`held_gib`) was not measured: the first update, which makes the moments, came after the micro-batch."""
    if "setting" not in rows:
        return pd.Series(False, rows.index)
    adamw = rows["setting"].map(lambda setting: isinstance(setting, dict) and setting.get("optimizer") == "adamw")
    held = (rows["metric"] == "held_gib").groupby([rows[key] for key in ("method", "length", "task", "time")])
    return adamw.astype(bool) & ~held.transform("any")


def device_name(environment: dict[str, Any]) -> str:
    device = environment.get("device", {})
    return device.get("gpu") or f"{device.get('machine', 'unknown')} CPU"


def grouped_bars(
    ax: Axes,
    values: pd.DataFrame,
    colors: Mapping[str, str],
    errors: pd.DataFrame | None,
    least: Collection[tuple[str, int]] = (),
) -> None:
    """Groups by length, one bar a method; published bars that were read off the chart carry the error of reading.
    `least`: (method, length) of the bars that are lower bounds."""
    width = 0.8 / len(values)
    for i, name in enumerate(values.index):
        for group, length in enumerate(values.columns):
            value = values.loc[name, length]
            if value != value:
                continue
            x = group + (i - (len(values) - 1) / 2) * width
            error = 0.0 if errors is None else errors.loc[name, length]
            look: dict[str, Any] = {"color": colors[name], "hatch": style.MEASURED_HATCH if errors is None else None}
            text = f"≥{value:.1f}" if (name, length) in least else f"{value:.1f}"
            ends = (value - error, value + error) if error else None
            style.bar(ax, x, value, width * 0.92, ends, text, label=name if group == 0 else None, **look)
    ax.set_xticks(range(len(values.columns)), [short_length(length) for length in values.columns])
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, float(values.max().max()) * 1.15)
    ax.grid(axis="y")
