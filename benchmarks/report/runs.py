"""What the report shows, read from run directories: rows, logs, heat maps, predictions, and how runs compare.

A run is a directory that a command wrote, with those of its parts inside (a demo holds three trainings, four
verifications, four scorings), or a file of rows alone. Nothing here draws.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import summary
from endprompt.files import sound_lines
from endprompt.results import REQUIRED
from paper_figures.averages import average

#: Folders of a run that hold no part of it, and how deep parts lie.
NO_PARTS = ("states", "samples", "figures", "tensorboard", "wandb")
DEPTH = 3
#: Columns that tell rows of one method apart, in the order in which a name shows them.
APART = ("target", "steps", "prompt_weight", "row_tokens", "chat", "backend", "backend_args", "dtype")
#: Further columns by which rows and predictions are told apart, each a plain value.
SCALARS = ("index", "prompt_sha256", "samples_sha256", "run", "run_sha256", "base", "fold")
MEANS = "mean over tasks"  # in the place of a task: the mean over all of them

Row = dict[str, Any]


@dataclass
class Part:
    """One directory that a command wrote. kind: the command, None if its configuration is not here."""

    path: Path
    kind: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    log: list[Row] = field(default_factory=list)
    depth: list[Row] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # places that could not be read
    last_run: str | None = None  # of a scoring: the run that its summary and depths are of

    def losses(self) -> list[Row]:
        """Lines of the log that have a step and a finite loss."""
        return [line for line in self.log if number(line.get("step")) and number(line.get("loss"))]

    @cached_property
    def predictions(self) -> list[Row]:
        """Whole entries of all predictions; of each run and sample the latest."""
        needed = ("task", "index", "prompt_sha256", "score", "prediction", "outputs")
        paths = sorted(self.path.glob("predictions*.jsonl"))
        lines = [line for path in paths for line in read_lines(path, [], needed) if number(line["score"])]
        return list({(line.get("run"), line["task"], line["index"]): line for line in lines}.values())


@dataclass
class Run:
    """What was asked to be shown: a name that is unique in the report, and its parts, the outermost first."""

    name: str
    path: Path
    parts: list[Part] = field(default_factory=list)

    @cached_property
    def rows(self) -> list[Row]:
        """Rows of all parts; one that an outer part repeats from an inner one counts once."""
        found: list[Row] = []
        seen: set[str] = set()
        for part in self.parts:
            more = ("step", "stratum", "layer", "head")
            keys = [json.dumps([r[key] for key in REQUIRED] + [r.get(key) for key in more]) for r in part.rows]
            found += [row for row, key in zip(part.rows, keys) if key not in seen]
            seen |= set(keys)
        return found


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
        parts = [read_part(place) for place in ([path] if path.is_file() else folders(path))]
        parts = [part for part in parts if part.rows or part.losses() or part.about]
        if not parts:
            lacks = f"{given} has no results.jsonl, log.jsonl or endprompt.json"
            raise ValueError(f"a run is a directory that endprompt wrote, or a file of rows: {lacks}")
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
        return Part(path, rows=read_lines(path, broken, REQUIRED), broken=broken)
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


def read_lines(path: Path, broken: list[str], required: Sequence[str] = ()) -> list[Row]:
    """Sound objects of a JSON Lines file that have the keys; the places of other lines are added to `broken`."""
    good = []
    for place, _, entry in sound_lines(path) if path.is_file() else ():
        if entry is not None and all(key in entry for key in required) and sound(entry):
            good.append(entry)
        else:
            broken.append(f"{path.name}, line {place}")
    return good


def sound(entry: Row) -> bool:
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
    """A mapping in YAML, as JSON is; empty if the file is not there. What is no such thing is added to `broken`."""
    import yaml

    if not path.is_file():
        return {}
    where = path.name
    try:
        value = yaml.load(path.read_text(encoding="utf-8", errors="replace"), yaml.CSafeLoader)
        if isinstance(value, dict):
            return value
    except yaml.MarkedYAMLError as error:
        where += f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    broken.append(where)
    return {}


def command_of(config: dict[str, Any]) -> str | None:
    """The command that a configuration is of: the one whose fields it has, and which has the fewest others."""
    fitting: dict[int, str] = {}
    for entry_point in entry_points(group="endprompt.commands") if config else ():
        names = {f.name for f in dataclasses.fields(typing.get_type_hints(entry_point.load())["config"])}
        if config.keys() <= names:
            fitting[len(names)] = entry_point.name
    return fitting[min(fitting)] if fitting else None


class Cell(typing.NamedTuple):
    """Score of a method on a task at a length, in percent, with its 95% interval (nan where there is none)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f}" + (f" [{self.low:.1f}, {self.high:.1f}]" if self.low == self.low else "")


@dataclass
class Facet:
    """Methods that belong in one picture: those of one base and one fold. samples: the numbers of samples of their
    rows. cells: by method, task and length, and for the task MEANS where all tasks were run."""

    title: str
    methods: list[str]
    tasks: list[str]
    lengths: list[int]
    window: int | None
    samples: list[float]
    cells: dict[tuple[str, str, int], Cell]


def facets(runs: Sequence[Run]) -> list[Facet]:
    """RULER's rows by base and fold, and in each by method; methods of one name are told apart by what differs."""
    columns = ["base", "fold", "model", "method", *APART, "run_sha256", "window", "task", "length", "seed", "value"]
    columns += ["n", "run", "origin", "lo", "hi"]
    found = []
    for run in runs:
        about = {"run": run.name, "origin": run.name}
        for row in (row for row in run.rows if row["suite"] == "ruler" and row["length"]):
            found.append(row | about | dict(zip(("lo", "hi"), row["ci95"] or (math.nan, math.nan))))
    every = pd.DataFrame(found, columns=columns, dtype=object)
    every = every.where(every.notna(), None).astype({"length": int, "value": float, "lo": float, "hi": float})
    return [facet_of(rows) for _, rows in every.groupby(["base", "fold"], sort=False, dropna=False)]


def facet_of(rows: pd.DataFrame) -> Facet:
    rows = rows.assign(label=labels(rows))
    rows = rows.drop_duplicates(["label", "task", "length", "seed"], keep="last")
    tasks, (base, fold) = list(rows["task"].unique()), rows[["base", "fold"]].iloc[0]
    windows = {int(window) for window in rows["window"] if number(window)}
    words = [f"base {base}" if base else "", f"{fold}-fold" if fold else ""]
    return Facet(
        title=", ".join(filter(None, words)),
        methods=list(rows["label"].unique()),
        tasks=tasks,
        lengths=sorted(map(int, rows["length"].unique())),
        window=windows.pop() if len(windows) == 1 else None,
        samples=sorted({size for size in rows["n"] if size}),
        cells=cells_of(rows.assign(method=rows["label"]), len(tasks)),
    )


def labels(rows: pd.DataFrame) -> list[str]:
    """Each row's method, with what it differs in from others of its name: the columns, the model, the run. Rows of one
    run directory for the same cell, made by different settings of `endprompt score`, must not take each other's place:
    they are told apart by their settings' hash."""
    same = ["run", "model", "method", "task", "length", "seed", *APART]
    clashing = rows.groupby(same, dropna=False)["run_sha256"].transform("nunique") > 1
    unlike = rows["run_sha256"].isin(set(rows.loc[clashing, "run_sha256"]))
    told = rows[[*APART, "model", "run"]].assign(settings=rows["run_sha256"].str[:8].where(unlike, None))
    differing = {
        method: [column for column in told if own[column].nunique(dropna=False) > 1]
        for method, own in told.groupby(rows["method"], sort=False)
    }
    made = []
    for method, row in zip(rows["method"], told.to_dict("records")):
        shown = [(column, row[column]) for column in differing[method] if not pd.isna(row[column])]
        words = [str(value) if column in ("model", "run") else f"{column} {value}" for column, value in shown]
        made.append(method + (f" ({', '.join(words)})" if words else ""))
    return made


def cells_of(rows: pd.DataFrame, tasks: int) -> dict[tuple[str, str, int], Cell]:
    """Scores of methods by task and length, and their means over the tasks where all were run."""
    found = average(rows, ["method", "task", "length"])
    if tasks > 1:
        means = average(rows, ["method", "length"], ["task"]).assign(task=MEANS)
        found = pd.concat([found, means[means["cells"] == tasks]])
    found[["lo", "hi"]] = found[["lo", "hi"]].clip(0, 100)
    return {(one.method, one.task, int(one.length)): Cell(one.value, one.lo, one.hi) for one in found.itertuples()}


def averages(facet: Facet) -> list[tuple[str, dict[str, float]]]:
    """RULER's own averages over the lengths of each method that has several, by their metrics."""
    found = []
    for label in facet.methods:
        own = [(*place[1:], cell.value) for place, cell in facet.cells.items() if place[0] == label]
        rows = [{"suite": "ruler", "task": t, "length": n, "value": value} for t, n, value in own if t != MEANS]
        made = {row["metric"]: row["value"] for row in summary.ruler_summary(rows) if row["length"] is None}
        if made and len({row["length"] for row in rows}) > 1:
            found.append((label, made))
    return found


def others(runs: Iterable[Run]) -> list[Row]:
    """Rows beside RULER's and the analysis's: of a training's evaluations the last, of seeds all."""
    columns = (*REQUIRED[:4], "model", "method", "seed", "base", "fold", "comparison", *APART)
    latest: dict[str, Row] = {}
    for run in runs:
        for row in (row for row in run.rows if row["suite"] not in ("ruler", "analysis")):
            key = json.dumps([run.name] + [row.get(k) for k in columns])
            if key not in latest or (row.get("step") or 0) >= (latest[key].get("step") or 0):
                latest[key] = row
    return list(latest.values())
