"""`endprompt report`: one page of HTML with everything that a run says of itself, and nothing that is loaded.

Styles, script and pictures are inside the page, whose policy forbids every request; Jinja escapes what comes from a
run. Behind each chart is a table with its numbers.
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
import yaml
from markupsafe import Markup

from benchmarks import summary
from benchmarks.report import charts
from benchmarks.report import runs as report_data
from benchmarks.report.charts import Point, tokens
from benchmarks.report.runs import Cell, Facet, Method, Part, Run, number
from endprompt import positions
from endprompt.cli import is_positional
from endprompt.files import write_text

if TYPE_CHECKING:
    from benchmarks.config import ReportConfig

#: Rows drawn of a scheme that draws its positions, schemes drawn, runs of positions drawn in one row.
DRAWS, SCHEMES, RUNS = 6, 16, 64
#: Points of a loss curve; wrong predictions shown of a task and length, and in all of one scoring.
CURVE, WRONG, SHOWN = 400, 3, 60
#: The column of the mean over a facet's tasks.
MEANS = "mean over tasks"
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
        glyphs=charts.GLYPHS,
        title=", ".join(run.name for run in runs),
        runs=[about_run(run) for run in runs],
        trainings=trainings(runs),
        schemes=drawn_schemes(runs),
        losses=loss_charts(runs),
        facets=[facet_view(facet, f"f{index}") for index, facet in enumerate(facets)],
        comparisons=[view for facet in facets if (view := comparison(facet, reference))],
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


def about_run(run: Run) -> tuple[list[tuple[str, Any]], list[str]]:
    """Facts by name, and the places of broken lines."""
    first = next((part for part in run.parts if part.environment), run.parts[0])
    environment, device = first.environment, first.environment.get("device") or {}
    kinds = [part.kind or ("rows" if part.rows else "training") for part in run.parts]
    seconds = sum(line["seconds"] for line in (*run.parts[0].log, run.parts[0].about) if number(line.get("seconds")))
    cores = f"CPU, {device['cpu_count']} cores" if device.get("cpu_count") else ""
    held = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    facts = {
        "Run": run.name,
        "Kind": run.parts[0].kind or kinds[0],
        "Holds": f"{held}; {len(run.rows):,} rows of results",
        "Device": device.get("gpu") or " ".join(str(v) for v in (device.get("machine"), cores) if v),
        "Revision": code(environment["revision"]) if environment.get("revision") else "",
        "Started": environment.get("time"),
        "Time taken": f"{seconds / 60:.1f} min" if seconds else "",
    }
    broken = [place for part in run.parts for place in part.broken]
    return [(name, value or "not recorded") for name, value in facts.items()], broken


def code(text: Any) -> Markup:
    return Markup("<code>{}</code>").format(text)


def trained(runs: Iterable[Run]) -> list[tuple[Run, Part]]:
    return [(run, part) for run in runs for part in run.parts if part.about or part.losses()]


def trainings(runs: Sequence[Run]) -> list[list[str]]:
    """A line a training: part, method, base, target, steps, tokens, rate, seconds, last loss."""
    found = []
    for run, part in trained(runs):
        about, config, losses = part.about, part.config or part.about.get("config") or {}, part.losses()
        last = about.get("final_loss") or (losses[-1]["loss"] if losses else None)
        found.append(
            [
                part_name(run, part),
                about.get("method") or config.get("scheme") or "",
                about.get("model") or Path(str(config.get("model") or "")).name,
                count(about.get("target") or config.get("target")),
                count(about.get("steps") or (losses[-1]["step"] if losses else None)),
                count(about.get("tokens")),
                f"{config['lr']:g}" if number(config.get("lr")) else "",
                f"{about['seconds']:,.0f} s" if number(about.get("seconds")) else "",
                f"{last:.4f}" if number(last) else "",
            ]
        )
    return found


def count(value: Any) -> str:
    return f"{value:,}" if number(value) else ""


def part_name(run: Run, part: Part, whole: bool = False) -> str:
    """The part's place in its run, or the run's own name; whole: with the run's name in front."""
    if part.path == run.path:
        return run.name
    return f"{run.name}/" * whole + part.path.relative_to(run.path).as_posix()


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


def loss_charts(runs: Sequence[Run]) -> list[tuple[list[str], Markup, list[Any]]]:
    """(names, picture, numbers by name) of training loss against steps, as many curves as can be told apart."""
    series = []
    for run, part in trained(runs):
        lines = part.losses()
        if len(lines) > 1:
            name = part_name(run, part) + (f": {part.about['method']}" if part.about.get("method") else "")
            points = [
                Point(line["step"], line["loss"], spoken=f"{name}, step {line['step']:,}: loss {line['loss']:.4f}")
                for line in charts.thinned(lines, CURVE)
            ]
            series.append((name, points))
    views = []
    for index, group in enumerate(chunks(series)):
        svg = charts.lines("Training loss", group, ("step", "loss (nats a token)"), f"l{index}")
        tables = [
            (name, [(f"{p.x:,.0f}", f"{p.y:.4f}") for p in charts.thinned(points, charts.STOPS)])
            for name, points in group
        ]
        views.append(([name for name, _ in group], svg, tables))
    return views


def chunks(series: Sequence[Any]) -> list[list[Any]]:
    return [list(series[k : k + charts.STYLES]) for k in range(0, len(series), charts.STYLES)]


# -------------------------------------------------------------------------------------------------------------- scores


def facet_view(facet: Facet, key: str) -> dict[str, Any]:
    """Charts a task, the table behind them and averages of one base and fold."""
    groups = chunks(facet.methods)
    mean = [MEANS] if len(facet.tasks) > 1 else []
    drawn = [*mean, *facet.tasks] if len(groups) == 1 else mean or facet.tasks
    views = []
    for place, group in enumerate(groups):
        pictures = []
        for number_, task in enumerate(drawn):
            series = [(method.label, points_of(facet, method, task)) for method in group]
            if any(points for _, points in series):
                title, labels = f"{task}: score against length", ("length (tokens)", "score (percent)")
                name = f"{key}-{place}-{number_}"
                svg = charts.lines(title, series, labels, name, scores=True, window=facet.window)
                pictures.append((task, svg))
        views.append(([method.label for method in group], pictures))
    columns = [*facet.tasks, *mean]
    rows = [
        [method.label, f"{length:,}", *(shown(cell_of(facet, method, task, length)) for task in columns)]
        for method in facet.methods
        for length in facet.lengths
        if any(method.cell(task, length) for task in facet.tasks)
    ]
    return {
        "title": facet.title,
        "groups": views,
        "head": "|>".join(["method", "length", *columns]),
        "rows": rows,
        "intervals": interval_notes(facet),
        "window": facet.window if facet.window and facet.lengths[0] < facet.window < facet.lengths[-1] else None,
        "averages": averages(facet),
    }


def cell_of(facet: Facet, method: Method, task: str, length: int) -> Cell | None:
    return method.mean(length, facet.tasks) if task == MEANS else method.cell(task, length)


def points_of(facet: Facet, method: Method, task: str) -> list[Point]:
    cells = [(length, cell_of(facet, method, task, length)) for length in facet.lengths]
    said = f"{method.label}, {task}"
    return [Point(n, one.value, one.low, one.high, f"{said}, {n:,} tokens: {one}") for n, one in cells if one]


def shown(cell: Cell | None) -> str:
    if cell is None or cell.low is None:
        return "" if cell is None else f"{cell.value:.0f}"
    return Markup(f"{cell.value:.0f} <small>[{cell.low:.0f}, {cell.high:.0f}]</small>")


def interval_notes(facet: Facet) -> str:
    cells = [method.cell(task, length) for method in facet.methods for task, length in method.rows]
    notes = dict.fromkeys(cell.note for cell in cells if cell)
    sizes = sorted({cell.n for cell in cells if cell and cell.n})
    samples = f"; {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "") + " samples a cell" if sizes else ""
    return "; ".join(notes) + samples


def averages(facet: Facet) -> list[list[str]]:
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
            kinds = ("average", "weighted_average_inc", "weighted_average_dec")
            longest = f"{made['effective_length']:,.0f}" if made["effective_length"] else "none"
            found.append([method.label, *(f"{made[kind]:.1f}" for kind in kinds), longest])
    return found


def comparison(facet: Facet, reference: str | None) -> dict[str, Any] | None:
    """Differences to the reference, a table a method; for many methods those at the longest length only."""
    found, cut = report_data.differences(facet, reference), len(facet.methods) > charts.STYLES
    if cut:
        found = [one for one in found if one.length == facet.lengths[-1]]
    if not found:
        return None
    reach = max([10.0, *(abs(v) for one in found for v in (one.value, one.low, one.high) if v is not None)])
    methods: dict[str, list[list[Any]]] = {}
    for one in found:
        value, interval = f"{one.value:+.1f}", "no interval"
        if one.low is not None and one.high is not None:
            interval = f"[{one.low:+.1f}, {one.high:+.1f}]"
            if one.low > 0 or one.high < 0:
                value = Markup(f"<strong>{value}</strong>")
        picture = whisker(one.value, one.low, one.high, reach, f"{one.value:+.1f} points, {interval}")
        methods.setdefault(one.other, []).append([one.task, f"{one.length:,}", value, interval, picture, one.how])
    return {"title": facet.title, "reference": found[0].reference, "methods": methods, "reach": f"{reach:.0f}",
            "cut": cut}  # fmt: skip


def whisker(value: float, low: float | None, high: float | None, reach: float, spoken: str) -> Markup:
    """A difference with its interval on an axis from -reach to reach, for a cell of a table."""
    x, left, right = (75 + 69 * max(-1.0, min(1.0, one / reach)) for one in (value, low or 0.0, high or 0.0))
    bar = f'<path d="M{left:.1f},10H{right:.1f}" class="whisker"/>' if low is not None else ""
    mark = f'<path d="M{x - 3.5:.1f},6.5h7v7h-7z" class="mark"/>'
    shapes = Markup(f'<path d="M75,1V19" class="axis"/>{bar}{mark}')
    return Markup('<svg viewBox="0 0 150 20" class="cell s0" role="img" aria-label="{}">{}</svg>').format(
        spoken, shapes
    )


# ----------------------------------------------------------------------------------------------------------- heat maps


def heat_maps(runs: Sequence[Run]) -> list[tuple[str, list[str], list[Any]]]:
    """Single answers found, by depth of the needle and length: title, lengths and lines of each scoring."""
    views = []
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
                    lines.append((name, [heat_cell(values.get((low, n)), name, n) for n in lengths]))
                title = f"{run.name}: {method}" if len(runs) > 1 else method
                views.append((title, [tokens(length) for length in lengths], lines))
    return views


def heat_cell(cell: dict[str, Any] | None, depth: str, length: int) -> tuple[str, str, str]:
    """(class, text, what is spoken)"""
    place = f"depth {depth}, {length:,} tokens"
    if cell is None:
        return "empty", "–", f"{place}: no needle here"
    value = min(100.0, max(0.0, cell["value"]))
    return f"h{round(value / 10)}", f"{value:.0f}", f"{place}: {value:.0f} percent of {cell['n']} answers found"


# -------------------------------------------------------------------------------------------------------------- bounds


def bounds(runs: Sequence[Run]) -> list[tuple[bool, list[str], Markup, list[Any]]]:
    """Largest value over each bound and the share of pairs within it: whether all hold, methods, picture, table."""
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
                over = f"{max(largest):.4f}" if largest else ""
                cells.append(Markup(over + (f" <small>{100 * min(share):.2f}%</small>" if share else "")))
                if largest:
                    marks.append((style, max(largest), f"{method}: {label}: {over}"))
            rows.append((label, marks))
            table.append([label, *cells])
        radius = [found[method].get("nonvacuous_radius_tokens") for method in group]
        table.append(["Bernstein's bound says something up to (tokens)", *(f"{r[0]:.3g}" if r else "" for r in radius)])
        holds = all(min(v) >= 1 for m in group for k, v in found[m].items() if k.startswith("share_within"))
        views.append((holds, group, charts.ratios("Largest value over its bound", rows, f"b{index}"), table))
    return views


# ----------------------------------------------------------------------------------------------------------- the rest


def other_rows(runs: Sequence[Run]) -> dict[str, list[list[Any]]]:
    """Every other number, by suite: evaluations while training, LongBench, short tasks, the lab's questions."""
    suites: dict[str, list[list[Any]]] = {}
    for row in report_data.others(runs):
        ci = row["ci95"]
        about = ", ".join(f"{k} {row[k]}" for k in ("base", "fold", "comparison", "step") if row.get(k) is not None)
        value = f"{row['value']:.4g}" + (f" [{ci[0]:.4g}, {ci[1]:.4g}]" if ci else "")
        line = [row["method"], row["task"], count(row["length"]), row["metric"], value, row["n"], row["seed"]]
        note = row.get("verdict") or row.get("error") or ""
        suites.setdefault(str(row["suite"]), []).append([*line, f"{about} {note}".strip()])
    return suites


def wrong_predictions(runs: Sequence[Run]) -> list[tuple[str, str, list[Any]]]:
    """What the models wrote where it was wrong: summary, name, and the first few of each task and length."""
    views = []
    for run in runs:
        for part in run.parts:
            entries = report_data.predictions(part)
            wrong: dict[str, list[dict[str, Any]]] = {}
            for entry in sorted(entries, key=lambda entry: entry["index"]):
                if entry["score"] < 100:
                    wrong.setdefault(str(entry["task"]), []).append(entry)
            rows = []
            for task, found in wrong.items():
                for entry in found[:WRONG]:
                    depth = listed(entry["depth"]) + "%" if entry.get("depth") else ""
                    answers = code(listed(entry["outputs"])), code(entry["prediction"])
                    rows.append([task, entry["index"], depth, f"{entry['score']:.0f}", *answers])
            if entries:
                method = f" ({part.rows[0]['method']})" if part.rows else ""
                said = f"{part_name(run, part)}{method}: {sum(map(len, wrong.values())):,} of {len(entries):,} wrong"
                rows = rows[:SHOWN]
                views.append((f"{said}, {len(rows)} shown", part_name(run, part, whole=True), rows))
    return views


def listed(values: Any) -> str:
    return "; ".join(map(str, values)) if isinstance(values, list) else str(values)


# --------------------------------------------------------------------------------------- provenance and reproduction


def environments(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each environment once: what was made in it and when, and its facts."""
    found: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        for part in run.parts:
            if part.environment:
                own = {key: value for key, value in part.environment.items() if key != "time"}
                made = found.setdefault(json.dumps(own, sort_keys=True), [])
                made.append((str(part.environment.get("time") or ""), part_name(run, part, whole=True)))
    return [
        (f"Made from {min(made)[0]} to {max(made)[0]}: {', '.join(name for _, name in made)}", facts(json.loads(own)))
        for own, made in found.items()
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
    return [
        (part_name(run, part, whole=True), tidy(yaml.safe_dump(part.config, sort_keys=False, allow_unicode=True)))
        for run in runs
        for part in run.parts
        if part.config
    ]


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


def tidy(text: str) -> str:
    """The text without the name of whoever ran it: the home directory as `~`."""
    home = os.path.expanduser("~").rstrip("/")
    return text.replace(f"'{home}/", "~/'").replace(home + "/", "~/") if len(home) > 1 else text
