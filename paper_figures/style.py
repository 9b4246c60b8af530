"""Appearance: the one `.mplstyle`, a colour, marker and line for each method, and saving the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from paper_figures.names import Method, parse_method

STYLE = Path(__file__).with_name("journal.mplstyle")

#: Okabe and Ito's colours (all types of colour blindness tell them apart), and a marker so that no colour is needed.
ARMS = {
    "base": ("#000000", "o"),
    "contiguous": ("#E69F00", "s"),
    "endprompt": ("#0072B2", "^"),
    "endprompt-random": ("#56B4E9", "v"),
    "recall": ("#D55E00", "D"),
    "pose": ("#009E73", "P"),
    "endprompt-pose": ("#CC79A7", "X"),
    "anchors": ("#999999", "*"),
    "full": ("#666666", "p"),
    "longlora": ("#882255", "h"),
}

OTHERS = (("#44AA99", "<"), ("#332288", ">"), ("#999933", "d"), ("#AA4499", "8"), ("#6699CC", "H"))

LINES = {"": ":", "none": ":", "linear": (0, (4, 1.5)), "yarn": "-", "ntk": "-.", "llama3": (0, (5, 1, 1, 1, 1, 1))}

#: The paper's four methods and its own extensions, where no scheme of ours is meant.
PUBLISHED = {
    "EndPrompt": "#0072B2",
    "ET": "#0072B2",
    "PoSE": "#009E73",
    "ET(PoSE)": "#CC79A7",
    "LCEG": "#E69F00",
    "LongLoRA": "#56B4E9",
    "Full FT": "#7F7F7F",
}

MEASURED_HATCH = "////"


@contextmanager
def journal() -> Iterator[None]:
    """Matplotlib's defaults plus the project's style, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.style.use(STYLE)
        yield


def figure(height: float, width: float = 7.0) -> Figure:
    """An empty figure, width and height in inches; it belongs to no window and no global state."""
    fig = Figure(figsize=(width, height))
    FigureCanvasAgg(fig)
    return fig


def look(arm: str, arms: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of an arm. `arms`: all arms drawn, to place unknown ones."""
    unknown = [other for other in arms if other not in ARMS]
    return ARMS.get(arm) or OTHERS[unknown.index(arm) % len(OTHERS)]


def arm_style(method: Method, arms: list[str]) -> dict[str, Any]:
    """Look of a method's arm, line of its scaling."""
    color, marker = look(method.arm, arms)
    return {"color": color, "marker": marker, "linestyle": LINES.get(method.scaling, "-")}


def percent_axis(ax: Axes, label: str | None = "score, percent") -> None:
    ax.set_ylim(0, 100)
    ax.set_yticks(range(0, 101, 25))
    ax.grid(axis="y")
    if label:
        ax.set_ylabel(label)


def note(fig: Figure, text: str) -> None:
    fig.suptitle(text, fontsize=6.5, color="#555555", x=0.01, ha="left")


def bar(
    ax: Axes,
    x: float,
    value: float,
    width: float,
    ends: tuple[float, float] | None,
    text: str,
    line: float = 0.8,
    size: float = 6.0,
    lift: float = 1.5,
    **look: Any,
) -> LineCollection | None:
    ax.bar(x, value, width, zorder=2, **look)
    drawn = ax.vlines(x, *ends, color="#222222", linewidth=line, zorder=3) if ends else None
    if text:
        top = (x, ends[1] if ends else value)
        ax.annotate(text, top, (0, lift), textcoords="offset points", ha="center", fontsize=size)
    return drawn


def on_scale(lo: float, hi: float) -> tuple[float, float] | None:
    """An interval cut at 0 and 100, since few seeds can have one that leaves the scale; None where there is none."""
    return (max(lo, 0.0), min(hi, 100.0)) if lo == lo else None


def save(fig: Figure, stem: Path) -> list[Path]:
    """PDF and PNG, byte-identical for identical content: no dates, no version of the software."""
    pdf, png = stem.with_suffix(".pdf"), stem.with_suffix(".png")
    fig.savefig(pdf, metadata={"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None})
    fig.savefig(png, metadata={"Software": None})
    return [pdf, png]


Methods = dict[str, Method]


def ordered_methods(rows: pd.DataFrame) -> Methods:
    """Method column -> its parts, in the order in which arms and scalings are listed."""
    parsed = {name: parse_method(name) for name in rows["method"].unique()}

    def place(name: str) -> tuple[int, int, str]:
        listed = ((parsed[name].arm, list(ARMS)), (parsed[name].scaling, list(LINES)))
        arm, scaling = (order.index(own) if own in order else len(order) for own, order in listed)
        return arm, scaling, name

    return {name: parsed[name] for name in sorted(parsed, key=place)}
