"""Charts of the report: matplotlib draws them, as SVG that stands in the page and reads files no more.

A chart is 340 units wide, so that its text keeps its size on a phone. It is drawn in stand-in colours, which become the
style sheet's variables: light, dark and print are the page's. A series has a marker and a dash of its own beside its
colour. What a pointer or the keyboard can reach carries its value as `data-v`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

WIDTH = 340
STYLES = 8  # series told apart in one chart, by colour, marker and dash; a legend of text has the marker as a glyph
MARKERS, GLYPHS = "osD^vPX*", "●■◆▲▼✚✖★"
DASHES = ("-", (0, (4, 2)), (0, (1, 2)), (0, (5, 1, 1, 1)), (0, (2, 1)), (0, (1, 1)), (0, (6, 2)), (0, (4, 1, 1, 1)))
#: Stand-in colours by the name of the style sheet's variable.
COLOURS = {
    name: f"#0000{place:02x}"
    for place, name in enumerate((*(f"c{style}" for style in range(STYLES)), "ink", "soft", "line", "card", "limit"), 1)
}
STOPS = 24  # points of a curve that can be reached one by one
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 12, "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["soft"], "axes.edgecolor": COLOURS["soft"], "xtick.color": COLOURS["soft"],
    "xtick.labelcolor": COLOURS["ink"], "ytick.labelcolor": COLOURS["ink"], "ytick.major.size": 0,
    "axes.axisbelow": True, "grid.color": COLOURS["line"], "grid.linewidth": 1, "lines.linewidth": 1.8,
    "path.simplify": False,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One value with its interval, if it has one; spoken: what is shown and read out for it."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    spoken: str = ""


Series = tuple[str, Sequence[Point]]  # a line's name and its points


class Chart:
    """A figure of matplotlib and what its marks say."""

    def __init__(self) -> None:
        height, left, top, bottom = 220, 44, 22, 40
        self.figure = Figure(figsize=(WIDTH / 72, height / 72))
        sides = (left / WIDTH, bottom / height, (WIDTH - left - 12) / WIDTH, (height - top - bottom) / height)
        self.axes = self.figure.add_axes(sides)
        self.axes.spines[["left", "top", "right"]].set_visible(False)
        self.spoken: dict[str, tuple[str, str]] = {}

    def point(self, x: float, y: float, style: int, spoken: str, kind: str, **more: Any) -> None:
        """A mark that can be reached and says this."""
        look: dict[str, Any] = {"marker": MARKERS[style % STYLES], "color": colour(style), "markersize": 8, **more}
        look |= {"markeredgecolor": COLOURS["card"], "markeredgewidth": 0.8, "gid": f"value-{len(self.spoken)}"}
        self.axes.plot([x], [y], clip_on=False, **look)
        self.spoken[look["gid"]] = kind, spoken

    def svg(self, title: str, description: str, key: str) -> Markup:
        """The picture with its name and description. key: unique in the page, for their ids."""
        root = inline(self.figure, self.spoken)
        about = {"class": "chart", "role": "group", "aria-labelledby": f"{key}-t", "aria-describedby": f"{key}-d"}
        root.attrib.update(about)
        for place, (tag, text) in enumerate((("title", title), ("desc", description))):
            element = ElementTree.Element(tag, id=f"{key}-{tag[0]}")
            element.text = text
            root.insert(place, element)
        names = {colour: name for name, colour in COLOURS.items()}
        text = re.sub(r"\s*\n\s*", " ", ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))
        return Markup(re.sub(r'"(#0000\w\w)"', lambda found: f'"var(--{names[found[1]]})"', text))


def colour(style: int) -> str:
    return COLOURS[f"c{style % STYLES}"]


def inline(figure: Figure, spoken: Mapping[str, tuple[str, str]]) -> ElementTree.Element:
    """The figure as an element of a page whose policy forbids style attributes, links and elements by reference.
    spoken: kind and words of the groups that carry a value, by their id; no other id is kept."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    shapes = {element.get("id"): element.get("d", "") for element in root.iter() if element.get("d")}
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for child in [child for child in element if child.tag.endswith(("metadata", "defs"))]:
            element.remove(child)
        name = element.attrib.pop("id", "")
        element.attrib.pop("clip-path", None)
        if name.startswith("matplotlib.axis"):
            element.set("aria-hidden", "true")
        elif name in spoken:
            kind, words = spoken[name]
            element.attrib.update({"class": kind, "role": "img", "aria-label": words, "data-v": words})
        for part in filter(None, element.attrib.pop("style", "").split("; ")):
            key, _, value = part.partition(": ")
            if not key.startswith("font"):
                element.set(key, value)
        if element.tag == "use":
            reference = element.attrib.pop("{http://www.w3.org/1999/xlink}href")
            x, y = element.attrib.pop("x"), element.attrib.pop("y")
            element.tag = "path"
            element.attrib.update(d=shapes[reference[1:]], transform=f"translate({x} {y})")
    return root


def tokens(count: float) -> str:
    """`4K`, `64K`, `1M`, or the number as it is where it is no multiple of 1024."""
    whole = round(count)
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if whole and whole % unit == 0:
            return f"{whole // unit}{name}"
    return f"{whole:,}"


def lines(
    title: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    key: str,
    *,
    scores: bool = False,
    window: int | None = None,
) -> Markup:
    """Lines with their intervals. labels: of the axes. scores: in percent against lengths in tokens, where lines lie
    side by side that share a length; if not, curves of many points, such as a loss, some of which can be reached one by
    one."""
    with rc_context(SETTINGS):
        chart = Chart()
        axes = chart.axes
        apart = min(5.0, 26.0 / len(series)) / 72
        for style, (_, points) in enumerate(series):
            place: dict[str, Any] = {}
            if scores:
                aside = ScaledTranslation((style - (len(series) - 1) / 2) * apart, 0, chart.figure.dpi_scale_trans)
                place["transform"] = axes.transData + aside
            look = {"color": colour(style), "clip_on": False, **place}
            axes.plot([p.x for p in points], [p.y for p in points], linestyle=DASHES[style % STYLES], **look)
            for p in points:
                if p.low == p.low:
                    axes.plot([p.x, p.x], [p.low, p.high], linewidth=1.6, alpha=0.75, **look)
            for p in points if scores else thinned(points, STOPS):
                chart.point(p.x, p.y, style, p.spoken, "mark" if scores else "stop", **place)
        if scores:
            lengths = sorted({point.x for _, points in series for point in points})
            shown = [x for x in lengths if len(lengths) < 8 or x in lengths[::2] or x == lengths[-1]]
            axes.set_xscale("log", base=2)
            axes.set(xlim=(lengths[0] / 1.25, lengths[-1] * 1.25), ylim=(0, 100), yticks=[0, 25, 50, 75, 100])
            axes.set_xticks(shown, [tokens(x) for x in shown])
            axes.xaxis.set_minor_locator(NullLocator())
            if window and lengths[0] < window < lengths[-1]:
                axes.axvline(window, color=COLOURS["limit"], linewidth=1.2, linestyle=(0, (4, 3)))
        else:
            axes.margins(x=0, y=0.06)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.grid(axis="y")
        axes.set_xlabel(labels[0])
        chart.figure.text(4 / WIDTH, 1, labels[1], color=COLOURS["soft"], verticalalignment="top")
        return chart.svg(title, f"{len(series)} lines. The values are in the table below.", key)


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly picked, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]
