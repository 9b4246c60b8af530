"""The training loop: config, data, model, loop, checkpoint, in that order.

One step takes `rows` rows of `row_tokens` physical tokens; row i of step s is row s * rows + i of the data, whatever
the size of the micro-batches. The loss of a step is the weighted sum over all its tokens by their weight total.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endprompt import checkpoint
from endprompt.data import Batch, Rows, RowSpec, encoder, load_documents, prefetch
from endprompt.loss import linear_cross_entropy, logits_cross_entropy
from endprompt.model import (
    check_vocabulary,
    export,
    extended_config,
    load_config,
    load_model,
    load_tokenizer,
    new_model,
    rope_geometry,
    torch_dtype,
    training_attention,
)
from endprompt.positions import WITH_PROMPT
from endprompt.prompts import prompt_kind
from endprompt.rows import RunDirectory, environment, plain, write_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class ExtendConfig:
    """How a checkpoint is extended.

    Args:
        model: directory of the checkpoint to start from
        data: JSONL, JSONL.gz, Parquet or text files, or prepared token shards
        output: directory of the extended checkpoint; it appears when the run is finished
        target: the extended window L, in tokens
        scheme: positions of a row: contiguous, endprompt, endprompt-random, pose, endprompt-pose, anchors
        scaling: RoPE scaling: none, linear (position interpolation), ntk, dynamic, yarn, llama3
        factor: scaling factor; default target / window
        prompt: the end prompt: EP_1, EP_2, EP_3, recall, "text:YOUR WORDS", or a list of cues drawn from; none for
            schemes without one; default EP_1 where the scheme needs one
        prompt_weight: loss weight of the end prompt's scored tokens; default 0.1 for cues, 1 for recall
        recall_span: tokens that a recall prompt copies from the context
        recall_given: how many of them carry no loss
        anchors: number of anchors of the anchors scheme
        row_tokens: physical tokens of a row, context and end prompt; default the checkpoint's window
        rows: rows of one step
        micro_rows: rows that go through the model at once; default all of a step
        steps: optimizer steps; or give tokens
        tokens: physical training tokens, instead of steps
        completion_weight: loss weight of a document's completion
        short_documents: drop (and count) documents shorter than a row, or pack them
        lr: learning rate
        warmup: warm-up steps, linear from 0
        schedule: constant, linear or cosine
        decay: share of the steps at the end over which linear and cosine fall to 0
        weight_decay: of AdamW
        beta1: of AdamW
        beta2: of AdamW
        clip: largest norm of the gradient; 0 for none
        seed: of positions, prompts and the order of documents
        dtype: of the weights that are trained: float32 or bfloat16
        autocast: multiply in bfloat16 while the weights stay as they are
        export_dtype: of the exported weights; default the checkpoint's own
        attention: sdpa, eager or flex, all causal only
        compile: layers (torch.compile of each decoder layer), none, or auto (layers on a GPU)
        device: cpu, cuda or auto
        save_every: steps between training states; 0 for none
        keep: how many training states are kept
        log_every: steps between lines of the log
        resume: go on from the newest training state of this output
        overwrite: replace a finished output
    """

    model: str = ""
    data: list[str] = dataclasses.field(default_factory=list)
    output: str = ""
    target: int = 0
    scheme: str = "endprompt"
    scaling: str = "linear"
    factor: float | None = None
    prompt: str | list[str] | None = None
    prompt_weight: float | None = None
    recall_span: int = 40
    recall_given: int = 12
    anchors: int = 4
    row_tokens: int | None = None
    rows: int = 64
    micro_rows: int | None = None
    steps: int | None = None
    tokens: int | None = None
    completion_weight: float = 1.0
    short_documents: str = "drop"
    lr: float = 2e-5
    warmup: int = 20
    schedule: str = "constant"
    decay: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    autocast: bool = False
    export_dtype: str | None = None
    attention: str = "sdpa"
    compile: str = "auto"
    device: str = "auto"
    save_every: int = 0
    keep: int = 2
    log_every: int = 10
    resume: bool = False
    overwrite: bool = False


SCHEDULES = ("constant", "linear", "cosine")


def check_config(config: ExtendConfig) -> None:
    """Raises ValueError naming key, value and rule for what no run can use."""
    for key in ("model", "output"):
        if not getattr(config, key):
            raise ValueError(f"{key} must be given: {key}=''")
    rules: dict[str, tuple[Any, bool, str]] = {
        "rows": (config.rows, config.rows >= 1, "at least 1"),
        "micro_rows": (config.micro_rows, config.micro_rows is None or config.micro_rows >= 1, "at least 1"),
        "lr": (config.lr, math.isfinite(config.lr) and config.lr > 0, "a finite number above 0"),
        "warmup": (config.warmup, config.warmup >= 0, "at least 0"),
        "schedule": (config.schedule, config.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        "decay": (config.decay, 0 <= config.decay <= 1, "between 0 and 1"),
        "weight_decay": (config.weight_decay, config.weight_decay >= 0, "at least 0"),
        "beta1": (config.beta1, 0 <= config.beta1 < 1, "in [0, 1)"),
        "beta2": (config.beta2, 0 <= config.beta2 < 1, "in [0, 1)"),
        "clip": (config.clip, config.clip >= 0, "at least 0"),
        "seed": (config.seed, config.seed >= 0, "at least 0"),
        "compile": (config.compile, config.compile in ("auto", "layers", "none"), "auto, layers or none"),
        "device": (config.device, config.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        "keep": (config.keep, config.keep >= 1, "at least 1"),
        "save_every": (config.save_every, config.save_every >= 0, "at least 0"),
        "log_every": (config.log_every, config.log_every >= 1, "at least 1"),
    }
    for key, (value, holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{key} must be {rule}: {key}={value!r}")
    if (config.steps is None) == (config.tokens is None):
        raise ValueError(f"give either steps or tokens: steps={config.steps} tokens={config.tokens}")
    for key in ("steps", "tokens"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1: {key}={value}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device")
    torch_dtype(config.dtype)


def method_name(config: ExtendConfig) -> str:
    """`scheme+prompt+scaling`, the `method` of result rows."""
    scheme = f"anchors{config.anchors}" if config.scheme == "anchors" else config.scheme
    names = prompt_names(config)
    return "+".join([scheme, *(["/".join(names)] if names else []), config.scaling])


def prompt_names(config: ExtendConfig) -> list[str]:
    """The end prompts by name, an empty list for none; EP_1 if the scheme needs one and none is named."""
    if config.prompt is None:
        return ["EP_1"] if config.scheme in WITH_PROMPT else []
    if config.prompt == "none":
        return []
    return [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)


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
        weight = 1.0 if names == ["recall"] else 0.1
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return RowSpec(
        row_tokens=config.row_tokens or window,
        target=config.target,
        scheme=config.scheme,
        prompt=prompt,
        anchors=config.anchors,
        completion_weight=config.completion_weight,
        prompt_weight=weight,
        bos=bos if adds_bos else None,
        short=config.short_documents,
        seed=config.seed,
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
    source = load_config(config.model)
    window = rope_geometry(source).window
    new_config = extended_config(source, config.scaling, config.target, config.factor)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(source, tokenizer)
    spec = row_spec(config, window, tokenizer)
    device = pick_device(config)

    def make_model() -> PreTrainedModel:
        return load_model(config.model, dtype=config.dtype, attention=attention, device=device, config=new_config)

    return run(config, spec, tokenizer, make_model, source_dtype=source.dtype)


def pretrain(config: ExtendConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Train a model from random weights on rows of its own window: how a base model is made."""
    check_config(config)
    attention = training_attention(config.attention)
    check_vocabulary(model_config, tokenizer)
    spec = row_spec(config, model_config.max_position_embeddings, tokenizer)
    device = pick_device(config)

    def make_model() -> PreTrainedModel:
        return new_model(model_config, seed=config.seed, dtype=config.dtype, attention=attention, device=device)

    return run(config, spec, tokenizer, make_model, source_dtype=torch_dtype(config.dtype))


def pick_device(config: ExtendConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(
    config: ExtendConfig, spec: RowSpec, tokenizer: PreTrainedTokenizerBase, make_model: Any, source_dtype: Any
) -> Path:
    """Everything that a run writes goes to OUTPUT.partial, which is renamed to OUTPUT when it is whole."""
    output = Path(config.output)
    work = output.with_name(output.name + ".partial")
    claim(output, work, config)
    rows = Rows(load_documents(config.data, tokenizer), spec)
    if len(rows) < config.rows:
        raise ValueError(
            f"fewer documents than one batch: {len(rows)} of at least {spec.needed} tokens (dropped {rows.dropped} "
            f"shorter ones), rows={config.rows}"
        )
    log = RunDirectory(work, config)
    steps = total_steps(config, spec.row_tokens)
    model = make_model()
    trainer = Trainer(config, model, rows, steps, log)
    if config.resume:
        trainer.resume(work / "states")
    trainer.fit(work / "states")
    return finish(config, trainer, tokenizer, work, output, source_dtype)


def claim(output: Path, work: Path, config: ExtendConfig) -> None:
    """Refuse to mix runs: a finished output needs `overwrite`, an unfinished one `resume` (or `overwrite`)."""
    if output.exists() and not config.overwrite:
        raise ValueError(f"the output exists already; choose another or set overwrite: output={config.output!r}")
    states = checkpoint.states(work / "states") if work.exists() else []
    if config.resume:
        if not states:
            raise ValueError(f"there is no training state to resume from: {work / 'states'}")
        saved = json.loads((states[-1] / checkpoint.STATE).read_text(encoding="utf-8")).get("config", {})
        ours = identity(config)
        different = sorted(key for key in ours if saved.get(key) != ours[key])
        if different:
            key = different[0]
            raise ValueError(
                f"resume needs the configuration that the run was started with: {key}={ours[key]!r}, the state has "
                f"{saved.get(key)!r} ({', '.join(different)} differ)"
            )
    elif states and not config.overwrite:
        raise ValueError(f"an unfinished run has states in {work}; set resume to go on, or overwrite to start again")
    elif work.exists():
        shutil.rmtree(work)


def identity(config: ExtendConfig) -> dict[str, Any]:
    """What must agree between a run and the state it resumes from."""
    free = {"output", "resume", "overwrite", "micro_rows", "log_every", "save_every", "keep", "device", "compile"}
    return {key: plain(value) for key, value in dataclasses.asdict(config).items() if key not in free}


def finish(
    config: ExtendConfig,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    output: Path,
    source_dtype: Any,
) -> Path:
    dtype = config.export_dtype or str(source_dtype or config.dtype).removeprefix("torch.")
    export(trainer.model, tokenizer, work, dtype)
    about = {
        "method": method_name(config),
        "model": Path(config.model).name,
        "target": config.target,
        "steps": trainer.steps,
        "tokens": trainer.steps * config.rows * trainer.rows.spec.row_tokens,
        "documents_dropped": trainer.rows.dropped,
        "seconds": round(trainer.seconds, 3),
        "final_loss": trainer.last_loss,
        "config": plain(dataclasses.asdict(config)),
        "environment": environment(),
    }
    write_text(work / "endprompt.json", json.dumps(about, indent=2) + "\n")
    shutil.rmtree(work / "states", ignore_errors=True)
    if output.exists():
        shutil.rmtree(output)
    os.replace(work, output)
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Loop


class Trainer:
    """Model, optimizer and rows of one run; `fit` goes from the current step to the last."""

    def __init__(self, config: ExtendConfig, model: PreTrainedModel, rows: Rows, steps: int, log: RunDirectory):
        self.config, self.model, self.rows, self.steps, self.log = config, model, rows, steps, log
        self.device = next(model.parameters()).device
        self.step = 0
        self.seconds = 0.0
        self.last_loss: float | None = None
        model.train()
        model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        if config.compile == "layers" or (config.compile == "auto" and self.device.type == "cuda"):
            for layer in decoder_layers(model):
                layer.compile()

    def resume(self, directory: Path) -> None:
        state = checkpoint.newest_state(directory)
        if state is None:
            raise ValueError(f"no whole training state is left in {directory}")
        checkpoint.restore(self.model, self.optimizer, state.tensors)
        self.step = state.step
        self.seconds = float(state.about.get("seconds", 0.0))
        say(f"resumed from step {self.step} of {self.steps}")

    def save(self, directory: Path) -> None:
        about = {"config": identity(self.config), "seconds": self.seconds}
        tensors = checkpoint.collect(self.model, self.optimizer)
        checkpoint.save_state(directory, self.step, tensors, about, self.config.keep)

    def fit(self, states: Path) -> None:
        config, per_step = self.config, self.config.rows
        batches = prefetch(lambda step: self.rows.batch(step * per_step, per_step), range(self.step, self.steps))
        started = last = time.perf_counter()
        before, since = self.seconds, self.step
        with progress(self.step, self.steps) as advance:
            for batch in batches:
                rate = learning_rate(config, self.step, self.steps)
                loss, norm = self.train_step(batch, rate)
                self.step += 1
                final = self.step == self.steps
                if final or self.step % config.log_every == 0 or self.step == 1:
                    self.last_loss = float(loss)
                    if not (math.isfinite(self.last_loss) and math.isfinite(float(norm))):
                        raise ValueError(self.divergence(float(norm), states))
                    now = time.perf_counter()
                    self.seconds = before + now - started
                    done = (self.step - since) * per_step * self.rows.spec.row_tokens
                    speed = done / max(now - last, 1e-9)
                    self.log.log(
                        step=self.step,
                        loss=round(self.last_loss, 6),
                        lr=rate,
                        grad_norm=round(float(norm), 5),
                        tokens_per_s=round(speed, 1),
                    )
                    advance(self.step, self.last_loss, speed)
                    last, since = now, self.step
                if config.save_every and not final and self.step % config.save_every == 0:
                    self.save(states)
        self.seconds = before + time.perf_counter() - started

    def divergence(self, norm: float, states: Path) -> str:
        kept = checkpoint.states(states)
        where = f"the last good state is {kept[-1]}" if kept else "no training state was saved (save_every=0)"
        return f"training diverged at step {self.step}: loss={self.last_loss} gradient norm={norm}; {where}"

    def train_step(self, batch: Batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns (loss, gradient norm before clipping) as tensors, without waiting for them."""
        config = self.config
        ids, positions, weights = (
            torch.from_numpy(part.copy()).to(self.device, non_blocking=True)
            for part in (batch.input_ids, batch.position_ids, batch.weights)
        )
        total = weights.sum()
        micro = config.micro_rows or len(ids)
        loss = torch.zeros((), device=self.device)
        with attention_backends(self.device):
            for start in range(0, len(ids), micro):
                part = slice(start, start + micro)
                part_loss = self.loss(ids[part], positions[part], weights[part]) / total
                part_loss.backward()
                loss += part_loss.detach()
        limit = config.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def loss(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
        """Weighted sum of next-token losses; weights_BT[:, t] is the weight of predicting token t, 0 for the first."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast)
        with autocast:
            labels, weights = ids_BT[:, 1:].reshape(-1), weights_BT[:, 1:].reshape(-1)
            if not plain_head(self.model):
                logits = self.model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
                return logits_cross_entropy(logits[:, :-1].flatten(0, 1), labels, weights)
            hidden = self.model.base_model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)[0]
            head = self.model.get_output_embeddings().weight
            return linear_cross_entropy(hidden[:, :-1].flatten(0, 1), head, labels, weights)


def plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just `hidden @ head.T` (no bias, no soft-capping, no scale)."""
    config = model.config
    special = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    head = model.get_output_embeddings()
    return getattr(head, "bias", None) is None and not any(getattr(config, name, None) for name in special)


def decoder_layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The decoder layers, in order. Raises ValueError for a model that keeps them elsewhere."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(f"cannot find the decoder layers of {type(model).__name__} (base_model.layers)")
    yield from layers


@contextlib.contextmanager
def attention_backends(device: torch.device) -> Iterator[None]:
    """On CUDA, cuDNN's attention first: it is about twice as fast as torch's own flash kernel on Hopper GPUs."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(first: int, last: int) -> Iterator[Any]:
    """`advance(step, loss, tokens_per_s)`: a bar on a terminal, a plain line every few seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        shown = [0.0]

        def line(step: int, loss: float, speed: float) -> None:
            now = time.monotonic()
            if now - shown[0] >= 5 or step == last:
                shown[0] = now
                say(f"step {step}/{last}  loss {loss:.4f}  {speed:,.0f} tokens/s")

        yield line
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=last, completed=first, loss=math.nan, speed=0.0)
        yield lambda step, loss, speed: bar.update(task, completed=step, loss=loss, speed=speed)
