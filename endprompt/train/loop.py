"""The loop over steps: rates, micro-batches, logs, states, evaluation, divergence.

One step takes `rows` rows of `row_tokens` physical tokens; row i of step s is row s * rows + i of the data, whatever
the size of the micro-batches. The loss of a step is the weighted sum over all its tokens by their weight total.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config

from endprompt import distributed, origin
from endprompt.config import ExtendConfig
from endprompt.data import Batch, Mixture, Rows
from endprompt.data.rows import prefetch
from endprompt.distributed import World, say
from endprompt.fast import linears
from endprompt.files import sound_lines
from endprompt.model import lora, quantized, shares, training_attention
from endprompt.model.attention import attention_backends, share_rows
from endprompt.model.load import decoder_layers, torch_dtype
from endprompt.model.parity import check_forward
from endprompt.results import result_row
from endprompt.runs import RunDirectory, plain
from endprompt.train import experts
from endprompt.train import states as checkpoint
from endprompt.train.evaluate import Evaluation
from endprompt.train.faster import convert, make_fast
from endprompt.train.graph import StepGraph, check_device, recorded_values, shared_graph
from endprompt.train.objective import Objective, optimizer_of, optimizer_step
from endprompt.train.output import identity
from endprompt.train.progress import device_peak, flops_per_token, progress, reporters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def shards_weights(config: ExtendConfig, here: World) -> bool:
    """Whether the processes of a run each hold a share of the weights, and not all of them."""
    return here.size > 1 and config.shard == "weights"


def objective_of(config: ExtendConfig, model: PreTrainedModel, here: World) -> Objective:
    """The loss of a model that is to be trained, with its LoRA updates; of several processes each holds a share, if the
    weights are to be sharded.

    Raises ValueError if it is not what transformers computes.
    """
    model.train()
    model.config.use_cache = False
    if config.quantize != "none":
        if experts.layers_of_experts(model):
            raise ValueError(
                f"quantize='4bit' knows linear matrices, and experts of {model.config.model_type} are none"
            )
        quantized.quantize(model, decoder_layers(model), here.device)
    if config.lora_rank:
        about = (config.lora_rank, config.lora_alpha, config.lora_also, config.seed, config.lora_targets)
        lora.add_lora(model, *about)
    if config.freeze_router:
        experts.freeze_routers(model)
    sharded = shards_weights(config, here)
    loss = Objective(model, autocast=config.autocast and not sharded)
    loss.balance = experts.balance_weight(config, model)
    if loss.balance and config.compile not in ("auto", "none"):
        raise ValueError(f"the experts' loss is not compiled: router_loss={loss.balance:g} compile={config.compile!r}")
    if here.context:
        loss.context = here.context
        share_rows(model, here.context)
        if loss.balance:
            raise ValueError(
                f"the experts' loss is of whole rows: router_loss={loss.balance:g} context_parallel={here.context.size}"
            )
    if not sharded:
        check_forward(loss if here.context else Objective(model, config.autocast), bfloat16=config.autocast)
        return loss
    loss.sharded = True
    if config.optimizer == "lean":
        convert(model, config, torch.device(here.device), sums=False)
    reduce_dtype = torch_dtype(config.reduce_dtype)
    distributed.shard(loss, decoder_layers(model), here, config.autocast, reduce_dtype, config.keep_gathered)
    shares.read_shares(model, here.device)
    check_forward(loss, bfloat16=config.autocast)
    distributed.reshard(loss)
    return loss


#: Share of a batch's tokens with a weight above which the loss of all is taken.
DENSE = 0.97


class Trainer:
    """Model, optimizer and rows of one run; `fit` goes from the current step to the last."""

    def __init__(
        self,
        config: ExtendConfig,
        model: PreTrainedModel,
        rows: Rows | Mixture,
        steps: int,
        log: RunDirectory | None,
        here: World | None = None,
        loss: Objective | None = None,
    ):
        """loss: `objective_of` this model, if it was made already."""
        here = here or World(device=next(model.parameters()).device.type)
        self.config, self.model, self.rows, self.steps, self.log, self.here = config, model, rows, steps, log, here
        self.device = torch.device(here.device)
        self.step = 0
        self.seconds = 0.0
        self.last_loss: float | None = None
        self.stopped = False
        self.saved: int | None = None  # the step of the newest state
        # Writes states beside the steps, one at a time. A trainer's own, since a fork of this process lacks its thread
        self.saver = ThreadPoolExecutor(1)
        self.saving: Future[Path] | None = None  # what is written of it beside the steps
        self.save_seconds: float | None = None  # that the last save held the steps up, until the log has it
        self.copies: dict[str, torch.Tensor] = {}
        self.guard = Guard(config.divergence)
        self.evaluation: Evaluation | None = None
        self.notes: list[str] = []  # on the checkpoint's weights
        self.source: dict[str, Any] = {}  # its identity
        self.method = ""  # of result rows
        self.loss = loss or objective_of(config, model, here)
        self.token_flops = flops_per_token(model, rows.spec.row_tokens)
        self.peak = device_peak(self.device)
        self.has_experts = bool(experts.layers_of_experts(model)) and not config.compile.startswith("graph")
        self.graph = self.step_graph() if config.compile.startswith("graph") else None
        self.optimizer = self.graph.optimizer if self.graph else optimizer_of(config, model, here)
        self.budget = make_fast(model, config, self.device, bool(self.loss.balance))

    def resume(self, state: checkpoint.TrainingState) -> None:
        checkpoint.restore(self.model, self.optimizer, state)
        linears.after_step(self.model)
        self.step = self.saved = state.step
        self.guard = Guard(**(state.about["guard"] | {"limit": self.config.divergence}))
        if self.log:
            for path in (self.log.path / "log.jsonl", self.log.results):
                checkpoint.forget_after(path, self.step)
        self.seconds = float(state.about.get("seconds", 0.0))
        self.last_loss = state.about.get("loss")
        say(f"resumed from step {self.step} of {self.steps}", self.here)

    def save(self, directory: Path, beside: bool = False) -> None:
        """Write a state of this step. beside: the next steps run meanwhile, on copies of its tensors."""
        began = time.perf_counter()
        self.settle()
        about = {
            "config": identity(self.config),
            "checkpoint": self.source,
            "documents": self.rows.sha256,
            "seconds": self.seconds,
            "guard": dict(vars(self.guard)),
            "loss": self.last_loss,
        }
        tensors = checkpoint.collect(self.model, self.optimizer, self.here)
        keep, here = self.config.keep, self.here
        if beside:
            staged = checkpoint.staged(tensors, self.copies)
            work = functools.partial(checkpoint.save_state, group=distributed.apart())
            self.saving = self.saver.submit(work, directory, self.step, staged, about, keep, here)
        else:
            checkpoint.save_state(directory, self.step, tensors, about, keep, here)
        self.saved = self.step
        self.save_seconds = time.perf_counter() - began

    def settle(self) -> None:
        """Wait for a state that is being written; raises what its writing has raised."""
        if (saving := self.saving) is not None:
            self.saving = None
            saving.result()

    @contextlib.contextmanager
    def kept(self, states: Path) -> Iterator[None]:
        """Around what comes after a step: if it fails there is a state of that step, and nothing is lost."""
        try:
            yield
        except (Exception, KeyboardInterrupt):
            self.keep(states)
            raise

    def keep(self, states: Path, beside: bool = False) -> None:
        """Leave a state of this step, if there is none and the output is not whole. Every process must call it."""
        if self.saved != self.step and distributed.from_main(states.parent.exists()):
            self.save(states, beside)
        if not beside:
            self.settle()

    def batch(self, step: int) -> Batch:
        """This process's share of a step's rows: all processes together have rows step * rows + 0, 1, 2 ..."""
        share = self.config.rows // self.here.shares
        return self.rows.batch(step * self.config.rows + self.here.share * share, share)

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
            contextlib.ExitStack() as ending,
        ):
            ending.callback(self.settle)  # whatever ends the steps, a state that was begun is whole
            if self.evaluation and self.evaluates() and not self.evaluated():  # it had failed
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
                        self.settle()
                        raise ValueError(
                            f"training diverged at step {self.step}: {wrong}; {checkpoint.last_good(states)}"
                        )
                    self.seconds = before + time.perf_counter() - started
                if log:
                    now = time.perf_counter()
                    values = self.values(rate, self.last_loss or 0.0, float(norm), self.step - since, now - last)
                    load = self.expert_load(batch) if self.has_experts else {}
                    for number, report in enumerate(reports):  # trackers take numbers alone
                        report(self.step, values if number else values | load)
                    advance(self.step, values)
                    last, since = now, self.step
                paused = time.perf_counter()
                if self.evaluation and self.evaluates():
                    self.evaluate_kept(reports, states)
                if save:
                    self.keep(states, beside=config.async_save and not stopped)
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
        values = {"loss": round(loss, 6), "lr": rate, "grad_norm": round(norm, 5), "tokens_per_s": round(speed, 1)}
        if self.save_seconds is not None:
            values["save_seconds"], self.save_seconds = round(self.save_seconds, 3), None
        if self.peak:
            values["mfu"] = round(speed * self.token_flops / (self.peak * self.here.size), 4)
            values["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return values

    def expert_load(self, batch: Batch) -> dict[str, Any]:
        """Tokens that each expert is sent of the first row of each process, over all layers."""
        ids, positions = (torch.from_numpy(x[:1].copy()).to(self.device) for x in (batch.input_ids, batch.position_ids))
        counts = experts.tokens_an_expert(self.loss, ids, positions)
        return {"expert_tokens": distributed.total(torch.tensor(counts, device=self.device)).tolist()} if counts else {}

    def evaluates(self) -> bool:
        """Whether an evaluation follows this step."""
        every = self.config.eval_every
        return self.step == self.steps or bool(every and self.step and self.step % every == 0)

    def evaluated(self) -> bool:
        """Whether the results have all rows of this step's evaluation; if not, they are left with none of them."""
        assert self.evaluation is not None
        whole = True
        if self.log:
            rows = sound_lines(self.log.results) if self.log.results.is_file() else ()
            keys = ("task", "length", "samples_sha256")
            found = {tuple(map(row.get, keys)) for *_, row in rows if row and row.get("step") == self.step}
            whole = found >= self.evaluation.asked
            if not whole:
                checkpoint.forget_after(self.log.results, self.step - 1)
        return bool(distributed.from_main(whole))

    def evaluate_kept(self, reports: list[Callable[[int, dict[str, float]], None]], states: Path) -> None:
        """`evaluate`, whose failure (long rows take memory) loses no step.

        One of several processes may fail alone, and a state takes all of them: it is saved before the evaluation.
        """
        if self.here.size > 1:
            self.keep(states)
        with self.kept(states) if self.here.size == 1 else contextlib.nullcontext():
            self.evaluate(reports)

    def evaluate(self, reports: list[Callable[[int, dict[str, float]], None]]) -> None:
        """Append a row of results for each task and length of the held-out text."""
        assert self.evaluation is not None
        self.model.eval()
        attention = self.model.config._attn_implementation
        if self.config.attention == "shifted":  # sparse in training only
            self.model.set_attn_implementation(training_attention("sdpa"))
        with attention_backends(self.device):
            found = list(self.evaluation.measure(self.loss, self.here))
        self.model.set_attn_implementation(attention)
        self.model.train()
        distributed.reshard(self.loss)
        if not self.log:
            return
        name = origin.name_of(self.config.model)
        for one in found:
            row = result_row(
                suite="training", model=name, method=self.method, seed=self.config.seed, step=self.step, **vars(one)
            )
            self.log.add([row])
            say(f"step {self.step}: {one.task} at {one.length}: {one.metric} {one.value:.4f}")
        for length, losses in self.evaluation.by_position.items():
            self.log.log(step=self.step, held_out_length=length, by_position=[round(loss, 6) for loss in losses])
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


@dataclass
class Guard:
    """A loss that is not finite, or one far above the best it had.

    limit: nats that the smoothed loss may be above its best; 0 for no limit. smoothed: running mean over about ten
    losses. best: its lowest value so far.
    """

    limit: float
    smoothed: float | None = None
    best: float | None = None

    def check(self, loss: float, norm: float, smooth: bool = True) -> str | None:
        """What is wrong with this loss and gradient norm, or None. smooth: count the loss into the running mean."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss={loss} gradient norm={norm}"
        if not smooth:
            return None
        self.smoothed = loss if self.smoothed is None else 0.9 * self.smoothed + 0.1 * loss
        self.best = self.smoothed if self.best is None else min(self.best, self.smoothed)
        if self.limit and self.smoothed > self.best + self.limit:
            return (
                f"the smoothed loss {self.smoothed:.3f} is over divergence={self.limit} above its best {self.best:.3f}"
            )
        return None
