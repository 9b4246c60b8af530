"""Score a checkpoint: samples, lm-eval's `simple_evaluate`, result rows. Resumable, with errors before any model loads.

config -> cells (task x length) -> samples -> lm-eval -> predictions as they come -> rows

A run directory holds `predictions*.jsonl` (appended), `results.jsonl` (a row a cell), `summary.jsonl`, `depth.jsonl`
(heat map), `results_DATE.json` (as lm-eval writes them), `config.yaml`, `environment.json`, `log.jsonl`. A cell whose
row is there already, made with the same checkpoint, samples and settings, is not run again.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import chat, originals
from benchmarks.scoring import fingerprint, lm_eval_results, vllm
from benchmarks.scoring.checkpoint import check_model, method_of, read_checkpoint, window_of
from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.predictions import read_run
from benchmarks.scoring.suite import Suite, suite_of
from benchmarks.scoring.units import Asker, Unit, needed, shortest_prompt
from endprompt import files, origin, runs
from endprompt.results import read_rows
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Result rows of all cells asked for, in order; those already in the output are taken from there. Raises ValueError
    (nothing was loaded yet) for unknown tasks, impossible lengths, missing data, a checkpoint that cannot be read."""
    suite_of(config)
    originals.say_version.cache_clear()
    if config.backend == "server" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("backend server runs in one process: concurrency says how many requests run together")
    if config.directory.exists() and not config.directory.is_dir():
        raise ValueError(f"output must be a folder, or nothing yet: output={str(config.directory)!r}")
    served, method = config.backend == "server", method_of(config)
    typed = config.tokenizer or config.checkpoint
    directory = origin.directory_of(typed, weights=not (config.prepare_only or served), code=config.trust_remote_code)
    if served:
        config = dataclasses.replace(config, name=config.model_name, method=method)
    if not (served or config.prepare_only or config.trust_remote_code):
        from endprompt.model.wrapper import text_checkpoint

        directory = text_checkpoint(directory)
    config = dataclasses.replace(config, checkpoint=str(directory))
    model_config, tokenizer = read_checkpoint(config)
    from endprompt.distributed import say
    from endprompt.model.load import check_vocabulary

    notes = [*([] if served else check_vocabulary(model_config, tokenizer)), *Reader(tokenizer).notes()]
    if not (config.prepare_only or served):
        notes += check_model(config, model_config)
    for note in notes:
        say(note)
    if config.thinking:
        arguments = chat.with_thinking(tokenizer, config.template_args, config.thinks)
        config = dataclasses.replace(config, template_args=arguments)
    config = settle_date(config, tokenizer)
    suite = suite_of(config)
    units = suite.units(Asker(config, model_config, tokenizer))
    if config.prepare_only:
        keep_day(config)
        return []
    return run(suite, units, model_config, tokenizer)


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


def run(
    suite: Suite, units: list[Unit], model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Rows of the units. The model is loaded only if one of them has no row yet."""
    config = suite.config
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        return score_units(suite, units, model_config, tokenizer, rank)
    with files.sole_use(config.directory):
        if config.overwrite:
            start_again(config.directory)
        keep_day(config)
        files.drop_cut_line(config.directory / "results.jsonl")
        return score_units(suite, units, model_config, tokenizer, rank)


def start_again(directory: Path) -> None:
    """Remove what earlier runs left; other processes look there after the model is loaded, which waits for all."""
    kept = ("results.jsonl", "summary.jsonl", "depth.jsonl", "log.jsonl", fingerprint.RUNS, fingerprint.DAY)
    for path in [*directory.glob("predictions*.jsonl"), *(directory / name for name in kept)]:
        path.unlink(missing_ok=True)


def score_units(
    suite: Suite, units: list[Unit], model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, rank: int
) -> list[dict[str, Any]]:
    config, made_by = suite.config, fingerprint.fingerprint(suite.config, model_config)
    done, renamed = earlier_rows(config, units, made_by.sha256)
    waiting = [unit for unit in units if unit.name not in done]

    @functools.cache
    def begin() -> runs.RunDirectory | None:
        return None if rank else fingerprint.begin(config.directory, config, made_by, computes=bool(waiting))

    if renamed and (out := begin()):
        out.add(renamed)
    if waiting:
        with_samples = [unit for unit in units if unit.samples]  # other prompts are made as they are asked
        if with_samples:
            begin()  # other processes write there once the model is loaded, which waits for all
        longest = max(map(needed, with_samples), default=window_of(config, model_config, 1)) + config.thought_tokens
        shortest = min(map(shortest_prompt, with_samples), default=1)
        lm = load(config, longest, shortest, model_config, tokenizer, suite.model_args)
        done |= suite.evaluate(waiting, lm, made_by.sha256, begin)
    made = [done[unit.name] for unit in units if unit.name in done]
    if made and (out := begin()):
        suite.summarise(out, made, units, made_by.sha256)
        lm_eval_results.write(config.directory, made, config.checkpoint, config.backend)
    return made


def load(
    config: ScoreConfig,
    needed: int,
    shortest: int,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_args: Mapping[str, Any] | None = None,
) -> Any:
    """The lm-eval model, for prompts of `shortest` tokens or more that with their generation take `needed` at most.
    Raises ValueError if it does not load."""
    from lm_eval.utils import simple_parse_args_string

    from endprompt.model.lora import check_adapter

    extra = (simple_parse_args_string(config.backend_args) if config.backend_args else {}) | dict(model_args or {})
    for key in ("peft", "lora_local_path"):
        if extra.get(key):
            check_adapter(Path(extra[key]), Path(config.checkpoint), model_config, config.trust_remote_code)
    if config.backend == "vllm":
        options = vllm.engine_options(model_config, max(needed, int(extra.get("max_model_len", 0))), shortest)
        options |= {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
        return vllm.load(config.checkpoint, **options | extra)
    room = window_of(config, model_config, needed) + config.thought_tokens
    if config.backend == "server":
        from benchmarks.scoring.server import ServerLM

        return ServerLM(config, model_config.served, room, tokenizer)
    from benchmarks.scoring.hf import LongContextLM
    from endprompt.model.load import quiet

    try:
        with quiet():
            return LongContextLM(
                pretrained=config.checkpoint,
                tokenizer=tokenizer,
                max_length=max(needed, room),
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


def earlier_rows(
    config: ScoreConfig, units: Sequence[Unit], settings: str
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(rows of this very run that the output has, those of them that it has under another name alone, renamed). A row
    is taken where it is of the same samples, with all their predictions there."""
    path = config.directory / "results.jsonl"
    found = read_rows(path) if path.is_file() and not config.overwrite else []
    predictions = set() if config.overwrite else read_run(config.directory, settings).keys()
    names = {"model": config.model_name, "method": method_of(config)}
    mine = [row for row in found if row.get("run_sha256") == settings]
    rows = sorted(mine, key=lambda row: names.items() <= row.items())  # the latest, those of this name after the others
    done, renamed = {}, []
    for unit in units:
        limit, wanted = unit.columns.get("max_new_tokens"), unit.known_by(config).items()
        known = [row for row in rows if wanted <= row.items()]
        if known and predictions >= {(unit.name, i, prompt, limit) for i, prompt in enumerate(unit.prompts)}:
            done[unit.name] = {**known[-1], **names}
            renamed += [done[unit.name]] if done[unit.name] != known[-1] else []
    return done, renamed
