"""`endprompt report`: one page of HTML with everything that a run says of itself, and nothing that is loaded.

Styles, script and pictures are inside the page, whose policy forbids every request; Jinja escapes what comes from a
run. Charts are drawn here from the rows; behind each is a table with its numbers.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from benchmarks import summary
from benchmarks.report import charts
from benchmarks.report import runs as report_data
from benchmarks.report.charts import Point, Series, tokens
from benchmarks.report.runs import Facet, Part, Run, number
from endprompt import positions
from endprompt.files import write_text

if TYPE_CHECKING:
    from benchmarks.config import ReportConfig

#: Rows drawn of a scheme that draws its positions, schemes drawn, runs of positions drawn in one row.
DRAWS, SCHEMES, RUNS = 6, 16, 64
#: Points of a loss curve; wrong predictions shown of a task and length, and in all of one scoring.
CURVE, WRONG, SHOWN = 400, 3, 60
#: Methods named above the picture of their positions.
NAMED = 5
#: An end prompt whose length no file says is drawn with so many tokens.
NOMINAL_PROMPT = 20
BOUNDS = {
    "coefficient_order0": "|S| over the sum of its coefficients",
    "coefficient_order1": "|S′| over its coefficient bound",
    "coefficient_order2": "|S″| over its coefficient bound",
    "bernstein_order1": "|S′| over Bernstein's bound",
    "bernstein_order2": "|S″| over Bernstein's bound",
    "duffin_schaeffer": "S′² + σ²S² over Duffin-Schaeffer's bound",
}


def report(config: ReportConfig) -> Path:
    """Write the page; returns its path. Raises ValueError for a run that is none, or an unknown reference."""
    runs = report_data.read_runs(config.runs)
    output = Path(config.output) if config.output else default_output(runs[0])
    page = render(runs, config.reference)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def show(page: Path) -> None:
    """Open the page in the user's browser."""
    import webbrowser

    webbrowser.open(page.resolve().as_uri())


def default_output(run: Run) -> Path:
    return run.path / "report.html" if run.path.is_dir() else run.path.with_suffix(".html")


def render(runs: Sequence[Run], reference: str | None = None) -> str:
    """The page as text: the same for the same runs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = files("benchmarks") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=PackageLoader("benchmarks"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    facets = report_data.facets(runs)
    if reference is not None and not any(report_data.choose_reference(f.methods, reference) for f in facets):
        names = sorted({method.label for facet in facets for method in facet.methods})
        raise ValueError(f"reference must be a method of the runs: reference={reference!r}, they have {names}")
    return environment.get_template("report.html").render(
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        title=", ".join(run.name for run in runs),
        runs=[about_run(run) for run in runs],
        trainings=trainings(runs),
        schemes=drawn_schemes(runs),
        losses=loss_charts(runs),
        facets=[view for index, facet in enumerate(facets) for view in [facet_view(facet, f"f{index}", reference)]],
        heat_maps=heat_maps(runs),
        bounds=bounds(runs),
        others=other_rows(runs),
        predictions=wrong_predictions(runs),
        environments=environments(runs),
        configurations=configurations(runs),
        commands=[(run.name, commands(run)) for run in runs],
    )


def policy(style: str, script: str) -> str:
    """Content-Security-Policy that allows this page's own style and script, and no request at all."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    own = f"style-src {source(style)}; script-src {source(script)}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


# -------------------------------------------------------------------------------------------------------- what was run


def about_run(run: Run) -> dict[str, Any]:
    first = next((part for part in run.parts if part.environment), run.parts[0])
    environment, device = first.environment, first.environment.get("device") or {}
    kinds = [part.kind or ("rows" if part.rows else "training") for part in run.parts]
    seconds = sum(line["seconds"] for line in (*run.parts[0].log, run.parts[0].about) if number(line.get("seconds")))
    return {
        "name": run.name,
        "kind": run.parts[0].kind or kinds[0],
        "parts": ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)),
        "rows": len(run.rows),
        "device": device.get("gpu") or " ".join(str(v) for v in (device.get("machine"), cores(device)) if v),
        "revision": environment.get("revision") or "not recorded",
        "time": environment.get("time") or "not recorded",
        "seconds": f"{seconds / 60:.1f} min" if seconds else "not recorded",
        "broken": [place for part in run.parts for place in part.broken],
    }


def cores(device: dict[str, Any]) -> str:
    return f"CPU, {device['cpu_count']} cores" if device.get("cpu_count") else ""


def trained(runs: Iterable[Run]) -> list[tuple[Run, Part]]:
    return [(run, part) for run in runs for part in run.parts if part.about or part.losses()]


def trainings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A line a training: method, base, target, steps, tokens, seconds, last loss."""
    found = []
    for run, part in trained(runs):
        about, config, losses = part.about, part.config or part.about.get("config") or {}, part.losses()
        last = about.get("final_loss") or (losses[-1]["loss"] if losses else None)
        found.append(
            {
                "name": part_name(run, part),
                "method": about.get("method") or config.get("scheme") or "",
                "base": about.get("model") or Path(str(config.get("model") or "")).name,
                "target": count(about.get("target") or config.get("target")),
                "steps": count(about.get("steps") or (losses[-1]["step"] if losses else None)),
                "tokens": count(about.get("tokens")),
                "lr": f"{config['lr']:g}" if number(config.get("lr")) else "",
                "seconds": f"{about['seconds']:,.0f} s" if number(about.get("seconds")) else "",
                "loss": f"{last:.4f}" if number(last) else "",
            }
        )
    return found


def count(value: Any) -> str:
    return f"{value:,}" if number(value) else ""


def part_name(run: Run, part: Part) -> str:
    """The part's place in its run, or the run's own name."""
    if part.path == run.path:
        return run.name
    return part.path.relative_to(run.path).as_posix()


# ----------------------------------------------------------------------------------------------------------- positions


def drawn_schemes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A picture for each way in which the runs lay out their rows."""
    wanted: dict[tuple[Any, ...], dict[str, None]] = {}
    for run in runs:
        for key, method in layouts(run):
            wanted.setdefault(key, {})[method] = None
    views = []
    for index, (key, methods) in enumerate(list(wanted.items())[:SCHEMES]):
        view = drawn_scheme(key, f"p{index}")
        if view:
            names = [*methods]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            views.append(view | {"methods": ", ".join(names[:NAMED]) + more})
    return views


def layouts(run: Run) -> list[tuple[tuple[Any, ...], str]]:
    """((scheme, context, prompt, target, anchors, whether the prompt's length is known), method) of each training.

    From the trainings' own notes, else from what was verified, else from the columns of the rows.
    """
    found = []
    for part in run.parts:
        about, config = part.about, part.about.get("config") or {}
        if all(number(about.get(k)) for k in ("target", "row_tokens", "prompt_tokens")) and "scheme" in config:
            context, prompt = int(about["row_tokens"] - about["prompt_tokens"]), int(about["prompt_tokens"])
            key = (config["scheme"], context, prompt, int(about["target"]), config.get("anchors") or 4, True)
            found.append((key, str(about.get("method"))))
    rows = {json.dumps([row.get(k) for k in ("method", "scheme", "context", "prompt", "window", "target")]): row
            for row in run.rows if row.get("scheme") and row["method"] != "base"}  # fmt: skip
    known = {method for _, method in found}
    for row in rows.values():
        anchors = row["anchors"] if number(row.get("anchors")) else 4
        if row["method"] in known:
            continue
        if number(row.get("context")) and number(row.get("prompt")) and number(row["length"]):
            key = (row["scheme"], row["context"], row["prompt"], int(row["length"]), int(anchors), True)
        elif number(row.get("window")) and number(row.get("target")):
            prompt = NOMINAL_PROMPT if row["scheme"] in positions.WITH_PROMPT else 0
            key = (row["scheme"], int(row["window"]) - prompt, prompt, int(row["target"]), int(anchors), prompt == 0)
        else:
            continue
        found.append((key, row["method"]))
    return found


def drawn_scheme(key: tuple[Any, ...], name: str) -> dict[str, Any] | None:
    """Picture and numbers of one layout; None if its sizes fit no row of the scheme."""
    from analysis.observability import distance_segments

    scheme, context, prompt, target, anchors, known = key
    options = {"count": anchors} if scheme == "anchors" else {}
    try:
        rows = [
            positions.position_ids(scheme, context, prompt, target, positions.sample_rng(0, index), **options)
            for index in range(DRAWS)
        ]
    except (ValueError, TypeError):
        return None
    try:
        observed, gap = distance_segments(target, context, prompt, scheme, count=anchors)
    except ValueError:
        observed, gap = None, None
    fixed = all(np.array_equal(rows[0], row) for row in rows)
    drawn = [runs_of(row, context, target) for row in (rows[:1] if fixed else rows)]
    numbers = [("context", f"{context:,} tokens"), ("end prompt", f"{prompt:,} tokens" if prompt else "none")]
    for index, runs in enumerate(drawn):
        label = "positions" if fixed else f"positions, row {index}"
        numbers.append((label, spans([(lo, hi) for lo, hi, _ in runs])))
    numbers.append(("observed distances", spans(observed) if observed is not None else "not computed"))
    numbers.append(("gap", spans(gap) or "none" if gap is not None else "not computed"))
    title = f"{scheme}, {tokens(context + prompt)} to {tokens(target)}"
    svg = charts.scheme(title, drawn, target, context + prompt, observed, name)
    return {"title": title, "svg": svg, "numbers": numbers, "known": known, "prompt": prompt}


def runs_of(row: np.ndarray, context: int, target: int) -> list[tuple[int, int, bool]]:
    """Runs of consecutive position ids, and whether each is the end prompt; neighbours are joined where they crowd."""
    found = []
    for part, terminal in ((row[:context], False), (row[context:], True)):
        if part.size:
            merged = positions.merge([(int(p), int(p)) for p in part])
            near = target // 200 if len(merged) > RUNS else 0
            joined = [merged[0]]
            for lo, hi in merged[1:]:
                if lo - joined[-1][1] - 1 <= near and near:
                    joined[-1] = (joined[-1][0], hi)
                else:
                    joined.append((lo, hi))
            found += [(lo, hi, terminal) for lo, hi in joined]
    return found


def spans(intervals: Sequence[tuple[int, int]], most: int = 8) -> str:
    shown = ", ".join(f"{lo:,}–{hi:,}" if hi > lo else f"{lo:,}" for lo, hi in intervals[:most])
    return shown + (f" and {len(intervals) - most} more" if len(intervals) > most else "")


# ---------------------------------------------------------------------------------------------------------------- loss


def loss_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Training loss against steps, at most as many curves in a chart as can be told apart."""
    series: list[Series] = []
    for run, part in trained(runs):
        lines = part.losses()
        if len(lines) < 2:
            continue
        name = part_name(run, part)
        name += f": {part.about['method']}" if part.about.get("method") else ""
        points = [
            Point(line["step"], line["loss"], spoken=f"{name}, step {line['step']:,}: loss {line['loss']:.4f}")
            for line in charts.thinned(lines, CURVE)
        ]
        series.append(Series(name, points, len(series) % charts.STYLES))
    views = []
    for index, group in enumerate(chunks(series)):
        svg = charts.curves("Training loss", group, "step", "loss (nats a token)", f"l{index}")
        table = [
            (one.name, [(f"{p.x:,.0f}", f"{p.y:.4f}") for p in charts.thinned(one.points, charts.STOPS)])
            for one in group
        ]
        views.append({"svg": svg, "legend": legend(group), "table": table})
    return views


def chunks(series: Sequence[Any]) -> list[list[Any]]:
    return [list(series[k : k + charts.STYLES]) for k in range(0, len(series), charts.STYLES)]


def legend(series: Iterable[Series]) -> list[tuple[Markup, str]]:
    return [(charts.swatch(one.style), one.name) for one in series]


# -------------------------------------------------------------------------------------------------------------- scores


def facet_view(facet: Facet, key: str, reference: str | None) -> dict[str, Any]:
    """Charts a task, the table behind them, averages and comparisons of one base and fold."""
    means = "mean over tasks"
    groups = chunks(facet.methods)
    names = [means] * (len(facet.tasks) > 1) + (facet.tasks if len(groups) == 1 else facet.tasks[:0])
    views = []
    for place, group in enumerate(groups):
        pictures = []
        for number_, task in enumerate(names or facet.tasks):
            series = []
            for style, method in enumerate(group):
                points = []
                for length in facet.lengths:
                    cell = method.mean(length, facet.tasks) if task == means else method.cell(task, length)
                    if cell:
                        spoken = f"{method.label}, {task}, {length:,} tokens: {cell}"
                        points.append(Point(length, cell.value, cell.low, cell.high, spoken))
                if points:
                    series.append(Series(method.label, points, style))
            if series:
                svg = charts.against_length(f"{task}: score against length", series, f"{key}-{place}-{number_}",
                                            facet.window)  # fmt: skip
                pictures.append((task, svg))
        entries = [(charts.swatch(style), method.label) for style, method in enumerate(group)]
        views.append({"pictures": pictures, "legend": entries})
    table = []
    for method in facet.methods:
        for length in facet.lengths:
            cells = [method.cell(task, length) for task in facet.tasks]
            if any(cells):
                mean = method.mean(length, facet.tasks)
                table.append({"method": method.label, "length": f"{length:,}", "cells": [*cells, mean]})
    return {
        "title": facet.title,
        "groups": views,
        "tasks": [*facet.tasks, means] if len(facet.tasks) > 1 else facet.tasks,
        "table": table,
        "intervals": interval_notes(facet),
        "window": facet.window if facet.window and facet.lengths[0] < facet.window < facet.lengths[-1] else None,
        "averages": averages(facet),
        "comparison": comparison(facet, reference),
    }


def interval_notes(facet: Facet) -> str:
    cells = [method.cell(task, length) for method in facet.methods for task, length in method.rows]
    notes = dict.fromkeys(cell.note for cell in cells if cell)
    sizes = sorted({cell.n for cell in cells if cell and cell.n})
    samples = f"; {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "") + " samples a cell" if sizes else ""
    return "; ".join(notes) + samples


def averages(facet: Facet) -> list[dict[str, Any]]:
    """RULER's own averages over lengths; the effective length of those that were run."""
    found = []
    for method in facet.methods:
        rows = [
            {"suite": "ruler", "task": task, "length": length, "value": cell.value}
            for (task, length) in method.rows
            if (cell := method.cell(task, length))
        ]
        made = {row["metric"]: row["value"] for row in summary.ruler_summary(rows) if row["length"] is None}
        if made and len({row["length"] for row in rows}) > 1:
            found.append({"method": method.label, **made})
    return found


def comparison(facet: Facet, reference: str | None) -> dict[str, Any] | None:
    """Differences to the reference, a table a method; for many methods those at the longest length only."""
    found = report_data.differences(facet, reference)
    if len(facet.methods) > charts.STYLES:
        found = [one for one in found if one.length == facet.lengths[-1]]
    if not found:
        return None
    reach = max([10.0, *(abs(v) for one in found for v in (one.value, one.low, one.high) if v is not None)])
    methods: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        interval = f"[{one.low:+.1f}, {one.high:+.1f}]" if one.low is not None else "no interval"
        spoken = f"{one.value:+.1f} points, {interval}"
        methods.setdefault(one.other, []).append(
            {
                "task": one.task,
                "length": f"{one.length:,}",
                "value": f"{one.value:+.1f}",
                "interval": interval,
                "how": one.how,
                "svg": charts.whisker(one.value, one.low, one.high, reach, spoken),
                "decided": one.low is not None and one.high is not None and (one.low > 0 or one.high < 0),
            }
        )
    return {"reference": found[0].reference, "methods": methods, "reach": f"{reach:.0f}",
            "cut": len(facet.methods) > charts.STYLES}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- heat maps


def heat_maps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Single answers found, by depth of the needle and length: a table with coloured cells for each scoring."""
    views = []
    several = len(runs) > 1
    for run in runs:
        for part in run.parts:
            by_method: dict[str, list[dict[str, Any]]] = {}
            for row in part.depth:
                by_method.setdefault(str(row["method"]), []).append(row)
            for method, cells in by_method.items():
                lengths = sorted({int(cell["length"]) for cell in cells})
                depths = sorted({(cell["depth_from"], cell["depth_to"]) for cell in cells})
                values = {(cell["depth_from"], int(cell["length"])): cell for cell in cells}
                lines = []
                for low, high in depths:
                    name = f"{low:.0f}–{high:.0f}%"
                    line = [heat_cell(values.get((low, length)), name, length) for length in lengths]
                    lines.append((name, line))
                title = f"{run.name}: {method}" if several else method
                views.append({"title": title, "lengths": [tokens(length) for length in lengths], "lines": lines})
    return views


def heat_cell(cell: dict[str, Any] | None, depth: str, length: int) -> dict[str, Any]:
    if cell is None:
        return {"level": None, "text": "–", "spoken": f"depth {depth}, {length:,} tokens: no needle here"}
    value = min(100.0, max(0.0, cell["value"]))
    spoken = f"depth {depth}, {length:,} tokens: {value:.0f} percent of {cell['n']} answers found"
    return {"level": round(value / 10), "text": f"{value:.0f}", "spoken": spoken}


# -------------------------------------------------------------------------------------------------------------- bounds


def bounds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Largest value over each bound and the share of pairs within it, by method."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for row in run.rows:
            if row["suite"] == "analysis" and row["task"] == "bounds":
                label = f"{row['method']} ({run.name})" if len(runs) > 1 else row["method"]
                found.setdefault(label, {}).setdefault(row["metric"], []).append(row["value"])
    found = {name: own for name, own in found.items() if any(f"largest_over_{b}" in own for b in BOUNDS)}
    views = []
    for index, group in enumerate(chunks(list(found))):
        rows, table = [], []
        for bound, label in BOUNDS.items():
            marks, cells = [], []
            for style, method in enumerate(group):
                largest, share = (found[method].get(f"{kind}_{bound}") for kind in ("largest_over", "share_within"))
                cells.append((f"{max(largest):.4f}" if largest else "", f"{100 * min(share):.2f}%" if share else ""))
                if largest:
                    marks.append((style, max(largest), f"{method}: {label}: {max(largest):.4f}"))
            rows.append((label, marks))
            table.append((label, cells))
        radius = [found[method].get("nonvacuous_radius_tokens") for method in group]
        table.append(
            ("Bernstein's bound says something up to (tokens)", [(f"{r[0]:.3g}" if r else "", "") for r in radius])
        )
        holds = all(min(v) >= 1 for m in group for k, v in found[m].items() if k.startswith("share_within"))
        svg = charts.ratios("Largest value over its bound", rows, f"b{index}")
        entries = [(charts.swatch(style), method) for style, method in enumerate(group)]
        views.append({"svg": svg, "legend": entries, "methods": group, "table": table, "holds": holds})
    return views


# ----------------------------------------------------------------------------------------------------------- the rest


def other_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every other number, by suite: evaluations while training, LongBench, short tasks, the lab's questions."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for row in report_data.others(runs):
        ci = row["ci95"]
        suites.setdefault(str(row["suite"]), []).append(
            {
                "method": row["method"],
                "about": ", ".join(
                    f"{key} {row[key]}" for key in ("base", "fold", "comparison", "step") if row.get(key) is not None
                ),
                "task": row["task"],
                "length": count(row["length"]),
                "metric": row["metric"],
                "value": f"{row['value']:.4g}" + (f" [{ci[0]:.4g}, {ci[1]:.4g}]" if ci else ""),
                "n": count(row["n"]),
                "seed": row["seed"],
                "note": row.get("verdict") or row.get("error") or "",
            }
        )
    return [{"suite": suite, "rows": rows} for suite, rows in suites.items()]


def wrong_predictions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the models wrote where it was wrong: the first few of each task and length."""
    views = []
    for run in runs:
        for part in run.parts:
            wrong: dict[str, list[dict[str, Any]]] = {}
            total = 0
            for entry in report_data.predictions(part):
                total += 1
                if entry["score"] < 100:
                    wrong.setdefault(str(entry["task"]), []).append(entry)
            if not total:
                continue
            shown = [
                {
                    "task": task,
                    "index": entry["index"],
                    "wanted": listed(entry["outputs"]),
                    "prediction": str(entry["prediction"]),
                    "score": f"{entry['score']:.0f}",
                    "depth": listed(entry["depth"]) + "%" if entry.get("depth") else "",
                }
                for task, entries in wrong.items()
                for entry in sorted(entries, key=lambda e: e["index"])[:WRONG]
            ][:SHOWN]
            number_wrong = sum(map(len, wrong.values()))
            method = part.rows[0]["method"] if part.rows else ""
            views.append({"name": part_name(run, part), "method": method, "total": total, "wrong": number_wrong,
                          "shown": shown})  # fmt: skip
    return views


def listed(values: Any) -> str:
    return "; ".join(map(str, values)) if isinstance(values, list) else str(values)


# --------------------------------------------------------------------------------------- provenance and reproduction


def environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each environment once, with the parts that were made in it."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for part in run.parts:
            if not part.environment:
                continue
            own = {key: value for key, value in part.environment.items() if key != "time"}
            entry = found.setdefault(json.dumps(own, sort_keys=True), {"facts": facts(own), "parts": [], "times": []})
            entry["parts"].append(run.name if part.path == run.path else f"{run.name}/{part_name(run, part)}")
            entry["times"].append(str(part.environment.get("time") or ""))
    return [
        {"facts": entry["facts"], "parts": entry["parts"], "first": min(entry["times"]), "last": max(entry["times"])}
        for entry in found.values()
    ]


def facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of an environment, nested ones on a line of their own."""
    lines = []
    for key, value in environment.items():
        if isinstance(value, dict):
            lines += [(f"{key}: {name}", str(item)) for name, item in value.items()]
        else:
            lines.append((key, str(value)))
    return lines


def configurations(runs: Sequence[Run]) -> list[tuple[str, str]]:
    import yaml

    return [
        (run.name if part.path == run.path else f"{run.name}/{part_name(run, part)}",
         tidy(yaml.safe_dump(part.config, sort_keys=False, allow_unicode=True)))
        for run in runs
        for part in run.parts
        if part.config
    ]  # fmt: skip


def commands(run: Run) -> list[str]:
    """Shell lines that make the run again: the checkout, then the outermost command that wrote it."""
    first = next((part for part in run.parts if part.kind), None)
    if first is None:
        return []
    revision = str(first.environment.get("revision") or "").removesuffix("-dirty")
    outer = (
        [first] if first.path == run.path else [p for p in run.parts if p.kind and p.path.parent == first.path.parent]
    )
    lines = [f"git checkout {shlex.quote(revision)}"] if revision else []
    return lines + [tidy(command_line(part.kind, part.config)) for part in outer if part.kind]


def command_line(name: str, config: dict[str, Any]) -> str:
    """`endprompt NAME ...` with every setting that is not the default, as the shell takes it."""
    kind = report_data.config_types()[name]
    words: list[str] = []
    flags: list[str] = []
    positionals = any(is_positional(f) for f in dataclasses.fields(kind))
    for f in dataclasses.fields(kind):
        if f.name not in config or f.name in ("resume", "overwrite"):
            continue
        value = config[f.name]
        if is_positional(f):
            words += [shlex.quote(str(item)) for item in (value if isinstance(value, list) else [value])]
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if value == default or (isinstance(default, tuple) and value == list(default)):
            continue
        flag = "--" + f.name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif isinstance(value, list) and value and not positionals and all(isinstance(v, str) for v in value):
            flags.append(" ".join([flag, *map(shlex.quote, value)]))
        else:
            text = json.dumps(value) if isinstance(value, (list, dict, bool)) or value is None else str(value)
            flags.append(f"{flag}={shlex.quote(text)}")
    return " ".join(["endprompt", name, *words, *flags])


def is_positional(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def tidy(text: str) -> str:
    """The text without the name of whoever ran it: the home directory as `~`."""
    home = os.path.expanduser("~").rstrip("/")
    return text.replace(f"'{home}/", "~/'").replace(home + "/", "~/") if len(home) > 1 else text
