"""The training loop: config, data, model, loop, checkpoint, in that order.

One step takes `rows` rows of `row_tokens` physical tokens; row i of step s is row s * rows + i of the data, whatever
the size of the micro-batches. The loss of a step is the weighted sum over all its tokens by their weight total.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config

from endprompt import checkpoint, determinism, distributed, linears, longlora, origin, outcome, shares
from endprompt.card import RECORD
from endprompt.config import ExtendConfig, check_config, check_output, check_processes, method_name, prompt_names
from endprompt.data import Batch, Rows, RowSpec, encoder, load_documents, prefetch, tokens_ending
from endprompt.distributed import World
from endprompt.evaluate import Evaluation
from endprompt.float8 import Float8Matrix
from endprompt.fused import can_fuse, fuse
from endprompt.graph import StepGraph, check_device, recorded_values, shared_graph
from endprompt.guard import Guard
from endprompt.loss import linear_cross_entropy, logits_cross_entropy, next_tokens
from endprompt.model import (
    check_builds,
    check_vocabulary,
    checkpoint_path,
    extended_config,
    load_config,
    load_model,
    load_tokenizer,
    new_model,
    rope_geometry,
    torch_dtype,
    training_attention,
    whole_weights,
    window_of,
)
from endprompt.optim import clip_gradients, make_optimizer
from endprompt.parity import check_forward, plain_head
from endprompt.plan import GIB, PlanConfig, fitting
from endprompt.positions import BY_SENTENCE
from endprompt.progress import check_reports, device_memory, device_peak, flops_per_token, progress, reporters, say
from endprompt.prompts import READ, prompt_kind
from endprompt.recompute import checkpoint_layers, memory_budget
from endprompt.rows import RunDirectory, environment, parse_object, plain, result_row
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------------------------
# From the configuration


def row_spec(config: ExtendConfig, window: int, tokenizer: PreTrainedTokenizerBase) -> RowSpec:
    """The rows that this configuration trains on."""
    names = prompt_names(config)
    prompt = None
    if names:
        prompt = prompt_kind(
            names, encoder(tokenizer), recall_span=config.recall_span, recall_given=config.recall_given
        )
    weight = config.prompt_weight
    if weight is None:
        weight = 1.0 if READ.keys() & names else 0.1
    begin = Reader(tokenizer).begin
    by_sentences = config.scheme in BY_SENTENCE
    return RowSpec(
        row_tokens=config.row_tokens or window,
        target=config.target,
        scheme=config.scheme,
        prompt=prompt,
        anchors=config.anchors,
        pieces=config.pieces,
        completion_weight=config.completion_weight,
        prompt_weight=weight,
        bos=begin[0] if len(begin) == 1 else tuple(begin) or None,
        short=config.short_documents,
        long=config.long_documents,
        seed=config.seed,
        line_ends=tokens_ending(tokenizer, ("\n",)) if by_sentences or names == ["question"] else frozenset(),
        sentence_ends=tokens_ending(tokenizer, (".", "!", "?")) if by_sentences else frozenset(),
    )


def total_steps(config: ExtendConfig, row_tokens: int) -> int:
    if config.steps is not None:
        return config.steps
    assert config.tokens is not None
    return max(1, round(config.tokens / (config.rows * row_tokens)))


def learning_rate(config: ExtendConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then constant, or falling to 0 over the last `decay` of the run."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    start = max(config.warmup, round(steps * (1 - config.decay)))
    if step < start:
        return config.lr
    progress = (step - start) / max(1, steps - start)
    return config.lr * (1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


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
    """Everything that a run writes goes to OUTPUT.partial, which is renamed to OUTPUT when it is whole.

    make_model: the model on a device; on meta, where several processes will each read their share, it need not have
    its weights yet. window: of the checkpoint that is extended, None for a model from random weights. notes: checks
    the checkpoint's weights before there is work to lose; what the user should know of them.
    """
    output = Path(config.output)
    work = output.with_name(output.name + ".partial")
    here = distributed.world(config.device)
    with distributed.only_run(output, here):
        check_processes(config, here.size)
        dtype = outcome.export_dtype(config, source_dtype)
        if finished_before(output, config):
            say(f"this run is finished already: {output}", here)
            return output
        check_claim(output, work, config)
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
        state = checkpoint.newest_state(work / "states", here) if config.resume else None
        if state is not None:
            check_identity(config, rows, state.about)
        distributed.barrier()  # nothing is written before every process has made its checks
        if here.main and state is None and work.exists():
            if config.resume:
                say(f"no whole training state in {work / 'states'}: starting at the first step")
            shutil.rmtree(work)
        with resumable(config, work):
            log = RunDirectory(work, config) if here.main else None
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
                distributed.by_main(here, lambda: check_end(trainer, tokenizer, work, dtype, window))
                if state is not None:
                    trainer.resume(state)
                try:
                    trainer.fit(work / "states")
                except torch.OutOfMemoryError as error:
                    raise ValueError(out_of_memory(config, spec, here, str(error).partition(". ")[0])) from error
            path = finish(config, trainer, tokenizer, work, output, dtype, window)
            if trainer.stopped:  # at its last step: what called this run is to stop
                raise KeyboardInterrupt
            return path


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run. flags: what the run goes on with, beside its own."""

    def __init__(self, flags: dict[str, bool]):
        super().__init__()
        self.flags = flags


@contextlib.contextmanager
def resumable(config: ExtendConfig, work: Path) -> Iterator[None]:
    """From where an output is this run's: Ctrl-C tells how to go on with it, not with one that was there before."""
    try:
        yield
    except KeyboardInterrupt:
        kept = checkpoint.states(work / "states") or not work.exists()  # it is renamed when it is whole
        raise Interrupted({"resume": True} if kept and not config.resume else {}) from None


def check_end(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, work: Path, dtype: str, window: int | None) -> None:
    """Raises ValueError if what the run is to leave could not be written; one without a state leaves nothing then."""
    try:
        outcome.check_room(work, trainer.config, trainer.steps, trainer.model, trainer.optimizer, dtype)
        outcome.rehearse(work, trainer.model, tokenizer, dtype, record_of(trainer, window))
    except ValueError:
        if not checkpoint.states(work / "states"):
            shutil.rmtree(work)
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


def finished_before(output: Path, config: ExtendConfig) -> bool:
    """Whether a resumed run ended after all: its output is whole and of the same configuration.

    With `overwrite` an output beside an unfinished run is the one that this run is to replace.
    """
    record = output / RECORD
    replaced = config.overwrite and output.with_name(output.name + ".partial").exists()
    if not (config.resume and record.is_file()) or replaced:
        return False
    saved = parse_object(record.read_bytes(), str(record)).get("config")
    if not isinstance(saved, dict):
        raise ValueError(f"{record}: must hold the run's configuration, an object `config`")
    return all(saved.get(key) == value for key, value in identity(config).items())


def check_claim(output: Path, work: Path, config: ExtendConfig) -> None:
    """Refuse to mix runs: a finished output needs `overwrite`, an unfinished one `resume` (or `overwrite`)."""
    check_output(config.output, config.overwrite, RECORD, "run")
    if config.resume and not work.exists():
        raise ValueError(f"there is no unfinished run to resume: {work} does not exist")
    if not (config.resume or config.overwrite) and work.exists() and checkpoint.states(work / "states"):
        raise ValueError(f"an unfinished run has states in {work}; set resume to go on, or overwrite to start again")


@contextlib.contextmanager
def stop_asked(here: World) -> Iterator[Callable[[], bool]]:
    """`asked()`: whether the user has pressed Ctrl-C, so that a run can end its step and save. A second one ends it.

    A run that was at its last step is ended whole. Only where Ctrl-C would raise KeyboardInterrupt here, and in a
    single process: several would not stop at one step.
    """
    pressed = threading.Event()
    ours = threading.current_thread() is threading.main_thread() and here.size == 1
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed.is_set
        return

    def press(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.set()

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check_identity(config: ExtendConfig, rows: Rows, about: dict[str, Any]) -> None:
    """Refuse a state of another configuration, or of data that have changed since."""
    ours, saved = identity(config), about.get("config", {})
    different = sorted(key for key in ours if saved.get(key) != ours[key])
    if different:
        key = different[0]
        raise ValueError(
            f"resume needs the configuration that the run was started with: {key}={ours[key]!r}, the state has "
            f"{saved.get(key)!r} ({', '.join(different)} differ)"
        )
    if about.get("documents") != rows.documents.fingerprint():
        raise ValueError(f"resume needs the documents that the run was started with: data={config.data} have changed")


def identity(config: ExtendConfig) -> dict[str, Any]:
    """What must agree between a run and the state it resumes from."""
    free = {"output", "resume", "overwrite", "micro_rows", "log_every", "save_every", "keep", "device", "compile"}
    free |= {"report", "divergence", "checkpointing", "deterministic", "fused"}
    free |= {key for key in vars(config) if key.startswith("eval_")}
    return {key: plain(value) for key, value in dataclasses.asdict(config).items() if key not in free}


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
    config: ExtendConfig,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    output: Path,
    dtype: str,
    window: int | None,
) -> Path:
    """Write the checkpoint and rename OUTPUT.partial to OUTPUT. If that fails, a state of the last step is left."""
    with trainer.kept(work / "states"):
        weights = whole_weights(trainer.model, dtype, keep=trainer.here.main)

        def write() -> None:
            merged = longlora.merge(weights, config.lora_alpha / config.lora_rank) if config.lora_rank else weights
            outcome.write(work, trainer.model, tokenizer, dtype, merged, record_of(trainer, window))
            checkpoint.sync_tree(work)
            if output.exists():
                shutil.rmtree(output)
            os.replace(work, output)
            shutil.rmtree(output / "states", ignore_errors=True)  # last, so that a crash before can be resumed

        distributed.by_main(trainer.here, write)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Loop


#: Share of a batch's tokens with a weight above which the loss of all is taken.
DENSE = 0.97


class Objective(torch.nn.Module):
    """The model with its loss, so that sharded weights are whole for both."""

    def __init__(
        self,
        model: PreTrainedModel,
        autocast: bool,
        every_token: bool = False,
        fuse: bool = True,
        float8: str = "none",
    ):
        """every_token, fuse: as in `linear_cross_entropy`. float8: of the head's products, while training."""
        super().__init__()
        self.model, self.autocast, self.float8 = model, autocast, float8
        self.options: dict[str, Any] = {"every_token": every_token, "fuse": fuse}
        self.plain = plain_head(model)  # tried while the model is whole: sharded it can't be
        self.dense = False  # nearly all tokens count: those that do not are not worth looking for

    def forward(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        weights_BT: torch.Tensor,
        hits: bool = False,
        instead: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Weighted sum of next-token losses; weights_BT[:, t] is the weight of predicting token t, 0 for the first.

        hits: instead the number of rows in which each token with a weight is the most likely one. instead: some other
        work with the model, whose weights are whole in here and nowhere else.
        """
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=self.autocast):
            if instead is not None:
                return instead()
            if hits:
                return self.hits(ids_BT, positions_BT, weights_BT[:, 1:] > 0)
            plain, options = self.plain, self.options
            dense = self.dense and plain and self.model.training
            if dense:
                labels, weights = next_tokens(ids_BT, weights_BT)
                options = options | {"every_token": True}
            else:
                labels, weights = ids_BT[:, 1:].reshape(-1), weights_BT[:, 1:].reshape(-1)
            if not plain:
                logits = self.model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
                return logits_cross_entropy(logits[:, :-1].flatten(0, 1), labels, weights)
            hidden = self.model.base_model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)[0]
            head = self.model.get_output_embeddings().weight
            hidden_ND = (hidden if dense else hidden[:, :-1]).flatten(0, 1)
            head8 = None
            if self.float8 != "none" and self.model.training:
                head8 = Float8Matrix(head.detach(), fast=self.float8 == "fast")
            return linear_cross_entropy(
                hidden_ND, head, labels, weights, head_sum_VD=self.head_sum(), head8=head8, **options
            )

    def head_sum(self) -> torch.Tensor | None:
        """The lean optimizer's sum, to which the head's gradient is added at once; None where it is passed back.

        Added at once it is that of the loss as it is given: nothing may scale the loss afterwards.
        """
        if not (self.model.training and torch.is_grad_enabled() and self.plain):
            return None
        head = self.model.get_output_embeddings().weight
        return getattr(head, "main_grad", None) if head.requires_grad else None

    def hits(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, scored_BT: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": ids_BT, "position_ids": positions_BT, "use_cache": False}
        if self.plain:
            hidden = self.model.base_model(**given)[0]
            best = self.model.get_output_embeddings()(hidden[:, :-1][scored_BT]).argmax(-1)
        else:
            best = self.model(**given).logits[:, :-1][scored_BT].argmax(-1)
        wrong = torch.zeros(len(ids_BT), device=ids_BT.device)
        wrong.index_add_(0, scored_BT.nonzero()[:, 0], (best != ids_BT[:, 1:][scored_BT]).float())
        return (wrong == 0).float().sum()


def optimizer_of(config: ExtendConfig, model: PreTrainedModel) -> torch.optim.Optimizer:
    """The optimizer over all weights that train."""
    name = config.optimizer
    if name == "auto":
        name = "masters" if config.dtype == "bfloat16" else "adamw"
    if name == "adamw" and config.dtype == "bfloat16":
        say("WARNING: adamw on bfloat16 weights rounds to nearest and loses small updates; masters keeps them")
    return make_optimizer(
        name,
        model,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        seed=config.seed,
        recorded=config.compile.startswith("graph"),
    )


def optimizer_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    micro: int,
    clip: float,
    processes: int,
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    weights_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, gradient and update from one process's rows; returns (its share of the loss, norm before clipping).

    micro: rows that go through the model at once.
    """
    total = distributed.total(weights_BT.sum())
    loss = torch.zeros((), device=ids_BT.device)
    with attention_backends(ids_BT.device):
        for start in range(0, len(ids_BT), micro):
            part = slice(start, start + micro)
            if objective.head_sum() is None:
                part_loss = objective(ids_BT[part], positions_BT[part], weights_BT[part]) / total
            else:
                part_loss = objective(ids_BT[part], positions_BT[part], weights_BT[part] / total)
            (part_loss * processes).backward()  # FSDP takes the mean over the processes, we want the sum
            loss += part_loss.detach()
    norm = distributed.whole(clip_gradients(optimizer, clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


class Trainer:
    """Model, optimizer and rows of one run; `fit` goes from the current step to the last."""

    def __init__(
        self,
        config: ExtendConfig,
        model: PreTrainedModel,
        rows: Rows,
        steps: int,
        log: RunDirectory | None,
        here: World | None = None,
    ):
        here = here or World(device=next(model.parameters()).device.type)
        self.config, self.model, self.rows, self.steps, self.log, self.here = config, model, rows, steps, log, here
        self.device = torch.device(here.device)
        self.step = 0
        self.seconds = 0.0
        self.last_loss: float | None = None
        self.stopped = False
        self.guard = Guard(config.divergence)
        self.evaluation: Evaluation | None = None
        self.notes: list[str] = []  # on the checkpoint's weights
        model.train()
        model.config.use_cache = False
        if here.size == 1:  # before anything is converted, compiled or recorded
            self.check_forward(Objective(model, autocast=config.autocast))
        if config.lora_rank:
            longlora.add_lora(model, config.lora_rank, config.lora_alpha, config.lora_also, config.seed)
        self.token_flops = flops_per_token(model, rows.spec.row_tokens)
        self.peak = device_peak(self.device)
        compiled = config.compile == "layers" or (config.compile == "auto" and self.device.type == "cuda")
        self.graph: StepGraph | None = None
        if config.compile.startswith("graph"):
            self.graph = self.step_graph()
            self.optimizer = self.graph.optimizer
        elif here.size == 1:
            self.optimizer = optimizer_of(config, model)
        self.budget: dict[str, float] = {}  # settings of torch's compiler while a step runs
        fused = self.convert_layers() if config.optimizer == "lean" else 0
        if compiled and config.checkpointing == "selective":
            self.budget = {"activation_memory_budget": memory_budget(config.float8, bool(fused))}
        else:
            checkpoint_layers(decoder_layers(model), config.checkpointing)
        if compiled:
            for layer in decoder_layers(model):
                layer.compile()
        float8 = config.float8 if config.float8_head else "none"
        self.loss = Objective(model, autocast=config.autocast and here.size == 1, float8=float8)
        if here.size > 1:  # the optimizer is over the shares
            distributed.shard(self.loss, decoder_layers(model), here, bfloat16=config.autocast)
            shares.read_shares(model, here.device)
            with torch.compiler.set_stance("force_eager"):  # a compiled layer would be made for the short row first
                self.check_forward(self.loss)
            sharded: Any = self.loss  # what is gathered for a forward pass stays so until the backward pass
            sharded.reshard()
            self.optimizer = optimizer_of(config, model)

    def check_forward(self, objective: Objective) -> None:
        with attention_backends(self.device):
            check_forward(objective, bfloat16=self.config.autocast)

    def convert_layers(self) -> int:
        """Change the layers for the lean optimizer, and fuse those that can be if that is asked for; how many were."""
        config, model = self.config, self.model
        # LoRA's frozen matrices have no sums, and its layers do more than a product
        wanted = config.fused and config.float8 == "none" and not config.lora_rank and can_fuse(self.device)
        if wanted:
            linears.join(model)
        linears.convert(model, config.float8)
        fused = fuse(model, keep=config.checkpointing == "none") if wanted else 0
        if wanted and not fused:
            say("fused: no layer of this model can be, they stay as they are", self.here)
        return fused

    def resume(self, state: checkpoint.TrainingState) -> None:
        checkpoint.restore(self.model, self.optimizer, state)
        linears.after_step(self.model)
        self.step = state.step
        self.guard = Guard(**(state.about["guard"] | {"limit": self.config.divergence}))
        if self.log:
            for path in (self.log.path / "log.jsonl", self.log.results):
                checkpoint.forget_after(path, self.step)
        self.seconds = float(state.about.get("seconds", 0.0))
        self.last_loss = state.about.get("loss")
        say(f"resumed from step {self.step} of {self.steps}", self.here)

    def save(self, directory: Path) -> None:
        about = {
            "config": identity(self.config),
            "documents": self.rows.documents.fingerprint(),
            "seconds": self.seconds,
            "guard": vars(self.guard),
            "loss": self.last_loss,
        }
        tensors = checkpoint.collect(self.model, self.optimizer)
        checkpoint.save_state(directory, self.step, tensors, about, self.config.keep, self.here)

    @contextlib.contextmanager
    def kept(self, states: Path) -> Iterator[None]:
        """Around what comes after a step: if it fails there is a state of that step, and nothing is lost."""
        try:
            yield
        except (Exception, KeyboardInterrupt):
            newest = checkpoint.states(states)[-1:]
            if states.parent.exists() and not (newest and newest[0].name == checkpoint.name_of(self.step)):
                self.save(states)
            raise

    def batch(self, step: int) -> Batch:
        """This process's share of a step's rows: all processes together have rows step * rows + 0, 1, 2 ..."""
        share = self.config.rows // self.here.size
        return self.rows.batch(step * self.config.rows + self.here.rank * share, share)

    def fit(self, states: Path) -> None:
        config = self.config
        batches = prefetch(self.batch, range(self.step, self.steps))
        started = last = time.perf_counter()
        before, since = self.seconds, self.step
        with (
            contextlib.closing(batches),
            progress(self.step, self.steps, self.here) as advance,
            stop_asked(self.here) as stop,
            self.reports() as reports,
        ):
            if self.evaluation and since == self.steps:  # the last evaluation had failed, or what came after it
                if self.log:
                    checkpoint.forget_after(self.log.results, self.step - 1)
                self.evaluate_kept(reports, states)
            for batch in batches:
                rate = learning_rate(config, self.step, self.steps)
                loss, norm = self.train_step(batch, rate)
                self.step += 1
                final = self.step == self.steps
                self.stopped = stop()
                stopped = self.stopped and not final
                save = stopped or (bool(config.save_every) and not final and self.step % config.save_every == 0)
                log = final or self.step == 1 or self.step % config.log_every == 0
                if save or log:  # only here the host waits for the device
                    self.last_loss = float(loss)
                    wrong = self.guard.check(self.last_loss, float(norm), smooth=log)
                    if wrong:
                        raise ValueError(
                            f"training diverged at step {self.step}: {wrong}; {checkpoint.last_good(states)}"
                        )
                    self.seconds = before + time.perf_counter() - started
                if log:
                    now = time.perf_counter()
                    values = self.values(rate, self.last_loss or 0.0, float(norm), self.step - since, now - last)
                    for report in reports:
                        report(self.step, values)
                    advance(self.step, values)
                    last, since = now, self.step
                paused = time.perf_counter()
                if self.evaluation and (final or (config.eval_every and self.step % config.eval_every == 0)):
                    self.evaluate_kept(reports, states)
                if save:
                    self.save(states)
                if stopped:
                    raise KeyboardInterrupt
                last += time.perf_counter() - paused  # tokens/s are those of the steps
        self.seconds = before + time.perf_counter() - started

    @contextlib.contextmanager
    def reports(self) -> Iterator[list[Callable[[int, dict[str, float]], None]]]:
        """Where values go: log.jsonl always, trackers as asked; nowhere but on the main process."""
        if not self.log:
            yield []
            return
        log = self.log
        with reporters(self.config.report, log.path, plain(dataclasses.asdict(self.config)), self.step) as asked:
            yield [lambda step, values: log.log(step=step, **values), *asked]

    def values(self, rate: float, loss: float, norm: float, steps: int, seconds: float) -> dict[str, float]:
        """What a line of the log says about the last `steps` steps, which took `seconds`."""
        speed = steps * self.config.rows * self.rows.spec.row_tokens / max(seconds, 1e-9)
        values = {
            "loss": round(loss, 6),
            "lr": rate,
            "grad_norm": round(norm, 5),
            "tokens_per_s": round(speed, 1),
        }
        if self.peak:
            values["mfu"] = round(speed * self.token_flops / (self.peak * self.here.size), 4)
            values["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return values

    def evaluate_kept(self, reports: list[Callable[[int, dict[str, float]], None]], states: Path) -> None:
        """`evaluate`, whose failure (long rows take memory) loses no step; one of several processes may fail alone."""
        with self.kept(states) if self.here.size == 1 else contextlib.nullcontext():
            self.evaluate(reports)

    def evaluate(self, reports: list[Callable[[int, dict[str, float]], None]]) -> None:
        """Append a row of results for each task and length of the held-out text."""
        assert self.evaluation is not None
        self.model.eval()
        if self.config.attention == "shifted":  # sparse in training only
            self.model.set_attn_implementation(training_attention("sdpa"))
        with attention_backends(self.device):
            found = list(self.evaluation.measure(self.loss, self.here))
        self.model.set_attn_implementation(training_attention(self.config.attention))
        self.model.train()
        if not self.log:
            return
        name, method = origin.name_of(self.config.model), method_name(self.config)
        for one in found:
            row = result_row(
                suite="training", model=name, method=method, seed=self.config.seed, step=self.step, **vars(one)
            )
            self.log.add([row])
            say(f"step {self.step}: {one.task} at {one.length}: {one.metric} {one.value:.4f}")
        for report in reports[1:]:
            report(self.step, {f"{one.task}/{one.length}": one.value for one in found})

    def train_step(self, batch: Batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns (loss, gradient norm before clipping) as tensors, without waiting for them."""
        config = self.config
        if self.graph:
            return self.graph.step(batch.input_ids, batch.position_ids, batch.weights, rate)
        ids, positions, weights = (
            torch.from_numpy(part.copy()).to(self.device, non_blocking=True)
            for part in (batch.input_ids, batch.position_ids, batch.weights)
        )
        # dropout, if the model has any, is a function of the step too
        seed = (config.seed * 1_000_003 + self.step) * self.here.size + self.here.rank
        (torch.cuda.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed)(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micro = config.micro_rows or len(ids)
        # on a GPU looking for the tokens that count waits for all that went before
        self.loss.dense = config.optimizer == "lean" and float((batch.weights[:, 1:] > 0).mean()) > DENSE
        with torch._functorch.config.patch(self.budget):
            loss, norm = optimizer_step(
                self.loss, self.optimizer, micro, config.clip, self.here.size, ids, positions, weights
            )
        linears.after_step(self.model)
        return distributed.total(loss), norm

    def step_graph(self) -> StepGraph:
        """The graph of this run's steps; one that an earlier run of the same shapes has left is used again.

        Raises ValueError for what no graph can hold.
        """
        config, model, device = self.config, self.model, self.device
        check_device(config, model, self.here)
        tokens, micro = self.rows.spec.row_tokens, config.micro_rows or config.rows
        layers = config.compile == "graph+layers"

        def make() -> StepGraph:
            optimizer = optimizer_of(config, model)
            if layers:
                for layer in decoder_layers(model):
                    layer.compile(dynamic=False)
            objective = Objective(model, config.autocast, every_token=True, fuse=layers)
            work = functools.partial(optimizer_step, objective, optimizer, micro, config.clip, 1)
            return StepGraph(model, optimizer, work, (config.rows, tokens), device)

        return shared_graph(recorded_values(config, model, (config.rows, tokens)), model, make)


def decoder_layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The decoder layers, in order. Raises ValueError for a model that keeps them elsewhere."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(f"cannot find the decoder layers of {type(model).__name__} (base_model.layers)")
    yield from layers


@contextlib.contextmanager
def attention_backends(device: torch.device) -> Iterator[None]:
    """On CUDA, cuDNN's attention first: it is about twice as fast as torch's own flash kernel on Hopper GPUs.

    Its gradients are summed in no fixed order, so where runs must repeat torch's own flash kernel comes first.
    """
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.are_deterministic_algorithms_enabled():
        order = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield
