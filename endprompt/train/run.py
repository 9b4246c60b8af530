"""A training run: configuration, data, model, loop, checkpoint, in that order."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from endprompt import distributed, origin
from endprompt.config import ExtendConfig, check_processes
from endprompt.data import Mixture, Rows, RowSpec, encoder
from endprompt.data.documents import data_file
from endprompt.data.rows import total_steps
from endprompt.distributed import World, say
from endprompt.fast.available import bfloat16_matmuls
from endprompt.files import sha256_of
from endprompt.model import lora, quantized, rope_geometry, wrapper
from endprompt.model.load import check_tokens, checkpoint_path, identity, whole_weights
from endprompt.model.shares import as_they_are, stream_weights
from endprompt.model.weights import sampled_sha256
from endprompt.plan import PlanConfig, fitting
from endprompt.runs import RunDirectory, environment, plain
from endprompt.shapes import GIB
from endprompt.train import determinism, outcome, states
from endprompt.train.evaluate import Evaluation
from endprompt.train.loop import Trainer, objective_of, shards_weights
from endprompt.train.output import Output, resumed_if_begun
from endprompt.train.progress import check_reports, device_memory
from endprompt.train.start import Checkpoint, to_extend

#: Packages that decide what a process computes, beside torch.
MUST_AGREE = ("transformers", "tokenizers", "numpy", "triton", "flash-attn", "flash-attn-4")


def extend(config: ExtendConfig) -> Path:
    """Extend a checkpoint's window; returns the finished directory. All checks come before any step."""
    try:
        start = to_extend(config)
        check_processes(config, int(os.environ.get("WORLD_SIZE", "1")), start.spec.row_tokens)
    except Exception as error:  # told to the other processes, which would wait for this one
        distributed.world("cpu", alike={"fault": str(error) or type(error).__name__})
        raise
    return run(start)


def run(start: Checkpoint) -> Path:
    """Claim the output, read the material, make the trainer, fit, finish."""
    config, tokenizer, spec = start.config, start.tokenizer, start.spec
    made_in = environment()
    alike = {key: made_in["packages"].get(key) for key in MUST_AGREE}
    alike |= {"revision": made_in["revision"], "settings": sha256_of(repr(config))[:16]}
    here = distributed.world(config.device, config.context_parallel, alike)
    config = resumed_if_begun(config, here)
    start = dataclasses.replace(start, config=config)
    if config.quantize != "none":
        quantized.check_machine(here.device)
    dtype = outcome.export_dtype(config, start.source_dtype)
    output = Output(config, here)
    with distributed.losses(lambda: states.last_good(output.states)), output.claim() as finished:
        if finished:
            say(f"this run is finished already: {output.path}", here)
            return output.path
        check_reports(config.report)
        if here.device == "cpu" and (config.autocast or config.dtype == "bfloat16") and not bfloat16_matmuls():
            say("bfloat16 has no instructions on this CPU and is many times slower than float32 without autocast", here)
        source = identity(config.model, start.model_config) | {"dtype": dtype}
        distributed.check_alike({"checkpoint": sha256_of(json.dumps(source, sort_keys=True, default=str))[:16]})
        about_weights = start.check_weights()
        for note in about_weights:
            say(f"{config.model}: {note}", here)
        for path in (*start.paths, *config.eval_data):  # what takes no time first, then the model, then the data
            if not Path(path).is_dir():
                data_file(path)
        with determinism.repeatable(config.deterministic):
            sharded = shards_weights(config, here)
            model = start.to_fill() if sharded else start.load("cpu" if config.quantize != "none" else here.device)
            loss = objective_of(config, model, here)
            rows, steps = start.rows(), total_steps(config, spec.row_tokens)
            if len(rows) < config.rows:
                raise ValueError(
                    f"fewer documents than one batch: {len(rows)} of at least {spec.needed} tokens (dropped "
                    f"{rows.dropped} shorter ones{rows.hint}), rows={config.rows}: data={config.data}"
                )
            taken = check_epochs(config, rows, steps * config.rows)
            check_tokens(rows.row(0)[0], start.model_config, tokenizer, "the end prompt or BOS")
            evaluation = held_out(start)
            if here.size > 1:
                held = sha256_of(repr(sorted(evaluation.asked)))[:16] if evaluation else None
                distributed.check_alike({"documents": rows.sha256[:16], "held-out rows": held})
            state = output.resume(rows, source)
            with output.resumable():
                log = RunDirectory(output.work, config) if here.main else None
                say(
                    f"{len(rows):,} rows of {spec.row_tokens:,} tokens a pass, {steps * config.rows:,} to train on; "
                    f"dropped {rows.dropped:,} shorter documents ({rows.dropped_tokens:,} tokens), truncated "
                    f"{rows.truncated_tokens:,} tokens"
                    + (f", padded {rows.padding:,} tokens of a pass" if rows.padding else ""),
                    here,
                )
                for one in taken:
                    say(
                        f"{one['source']}: {one['share']:.2%} of the tokens, {one['rows']:,} rows, {one['epochs']:.2f} "
                        f"epochs; dropped {one['documents_dropped']:,} shorter documents",
                        here,
                    )
                trainer = Trainer(config, model, rows, steps, log, here, loss)
                trainer.evaluation, trainer.notes, trainer.source = evaluation, about_weights, source
                trainer.method = start.method
                distributed.by_main(here, lambda: check_end(trainer, start, output, dtype))
                if state is not None:
                    trainer.resume(state)
                try:
                    trainer.fit(output.states)
                except torch.OutOfMemoryError as error:
                    raise ValueError(out_of_memory(config, spec, here, str(error).partition(". ")[0])) from error
                finish(trainer, start, output, dtype)
                if trainer.stopped:  # at its last step: what called this run is to stop
                    raise KeyboardInterrupt
                return output.path


def check_epochs(config: ExtendConfig, rows: Rows | Mixture, needed: int) -> list[dict[str, Any]]:
    """What the run takes of each source of a mixture. Raises ValueError if one of them would be read too often."""
    taken = rows.record(needed) if isinstance(rows, Mixture) else []
    counts = [(one["source"], one["epochs"]) for one in taken] or [(config.data, needed / len(rows))]
    for source, epochs in counts:
        if config.max_epochs is not None and epochs > config.max_epochs:
            raise ValueError(
                f"a source runs dry: the run takes {epochs:.2f} passes over it, max_epochs={config.max_epochs}: "
                f"data={source!r}"
            )
    return taken


def check_end(trainer: Trainer, start: Checkpoint, output: Output, dtype: str) -> None:
    """Raises ValueError if what the run is to leave could not be written; one without a state leaves nothing then."""
    try:
        about = trainer.config, trainer.steps, trainer.model, trainer.optimizer, dtype, trainer.here.size
        outcome.check_room(output.work, *about)
        outcome.rehearse(output.work, trainer.model, start.tokenizer, dtype, record_of(trainer, start.window))
    except ValueError:
        output.drop_unless_kept()
        raise


def out_of_memory(config: ExtendConfig, spec: RowSpec, here: World, reason: str) -> str:
    """What to change, with the settings that fit by the estimate of `endprompt plan` where it knows the device."""
    micro = config.micro_rows or config.rows // here.shares
    message = (
        f"the device's memory is too small: lower micro_rows={micro} or raise checkpointing={config.checkpointing} "
        "(none, selective, attention, full)"
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
            context_parallel=config.context_parallel,
            shard=config.shard,
            rows=config.rows,
            optimizer="lean" if config.optimizer == "lean" else "adamw",
            float8="none" if config.float8 == "none" else "fast",
        )
        message += f"; by the estimate {fitting(wanted, micro, total / GIB)}"
    return f"{message}: {reason}"


def held_out(start: Checkpoint) -> Evaluation | None:
    """The rows that the run is evaluated on, None if no held-out text is given."""
    config, encode = start.config, encoder(start.tokenizer)
    if not config.eval_data:
        return None
    lengths = config.eval_lengths or sorted({start.spec.row_tokens, config.target})
    documents = start.documents(config.eval_data)
    lead = start.spec.lead
    return Evaluation(documents, lengths, config.eval_rows, config.eval_needles, encode, config.seed, lead)


def record_of(trainer: Trainer, window: int) -> dict[str, Any]:
    """What a finished run says of itself in its output."""
    config, rows = trainer.config, trainer.rows
    spec = rows.spec
    return {
        "method": trainer.method,
        "model": origin.name_of(config.model),
        "origin": origin.about(config.model),
        "window": window,
        "target": config.target,
        "factor": rope_geometry(trainer.model.config).parameters.get("factor"),
        "row_tokens": spec.row_tokens,
        "prompt_tokens": spec.prompt.longest if spec.prompt else 0,
        "steps": trainer.steps,
        "tokens": trainer.steps * config.rows * spec.row_tokens,
        "weights": trainer.notes,
        "mixture": rows.record(trainer.steps * config.rows) if isinstance(rows, Mixture) else [],
        "documents_dropped": rows.dropped,
        "tokens_dropped": rows.dropped_tokens,
        "tokens_truncated": rows.truncated_tokens,
        "seconds": round(trainer.seconds, 3),
        "final_loss": trainer.last_loss,
        "config": plain(dataclasses.asdict(config)),
        "environment": environment(),
    }


def finish(trainer: Trainer, start: Checkpoint, output: Output, dtype: str) -> None:
    """Write the checkpoint and commit the output. If that fails, a state of the last step is left."""
    config = trainer.config
    with trainer.kept(output.states):
        streamed = output.work / "weights"
        weights: dict[str, Any] = {}
        if trainer.here.size > 1 and as_they_are(trainer.model) and not config.lora_rank:
            stream_weights(trainer.model, dtype, streamed, trainer.here)
        else:
            weights = whole_weights(trainer.model, dtype, keep=trainer.here.main)

        def write() -> None:
            alone = config.adapter == "only"
            merged = lora.merge(weights, config.lora_alpha / config.lora_rank) if config.lora_rank else weights
            record = record_of(trainer, start.window)
            outcome.write(output.work, trainer.model, start.tokenizer, dtype, {} if alone else merged, record)
            for path in output.work.glob("model*.safetensors*") if alone or not weights else ():
                path.unlink()
            for path in streamed.iterdir() if streamed.is_dir() else ():
                os.replace(path, output.work / path.name)
            shutil.rmtree(streamed, ignore_errors=True)
            if config.adapter != "merged":
                base = origin.hub_of(config.model).get("hub") or config.model
                folder = output.work if alone else output.work / "adapter"
                about = config.lora_rank, config.lora_alpha, sampled_sha256(checkpoint_path(config.model))
                lora.write_adapter(folder, trainer.model, weights, base, *about)
            if config.adapter == "beside":
                shutil.copy(output.work / "config.json", folder)
            if start.wrapper:
                wrapper.put_back(output.work, *start.wrapper)

        output.commit(write)
