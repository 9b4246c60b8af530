"""`endprompt compare`: several scorings side by side, with intervals, paired differences, costs and published tables.

A mean over tasks combines the tasks' intervals by squares, separately below and above (as paper_figures.averages does);
effective lengths and differences have 95% intervals from a bootstrap over samples.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup

from benchmarks import summary
from benchmarks.report import charts, page
from benchmarks.ruler.tasks import TASKS
from benchmarks.scoring import fingerprint
from benchmarks.scoring.predictions import read_run
from endprompt.files import read_json_lines, write_text
from endprompt.results import read_rows

if TYPE_CHECKING:
    from benchmarks.config import CompareConfig

RESAMPLES = 2000  # of means; differences have summary's number
#: What a score depends on beside the model, as the rows say it.
SETTINGS = ("edition", "chat", "chat_layout", "thinking", "system", "api", "backend", "dtype", "generator")
#: Scores of one cell by sample: its index, the hash of its prompt, the tokens allowed.
Scores = dict[tuple[int, str, int | None], float]
Cell = tuple[str, str, int | None]  # suite, task, length
NONE = math.nan


@dataclass
class Entry:
    """The last run of a directory. about: its line of runs.jsonl. rows, scores: by cell."""

    name: str
    path: Path
    about: dict[str, Any]
    rows: dict[Cell, dict[str, Any]]
    scores: dict[Cell, Scores]

    @cached_property
    def named(self) -> dict[str, float]:
        """Numbers of the run's summary by the names that published tables have for them, and its tasks' own."""
        path, found = self.path / "summary.jsonl", {task: row["value"] for (_, task, _), row in self.rows.items()}
        for row in read_rows(path) if path.is_file() else ():
            if row.get("run_sha256") == self.about["run_sha256"] and "bucket" not in row:
                plain = row["task"] if row["metric"] in ("average", "accuracy") else row["metric"]
                name = f"{row['group']}:{row['task']}" if row.get("group") else plain
                found[str(row["length"]) if row["length"] else name] = row["value"]
        return found

    def means(self, suite: str, length: int | None, tasks: Sequence[str]) -> np.ndarray | None:
        """float64 [RESAMPLES]: means over the tasks, samples drawn anew; None where a task has no predictions."""
        parts = [self.scores.get((suite, task, length)) for task in tasks]
        if not all(parts):
            return None
        place = list(self.rows).index((suite, tasks[0], length))  # lengths are drawn independently of each other
        return resampled([np.array([*own.values()]) for own in parts if own], seed=place)

    @cached_property
    def cost(self) -> dict[str, float]:
        """tokens (read and made), seconds and GPU-seconds of what the log tells of this run; nan where it does not."""
        path, sha256 = self.path / "log.jsonl", self.about["run_sha256"]
        lines = [line for _, line in read_json_lines(path) if line.get("run") == sha256] if path.is_file() else []

        def total(*keys: str) -> float:
            told = [math.prod(NONE if line.get(key) is None else line[key] for key in keys) for line in lines]
            return sum(told) if told else NONE

        tokens = total("prompt_tokens") + total("answer_tokens")
        return {"tokens": tokens, "seconds": total("seconds"), "GPU-seconds": total("seconds", "gpus")}

    @property
    def settings(self) -> str:
        rows = self.rows.values()
        told = {key: sorted({str(row[key]) for row in rows if row.get(key) not in (None, False)}) for key in SETTINGS}
        sizes = sorted({row["n"] for row in rows if row["n"]})
        samples = f"n {'–'.join(str(n) for n in dict.fromkeys([sizes[0], sizes[-1]]))}" if sizes else ""
        return ", ".join(filter(None, [*(f"{key} {'/'.join(v)}" for key, v in told.items() if v), samples]))


def read(paths: Sequence[str]) -> list[Entry]:
    """Entries with names of their own: model and method, and the directory's name where two have the same. Raises
    ValueError for a directory that is no finished scoring."""
    if not paths:
        raise ValueError("name at least one run directory: endprompt compare RUN [RUN ...]")
    made = []
    for given in paths:
        path, (about, rows) = Path(given), fingerprint.last_run(given)
        if not rows:
            raise ValueError(f"{given}: its last run has no finished task: score again to complete it")
        found: dict[str, dict[int, tuple[Any, float]]] = {}
        for (task, *key), entry in read_run(path, about["run_sha256"]).items():
            found.setdefault(task, {})[entry["index"]] = tuple(key), float(entry["score"])
        cells = {(row["suite"], row["task"], row["length"]): row for row in rows}
        units = {cell: f"{cell[1]}@{cell[2]}" if cell[2] else cell[1] for cell in cells}
        own = {cell: scores_of(row, found.get(units[cell], {})) for cell, row in cells.items()}
        method = "" if rows[-1]["method"] in ("base", None) else f" ({rows[-1]['method']})"
        made.append(Entry(f"{rows[-1]['model']}{method}", path, about, cells, own))
    for place in (0, 1):  # by the directory's name, then by the number
        names = [entry.name for entry in made]
        for place_, one in enumerate(made, 1):
            if names.count(one.name) > 1:
                one.name += f", {(one.path.resolve().name, place_)[place]}"
    return made


def scores_of(row: Mapping[str, Any], found: Mapping[int, tuple[Any, float]]) -> Scores:
    """The scores behind a row, the first of its task's; empty unless they have its number and mean."""
    own = dict(one for _, one in sorted(found.items())[: row["n"]])
    right = own and len(own) == row["n"] and abs(sum(own.values()) / len(own) - row["value"]) < 1e-6
    return own if right else {}


def resampled(parts: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """float64 [resamples]: the mean of the parts' means, each part's values drawn anew."""
    rng = np.random.default_rng([seed, len(parts)])
    return np.mean([summary.resampled_means(part, rng, resamples) for part in parts], axis=0)


def interval(values: np.ndarray | None, **how: Any) -> tuple[float, float]:
    if values is None:
        return NONE, NONE
    low, high = np.percentile(values, [2.5, 97.5], **how)
    return float(low), float(high)


def differences(entries: Sequence[Entry], reference: Entry) -> list[dict[str, Any]]:
    """Each other run less the reference, by cell and over the tasks of a suite's length, with Holm's p-values. Paired
    by sample where both were asked the same prompts with as many tokens for the answer; else both are drawn by
    themselves. A family is a suite's cells, or its means."""
    found = []
    for other in entries:
        for (suite, length), tasks in groups([reference, other]).items() if other is not reference else ():
            cells = [(task, pair(reference, other, (suite, task, length))) for task in tasks]
            known = [(task, [one]) for task, one in cells if one]
            if len(known) == len(cells) > 1:
                known.append(("mean", [parts[0] for _, parts in known]))
            about = {"suite": suite, "length": length, "reference": reference.name, "other": other.name}
            found += [{**about, "task": task, **difference(parts)} for task, parts in known]
    for _, family in itertools.groupby(sorted(found, key=family_of), family_of):
        rows = list(family)
        for row, p in zip(rows, summary.holm([row["p"] for row in rows])):
            row["p_holm"] = p
    return found


class Pair(NamedTuple):
    """Scores of one cell in two runs, and whether they lie beside each other by sample."""

    first: np.ndarray
    second: np.ndarray
    paired: bool


def difference(parts: Sequence[Pair]) -> dict[str, Any]:
    """second - first over the parts' means, its interval and p-value by bootstrap. Where that has nothing to draw from,
    since all samples differ alike: a sign test and Newcombe's hybrid interval."""
    paired, n = all(part.paired for part in parts), sum(min(len(part.first), len(part.second)) for part in parts)
    sides = [[part.first for part in parts], [part.second for part in parts]]
    first, second = (float(np.mean([own.mean() for own in side])) for side in sides)
    if paired:
        gaps = resampled([part.second - part.first for part in parts], summary.RESAMPLES)
    else:
        drawn = [resampled(side, summary.RESAMPLES, seed) for seed, side in enumerate(sides)]
        gaps = drawn[1] - drawn[0]
    p, (low, high) = summary.two_sided(gaps), interval(gaps)
    if low == high:
        p = min(1.0, max(2.0 ** (1 - n), 1 / summary.RESAMPLES)) if first != second else 1.0
        a, b = (combined([(float(own.mean()), summary.interval(own.tolist())[0]) for own in side]) for side in sides)
        low, high = summary.newcombe(first, a, second, b)
    return {"first": first, "second": second, "difference": second - first, "ci95": [low, high], "p": p,
            "paired": paired, "n": n}  # fmt: skip


def combined(cells: Sequence[tuple[float, Sequence[float] | None]]) -> tuple[float, float]:
    """Interval of the mean of cells from each one's (value, interval); nan if one has none, or there is no cell."""
    ends = [(value - ci[0], ci[1] - value) for value, ci in cells if ci]
    if not cells or len(ends) < len(cells):
        return NONE, NONE
    value = sum(value for value, _ in cells) / len(cells)
    below, above = (math.hypot(*side) / len(cells) for side in zip(*ends))
    return max(0.0, value - below), min(100.0, value + above)


def family_of(row: Mapping[str, Any]) -> tuple[str, bool]:
    return row["suite"], row["task"] == "mean"


def pair(first: Entry, second: Entry, cell: Cell) -> Pair | None:
    """The scores of one cell; those of shared prompts alone where there are some. None where a run kept none."""
    a, b = first.scores[cell], second.scores[cell]
    shared = [] if fingerprint.differing(first.about, second.about) else sorted(a.keys() & b.keys())
    if len(shared) > 1:
        return Pair(np.array([a[key] for key in shared]), np.array([b[key] for key in shared]), True)
    return Pair(np.array([*a.values()]), np.array([*b.values()]), False) if a and b else None


def groups(entries: Sequence[Entry]) -> dict[tuple[str, int | None], list[str]]:
    """(suite, length) → the tasks that all of the entries have."""
    found: dict[tuple[str, int | None], list[str]] = {}
    for suite, task, length in entries[0].rows:
        if all((suite, task, length) in entry.rows for entry in entries):
            found.setdefault((suite, length), []).append(task)
    return found


@dataclass
class Table:
    """Rows of (text, what it is sorted by). own: how many of the rows are of runs, the first ones."""

    title: str
    notes: list[str]
    columns: list[str]
    rows: list[list[tuple[str, Any]]]
    picture: Markup | None = None
    legend: list[str] = field(default_factory=list)
    own: int = 0

    def text(self) -> str:
        cells = [self.columns, *([text for text, _ in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells]
        return "\n".join([self.title, *lines, *self.notes])


def shown(value: float, ends: Iterable[float] = (), pattern: str = "{:.1f}") -> tuple[str, Any]:
    """A cell: the number, its interval if it has one, and the number for sorting."""
    if math.isnan(value):
        return "", ""
    ends = [end for end in ends if not math.isnan(end)]
    return pattern.format(value) + (f" [{', '.join(map(pattern.format, ends))}]" if ends else ""), value


def tokens(value: float, ends: Sequence[float]) -> tuple[str, Any]:
    def name(length: float) -> str:
        return charts.tokens(length) if length else "none"

    around = f" [{', '.join(map(name, ends))}]" if ends[0] == ends[0] else ""
    return name(value) + around, value


def scores_table(entries: Sequence[Entry], suite: str, threshold: float, key: str) -> Table:
    """A suite's runs: the mean over the tasks that any of them has at a length, effective lengths, costs, settings."""
    cells = {cell: None for entry in entries for cell in entry.rows if cell[0] == suite}
    lengths = sorted({length for _, _, length in cells}, key=lambda length: length or 0)
    tasks = {length: [task for _, task, at in cells if at == length] for length in lengths}
    several = [length for length in lengths if length is not None]
    heads = [f"{length:,}" if length else "mean" for length in lengths]
    effective = ["effective length", "unbroken"] if len(several) > 1 else []
    rows, series = [], []
    for entry in entries:
        if not any(cell[0] == suite for cell in entry.rows):
            continue
        values: dict[int | None, float] = {}
        ends: dict[int | None, tuple[float, float]] = {}
        drawn: dict[int | None, np.ndarray | None] = {}
        for length in lengths:
            own = [entry.rows.get((suite, task, length)) for task in tasks[length]]
            values[length] = sum(row["value"] for row in own if row) / len(own) if all(own) else NONE
            ends[length] = combined([(row["value"], row["ci95"]) for row in own if row])
            drawn[length] = entry.means(suite, length, tasks[length]) if all(own) else None
        row = [(entry.name, entry.name), *(shown(values[n], ends[n]) for n in lengths)]
        if effective:
            row += effective_lengths({n: values[n] for n in several}, drawn, threshold)
        costs = entry.cost
        rows.append([*row, *(shown(value, pattern="{:,.0f}") for value in costs.values()), (entry.settings,) * 2])
        drawn_at = [n for n in several if values[n] == values[n]]
        spoken = {n: f"{entry.name}, {n:,} tokens: {shown(values[n])[0]}" for n in drawn_at}
        series.append((entry.name, [charts.Point(n, values[n], *ends[n], spoken[n]) for n in drawn_at]))
    picture = None
    drawable = [one for one in series if one[1]][: charts.STYLES]
    if effective and drawable:
        picture = charts.lines(suite, drawable, ("length (tokens)", "score (percent)"), key, scores=True)
    counts = sorted({len(own) for own in tasks.values()})
    notes = [f"Mean over {' or '.join(map(str, counts))} task{'s' * (counts != [1])}, percent [95% interval]."]
    if blank := [row[0][0] for row in rows if any(not text for text, _ in row[1 : 1 + len(lengths)])]:
        notes.append(f"No mean at a length where a run lacks one of these tasks: {', '.join(blank)}.")
    if effective:
        notes.append(
            f"Effective length: the longest that scores {threshold:g} or more (RULER's rule); unbroken: up to which "
            "every length that was run does; their intervals by bootstrap over samples."
        )
    cells_of = [
        (entry, cell) for entry in entries for cell, own in entry.scores.items() if cell[0] == suite and not own
    ]
    if lost := [f"{task}{f' at {n:,}' if n else ''} of {entry.name}" for entry, (_, task, n) in cells_of]:
        notes.append(
            f"Without differences, since no answers are kept that have the row's score: {', '.join(lost[:4])}"
            f"{f' and {len(lost) - 4} more' * (len(lost) > 4)}."
        )
    columns = ["model", *heads, *effective, "tokens", "seconds", "GPU-seconds", "settings"]
    told = [place for place, cells_ in enumerate(zip(*rows)) if any(text for text, _ in cells_)]  # the others are empty
    columns, rows = [columns[place] for place in told], [[row[place] for place in told] for row in rows]
    return Table(suite, notes, columns, rows, picture, [name for name, _ in drawable], len(rows))


def effective_lengths(
    values: Mapping[int, float], drawn: Mapping[int | None, np.ndarray | None], threshold: float
) -> list[tuple[str, Any]]:
    """Cells of RULER's effective length and the unbroken one; empty unless every length has a mean."""
    if any(math.isnan(value) for value in values.values()):
        return [("", "")] * 2
    lengths = np.array([*values])

    def both(means: np.ndarray) -> list[np.ndarray]:
        held = means >= threshold
        return [np.max(lengths[:, None] * found, axis=0) for found in (held, np.logical_and.accumulate(held))]

    point = both(np.array([*values.values()])[:, None])
    kept = [drawn[length] for length in values]
    spread = [None, None] if any(one is None for one in kept) else both(np.array(kept))
    return [tokens(float(p[0]), interval(s, method="inverted_cdf")) for p, s in zip(point, spread)]


def differences_table(found: Sequence[Mapping[str, Any]], title: str) -> Table:
    rows = []
    for row in found:
        at = f"{row['length']:,}" if row["length"] else ""
        rows.append([
            (row["other"],) * 2, (row["task"],) * 2, (at, row["length"] or 0), shown(row["first"]),
            shown(row["second"]), shown(row["difference"], row["ci95"], "{:+.1f}"), shown(row["p"], (), "{:.4f}"),
            shown(row["p_holm"], (), "{:.4f}"), ("by sample" if row["paired"] else "not paired",) * 2,
            shown(row["n"], (), "{}"),
        ])  # fmt: skip
    columns = ["model", "task", "length", "reference", "model's", "difference", "p", "p (Holm)", "paired", "n"]
    notes = [f"Against {found[0]['reference']}. Holm's correction over the {len(found)} lines."]
    return Table(title, notes, columns, rows)


def board_table(entries: Sequence[Entry], name: str) -> Table:
    """A published table with the runs on top that have its numbers. Raises ValueError for a name that is none."""
    known = {path.name.removesuffix(".csv"): path for path in (files("benchmarks") / "report" / "boards").iterdir()}
    if name not in known:
        raise ValueError(f"board must be one of {', '.join(sorted(known))}: {name!r}")
    lines = known[name].read_text(encoding="utf-8").splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    columns, *published = csv.reader(line for line in lines if not line.startswith("# "))
    rows, notes = [], []
    for entry in entries:
        tasks = {task for suite, task, _ in entry.rows if suite == about["suite"]}
        if about["suite"] == "ruler" and tasks and tasks != set(TASKS):
            notes.append(f"{entry.name} has {len(tasks)} of the 13 tasks, and no average beside these.")
            continue
        have = {**entry.named, "effective length": entry.named.get("effective_length", NONE)}
        row = [shown(have.get(column, NONE)) for column in columns[1:]]
        if tasks and any(text for text, _ in row):
            rows.append([(f"{entry.name} [this run]",) * 2, *row])
            notes.append(f"{entry.name}: {entry.settings}.")
    own = len(rows)
    rows += [[(row[0],) * 2, *((text, number(text)) for text in row[1:])] for row in published]
    notes += [f"Published: {about['source']}, read {about['read']}.", f"Edition: {about['edition']}."]
    return Table(f"{about['title']}, published", [*notes, f"Mind: {about['caveats']}."], columns, rows, own=own)


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def tables(entries: Sequence[Entry], found: Sequence[Mapping[str, Any]], config: CompareConfig) -> list[Table]:
    suites = dict.fromkeys(suite for entry in entries for suite, _, _ in entry.rows)
    made = [scores_table(entries, suite, config.threshold, f"b{place}") for place, suite in enumerate(suites)]
    for suite, means in itertools.product(suites, (True, False)):
        if own := [row for row in found if family_of(row) == (suite, means)]:
            made.append(differences_table(own, f"{suite}, differences {'of means' if means else 'by task'}"))
    return made + [board_table(entries, name) for name in filter(None, (config.board or "").split(","))]


def render(made: Sequence[Table], names: Sequence[str]) -> str:
    """The page as text. Its tables sort in place; it loads nothing."""
    return page.rendered("board.html", "board.js", tables=made, names=names)


def model_index(entry: Entry) -> str:
    """Front matter of a model card with the run's scores, as the hub reads it."""
    from huggingface_hub import ModelCardData

    from endprompt.train.card import eval_result

    data = ModelCardData(model_name=entry.name, eval_results=[eval_result(row) for row in entry.rows.values()])
    return f"---\n{data.to_yaml()}\n---\n"


def compare(config: CompareConfig) -> tuple[list[Table], list[dict[str, Any]]]:
    """(tables, differences); writes the files asked for. Raises ValueError for runs and names that are none."""
    entries = read(config.runs)
    chosen = [e for e in entries if config.reference in (None, e.name, str(e.path))]
    if not chosen:
        raise ValueError(f"reference must be one of {', '.join(e.name for e in entries)}: {config.reference!r}")
    if config.model_index and len(entries) != 1:
        raise ValueError(f"model_index is for one run's scores: {len(entries)} runs are given")
    found = differences(entries, chosen[0])
    made = tables(entries, found, config)
    if config.page:
        write_text(Path(config.page), render(made, [entry.name for entry in entries]))
    if config.model_index:
        write_text(Path(config.model_index), model_index(entries[0]))
    return made, found
