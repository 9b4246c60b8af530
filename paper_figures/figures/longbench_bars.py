"""LongBench: every checkpoint's bars by category, with both averages, and by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from paper_figures import style
from paper_figures.averages import average, interval_kind
from paper_figures.inputs import Frames, Inputs
from paper_figures.names import CATEGORIES, LONGBENCH, LONGBENCH_ZH, Method
from paper_figures.style import ordered_methods

TITLE = "LongBench by category and by set, all methods, 95% intervals"
INPUTS = Inputs(rows={"longbench": ()}, needs_rows=True)
NUMBERED = 36  # more bars than this in a panel have no room for their numbers


def draw(frames: Frames) -> Figure:
    rows = frames["longbench"].astype({"value": float, "lo": float, "hi": float})
    sets = {c: [n for n in (*LONGBENCH[c], *LONGBENCH_ZH.get(c, ())) if n in set(rows["task"])] for c in LONGBENCH}
    rows = rows[rows["task"].isin([name for names in sets.values() for name in names])]
    methods = ordered_methods(rows)
    looks = looks_of(methods)
    by_category = categories(rows)
    by_set = {name: average(rows[rows["task"] == name], ["method"]) for names in sets.values() for name in names}
    fig = style.figure(5.2 if by_category else 3.2)
    axes = list(fig.subplots(2 if by_category else 1, 1, squeeze=False)[:, 0])
    if by_category:
        grouped_bars(axes[0], by_category, looks)
        axes[0].set_title("by category, English sets")
    ax = axes[-1]
    grouped_bars(ax, by_set, looks)
    ax.set_xticks(ax.get_xticks(), list(by_set), rotation=90)
    ax.set_title("by set", pad=14)
    name_categories(ax, sets)
    keys = [Patch(**looks[name], label=method.label) for name, method in methods.items()]
    fig.legend(handles=keys, loc="outside upper center", ncols=min(4, len(keys)))
    n = sorted({int(v) for v in rows["n"].dropna()})
    samples = f"{n[0]} documents a set; " if len(n) == 1 else f"{n[0]} to {n[-1]} documents a set; " if n else ""
    note = f"measured here; {samples}{interval_kind(next(iter(by_set.values())))}"
    fig.supxlabel(note, fontsize=6.5, color="#555555")
    return fig


def categories(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Averages by method of each category all of whose English sets were run, then the two published averages."""
    run = set(rows["task"])
    whole = {CATEGORIES[category]: names for category, names in LONGBENCH.items() if set(names) <= run}
    members = {label: rows[rows["task"].isin(names)] for label, names in whole.items()}
    found = {label: average(part, ["method"]) for label, part in members.items()}
    if len(found) == len(LONGBENCH):
        means = [average(part, ["method", "seed"]).assign(task=label) for label, part in members.items()]
        found["mean of\n6 categories"] = average(pd.concat(means), ["method"], ["task"])
        found["mean of\n16 sets"] = average(pd.concat(members.values()), ["method"])
    return found


def grouped_bars(ax: Axes, groups: Mapping[str, pd.DataFrame], looks: Mapping[str, Mapping[str, Any]]) -> None:
    width = 0.8 / len(looks)
    for i, (name, look) in enumerate(looks.items()):
        for x, means in enumerate(groups.values()):
            place = x + width * (i - (len(looks) - 1) / 2)
            for value, lo, hi in means.loc[means["method"] == name, ["value", "lo", "hi"]].to_numpy(float):
                text = f"{value:.0f}" if len(groups) * len(looks) <= NUMBERED else ""
                if line := style.bar(ax, place, value, 0.92 * width, style.on_scale(lo, hi), text, line=0.7, **look):
                    line.set_path_effects([withStroke(linewidth=1.3, foreground="white")])  # seen on a dark bar too
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.tick_params(axis="x", length=0)
    style.percent_axis(ax)
    ax.set_ylim(0, 110)  # room for the number above a bar of 100


def looks_of(methods: Mapping[str, Method]) -> dict[str, dict[str, Any]]:
    """Colour of each method's arm; a second scaling of an arm is hatched."""
    arms = list(dict.fromkeys(method.arm for method in methods.values()))
    looks: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        color = style.arm_style(method, arms)["color"]
        again = any(look["facecolor"] == color for look in looks.values())
        looks[name] = {"facecolor": color, "hatch": style.MEASURED_HATCH if again else None}
    return looks


def name_categories(ax: Axes, sets: Mapping[str, Sequence[str]]) -> None:
    """Category names above their sets where there is room, and a thin line between categories."""
    total, start = sum(map(len, sets.values())), 0
    for category, names in sets.items():
        room = 120 * len(names) / total  # letters of 6 pt in the part of the axes that the sets take
        label = CATEGORIES[category]
        label = label if len(names) > 0.11 * total else label.replace(" ", "\n")
        if max(map(len, label.split("\n"))) <= room:
            middle = start + (len(names) - 1) / 2
            ax.text(middle, 1.02, label, transform=ax.get_xaxis_transform(), ha="center", fontsize=6, color="#555555")
        start += len(names)
        if names and start < total:
            ax.axvline(start - 0.5, color="#DDDDDD", linewidth=0.6, zorder=0)
