"""The page of `endprompt verify`, drawn from curves.json alone: no torch, no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

SHEET = "analysis.mplstyle"
OBSERVED, BOUND, BERNSTEIN, SCORE = "#d9e8d3", "#b2182b", "#ef8a62", "#2166ac"


def draw(source: str | Path, target: str | Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Draw the page from curves.json; returns the files written (target plus each format's suffix)."""
    from matplotlib import style
    from matplotlib.figure import Figure

    curves = json.loads(Path(source).read_text(encoding="utf-8"))
    with as_file(files("analysis") / SHEET) as sheet, style.context(str(sheet)):
        figure = Figure(figsize=(10, 6), layout="constrained")
        score_panels(figure, curves)
        written = []
        for kind in formats:
            path = Path(target).with_suffix(f".{kind}")
            figure.savefig(path)
            written.append(path)
    return written


def chosen(curves: Sequence[Any], number: int = 3) -> list[Any]:
    """First, middle and last layer."""
    places = np.unique(np.linspace(0, len(curves) - 1, number).round().astype(int))
    return [curves[place] for place in places]


def score_panels(figure: Any, curves: dict[str, Any]) -> None:
    """S, S' and S'' against distance: one column a head, one row an order."""
    heads = chosen(curves["curves"])
    axes = figure.subplots(3, len(heads), sharex=True, squeeze=False)
    names = ("logit S(d)", "S′(d), per token", "S″(d), per token²")
    for column, head in enumerate(heads):
        for order, name in enumerate(names):
            axis, data = axes[order][column], head["orders"][order]
            shade(axis, curves)
            axis.fill_between(head["distance"], data["low"], data["high"], color=SCORE, lw=0.6, zorder=3)
            for sign in (-1, 1):
                axis.axhline(sign * data["coefficient"], color=BOUND, lw=1, zorder=2)
                if order:
                    axis.axhline(sign * data["bernstein"], color=BERNSTEIN, lw=1, ls="--", zorder=2)
            top = max(data["coefficient"], data["bernstein"])
            axis.set_ylim(-1.15 * top, 1.15 * top)
            if column == 0:
                axis.set_ylabel(name)
        axes[0][column].set_title(f"layer {head['layer']}, head {head['head']}: token {head['query']} to {head['key']}")
        axes[-1][column].set_xlabel("relative distance d (tokens)")
    lo, hi = max(curves["gap"], key=lambda interval: interval[1] - interval[0])
    axes[0][0].annotate(
        f"gap [{lo}, {hi}]", ((lo + hi) / 2, 0.13), xycoords=("data", "axes fraction"), ha="center", va="bottom"
    )
    legend(figure, curves)


def shade(axis: Any, curves: dict[str, Any]) -> None:
    for lo, hi in curves["observed"]:
        axis.axvspan(lo - 0.5, hi + 0.5, color=OBSERVED, lw=0, zorder=0)
    axis.set_xlim(0, curves["length"] - 1)


def legend(figure: Any, curves: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Line2D([], [], color=SCORE, label="score of this pair"),
            Line2D([], [], color=BOUND, label="coefficient bound"),
            Line2D([], [], color=BERNSTEIN, ls="--", label="Bernstein"),
            Patch(color=OBSERVED, label="observed distances"),
            Patch(facecolor="white", edgecolor="0.7", label="gap: never observed"),
        ],
        loc="outside lower center",
        ncols=5,
        title=f"{curves['checkpoint']}: bounds hold at every real distance; Bernstein's constant says more than "
        f"2 sup|S| only within {curves['radius']:.3g} tokens",
    )
