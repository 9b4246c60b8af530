"""`endprompt report`: one page of HTML with everything that a run says of itself, and nothing that is loaded.

Styles, script and pictures are inside the page, whose policy forbids every request. Behind each chart is a table.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.report import charts
from benchmarks.report import runs as report_data
from benchmarks.report.charts import Point, tokens
from benchmarks.report.runs import MEANS, Facet, Part, Run, number
from endprompt.files import write_text

if TYPE_CHECKING:
    from benchmarks.config import ReportConfig

DUMP = functools.partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
#: Points of a loss curve; wrong predictions shown of a task and length, and in all of one scoring.
CURVE, WRONG, SHOWN = 400, 3, 60
BOUNDS = {
    "coefficient_order0": "|S| over the sum of its coefficients",
    "coefficient_order1": "|S′| over its coefficient bound",
    "coefficient_order2": "|S″| over its coefficient bound",
    "bernstein_order1": "|S′| over Bernstein's bound",
    "bernstein_order2": "|S″| over Bernstein's bound",
    "duffin_schaeffer": "S′² + σ²S² over Duffin-Schaeffer's bound",
}


def report(config: ReportConfig) -> Path:
    """Write the page; returns its path. Raises ValueError for a run that is none."""
    runs = report_data.read_runs(config.runs)
    first = runs[0].path
    output = Path(config.output or (first / "report.html" if first.is_dir() else first.with_suffix(".html")))
    page = render(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def show(page: Path) -> None:
    """Open the page in the user's browser."""
    import webbrowser

    webbrowser.open(page.resolve().as_uri())


def render(runs: Sequence[Run]) -> str:
    """The page as text: the same for the same runs."""
    parts = [(name_of(run, part), run, part) for run in runs for part in run.parts]
    return rendered(
        "report.html",
        runs=runs,
        parts=parts,
        about_run=about_run,
        losses=loss_charts(parts),
        facets=[facet_view(facet, f"f{index}") for index, facet in enumerate(report_data.facets(runs))],
        heat_maps=[view for _, run, part in parts for view in heat_maps(run, part, len(runs) > 1)],
        bounds=bounds(runs),
        others=report_data.others(runs),
        predictions=[wrong_predictions(name, part) for name, _, part in parts if last_predictions(part)],
        environments=environments(parts),
        configurations=[(name, DUMP(part.config)) for name, _, part in parts if part.config],
        commands=[(run.name, commands(run)) for run in runs],
    )


def rendered(template: str, *scripts: str, **values: Any) -> str:
    """A page of the package's templates with its style and scripts inside, and a policy that allows no others."""
    folder = files("benchmarks") / "templates"
    style, *code = ((folder / name).read_text("utf-8") for name in ("report.css", "report.js", *scripts))
    own = {"policy": policy(style, "".join(code)), "style": Markup(style), "script": Markup("".join(code))}
    made = Environment(
        loader=PackageLoader("benchmarks"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"count": count, "tokens": tokens, "tidy": tidy, "basename": os.path.basename}
    made.tests["number"] = number
    return made.get_template(template).render(**own, glyphs=charts.GLYPHS, **values)


def policy(style: str, script: str) -> str:
    """Content-Security-Policy that allows this page's own style and script, and no request at all."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    own = f"style-src {source(style)}; script-src {source(script)}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def count(value: Any) -> str:
    return f"{value:,}" if number(value) else ""


def name_of(run: Run, part: Part) -> str:
    """The run's name and the part's place in it."""
    return run.name if part.path == run.path else f"{run.name}/{part.path.relative_to(run.path).as_posix()}"


def about_run(run: Run) -> dict[str, Any]:
    """Facts by name."""
    first = next((part for part in run.parts if part.environment), run.parts[0])
    environment, device = first.environment, first.environment.get("device") or {}
    kinds = [part.kind or ("rows" if part.rows else "training") for part in run.parts]
    seconds = sum(line["seconds"] for line in (*run.parts[0].log, run.parts[0].about) if number(line.get("seconds")))
    cores = f"CPU, {device['cpu_count']} cores" if device.get("cpu_count") else ""
    held = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    return {
        "Run": run.name,
        "Kind": kinds[0],
        "Holds": f"{held}; {len(run.rows):,} rows of results",
        "Device": device.get("gpu") or " ".join(str(v) for v in (device.get("machine"), cores) if v),
        "Revision": environment.get("revision"),
        "Started": environment.get("time"),
        "Time taken": f"{seconds / 60:.1f} min" if seconds else "",
    }


def loss_charts(parts: Sequence[tuple[str, Run, Part]]) -> list[tuple[list[str], Markup, list[Any]]]:
    """(names, picture, numbers by name) of training loss against steps, as many curves as can be told apart."""
    series = []
    for name, _, part in parts:
        lines = part.losses()
        if len(lines) > 1:
            name += f": {part.about['method']}" if part.about.get("method") else ""
            curve = [(line["step"], line["loss"]) for line in charts.thinned(lines, CURVE)]
            series.append((name, [Point(*p, spoken=f"{name}, step {p[0]:,}: loss {p[1]:.4f}") for p in curve]))
    views = []
    for index, group in enumerate(chunks(series)):
        svg = charts.lines("Training loss", group, ("step", "loss (nats a token)"), f"l{index}")
        shown = [(name, charts.thinned(points, charts.STOPS)) for name, points in group]
        tables = [(name, [(f"{p.x:,.0f}", f"{p.y:.4f}") for p in points]) for name, points in shown]
        views.append(([name for name, _ in group], svg, tables))
    return views


def chunks(series: Sequence[Any]) -> list[list[Any]]:
    return [list(series[k : k + charts.STYLES]) for k in range(0, len(series), charts.STYLES)]


def facet_view(facet: Facet, key: str) -> dict[str, Any]:
    """Charts of each task, the numbers behind them and averages, of one base and fold."""
    groups = chunks(facet.methods)
    mean = [MEANS] if len(facet.tasks) > 1 else []
    drawn = [*mean, *facet.tasks] if len(groups) == 1 else mean or facet.tasks
    labels = ("length (tokens)", "score (percent)")
    views = []
    for place, group in enumerate(groups):
        pictures = []
        for number_, task in enumerate(drawn):
            series = [(method, points_of(facet, method, task)) for method in group]
            if any(points for _, points in series):
                title, name = f"{task}: score against length", f"{key}-{place}-{number_}"
                svg = charts.lines(title, series, labels, name, scores=True, window=facet.window)
                pictures.append((task, svg))
        views.append((group, pictures))
    sizes = facet.samples
    return {
        "facet": facet,
        "groups": views,
        "columns": [*facet.tasks, *mean],
        "places": [(m, length) for m in facet.methods for length in sorted({p[2] for p in facet.cells if p[0] == m})],
        "samples": " to ".join(f"{size:,.0f}" for size in dict.fromkeys([sizes[0], sizes[-1]])) if sizes else "",
        "averages": report_data.averages(facet),
    }


def points_of(facet: Facet, method: str, task: str) -> list[Point]:
    cells = [(length, facet.cells.get((method, task, length))) for length in facet.lengths]
    return [Point(n, *one, f"{method}, {task}, {n:,} tokens: {one}") for n, one in cells if one]


def heat_maps(run: Run, part: Part, several: bool) -> Iterator[tuple[str, list[int], list[Any]]]:
    """Single answers found: title, lengths, and by depth of the needle the cell of each length, of each method."""
    if not part.depth:
        return
    for method, cells in pd.DataFrame(part.depth).groupby("method", sort=False):
        lengths = sorted(map(int, cells["length"].unique()))
        found = {(cell["depth_from"], cell["depth_to"], int(cell["length"])): cell for cell in cells.to_dict("records")}
        lines = [(low, high, [(n, found.get((low, high, n))) for n in lengths])
                 for low, high in sorted({place[:2] for place in found})]  # fmt: skip
        yield f"{run.name}: {method}" if several else str(method), lengths, lines


def bounds(runs: Sequence[Run]) -> list[tuple[bool, list[str], list[Any]]]:
    """Largest value over each bound and the share of pairs within it: whether all hold, methods, table."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for row in run.rows:
            if row["suite"] == "analysis" and row["task"] == "bounds":
                label = f"{row['method']} ({run.name})" if len(runs) > 1 else row["method"]
                found.setdefault(label, {}).setdefault(row["metric"], []).append(row["value"])
    found = {name: own for name, own in found.items() if any(f"largest_over_{b}" in own for b in BOUNDS)}
    views = []
    for group in chunks(list(found)):
        table: list[list[Any]] = []
        for bound, label in BOUNDS.items():
            pairs = [(found[m].get(f"largest_over_{bound}"), found[m].get(f"share_within_{bound}")) for m in group]
            shares = [f" <small>{100 * min(share):.2f}%</small>" if share else "" for _, share in pairs]
            over = [f"{max(largest):.4f}" if largest else "" for largest, _ in pairs]
            table.append([label, *(Markup(value + share) for value, share in zip(over, shares))])
        radius = [found[method].get("nonvacuous_radius_tokens") for method in group]
        table.append(["Bernstein's bound says something up to (tokens)", *(f"{r[0]:.3g}" if r else "" for r in radius)])
        holds = all(min(v) >= 1 for m in group for k, v in found[m].items() if k.startswith("share_within"))
        views.append((holds, group, table))
    return views


def last_predictions(part: Part) -> list[dict[str, Any]]:
    """Of the scoring's last run, in the samples' order."""
    own = [entry for entry in part.predictions if part.last_run in (None, entry.get("run"))]
    return sorted(own, key=lambda entry: entry["index"])


def wrong_predictions(name: str, part: Part) -> tuple[str, str, list[dict[str, Any]]]:
    """What a model wrote where it was wrong: summary, name, and the first few of each task and length."""
    entries = last_predictions(part)
    wrong: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["score"] < 100:
            wrong.setdefault(str(entry["task"]), []).append(entry)
    shown = [entry for found in wrong.values() for entry in found[:WRONG]][:SHOWN]
    method = f" ({part.rows[0]['method']})" if part.rows else ""
    said = f"{name}{method}: {sum(map(len, wrong.values())):,} of {len(entries):,} wrong, {len(shown)} shown"
    return said, name, shown


def environments(parts: Sequence[tuple[str, Run, Part]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Each environment once: what was made in it and when, and its facts, nested ones on a line of their own."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, _, part in parts:
        if own := {key: value for key, value in part.environment.items() if key != "time"}:
            made = found.setdefault(json.dumps(own, sort_keys=True), [])
            made.append((str(part.environment.get("time") or ""), name))
    said = [
        f"Made from {min(made)[0]} to {max(made)[0]}: {', '.join(name for _, name in made)}" for made in found.values()
    ]
    facts = ([*pd.json_normalize(json.loads(own), sep=": ").iloc[0].items()] for own in found)
    return [*zip(said, facts)]


def commands(run: Run) -> list[str]:
    """Shell lines that make the run again: the checkout, then the outermost commands with their configurations."""
    made = [part for part in run.parts if part.kind]
    if not made:
        return []
    revision = str(made[0].environment.get("revision") or "").removesuffix("-dirty")
    outer = made[:1] if made[0].path == run.path else [p for p in made if p.path.parent == made[0].path.parent]
    lines = [f"git checkout {shlex.quote(revision)}"] if revision else []
    return lines + [f"endprompt {p.kind} --config {shlex.quote(str(p.path / 'config.yaml'))}" for p in outer]


def tidy(text: str) -> str:
    """The text without the name of whoever ran it: the home directory as `~`."""
    home = os.path.expanduser("~").rstrip("/")
    return text.replace(f"'{home}/", "~/'").replace(home + "/", "~/") if len(home) > 1 else text
