"""A training run: configuration, data, model, loop, checkpoint, in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endprompt import distributed, origin
from endprompt.config import ExtendConfig, check_config, check_processes, method_name
from endprompt.data import Rows, RowSpec, encoder, load_documents
from endprompt.data.rows import row_spec, total_steps
from endprompt.distributed import World, say
from endprompt.model import (
    extended_config,
    load_config,
    load_model,
    load_tokenizer,
    lora,
    new_model,
    rope_geometry,
    shares,
    training_attention,
)
from endprompt.model.geometry import window_of
from endprompt.model.load import check_builds, check_vocabulary, checkpoint_path, torch_dtype, whole_weights
from endprompt.plan import PlanConfig, fitting
from endprompt.runs import RunDirectory, environment, plain
from endprompt.shapes import GIB
from endprompt.text import Reader
from endprompt.train import determinism, outcome
from endprompt.train.evaluate import Evaluation
from endprompt.train.loop import Trainer
from endprompt.train.output import Output
from endprompt.train.progress import check_reports, device_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def extend(config: ExtendConfig) -> Path:
    """Extend a checkpoint's window; returns the finished directory. All checks come before any step."""
    check_config(config)
    attention = training_attention(config.attention)
    config = dataclasses.replace(config, model=str(checkpoint_path(config.model)))
    source = load_config(config.model)
    rope_geometry(source)  # says what a model without RoPE is before its window is asked for
    window = window_of(source, config.window).window
    options = {"window": window} | (config.rope_options or {})
    new_config = extended_config(source, config.scaling, config.target, config.factor, **options)
    check_builds(new_config)
    before, after = (c.rope_parameters.get("factor") for c in (source, new_config))
    if before and config.scaling != "none":
        say(f"the checkpoint is scaled by {before:g} already; the factors multiply: {before:g} becomes {after:g}")
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(source, tokenizer)
    for note in Reader(tokenizer).notes(documents_end=True):
        say(note)
    spec = row_spec(config, window, tokenizer)

    def make_model(device: str) -> PreTrainedModel:
        if device == "meta":
            return shares.model_to_fill(config.model, dtype=config.dtype, attention=attention, config=new_config)
        return load_model(config.model, dtype=config.dtype, attention=attention, device=device, config=new_config)

    def notes() -> list[str]:
        return shares.check_weights(config.model, dtype=config.dtype, attention=attention, config=new_config)

    return run(config, spec, tokenizer, make_model, source_dtype=source.dtype, window=window, notes=notes)


def pretrain(config: ExtendConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Train a model from random weights on rows of its own window: how a base model is made."""
    check_config(config)
    attention = training_attention(config.attention)
    check_vocabulary(model_config, tokenizer)
    spec = row_spec(config, model_config.max_position_embeddings, tokenizer)

    def make_model(device: str) -> PreTrainedModel:
        device = "cpu" if device == "meta" else device  # every process makes the same random weights, whole
        return new_model(model_config, seed=config.seed, dtype=config.dtype, attention=attention, device=device)

    return run(config, spec, tokenizer, make_model, source_dtype=torch_dtype(config.dtype))


def run(
    config: ExtendConfig,
    spec: RowSpec,
    tokenizer: PreTrainedTokenizerBase,
    make_model: Callable[[str], PreTrainedModel],
    source_dtype: Any,
    window: int | None = None,
    notes: Callable[[], list[str]] = list,
) -> Path:
    """Claim the output, read the material, make the trainer, fit, finish.

    make_model: the model on a device; on meta, where several processes will each read their share, it need not have
    its weights yet. window: of the checkpoint that is extended, None for a model from random weights. notes: checks
    the checkpoint's weights before there is work to lose; what the user should know of them.
    """
    here = distributed.world(config.device)
    check_processes(config, here.size)
    dtype = outcome.export_dtype(config, source_dtype)
    output = Output(config, here)
    with output.claim() as finished:
        if finished:
            say(f"this run is finished already: {output.path}", here)
            return output.path
        check_reports(config.report)
        about_weights = notes()
        for note in about_weights:
            say(f"{config.model}: {note}", here)
        rows = Rows(load_documents(config.data, tokenizer), spec)
        if len(rows) < config.rows:
            raise ValueError(
                f"fewer documents than one batch: {len(rows)} of at least {spec.needed} tokens (dropped {rows.dropped} "
                f"shorter ones), rows={config.rows}"
            )
        evaluation = held_out(config, spec, tokenizer)
        state = output.resume(rows)
        with output.resumable():
            log = RunDirectory(output.work, config) if here.main else None
            steps = total_steps(config, spec.row_tokens)
            say(
                f"{len(rows):,} rows of {spec.row_tokens:,} tokens a pass, {steps * config.rows:,} to train on; "
                f"dropped {rows.dropped:,} shorter documents ({rows.dropped_tokens:,} tokens), truncated "
                f"{rows.truncated_tokens:,} tokens",
                here,
            )
            with determinism.repeatable(config.deterministic):
                trainer = Trainer(config, make_model("meta" if here.size > 1 else here.device), rows, steps, log, here)
                trainer.evaluation, trainer.notes = evaluation, about_weights
                distributed.by_main(here, lambda: check_end(trainer, tokenizer, output, dtype, window))
                if state is not None:
                    trainer.resume(state)
                try:
                    trainer.fit(output.states)
                except torch.OutOfMemoryError as error:
                    raise ValueError(out_of_memory(config, spec, here, str(error).partition(". ")[0])) from error
            finish(trainer, tokenizer, output, dtype, window)
            if trainer.stopped:  # at its last step: what called this run is to stop
                raise KeyboardInterrupt
            return output.path


def check_end(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, output: Output, dtype: str, window: int | None
) -> None:
    """Raises ValueError if what the run is to leave could not be written; one without a state leaves nothing then."""
    try:
        outcome.check_room(output.work, trainer.config, trainer.steps, trainer.model, trainer.optimizer, dtype)
        outcome.rehearse(output.work, trainer.model, tokenizer, dtype, record_of(trainer, window))
    except ValueError:
        output.drop_unless_kept()
        raise


def out_of_memory(config: ExtendConfig, spec: RowSpec, here: World, reason: str) -> str:
    """What to change, with the settings that fit by the estimate of `endprompt plan` where it knows the device."""
    micro = config.micro_rows or config.rows // here.size
    message = (
        f"the device's memory is too small: lower micro_rows={micro} or raise checkpointing={config.checkpointing} "
        "(none, selective, full)"
    )
    total = device_memory(torch.device(here.device))
    if total:
        wanted = PlanConfig(
            model=config.model,
            method="longlora" if config.lora_rank else "full",
            target=config.target,
            row_tokens=spec.row_tokens,
            window=config.window,
            gpus=here.size,
            rows=config.rows,
            optimizer="lean" if config.optimizer == "lean" else "adamw",
            float8="none" if config.float8 == "none" else "fast",
        )
        message += f"; by the estimate {fitting(wanted, micro, total / GIB)}"
    return f"{message}: {reason}"


def held_out(config: ExtendConfig, spec: RowSpec, tokenizer: PreTrainedTokenizerBase) -> Evaluation | None:
    """The rows that the run is evaluated on, None if no held-out text is given."""
    if not config.eval_data:
        return None
    lengths = config.eval_lengths or sorted({spec.row_tokens, config.target})
    documents = load_documents(config.eval_data, tokenizer)
    return Evaluation(documents, lengths, config.eval_rows, config.eval_needles, encoder(tokenizer), config.seed)


def record_of(trainer: Trainer, window: int | None) -> dict[str, Any]:
    """What a finished run says of itself in its output."""
    config, rows = trainer.config, trainer.rows
    spec = rows.spec
    return {
        "method": method_name(config),
        "model": origin.name_of(config.model),
        "origin": origin.about(config.model),
        "window": window,
        "target": config.target,
        "factor": trainer.model.config.rope_parameters.get("factor"),
        "row_tokens": spec.row_tokens,
        "prompt_tokens": spec.prompt.longest if spec.prompt else 0,
        "steps": trainer.steps,
        "tokens": trainer.steps * config.rows * spec.row_tokens,
        "weights": trainer.notes,
        "documents_dropped": rows.dropped,
        "tokens_dropped": rows.dropped_tokens,
        "tokens_truncated": rows.truncated_tokens,
        "seconds": round(trainer.seconds, 3),
        "final_loss": trainer.last_loss,
        "config": plain(dataclasses.asdict(config)),
        "environment": environment(),
    }


def finish(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, output: Output, dtype: str, window: int | None
) -> None:
    """Write the checkpoint and commit the output. If that fails, a state of the last step is left."""
    config = trainer.config
    with trainer.kept(output.states):
        weights = whole_weights(trainer.model, dtype, keep=trainer.here.main)

        def write() -> None:
            merged = lora.merge(weights, config.lora_alpha / config.lora_rank) if config.lora_rank else weights
            outcome.write(output.work, trainer.model, tokenizer, dtype, merged, record_of(trainer, window))

        output.commit(write)
