"""What the report shows, read from run directories: rows, logs, heat maps, predictions, and how runs compare.

A run is a directory that a command wrote, with those of its parts inside (a demo holds three trainings, four
verifications, four scorings), or a file of rows alone. Nothing here draws.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from benchmarks import summary
from endprompt.results import REQUIRED

#: Folders of a run that hold no part of it.
NO_PARTS = ("states", "samples", "figures", "tensorboard", "wandb")
DEPTH = 3
INTERVALS = {"wilson": "Wilson", "bootstrap": "bootstrap"}
#: Further columns by which rows and predictions are told apart, each a plain value.
SCALARS = ("index", "prompt_sha256", "samples_sha256", "run", "run_sha256", "base", "fold")
#: Columns that tell rows of one method apart, in the order in which a name shows them.
APART = ("target", "steps", "prompt_weight", "row_tokens", "chat", "backend", "dtype")


@dataclass
class Part:
    """One directory that a command wrote. kind: the command, None if its configuration is not here."""

    path: Path
    kind: str | None
    config: dict[str, Any]
    environment: dict[str, Any]
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    log: list[dict[str, Any]]
    depth: list[dict[str, Any]]
    broken: list[str] = field(default_factory=list)  # places that could not be read
    last_run: str | None = None  # of a scoring: the run that its summary and depths are of

    def losses(self) -> list[dict[str, Any]]:
        """Lines of the log that have a step and a finite loss."""
        return [line for line in self.log if number(line.get("step")) and number(line.get("loss"))]


@dataclass
class Run:
    """What was asked to be shown: a name that is unique in the report, and its parts, the outermost first."""

    name: str
    path: Path
    parts: list[Part] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of all parts; one that an outer part repeats from an inner one counts once."""
        found: list[dict[str, Any]] = []
        seen: set[str] = set()
        for part in self.parts:
            keys = [row_key(row) for row in part.rows]
            found += [row for row, key in zip(part.rows, keys) if key not in seen]
            seen |= set(keys)
        return found


def row_key(row: dict[str, Any]) -> str:
    return json.dumps([row[key] for key in REQUIRED] + [row.get(key) for key in ("step", "stratum", "layer", "head")])


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs, named by the last part of their paths. Raises ValueError for a path that holds nothing of ours."""
    if not paths:
        raise ValueError("name at least one run directory: endprompt report RUN [RUN ...]")
    runs: list[Run] = []
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise ValueError(f"there is no such run: {given}")
        parts = [read_part(path)] if path.is_file() else [read_part(folder) for folder in folders(path)]
        parts = [part for part in parts if part.rows or part.losses() or part.about]
        if not parts:
            raise ValueError(
                f"a run is a directory that endprompt wrote, or a file of rows: {given} has no results.jsonl, "
                "log.jsonl or endprompt.json"
            )
        name = path.resolve().name.removesuffix(".jsonl")
        taken = {run.name for run in runs}
        others = (f"{name} ({what})" for what in (parts[0].kind, *range(2, len(paths) + 2)) if what)
        runs.append(Run(next(n for n in (name, *others) if n not in taken), path, parts))
    return runs


def folders(root: Path) -> list[Path]:
    """The directory and those below it that may be parts of the run, the outermost first."""
    found = []
    for place, names, _ in os.walk(root):
        path = Path(place)
        below = len(path.relative_to(root).parts)
        names[:] = sorted(n for n in names if n not in NO_PARTS and not n.startswith(".")) if below < DEPTH else []
        found.append(path)
    return sorted(found, key=lambda path: (len(path.relative_to(root).parts), str(path)))


def read_part(path: Path) -> Part:
    """What a directory, or a file of rows, holds. What is broken is left out, and its place named."""
    broken: list[str] = []
    if path.is_file():
        rows = read_lines(path, broken, REQUIRED)
        return Part(path, None, {}, {}, {}, rows, [], [], broken)
    rows = read_lines(path / "results.jsonl", broken, REQUIRED)
    log = read_lines(path / "log.jsonl", broken)
    depth = read_lines(path / "depth.jsonl", broken, ("length", "depth_from", "depth_to", "value", "n", "method"))
    runs = read_lines(path / "runs.jsonl", broken, ("run_sha256",))
    config, about, environment = (
        read_mapping(path / name, broken) for name in ("config.yaml", "endprompt.json", "environment.json")
    )
    kept = about.get("environment")
    environment = environment or (kept if isinstance(kept, dict) else {})
    last = str(runs[-1]["run_sha256"]) if runs else None
    return Part(path, command_of(config), config, environment, about, rows, log, depth, broken, last)


def read_lines(path: Path, broken: list[str], required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Sound objects of a JSON Lines file that have the keys; the places of other lines are added to `broken`."""
    good: list[dict[str, Any]] = []
    if not path.is_file():
        return good
    with open(path, encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(file, 1):
            try:
                entry = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                entry = ()
            if isinstance(entry, dict) and all(k in entry for k in required) and sound(entry):
                good.append(entry)
            elif entry is not None:
                broken.append(f"{path.name}, line {place}")
    return good


def sound(entry: dict[str, Any]) -> bool:
    """Whether what is computed with has the type it should have."""
    numbers = ("value", "length", "n", "stderr", "seed", "score", "depth_from", "depth_to", "step")
    ci = entry.get("ci95")
    return (
        all(entry.get(key) is None or number(entry[key]) for key in numbers)
        and (entry.get("value", 0) is not None)
        and (ci is None or (isinstance(ci, list) and len(ci) == 2 and all(map(number, ci))))
        and all(isinstance(entry.get(key, ""), str) for key in ("suite", "task", "metric", "model", "method"))
        and not any(isinstance(entry.get(key), (list, dict)) for key in (*SCALARS, *APART))
    )


def read_mapping(path: Path, broken: list[str]) -> dict[str, Any]:
    """A JSON or YAML mapping; empty if the file is not there. What is no such thing is added to `broken`."""
    import yaml

    if not path.is_file():
        return {}
    text, where = path.read_text(encoding="utf-8", errors="replace"), path.name
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if isinstance(value, dict):
            return value
    except yaml.MarkedYAMLError as error:
        where += f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
    except json.JSONDecodeError as error:
        where += f", line {error.lineno}"
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    broken.append(where)
    return {}


def config_types() -> dict[str, type]:
    """The configuration of each command, by its name."""
    found = {}
    for entry_point in entry_points(group="endprompt.commands"):
        try:
            found[entry_point.name] = typing.get_type_hints(entry_point.load())["config"]
        except (ImportError, AttributeError):  # a command of another package that is not whole
            continue
    return found


def command_of(config: dict[str, Any]) -> str | None:
    """The command that a configuration is of: the one whose fields it has, and which has the fewest others."""
    fitting = {}
    for name, kind in config_types().items() if config else ():
        names = {f.name for f in dataclasses.fields(kind)}
        if config.keys() <= names:
            fitting[name] = len(names)
    return min(fitting, key=lambda name: fitting[name]) if fitting else None


# -------------------------------------------------------------------------------------------------------------- scores


@dataclass
class Cell:
    """Score of a method on a task at a length, in percent. seeds: how many; note: what the interval is over."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    seeds: int
    note: str

    def __str__(self) -> str:
        return f"{self.value:.1f}" + (f" [{self.low:.1f}, {self.high:.1f}]" if self.low is not None else "")


@dataclass
class Method:
    """Scores of one method: rows[(task, length)][seed] is the row."""

    run: Run
    name: str
    label: str
    apart: tuple[Any, ...]
    rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = field(default_factory=dict)

    def cell(self, task: str, length: int) -> Cell | None:
        rows = self.rows.get((task, length))
        return cell_of(list(rows.values())) if rows else None

    def mean(self, length: int, tasks: Sequence[str]) -> Cell | None:
        """Mean over the tasks; None unless every one of them was run at this length."""
        own = [self.rows.get((task, length)) for task in tasks]
        if len(tasks) < 2 or not all(own):
            return None
        per_task: list[dict[int, dict[str, Any]]] = [rows for rows in own if rows]
        seeds = set.intersection(*(set(rows) for rows in per_task))
        if len(seeds) > 1:
            means = [statistics.fmean(rows[seed]["value"] for rows in per_task) for seed in sorted(seeds)]
            return over_seeds(means, None)
        cells = [cell_of([next(iter(rows.values()))]) for rows in per_task]
        value = statistics.fmean(cell.value for cell in cells)
        below = [cell.value - cell.low for cell in cells if cell.low is not None]
        above = [cell.high - cell.value for cell in cells if cell.high is not None]
        if len(below) < len(cells) or len(above) < len(cells):
            return Cell(value, None, None, None, 1, "no interval")
        # the tasks' samples are independent: widths add as roots of sums of squares (Zou and Donner 2008)
        return Cell(
            value,
            value - math.hypot(*below) / len(cells),
            value + math.hypot(*above) / len(cells),
            None,
            1,
            "from the tasks' intervals",
        )


@dataclass
class Facet:
    """Methods that belong in one picture: those of one base and one fold."""

    title: str
    methods: list[Method]
    tasks: list[str]
    lengths: list[int]
    window: int | None


def cell_of(rows: Sequence[dict[str, Any]]) -> Cell:
    """One row: itself. Several seeds: their mean with a t interval over seeds."""
    if len(rows) > 1:
        return over_seeds([row["value"] for row in rows], sum(row["n"] or 0 for row in rows) or None)
    row = rows[0]
    ci = row["ci95"] or (None, None)
    note = f"{INTERVALS.get(str(row.get('ci')), '95%')}, over samples" if row["ci95"] else "no interval"
    return Cell(row["value"], ci[0], ci[1], row["n"], 1, note)


def over_seeds(values: Sequence[float], n: int | None) -> Cell:
    """Mean of training seeds with Student's 95% interval."""
    value, half = statistics.fmean(values), t_half(values)
    return Cell(value, max(0.0, value - half), min(100.0, value + half), n, len(values), "Student's t, over seeds")


def t_half(values: Sequence[float]) -> float:
    """Half the width of Student's 95% interval of the mean of at least two values."""
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def facets(runs: Sequence[Run]) -> list[Facet]:
    """RULER's rows by base and fold, and in each by method; methods of one name are told apart by what differs."""
    groups: dict[tuple[Any, Any], dict[tuple[Any, ...], Method]] = {}
    tasks: dict[tuple[Any, Any], dict[str, None]] = {}
    windows: dict[tuple[Any, Any], set[int]] = {}
    versions = clashing(runs)
    for run in runs:
        for row in run.rows:
            if row["suite"] != "ruler" or not row["length"]:
                continue
            place = (row.get("base"), row.get("fold"))
            apart = tuple(row.get(key) for key in APART)
            name = str(row["method"])
            own = groups.setdefault(place, {})
            key = (run.name, row["model"], name, apart, versions.get((str(run.path), row.get("run_sha256")), ""))
            method = own.setdefault(key, Method(run, name, name, apart))
            method.rows.setdefault((row["task"], int(row["length"])), {})[row["seed"]] = row
            tasks.setdefault(place, {})[row["task"]] = None
            if number(row.get("window")):
                windows.setdefault(place, set()).add(int(row["window"]))
    found = []
    for place, own in groups.items():
        label_apart(own)
        words = [f"base {place[0]}" if place[0] else "", f"{place[1]}-fold" if place[1] else ""]
        lengths = sorted({length for method in own.values() for _, length in method.rows})
        seen = windows.get(place, set())
        window = seen.pop() if len(seen) == 1 else None
        title = ", ".join(word for word in words if word)
        found.append(Facet(title, list(own.values()), list(tasks[place]), lengths, window))
    return found


def clashing(runs: Sequence[Run]) -> dict[tuple[str, Any], str]:
    """(run's path, run_sha256) → a short name, of runs of `endprompt score` that have rows for the same cells.

    They stand in one directory and were made with different settings: one must not take the place of the other.
    """
    found: dict[tuple[Any, ...], dict[str, None]] = {}
    for run in runs:
        for row in run.rows:
            if row["suite"] == "ruler" and row.get("run_sha256"):
                cell = (str(run.path), *(row.get(key) for key in ("base", "fold", "model", "method", "task", "length")))
                cell += (row["seed"], *(row.get(key) for key in APART))
                found.setdefault(cell, {})[row["run_sha256"]] = None
    return {(cell[0], name): name[:8] for cell, names in found.items() if len(names) > 1 for name in names}


def label_apart(methods: dict[tuple[Any, ...], Method]) -> None:
    """Add to each label what differs between methods of one name: the columns, the model, the run."""
    names: dict[str, list[tuple[Any, ...]]] = {}
    for key, method in methods.items():
        names.setdefault(method.name, []).append(key)
    for keys in names.values():
        if len(keys) == 1:
            continue
        differs = [len({key[3][place] for key in keys}) > 1 for place in range(len(APART))]
        models, runs = len({key[1] for key in keys}) > 1, len({key[0] for key in keys}) > 1
        for key in keys:
            extra = [f"{name} {value}" for name, value, on in zip(APART, key[3], differs) if on and value is not None]
            extra += [str(key[1])] * models + [str(key[0])] * runs + [f"run {key[4]}"] * bool(key[4])
            methods[key].label += f" ({', '.join(extra)})" if extra else ""


# --------------------------------------------------------------------------------------------------------- comparisons


@dataclass
class Difference:
    """other - reference in points of percent; how: what the interval rests on."""

    reference: str
    other: str
    task: str
    length: int
    value: float
    low: float | None
    high: float | None
    how: str


def differences(facet: Facet, reference: str | None) -> list[Difference]:
    """Each method against the reference: by default the first contiguous one, else the first that is not the base.

    Paired by sample where both runs kept predictions of the same prompts; else paired by training seed where two seeds
    or more share their samples; else from the two intervals (Newcombe's hybrid), which knows no pairs.
    """
    if len(facet.methods) < 2:
        return []
    chosen = choose_reference(facet.methods, reference)
    if chosen is None:
        return []
    found = []
    for method in facet.methods:
        if method is chosen:
            continue
        for length in facet.lengths:
            for task in facet.tasks:
                one = difference(chosen, method, task, length)
                if one:
                    found.append(one)
    return found


def choose_reference(methods: Sequence[Method], name: str | None) -> Method | None:
    if name is not None:
        return next((m for m in methods if name in (m.name, m.label)), None)
    trained = [m for m in methods if m.name != "base" and not m.name.startswith("untrained")] or list(methods)
    return next((m for m in trained if m.name.startswith("contiguous")), trained[0])


def difference(first: Method, second: Method, task: str, length: int) -> Difference | None:
    """second - first on one task at one length, None if one of them was not run."""
    one, other = first.rows.get((task, length)), second.rows.get((task, length))
    if not one or not other:
        return None
    about = (first.label, second.label, task, length)
    seeds = sorted(one.keys() & other.keys())
    same = [s for s in seeds if one[s]["samples_sha256"] and one[s]["samples_sha256"] == other[s]["samples_sha256"]]
    if len(same) > 1:
        values = [other[seed]["value"] - one[seed]["value"] for seed in same]
        mean, half = statistics.fmean(values), t_half(values)
        return Difference(*about, mean, mean - half, mean + half, f"paired by seed, {len(same)} seeds")
    if same:
        left, right = (scores(m, task, length, same[0]) for m in (first, second))
        if left and left.keys() == right.keys():
            order = sorted(left)
            paired = summary.paired_difference([left[i] for i in order], [right[i] for i in order])
            if paired["ci95"][0] < paired["ci95"][1]:  # alike differences give a bootstrap nothing to draw from
                low, high = paired["ci95"]
                return Difference(*about, paired["value"], low, high, f"paired by sample, {paired['n']} samples")
    a, b = cell_of(list(one.values())), cell_of(list(other.values()))
    value = b.value - a.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Difference(*about, value, None, None, "no interval")
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    high = value + math.hypot(b.high - b.value, a.value - a.low)
    return Difference(*about, value, low, high, "not paired")


def scores(method: Method, task: str, length: int, seed: int) -> dict[tuple[int, str], float]:
    """{(index, prompt's sha256): score} of a cell, from the predictions that its run kept; empty if it kept none."""
    row = method.rows[(task, length)][seed]
    for part in method.run.parts:
        if any(own.get("run_sha256") == row.get("run_sha256") and own["method"] == method.name for own in part.rows):
            own = {
                (entry["index"], entry["prompt_sha256"]): float(entry["score"])
                for entry in predictions(part, row.get("run_sha256"))
                if entry["task"] == f"{task}@{length}"
            }
            if own:
                return own
    return {}


def predictions(part: Part, run: str | None = None) -> list[dict[str, Any]]:
    """Whole entries of the predictions of one run of a part, its last if none is named, the latest of each sample."""
    needed = ("task", "index", "prompt_sha256", "score", "prediction", "outputs")
    if not part.path.is_dir():
        return []
    run = run or part.last_run
    lines = [line for path in sorted(part.path.glob("predictions*.jsonl")) for line in read_lines(path, [], needed)]
    own = [line for line in lines if number(line["score"]) and run in (None, line.get("run"))]
    return list({(line["task"], line["index"]): line for line in own}.values())


def others(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Rows beside RULER's and the analysis's: of a training's evaluations the last, of seeds all."""
    columns = (*REQUIRED[:4], "model", "method", "seed", "base", "fold", "comparison", *APART)
    latest: dict[str, dict[str, Any]] = {}
    for run in runs:
        for row in run.rows:
            if row["suite"] in ("ruler", "analysis"):
                continue
            key = json.dumps([run.name] + [row.get(k) for k in columns])
            if key not in latest or (row.get("step") or 0) >= (latest[key].get("step") or 0):
                latest[key] = row
    return list(latest.values())
