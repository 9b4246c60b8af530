"""A unit is what is scored and written at once: a task at a length, with its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import chat, ruler, summary
from benchmarks.longbench import TASKS, dataset_of, load_documents, metrics
from benchmarks.longbench.prompts import GENERATOR, Prompter
from benchmarks.longbench.samples import score, select
from benchmarks.ruler.tasks import check_task
from benchmarks.scoring.checkpoint import method_of, window_of
from benchmarks.scoring.config import ScoreConfig
from endprompt.results import result_row

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass
class Unit:
    """One cell to score: an lm-eval task over its samples, and how its row is made."""

    name: str  # unique: task@length
    task: str
    length: int | None
    suite: str
    metric: str
    samples: Sequence[dict[str, Any]]
    score: Callable[[dict[str, Any], str], float]  # in [0, 1]
    columns: dict[str, Any]
    sha256: str = ""
    characters: int = 0
    prompts: Sequence[str] = ()  # the hash of each
    readings: dict[str, Callable[[dict[str, Any], str], float]] = field(default_factory=dict)  # columns of the row


def prepare(config: ScoreConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Unit]:
    """The cells with their samples, RULER's from the cache."""
    if config.suite == "longbench":
        return longbench_units(config, window_of(config, model_config), tokenizer)
    from benchmarks.ruler import cache

    names = list(ruler.TASKS) if config.task_names == ["all"] else config.task_names
    for name in names:
        check_task(name)
    if not names:
        raise ValueError("tasks must name at least one task, or be all")
    asked = 1 if config.beyond_window or config.prepare_only else max(config.length_list)
    window = window_of(config, model_config, asked)
    over = [length for length in config.length_list if length > window]
    if over and not config.beyond_window and not config.prepare_only:
        raise ValueError(
            f"lengths must be at most the checkpoint's window {window}: {over} (beyond_window allows longer ones)"
        )
    wanted = [(task, length) for length in config.length_list for task in names]
    settings = (config.samples, config.seed, config.data_dir, config.options, config.cache_dir)
    units = [ruler_unit(cell) for cell in cache.cells(wanted, tokenizer, *settings)]
    for unit in units:
        if needed(unit) > window and not config.beyond_window and not config.prepare_only:
            raise ValueError(
                f"{unit.name}: prompt and generation must be at most the checkpoint's window {window}, and edition "
                f"{config.edition} keeps too little room for the answer: {needed(unit)} (beyond_window allows it)"
            )
    return units


def ruler_unit(cell: ruler.Cell) -> Unit:
    recipe, options = cell.recipe, cell.options
    metric = "string_match_part" if ruler.SPECS[recipe["task"]].metric == "any" else "string_match_all"
    kept, length = recipe["max_new_tokens"], recipe["length"]
    filled = [(tokens + kept) / length for _, tokens in recipe["samples"]]
    columns = {
        "haystack": recipe["haystack"],
        "haystack_sha256": recipe["haystack_sha256"],
        "fill": round(sum(filled) / len(filled), 5),
        "max_new_tokens": kept,
        "edition": options.edition,
        "chat": options.chat,
        "chat_layout": options.layout,
        "generator": recipe["generator"],
        **{name: value for name in ("date", "template_args") if (value := getattr(options, name))},
    }
    if recipe["questions"] is not None:
        columns |= {"questions": recipe["questions"]["count"], "questions_whole": recipe["questions"]["whole"]}
    if ruler.SPECS[recipe["task"]].family in ("vt", "cwe"):
        columns["shots"] = options.shots
    if ruler.SPECS[recipe["task"]].family == "vt":
        columns["hops"] = options.hops
    return Unit(
        f"{recipe['task']}@{length}",
        recipe["task"],
        length,
        "ruler",
        metric,
        cell,
        found_share,
        columns,
        recipe["samples_sha256"],
        recipe["characters"],
        recipe["prompts"],
    )


def found_share(sample: dict[str, Any], prediction: str) -> float:
    return ruler.score(sample["task"], prediction, sample["outputs"])


def needed(unit: Unit) -> int:
    """Window that the unit's longest prompt and its generation take."""
    if isinstance(unit.samples, ruler.Cell):
        recipe = unit.samples.recipe  # a prompt of RULER's own making may be over its length
        longest = max(tokens for _, tokens in recipe["samples"])
        return max(recipe["length"], longest + recipe["max_new_tokens"])
    return max(sample["length"] + sample["max_new_tokens"] for sample in unit.samples)


def shortest_prompt(unit: Unit) -> int:
    """Tokens of the unit's shortest prompt."""
    if isinstance(unit.samples, ruler.Cell):  # without rendering any
        return min(tokens for _, tokens in unit.samples.recipe["samples"])
    return min(sample["length"] for sample in unit.samples)


def row(config: ScoreConfig, unit: Unit, scores: Sequence[float], settings: str) -> dict[str, Any]:
    percent = [100 * value for value in scores]
    ci95, kind = summary.interval(percent, config.seed)
    return result_row(
        suite=unit.suite,
        task=unit.task,
        length=unit.length,
        metric=unit.metric,
        value=sum(percent) / len(percent),
        stderr=summary.standard_error(percent),
        ci95=ci95,
        n=len(percent),
        n_truncated=sum(bool(sample.get("truncated")) for sample in unit.samples) if unit.suite != "ruler" else 0,
        model=config.model_name,
        method=method_of(config),
        seed=config.seed,
        samples_sha256=unit.sha256,
        ci=kind,
        backend=config.backend,
        attn=config.attn if config.backend == "hf" else None,
        dtype=config.dtype,
        run_sha256=settings,
        **({"answers": config.answers} if config.answers else {}),
        **unit.columns,
    )


def longbench_units(config: ScoreConfig, window: int, tokenizer: PreTrainedTokenizerBase) -> list[Unit]:
    """What `endprompt score --suite longbench` runs: a cell a set, without length; all data are read before any model.

    Raises what `load_documents` and `Prompter.fit` do.
    """
    from benchmarks.longbench.cache import cached_fits
    from benchmarks.ruler.cache import default_directory, tokenizer_sha256

    template = chat.renderer(tokenizer, config.date, config.template_args) if config.chat else None
    directory = config.cache_dir or default_directory()
    tokenizer_hash = tokenizer_sha256(tokenizer)
    # All files are read, and so checked, before the first prompt is made; texts are let go set by set.
    found = {task: load_documents(task, config.data_dir) for task in select(config.task_names)}
    made = []
    for task in list(found):
        rules, documents = dataset_of(task), found.pop(task)
        prompter = Prompter(
            task,
            tokenizer,
            window,
            prompt_length=config.prompt_length,
            chat_template=template,
            max_new_tokens=config.max_new_tokens,
        )
        fits = cached_fits(prompter, documents, config.samples, tokenizer_hash, directory)
        samples = prompter.samples(documents.items[: config.samples], fits)
        filled = [(sample["length"] + sample["max_new_tokens"]) / window for sample in samples]
        columns = {
            "category": rules.category,
            "language": rules.language,
            "window": window,
            "prompt_length": config.prompt_length,
            "fill": round(sum(filled) / len(filled), 5),
            "max_new_tokens": prompter.new_tokens,
            "chat": config.chat and rules.chat,
            "date": config.date if config.chat and rules.chat else None,
            "data_sha256": documents.sha256,
            "generator": GENERATOR,
        }
        suite = "longbench" if task in TASKS else "longbench_e"
        unit = Unit(task, task, None, suite, rules.metric, samples, partial(share, task), columns)
        if rules.metric == "code_similarity":
            # Publishers had the one or the other, by what was installed beside fuzzywuzzy: points apart.
            unit.readings = {"code_similarity_difflib": unit.score, "code_similarity_levenshtein": levenshtein_share}
        made.append(unit)
    return made


def levenshtein_share(sample: Mapping[str, Any], prediction: str) -> float:
    return max(metrics.code_similarity_levenshtein(prediction, answer) for answer in sample["outputs"])


def share(task: str, sample: Mapping[str, Any], prediction: str) -> float:
    """The score of a sample's prediction, in [0, 1]."""
    return score(task, prediction, sample["outputs"], sample["all_classes"]) / 100
