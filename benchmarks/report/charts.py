"""Charts of the report, as inline SVG that reads files no more: each takes numbers and returns markup.

A chart is 340 units wide, so that its text keeps its size on a phone. Colours are classes (`s0`, `s1` ...) that the
page's style sheet sets for light, dark and print; a series has a marker and a dash of its own beside its colour. What a
pointer or the keyboard can reach carries its value as `data-v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH = 340
#: Series told apart in one chart, by colour, marker and dash.
STYLES = 8
DASHES = ("none", "6 3", "2 3", "8 3 2 3", "4 2", "1 3", "10 4", "6 2 2 2")
#: Points of a curve that can be reached one by one.
STOPS = 24


@dataclass(frozen=True)
class Point:
    """One value with its interval, if it has one; spoken: what is shown and read out for it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    spoken: str = ""


@dataclass(frozen=True)
class Series:
    """A named line; style: number of its colour, marker and dash."""

    name: str
    points: Sequence[Point]
    style: int = 0


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element, all in it escaped. `text_anchor` is text-anchor, `class_` is class, None is left out."""
    given = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), short(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, Markup("").join(escape(c) for c in children))


def short(value: Any) -> str:
    """A number with at most two decimals, anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def picture(title: str, description: str, height: float, *parts: Any, width: float = WIDTH, key: str) -> Markup:
    """The SVG around a chart's parts. key: unique in the page, for the ids of its name and description."""
    head = [tag("title", title, id=f"{key}-t"), tag("desc", description, id=f"{key}-d")]
    about = {"role": "group", "aria_labelledby": f"{key}-t", "aria_describedby": f"{key}-d"}
    return tag("svg", *head, *parts, viewBox=f"0 0 {width} {short(float(height))}", class_="chart", **about)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, steps of 1, 2 or 5 times a power of ten, about `count` of them."""
    span = max(high - low, 1e-12)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tokens(count: float) -> str:
    """`4K`, `64K`, `1M`, or the number as it is where it is no multiple of 1024."""
    whole = round(count)
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if whole and whole % unit == 0:
            return f"{whole // unit}{name}"
    return f"{whole:,}"


def marker(x: float, y: float, style: int, spoken: str, hidden: bool = False) -> Markup:
    """The mark of a value, reachable by pointer and keyboard."""
    r = 4.0
    shapes = (
        f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0",
        f"M{x - 3.5:.1f},{y - 3.5:.1f}h7v7h-7z",
        f"M{x:.1f},{y - 4.6:.1f}l4.4,8h-8.8z",
        f"M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z",
        f"M{x:.1f},{y + 4.6:.1f}l4.4,-8h-8.8z",
        f"M{x - 1.4:.1f},{y - 4.6:.1f}h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2z",
        f"M{x - 5:.1f},{y - 2.5:.1f}h10v5h-10z",
        f"M{x - 2.5:.1f},{y - 5:.1f}h5v10h-5z",
    )
    kind = "stop" if hidden else f"mark s{style % STYLES}"
    return tag("path", d=shapes[style % len(shapes)], class_=kind, role="img", aria_label=spoken, data_v=spoken)


def swatch(style: int) -> Markup:
    """Line and marker of a series, for a legend made of text."""
    line = tag("path", d="M1,8h26", class_=f"line s{style % STYLES}", stroke_dasharray=DASHES[style % STYLES])
    shape = tag("g", marker(14, 8, style, "").replace(Markup(' role="img"'), Markup("")), aria_hidden="true")
    return tag("svg", line, shape, viewBox="0 0 28 16", class_="swatch", aria_hidden="true", width=28, height=16)


@dataclass(frozen=True)
class Frame:
    """Where values lie in a chart, and its axes."""

    x_of: Callable[[float], float]
    y_of: Callable[[float], float]
    axes: Markup
    height: float


def frame(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
    height: float = 220,
    log: bool = False,
) -> Frame:
    """Axes over the ranges; log: the horizontal one is logarithmic."""
    left, right, top, bottom = 44.0, WIDTH - 12.0, 22.0, height - 40.0
    scale = math.log2 if log else float
    low, high = scale(x_range[0]), scale(x_range[1])

    def x_of(x: float) -> float:
        return left + (right - left) * ((scale(x) - low) / (high - low) if high > low else 0.5)

    def y_of(y: float) -> float:
        return bottom - (bottom - top) * (y - y_range[0]) / max(y_range[1] - y_range[0], 1e-12)

    parts = [tag("text", y_label, x=4, y=12, class_="label")]
    for value, name in y_ticks:
        parts.append(tag("path", d=f"M{left},{y_of(value):.1f}H{right}", class_="grid"))
        parts.append(tag("text", name, x=left - 6, y=y_of(value) + 4, text_anchor="end"))
    for value, name in x_ticks:
        parts.append(tag("path", d=f"M{x_of(value):.1f},{bottom}v4", class_="axis"))
        parts.append(tag("text", name, x=x_of(value), y=bottom + 16, text_anchor="middle"))
    parts.append(tag("path", d=f"M{left},{bottom}H{right}", class_="axis"))
    parts.append(tag("text", x_label, x=(left + right) / 2, y=height - 6, text_anchor="middle", class_="label"))
    return Frame(x_of, y_of, tag("g", *parts, aria_hidden="true"), height)


def against_length(title: str, series: Sequence[Series], key: str, window: int | None = None) -> Markup:
    """Scores in percent against length, intervals as bars; the lines lie side by side where they share a length."""
    lengths = sorted({point.x for one in series for point in one.points})
    pad = 1.25
    shown = [(x, tokens(x)) for x in lengths if len(lengths) < 8 or x in lengths[::2] or x == lengths[-1]]
    percent = [(y, str(y)) for y in (0, 25, 50, 75, 100)]
    f = frame(
        (lengths[0] / pad, lengths[-1] * pad), (0, 100), shown, percent, "length (tokens)", "score (percent)", log=True
    )
    parts = [f.axes]
    if window and lengths[0] < window < lengths[-1]:
        parts.append(tag("path", d=f"M{f.x_of(window):.1f},{f.y_of(0):.1f}V{f.y_of(100):.1f}", class_="limit"))
    apart = min(5.0, 26.0 / max(len(series), 1))
    for number, one in enumerate(series):
        aside = (number - (len(series) - 1) / 2) * apart
        places = [(f.x_of(p.x) + aside, f.y_of(p.y), p) for p in sorted(one.points, key=lambda p: p.x)]
        style = f"s{one.style % STYLES}"
        line = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        drawn = [tag("path", d=line, class_=f"line {style}", stroke_dasharray=DASHES[one.style % STYLES])]
        for x, _, p in places:
            if p.low is not None and p.high is not None:
                span = f"M{x:.1f},{f.y_of(p.low):.1f}V{f.y_of(p.high):.1f}"
                drawn.append(tag("path", d=span, class_=f"whisker {style}"))
        drawn += [marker(x, y, one.style, p.spoken) for x, y, p in places]
        parts.append(tag("g", *drawn))
    description = f"{len(series)} lines over lengths from {tokens(lengths[0])} to {tokens(lengths[-1])} tokens."
    return picture(title, description + " The values are in the table below.", f.height, *parts, key=key)


def curves(title: str, series: Sequence[Series], x_label: str, y_label: str, key: str) -> Markup:
    """Curves of many points, such as a loss; some points of each can be reached one by one."""
    every = [point for one in series for point in one.points]
    x_low, x_high = min(p.x for p in every), max(p.x for p in every)
    y_low, y_high = min(p.y for p in every), max(p.y for p in every)
    room = 0.06 * max(y_high - y_low, 1e-3 * max(abs(y_high), 1e-9))
    y_low, y_high = y_low - room, y_high + room
    x_low, x_high = (x_low, x_high) if x_high > x_low else (x_low - 1, x_high + 1)
    marks = ticks(y_low, y_high)
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if len(marks) > 1 else 2
    names = [(y, f"{y:.{decimals}f}") for y in marks]
    f = frame((x_low, x_high), (y_low, y_high), [(x, f"{x:,.0f}") for x in ticks(x_low, x_high, 4)], names, x_label,
              y_label)  # fmt: skip
    parts = [f.axes]
    for one in series:
        places = [(f.x_of(p.x), f.y_of(p.y), p) for p in one.points]
        line = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        drawn = [tag("path", d=line, class_=f"line s{one.style % STYLES}", stroke_dasharray=DASHES[one.style % STYLES])]
        drawn += [marker(x, y, one.style, p.spoken, hidden=True) for x, y, p in thinned(places, STOPS)]
        parts.append(tag("g", *drawn))
    description = f"{len(series)} curves. Values at some of the points are in the table below."
    return picture(title, description, f.height, *parts, key=key)


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly picked, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]


def ratios(title: str, rows: Sequence[tuple[str, Sequence[tuple[int, float, str]]]], key: str) -> Markup:
    """Values over their bounds, a row a bound; a value beyond the line at 1 breaks it.

    rows: (the bound's name, [(style, value over bound, what is spoken)]).
    """
    most = max([1.0, *(value for _, values in rows for _, value, _ in values if math.isfinite(value))]) * 1.08
    left, right, step = 12.0, WIDTH - 16.0, 40.0
    height = step * len(rows) + 52

    def x_of(value: float) -> float:
        return left + (right - left) * min(value, most) / most

    parts = []
    for number, (name, values) in enumerate(rows):
        y = 30 + step * number
        parts.append(tag("text", name, x=left, y=y - 12))
        parts.append(tag("path", d=f"M{left},{y}H{right}", class_="grid"))
        for place, (style, value, spoken) in enumerate(values):  # one below the other, so that none hides another
            parts.append(marker(x_of(value), y + 3.0 * (place - (len(values) - 1) / 2), style, spoken))
    bottom = 30 + step * len(rows) - 18
    parts.append(tag("path", d=f"M{x_of(1.0):.1f},6V{bottom}", class_="limit"))
    scale = [tag("path", d=f"M{left},{bottom}H{right}", class_="axis")]
    for value in ticks(0, most, 4):
        scale.append(tag("path", d=f"M{x_of(value):.1f},{bottom}v4", class_="axis"))
        scale.append(tag("text", f"{value:g}", x=x_of(value), y=bottom + 16, text_anchor="middle"))
    about = {"x": (left + right) / 2, "y": bottom + 31, "text_anchor": "middle", "class_": "label"}
    scale.append(tag("text", "largest value / bound; dashed: the bound", **about))
    description = "Largest value over its bound. The values are in the table below."
    return picture(title, description, height, *parts, tag("g", *scale, aria_hidden="true"), key=key)


def whisker(value: float, low: float | None, high: float | None, reach: float, spoken: str) -> Markup:
    """A difference with its interval on an axis from -reach to reach, for a cell of a table."""
    width, middle, y = 150.0, 75.0, 10.0

    def x_of(number: float) -> float:
        return middle + (middle - 6) * max(-1.0, min(1.0, number / reach))

    parts = [tag("path", d=f"M{middle},1V19", class_="axis")]
    if low is not None and high is not None:
        parts.append(tag("path", d=f"M{x_of(low):.1f},{y}H{x_of(high):.1f}", class_="whisker s0"))
    parts.append(tag("path", d=f"M{x_of(value) - 3.5:.1f},{y - 3.5}h7v7h-7z", class_="mark s0"))
    return tag("svg", *parts, viewBox=f"0 0 {width:g} 20", class_="cell", role="img", aria_label=spoken)


def scheme(
    title: str,
    draws: Sequence[Sequence[tuple[int, int, bool]]],
    target: int,
    window: int,
    observed: Sequence[tuple[int, int]] | None,
    key: str,
) -> Markup:
    """Position ids of a row, and the relative distances that such rows show.

    draws: for each row drawn the runs of consecutive position ids, inclusive, and whether a run is the end prompt.
    observed: intervals of distance, None if they are not known.
    """
    left, right = 12.0, WIDTH - 12.0

    def x_of(position: float) -> float:
        return left + (right - left) * position / target

    def bar(lo: int, hi: int, y: float, height: float, kind: str, spoken: str) -> Markup:
        size = {"x": x_of(lo), "y": y, "width": max(x_of(hi + 1) - x_of(lo), 2.0), "height": height}
        return tag("rect", **size, class_=kind, role="img", aria_label=spoken, data_v=spoken)

    parts = [tag("text", "positions of a row" if len(draws) == 1 else "positions, a line a row", x=left, y=12)]
    y = 20.0
    thick = 14.0 if len(draws) == 1 else 7.0
    for runs in draws:
        parts.append(tag("path", d=f"M{left},{y + thick / 2}H{right}", class_="grid"))
        for lo, hi, terminal in runs:
            spoken = f"{'end prompt' if terminal else 'context'}: positions {lo:,} to {hi:,}"
            parts.append(bar(lo, hi, y, thick, "fill s1" if terminal else "fill s0", spoken))
        y += thick + 3
    parts.append(tag("path", d=f"M{x_of(window):.1f},16V{y + 2:.1f}", class_="limit"))
    y += 4
    parts.append(tag("path", d=f"M{left},{y}H{right}", class_="axis"))
    for place, name, anchor in ((0, "0", "start"), (window, tokens(window), "middle"), (target, tokens(target), "end")):
        x = max(x_of(place), left + 26) if anchor == "middle" else x_of(place)
        parts.append(tag("text", name, x=x, y=y + 15, text_anchor=anchor))
    y += 36
    if observed is not None:
        parts.append(tag("text", "distances that such rows show", x=left, y=y))
        parts.append(tag("rect", x=left, y=y + 8, width=right - left, height=14.0, class_="hollow"))
        for lo, hi in observed:
            parts.append(bar(lo, hi, y + 8, 14.0, "fill s2", f"observed distances {lo:,} to {hi:,}"))
        y += 26
    description = "Where the tokens of a training row stand, and which distances between tokens that shows."
    return picture(title, description + " The numbers are in the table below.", y, *parts, key=key)
