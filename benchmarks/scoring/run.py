"""Score a checkpoint: samples, lm-eval's `simple_evaluate`, result rows. Resumable, with errors before any model loads.

config -> cells (task x length) -> samples -> lm-eval -> predictions as they come -> rows

A run directory holds `predictions*.jsonl` (appended), `results.jsonl` (a row a cell), `summary.jsonl` (averages,
effective length), `depth.jsonl` (heat map), `results_DATE.json` (the rows as lm-eval writes them), `config.yaml`,
`environment.json`, `log.jsonl`. A cell whose row is there already, made with the same checkpoint, samples and settings,
is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import chat
from benchmarks.ruler.cell import samples_sha256, text_sha256
from benchmarks.scoring import fingerprint, lm_eval_results, vllm
from benchmarks.scoring.checkpoint import method_of, read_checkpoint, window_of
from benchmarks.scoring.compare import read_run
from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.settled import settled
from benchmarks.scoring.summaries import predicted, write_summary
from benchmarks.scoring.units import Unit, needed, prepare, row, shortest_prompt
from endprompt import files, origin, runs
from endprompt.results import read_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from benchmarks.scoring.recording import Progress


# Prompt text held by one call of simple_evaluate, in characters: bounds the memory whatever the number of cells.
CALL_CHARACTERS = 150_000_000


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Result rows of all cells asked for, in order; those already in the output are taken from there.

    Raises ValueError (nothing was loaded yet) for unknown tasks, impossible lengths, missing data, a checkpoint that
    cannot be read.
    """
    if config.suite == "short":
        from benchmarks.scoring import short

        short.task_names(config)
    directory = origin.directory_of(config.checkpoint, weights=not config.prepare_only, code=config.trust_remote_code)
    config = dataclasses.replace(config, checkpoint=str(directory))
    model_config, tokenizer = read_checkpoint(config)
    config = settle_date(config, tokenizer)
    units = prepare(config, model_config, tokenizer) if config.suite != "short" else []
    if config.prepare_only:
        keep_day(config)
        return []
    return run(config, units, model_config, tokenizer)


def settle_date(config: ScoreConfig, tokenizer: PreTrainedTokenizerBase) -> ScoreConfig:
    """The configuration with the day that its prompts are made for: as set, else the output's own, else today."""
    if not config.chat:
        return dataclasses.replace(config, date=None)

    def day() -> str:
        kept = None if config.overwrite else fingerprint.read_day(config.directory)
        return kept or chat.today(tokenizer)

    return dataclasses.replace(config, date=chat.day_read(tokenizer, config.date, config.template_args, day))


def keep_day(config: ScoreConfig) -> None:
    """Write down the day of the output's prompts, at its first start: a later one goes on with it."""
    path = config.directory / fingerprint.DAY
    if config.date is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, config.date + "\n")


# --------------------------------------------------------------------------------------------------------------- run


def run(
    config: ScoreConfig, units: list[Unit], model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Rows of the units. The model is loaded only if one of them has no row yet."""
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.nullcontext() if rank else files.sole_use(config.directory):
        if config.overwrite and rank == 0:
            start_again(config.directory)
        if rank == 0:
            keep_day(config)
            files.drop_cut_line(config.directory / "results.jsonl")
        work = score_short if config.suite == "short" else score_units
        return work(config, units, model_config, tokenizer, rank)


def start_again(directory: Path) -> None:
    """Remove what earlier runs left; other processes look there after the model is loaded, which waits for all."""
    for path in [*directory.glob("predictions*.jsonl"), *(directory / name for name in RESULT_FILES)]:
        path.unlink(missing_ok=True)


def score_short(
    config: ScoreConfig,
    units: list[Unit],
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
) -> list[dict[str, Any]]:
    """lm-eval's own tasks: a row as soon as its task is done."""
    from benchmarks.scoring import short

    made_by = fingerprint.fingerprint(config, model_config)
    names = short.task_names(config)
    done, renamed = earlier_rows(config, made_by.sha256, ("suite", "task"), {name: ("short", name) for name in names})
    waiting = [name for name in names if name not in done]
    lm = (
        load(config, window_of(config, model_config, needed=1), 1, model_config, tokenizer) if waiting else None
    )  # texts of all lengths
    out: runs.RunDirectory | None = None
    if renamed and rank == 0:
        out = fingerprint.begin(config.directory, config, made_by, computes=bool(waiting))
        out.add(renamed)
    _, day = chat.settled(tokenizer, config.date, config.template_args) if config.chat else ({}, None)
    with chat.clock_at(day):
        for row in short.made_rows(config, lm, waiting):
            out = out or fingerprint.begin(config.directory, config, made_by, computes=True)
            done[row["task"]] = {**row, "run_sha256": made_by.sha256}
            out.add([done[row["task"]]])
    made = [done[name] for name in names if name in done]
    if rank == 0 and made:
        if out is None:
            fingerprint.begin(config.directory, config, made_by, computes=False)
        lm_eval_results.write(config.directory, made, config.checkpoint, config.backend)
    return made


def score_units(
    config: ScoreConfig,
    units: list[Unit],
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
) -> list[dict[str, Any]]:
    directory = config.directory
    for unit in units:
        if not unit.sha256:
            unit.sha256 = samples_sha256(unit.samples)
            unit.characters = sum(len(sample["input"]) for sample in unit.samples)
            unit.prompts = [text_sha256(sample["input"]) for sample in unit.samples]
    made_by = fingerprint.fingerprint(config, model_config)
    done, renamed = finished(config, units, made_by.sha256)
    waiting = [unit for unit in units if unit.name not in done]
    out = fingerprint.begin(directory, config, made_by, computes=bool(waiting)) if rank == 0 else None
    if out is not None and renamed:
        out.add(renamed)
    if waiting:
        longest = max(needed(unit) for unit in units)
        lm = load(config, longest, min(shortest_prompt(unit) for unit in units), model_config, tokenizer)
        from benchmarks.scoring.recording import Progress

        own = sum(-(-len(unit.samples) // lm.world_size) for unit in waiting)  # the first process takes the remainder
        progress = Progress(own, quiet=config.quiet or lm.rank != 0)
        for group in groups(waiting):
            done |= evaluate(config, group, lm, made_by.sha256, progress, out)
    made = [done[unit.name] for unit in units if unit.name in done]
    if out is not None:
        write_summary(config, out, made, units, made_by.sha256)
        lm_eval_results.write(directory, made, config.checkpoint, config.backend)
    return made


RESULT_FILES = ("results.jsonl", "summary.jsonl", "depth.jsonl", "log.jsonl", fingerprint.RUNS, fingerprint.DAY)


def groups(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that share one call of simple_evaluate: many short cells, or one of long prompts."""
    out: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not out or size + unit.characters > CALL_CHARACTERS:
            out.append([])
            size = 0
        out[-1].append(unit)
        size += unit.characters
    return out


def load(
    config: ScoreConfig,
    needed: int,
    shortest: int,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """The lm-eval model, for prompts of `shortest` tokens or more that with their generation take `needed` at most.

    Raises ValueError if it does not load.
    """
    from lm_eval.utils import simple_parse_args_string

    extra = simple_parse_args_string(config.backend_args) if config.backend_args else {}
    if config.suite == "short" and config.chat:  # lm-eval makes the prompts
        extra["chat_template_args"] = chat.settled(tokenizer, config.date, config.template_args)[0]
    if config.backend == "vllm":
        options = vllm.engine_options(model_config, max(needed, int(extra.get("max_model_len", 0))), shortest)
        return vllm.load(
            config.checkpoint,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            **{**options, **extra},
        )
    from benchmarks.scoring.hf import LongContextLM
    from endprompt.model.load import quiet

    try:
        with quiet():
            return LongContextLM(
                pretrained=config.checkpoint,
                tokenizer=tokenizer,
                max_length=max(needed, window_of(config, model_config, needed)),
                dtype=config.dtype,
                device=fingerprint.device_of(config.device),
                batch_size=config.batch_size,
                attn_implementation=config.attn,
                trust_remote_code=config.trust_remote_code,
                **extra,
            )
    except Exception as error:  # transformers raises whatever a damaged file makes its code run into
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{config.checkpoint}: the checkpoint does not load: {first}") from error


def evaluate(
    config: ScoreConfig,
    units: Sequence[Unit],
    lm: Any,
    settings: str,
    progress: Progress,
    out: runs.RunDirectory | None,
) -> dict[str, dict[str, Any]]:
    """Rows of one group of units, appended to the results; on processes other than the first there are none."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from benchmarks.scoring import hf
    from benchmarks.scoring.recording import Predictions, RecordingLM, no_environment_report
    from benchmarks.tasks import sample_task

    began, before = time.perf_counter(), progress.tokens
    predictions = Predictions(config.directory, settings, lm.rank)
    longest = max(needed(unit) for unit in units)
    chunk = config.batch_size if config.backend == "hf" else vllm.chunk(longest)
    by_name = {unit.name: unit for unit in units}

    def note(task: str, sample: dict[str, Any], prediction: str) -> dict[str, Any]:
        kept: dict[str, Any] = {key: sample[key] for key in ("outputs", "length", "depth") if key in sample}
        return {"score": 100 * by_name[task].score(sample, prediction), **kept}

    if isinstance(lm, hf.LongContextLM):
        lm.settled = settled if config.answers == "until settled" else None
    recording = RecordingLM(lm, predictions, chunk, progress, note)
    tasks = [sample_task.SampleTask(unit.name, unit.samples, unit.score, unit.prompts) for unit in units]
    with no_environment_report():
        simple_evaluate(
            model=recording,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    if out is None:
        return {}
    entries = read_run(config.directory, settings) if any(unit.readings for unit in units) else {}
    for unit in units:
        texts = predicted(entries, unit) if unit.readings else []
        for name, reading in unit.readings.items():
            unit.columns[name] = 100 * sum(reading(sample, text) for sample, text in texts) / len(texts)
    made = {unit.name: row(config, unit, task.scores, settings) for unit, task in zip(units, tasks)}
    out.add(made.values())
    out.log(cells=list(made), seconds=round(time.perf_counter() - began, 3), prompt_tokens=progress.tokens - before)
    return made


def finished(
    config: ScoreConfig, units: Sequence[Unit], settings: str
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """`earlier_rows` of the units: of the same samples, with all their predictions there."""
    columns = ("suite", "task", "length", "samples_sha256", "n", "max_new_tokens", "seed")
    limits = {unit.name: unit.columns["max_new_tokens"] for unit in units}
    known = set() if config.overwrite else read_run(config.directory, settings).keys()
    wanted = {
        unit.name: (unit.suite, unit.task, unit.length, unit.sha256, len(unit.samples), limits[unit.name], config.seed)
        for unit in units
        if known >= {(unit.name, i, prompt, limits[unit.name]) for i, prompt in enumerate(unit.prompts)}
    }
    return earlier_rows(config, settings, columns, wanted)


def earlier_rows(
    config: ScoreConfig, settings: str, columns: Sequence[str], wanted: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(rows of this very run that the output has, those of them that it has under another name alone, renamed).

    wanted: values of the columns by which each row is known.
    """
    path = config.directory / "results.jsonl"
    found = read_rows(path) if path.is_file() and not config.overwrite else []
    names = {"model": config.model_name, "method": method_of(config)}
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for old in sorted(found, key=lambda row: names.items() <= row.items()):  # those of this name after the others
        if old.get("run_sha256") == settings:
            known[tuple(old.get(column) for column in columns)] = old
    done = {name: {**known[key], **names} for name, key in wanted.items() if key in known}
    return done, [row for name, row in done.items() if row != known[wanted[name]]]
