"""The page of `endprompt verify`, drawn from curves.json alone: no torch, no model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

SHEET = "analysis.mplstyle"
OBSERVED, BOUND, BERNSTEIN, SCORE, NULL = "#d9e8d3", "#b2182b", "#ef8a62", "#2166ac", "0.55"
NAMES = ("score", "verify")


def draw_at_once(source: str | Path, directory: str | Path, formats: Sequence[str] = ("png", "pdf")) -> None:
    """`draw`, with the first picture in a process of its own; here, if that cannot be."""
    if not formats:
        return
    program = "import sys; from analysis.figures import draw; draw(*sys.argv[1:3], sys.argv[4:], sys.argv[3:4])"
    given = [sys.executable, "-c", program, str(source), str(directory), NAMES[0], *formats]
    with subprocess.Popen(given, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        draw(source, directory, formats, NAMES[1:])
    if other.returncode:
        draw(source, directory, formats, NAMES[:1])


def draw(
    source: str | Path, directory: str | Path, formats: Sequence[str] = ("png", "pdf"), names: Sequence[str] = NAMES
) -> list[Path]:
    """Draw score.* (scores against distance) and verify.* (the whole page) from curves.json; returns the files."""
    from matplotlib import style
    from matplotlib.figure import Figure

    curves = json.loads(Path(source).read_text(encoding="utf-8"))
    written = []
    with as_file(files("analysis") / SHEET) as sheet, style.context(str(sheet)):
        if "score" in names:
            figure = Figure(figsize=(10, 5.6), layout="constrained")
            score_panels(figure, curves)
            written += [save(figure, Path(directory) / f"score.{kind}") for kind in formats]
        if "verify" not in names:
            return written
        figure = Figure(figsize=(11, 14.5), layout="constrained")
        thirds: Any = figure.subfigures(3, 1, height_ratios=[6.4, 3.2, 4.4], hspace=0.03)
        top, middle, bottom = thirds
        score_panels(top, curves)
        head_panels(middle, curves)
        left, right = bottom.subfigures(1, 2, width_ratios=[1, 2], wspace=0.03)
        change_panel(left, curves)
        outlook_panels(right, curves)
        written += [save(figure, Path(directory) / f"verify.{kind}") for kind in formats]
    return written


def save(figure: Any, path: Path) -> Path:
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    figure.dpi = rcParams["savefig.dpi"]
    # PNG and PDF by their canvas: `savefig` would draw twice. A date or version would make each drawing another file
    if path.suffix == ".png":
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    elif path.suffix == ".pdf":
        FigureCanvasPdf(figure).print_pdf(path, metadata={"CreationDate": None})
    else:
        figure.savefig(path)
    figure.set_layout_engine("none")  # laid out once: the next format has the same places
    return path


def score_panels(figure: Any, curves: dict[str, Any]) -> None:
    """S, S' and S'' against distance: one column a head, one row an order."""
    heads = curves["curves"]
    figure.suptitle(
        f"{curves['checkpoint']} ({curves['method']}): bounds hold at every real distance. Bernstein's constant says "
        f"more than |S(d) − S(d′)| ≤ 2 sup|S|\nonly within {curves['radius']:.3g} tokens; "
        + (
            f"the gap is {max(hi - lo + 1 for lo, hi in curves['gap'])} tokens wide"
            if curves["gap"]
            else "there is no gap"
        )
    )
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
            top = max(data["coefficient"], data["bernstein"] if order else 0)
            axis.set_ylim(-1.25 * top, 1.25 * top)
            if column == 0:
                axis.set_ylabel(name)
        axes[0][column].set_title(
            f"layer {head['layer']}, head {head['head']}: token {head['query']} attends to {head['key']}\n"
            f"sup|S| over the line = {head['supremum'][1] / head['sum_a']:.3f} Σa"
        )
        axes[-1][column].set_xlabel("relative distance d (tokens)")
    if curves["gap"]:
        lo, hi = max(curves["gap"], key=lambda interval: interval[1] - interval[0])
        axes[0][0].annotate(
            f"gap [{lo}, {hi}]",
            ((lo + hi) / 2, 0.86),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
        )
    legend(figure)


def shade(axis: Any, curves: dict[str, Any]) -> None:
    for lo, hi in curves["observed"]:
        axis.axvspan(lo - 0.5, hi + 0.5, color=OBSERVED, lw=0, zorder=0)
    axis.set_xlim(0, curves["length"] - 1)


def legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Line2D([], [], color=SCORE, label="this pair (its steepest far pair of the layer)"),
            Line2D([], [], color=BOUND, label="coefficient bound Σ aω^r"),
            Line2D([], [], color=BERNSTEIN, ls="--", label="Bernstein σ^r sup|S|"),
            Patch(color=OBSERVED, label="observed distances"),
            Patch(facecolor="white", edgecolor="0.7", label="gap: never observed"),
        ],
        loc="outside lower center",
        ncols=5,
    )


def head_panels(figure: Any, curves: dict[str, Any]) -> None:
    """Heat maps layer x head of tightness and roughness, and the roughness of pairs against random phases."""
    axes = figure.subplots(1, 3)
    tightness, roughness = np.array(curves["tightness"]), np.array(curves["roughness"])
    measured, null = np.array(curves["roughness_pairs"]), np.array(curves["roughness_null"])
    low, high = np.quantile(null, [0.01, 0.99]) if curves["gap"] else (1, 1)
    reach = max(1e-3, float(np.abs(np.concatenate([roughness.ravel(), [low, high]]) - 1).max()))
    panels = [
        (tightness, "median of max|S′| / Σ aω", {"cmap": "viridis", "vmin": 0, "vmax": 1}),
        (roughness, "median of RMS S′, gap / observed", {"cmap": "RdBu_r", "vmin": 1 - reach, "vmax": 1 + reach}),
    ]
    for axis in () if curves["gap"] else axes[1:]:
        axis.set_axis_off()
    for axis, (values, title, colours) in zip(axes, panels if curves["gap"] else panels[:1], strict=False):
        picture = axis.imshow(values, aspect="auto", origin="lower", interpolation="nearest", **colours)
        axis.set_title(title)
        axis.set_xlabel("head")
        axis.set_ylabel("layer with RoPE" if curves.get("without_rope") else "layer")
        whole(axis)
        figure.colorbar(picture, ax=axis)
    if not curves["gap"]:
        return
    axis = axes[2]
    edges = np.quantile(np.concatenate([measured, null]), [0.002, 0.998])
    bins = np.linspace(min(edges[0], 0.99), max(edges[1], 1.01), 50)
    axis.hist(null, bins, density=True, color=NULL, alpha=0.6, label=f"random phases: 98% in [{low:.2f}, {high:.2f}]")
    axis.hist(measured, bins, density=True, histtype="step", color=SCORE, lw=1.2, label="measured pairs")
    axis.axvline(1, color="k", lw=0.6)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.35)
    axis.set_xlabel("RMS S′, gap / observed")
    axis.set_ylabel("density")
    axis.set_title("random phases give ratios near 1 too")
    axis.legend(loc="upper right")


def whole(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(integer=True, nbins=8))


def change_panel(figure: Any, curves: dict[str, Any]) -> None:
    """RMS on the observed distances against RMS in the gap, each pair a point, beside the worst case."""
    prediction = curves["prediction"]
    what = "ΔS, after − before" if prediction["subject"] == "change" else "S"
    if not curves["gap"]:
        return
    axis, below = figure.subplots(2, 1, height_ratios=[2.2, 1])
    axis.plot(
        prediction["points"]["observed"], prediction["points"]["gap"], ".", color=SCORE, ms=2, label=f"{what}, pairs"
    )
    axis.plot(
        prediction["worst"]["eps"], prediction["worst"]["value"], color=BOUND, label="worst case V(ε): none above"
    )
    places = [x for x in (*prediction["points"]["observed"], *prediction["points"]["gap"]) if x > 0]
    if places:
        span = [min(places) * 0.8, max(places) * 1.2]
        axis.plot(span, span, color="k", lw=0.6, label="equal")
    decades(axis)
    if places:
        axis.set_ylim(bottom=min(places) / 6)  # room for the legend
    axis.set_xlabel(f"RMS of {what} on observed distances, for ‖c‖ = 1")
    axis.set_ylabel("RMS in the gap, for ‖c‖ = 1")
    undetermined = prediction.get("average")
    note = "" if undetermined is None else f"\nleft open by the observed (average case): {undetermined:.3g}"
    rms = prediction["rms"]
    axis.set_title(f"RMS {what}: observed {rms['observed']:.3g}, gap {rms['gap']:.3g} (logits){note}")
    axis.legend(loc="lower right")
    extremal = prediction.get("extremal")
    if extremal is None:
        below.set_axis_off()
        return
    shade(below, curves)
    below.fill_between(extremal["distance"], extremal["low"], extremal["high"], color=BOUND, lw=0.6)
    below.set_xlabel("relative distance d (tokens)")
    below.set_title(
        f"the worst case of ‖c‖ = 1, drawn:\nRMS {extremal['eps']:g} where observed, {extremal['value']:.3g} in the gap"
    )


def decades(axis: Any) -> None:
    """Logarithmic axes with few, plain labels, over less than a decade too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        ticks.set_major_formatter(lambda value, _: f"{value:g}")
        ticks.set_minor_formatter(NullFormatter())


def outlook_panels(figure: Any, curves: dict[str, Any]) -> None:
    """Predicted RMS error in the gap against target, context, anchors, scheme and pretraining."""
    outlook = curves["outlook"]
    if not outlook["schemes"]:  # rows as long as the target
        return
    figure.suptitle(
        f"what positions determine: predicted RMS error in the gap for scores of RMS 1, noise {curves['noise']:g}, "
        "white prior"
    )
    axes = figure.subplots(2, 2).ravel()
    labels = {"contiguous": "contiguous (short)", "endprompt": "end prompt", "anchors": "anchors"}
    marks = {"contiguous": "s", "endprompt": "o", "anchors": "^"}
    for axis, key, name, log in (
        (axes[0], "target", "target L (tokens)", True),
        (axes[1], "context", "context a (tokens)", False),
        (axes[2], "anchors", "equally spaced anchors K", False),
    ):
        for line in outlook[key]:
            axis.plot(line["x"], line["y"], marker=marks[line["scheme"]], ms=3, label=labels[line["scheme"]])
        axis.set_xlabel(name)
        axis.set_ylabel("predicted RMS")
        axis.set_ylim(bottom=0)
        if not any(line["x"] for line in outlook[key]):
            axis.set_axis_off()
            continue
        if log:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.legend()
    bars = [(entry["scheme"], entry["once"], entry["by_pairs"]) for entry in outlook["schemes"]]
    bars += [(f"pretraining + {entry['scaling']}", entry["value"], None) for entry in outlook["pretraining"]]
    for place, (_, once, by_pairs) in enumerate(bars[::-1]):
        axes[3].barh(place, once, color=NULL if by_pairs is None else SCORE)
        reach, note = once, f" {once:.3f}"
        if by_pairs is not None:
            axes[3].plot([by_pairs] * 2, [place - 0.4, place + 0.4], color=BOUND, lw=1.5)
            reach, note = max(once, by_pairs), f" {once:.3f}; {by_pairs:.3f} by pairs"
        axes[3].text(reach, place, note, va="center", fontsize=7)
    axes[3].set_yticks(range(len(bars)), [name for name, *_ in bars[::-1]])
    axes[3].set_xlim(0, 1.6 * max(max(once, by_pairs or 0) for _, once, by_pairs in bars))
    axes[3].set_xlabel("predicted RMS")
    axes[3].tick_params(axis="y", length=0)
