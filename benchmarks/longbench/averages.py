"""LongBench's averages, every one by name, and the rows of a run with standard errors and bootstrap intervals.

A category's rows (metric `category_mean`) are the bars, or the radar, of a model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.longbench.sets import BUCKETS, CATEGORIES, DATASETS, bucket, dataset_of
from benchmarks.ruler.cell import samples_sha256
from endprompt.files import sha256_of
from endprompt.results import result_row

Samples = Mapping[str, Sequence[Mapping[str, Any]]]

# Every average by name: the sets (or the categories) that it is the mean of.
ENGLISH = tuple(name for name, dataset in DATASETS.items() if dataset.language != "zh")
CHINESE = tuple(name for name, dataset in DATASETS.items() if dataset.language == "zh")
EXTENDED = tuple(name for name, dataset in DATASETS.items() if dataset.extended)


def categories(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """category → those of the sets that are in it."""
    names = list(names)
    return {category: tuple(n for n in names if DATASETS[n].category == category) for category in CATEGORIES}


def average_weights() -> dict[str, dict[str, float]]:
    """name of an average → set → weight, for the 21 sets: english_category_mean (the repository's README),
    english_16_mean (papers), all_21_mean, chinese_category_mean (the README's Chinese table, whose code column is the
    English one's), and english:CATEGORY, chinese:CATEGORY, all:CATEGORY.
    """
    code = categories(DATASETS)["code"]
    groups = {"english": categories(ENGLISH), "chinese": categories((*CHINESE, *code)), "all": categories(DATASETS)}
    weights = {
        "english_category_mean": mean_of_means(groups["english"].values()),
        "english_16_mean": mean_of(ENGLISH),
        "all_21_mean": mean_of(DATASETS),
        "chinese_category_mean": mean_of_means(groups["chinese"].values()),
    }
    for group, members in groups.items():
        weights |= {f"{group}:{category}": mean_of(names) for category, names in members.items()}
    return weights


def average_weights_e() -> dict[str, dict[str, float]]:
    """The same for LongBench-E: category_mean, all_13_mean and all:CATEGORY of its 13 sets."""
    members = categories(EXTENDED)
    weights = {"category_mean": mean_of_means(members.values()), "all_13_mean": mean_of(EXTENDED)}
    return weights | {f"all:{category}": mean_of(names) for category, names in members.items()}


def mean_of(names: Iterable[str]) -> dict[str, float]:
    names = list(names)
    return {name: 1 / len(names) for name in names}


def mean_of_means(groups: Iterable[Sequence[str]]) -> dict[str, float]:
    groups = list(groups)
    return {name: 1 / len(group) / len(groups) for group in groups for name in group}


def averages(scores: Mapping[str, float], extended: bool = False) -> dict[str, float]:
    """Every average, by name, whose sets are all in `scores` (set → percent). A partial one is left out."""
    weights = average_weights_e() if extended else average_weights()
    return {
        name: sum(weight * scores[dataset] for dataset, weight in parts.items())
        for name, parts in weights.items()
        if parts.keys() <= scores.keys()
    }


def result_rows(
    samples: Samples,
    *,
    model: str,
    method: str,
    seed: int = 0,
    data_sha256: Mapping[str, Mapping[str, str]] | None = None,
    resamples: int = 2000,
    **extra: Any,
) -> list[dict[str, Any]]:
    """Rows of a run: each task, LongBench-E's buckets, categories and averages; what was not run is absent.

    samples: task → samples as `build_samples` made them, each with its `score` (percent) added. seed: of the bootstrap;
    each task has a generator of its own, so rows do not depend on what else was run. data_sha256: task → file → sha256,
    as `load_documents` found it. extra: columns for every row. Columns besides the usual: `bucket` (LongBench-E; absent
    over all lengths), `category`, `group` of a category's mean (english, chinese, all), `prompt_tokens` (mean of a
    task), `data_sha256`. An average's n counts documents; its standard error and interval come from its sets, which are
    resampled independently of each other.
    """
    common = {"model": model, "method": method, "seed": seed, **extra}
    rows = []
    for suite, place, tasks in row_groups(samples):
        estimates = {task: estimate(task, items, seed, resamples) for task, items in tasks.items() if items}
        for task, found in estimates.items():
            rules = dataset_of(task)
            columns = {"task": task, "metric": rules.metric, "category": rules.category, **found.columns()}
            columns["prompt_tokens"] = sum(sample["length"] for sample in tasks[task]) / found.n
            if data_sha256 and task in data_sha256:
                columns["data_sha256"] = dict(data_sha256[task])
            rows.append(result_row(suite=suite, **columns, **place, **common))
        by_set = {task.removesuffix("_e"): found for task, found in estimates.items()}
        for name, weights in (average_weights_e() if suite == "longbench_e" else average_weights()).items():
            if not weights.keys() <= by_set.keys():
                continue
            group, _, category = name.rpartition(":")
            columns = {"task": name, "metric": "average"}
            if group:
                columns = {"task": category, "metric": "category_mean", "category": category, "group": group}
            columns |= combine(by_set, weights).columns()
            rows.append(result_row(suite=suite, **columns, **place, **common))
    return rows


def summary_rows(samples: Samples, **options: Any) -> list[dict[str, Any]]:
    """`result_rows` less the tasks' own over all lengths: buckets, categories and averages."""
    made = result_rows(samples, **options)
    return [row for row in made if "bucket" in row or row["metric"] in ("average", "category_mean")]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Sets by category, then the averages, as text; a column a bucket for LongBench-E."""
    columns: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["suite"] in ("longbench", "longbench_e"):
            group = "extended" if row["suite"] == "longbench_e" else row.get("group")
            name = f"{group}: {row['task']}" if row["metric"] == "category_mean" else row["task"]
            columns.setdefault(row.get("bucket", "all"), {})[name] = row["value"]
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    width = max(map(len, names), default=0)
    lines = [" ".join([" " * width, *(f"{column:>7}" for column in columns)])]
    for name in names:
        cells = [f"{values[name]:7.2f}" if name in values else " " * 7 for values in columns.values()]
        lines.append(" ".join([f"{name:<{width}}", *cells]))
    return "\n".join(line.rstrip() for line in lines)


def row_groups(samples: Samples) -> Iterator[tuple[str, dict[str, Any], Samples]]:
    """(suite, columns, task → samples) of each set of rows that share averages: LongBench, -E, -E's buckets."""
    yield "longbench", {}, {task: items for task, items in samples.items() if task in DATASETS}
    extended = {task: items for task, items in samples.items() if task not in DATASETS}
    yield "longbench_e", {}, extended
    for name in BUCKETS:
        within = {t: [item for item in items if bucket(item["words"]) == name] for t, items in extended.items()}
        yield "longbench_e", {"bucket": name}, within


@dataclass(frozen=True)
class Estimate:
    """A mean of scores, percent, with its standard error and the means of bootstrap resamples."""

    value: float
    stderr: float | None
    resampled: np.ndarray
    n: int
    n_truncated: int
    sha256: str

    def columns(self) -> dict[str, Any]:
        ci95 = None
        if self.stderr is not None:
            low, high = np.percentile(self.resampled, [2.5, 97.5])
            ci95 = [min(float(low), self.value), max(float(high), self.value)]
        return {
            "value": self.value,
            "stderr": self.stderr,
            "ci95": ci95,
            "n": self.n,
            "n_truncated": self.n_truncated,
            "samples_sha256": self.sha256,
        }


def estimate(task: str, samples: Sequence[Mapping[str, Any]], seed: int, resamples: int) -> Estimate:
    scores = np.array([sample["score"] for sample in samples], dtype=np.float64)
    n = len(scores)
    rng = np.random.default_rng(int(sha256_of(str(seed), task)[:16], 16))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return Estimate(
        value=float(scores.mean()),
        stderr=float(scores.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        resampled=counts @ scores / n,
        n=n,
        n_truncated=sum(bool(sample["truncated"]) for sample in samples),
        sha256=samples_sha256(samples),
    )


def combine(estimates: Mapping[str, Estimate], weights: Mapping[str, float]) -> Estimate:
    """The weighted mean of sets that were drawn independently of each other."""
    parts = [(weight, estimates[name]) for name, weight in weights.items()]
    errors = [weight * part.stderr for weight, part in parts if part.stderr is not None]
    return Estimate(
        value=sum(weight * part.value for weight, part in parts),
        stderr=math.hypot(*errors) if len(errors) == len(parts) else None,
        resampled=sum((weight * part.resampled for weight, part in parts[1:]), parts[0][0] * parts[0][1].resampled),
        n=sum(part.n for _, part in parts),
        n_truncated=sum(part.n_truncated for _, part in parts),
        sha256=sha256_of(*(part.sha256 for _, part in parts)),
    )
