"""CUDA graphs: work of fixed shapes is recorded once and replayed, so small models are not bound by kernel launches."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from endprompt.model import length_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from endprompt.config import ExtendConfig
    from endprompt.distributed import World


class Replayed:
    """A function without arguments or result that works on tensors in place; on CUDA its later calls are replays.

    Its first two calls run as written, on a stream of their own (libraries and torch.compile set themselves up there),
    the third records the work and replays it, as all later ones do; on a CPU every call runs as written. A recording
    holds addresses and shapes of tensors, and the values of Python numbers. Raises ValueError if the work cannot be
    recorded: it waits for the device, or its shapes depend on data.
    """

    WARM = 2

    def __init__(self, work: Callable[[], object], device: torch.device, warm: int = WARM):
        self.work, self.device, self.warm = work, device, warm
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.recording: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.stream is None:
            self.work()
            return
        if self.recording is None and self.warm > 0:
            self.warm -= 1
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.work()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return
        if self.recording is None:
            recording = torch.cuda.CUDAGraph()
            try:
                # other threads prepare batches meanwhile: their calls are none of this recording's business
                with torch.cuda.graph(recording, stream=self.stream, capture_error_mode="thread_local"):
                    self.work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"this work cannot be recorded as a CUDA graph: {reason}") from error
            self.recording = recording
        self.recording.replay()


KEPT = 3  # graphs that a process keeps for runs of the same shapes
DEVICES = ("cuda",)
_kept: dict[Hashable, StepGraph] = {}


class StepGraph:
    """One whole training step: forward, backward, clipping and update, on buffers that each batch is copied into. work:
    (ids, positions, weights) -> (loss, norm), which also updates the parameters by the optimizer, whose rate is a
    tensor. Its first steps are real ones, made as written, so recording changes no weight.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        work: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        shape: tuple[int, int],
        device: torch.device,
    ):
        self.model, self.optimizer, self.work = model, optimizer, work
        self.ids_BT = torch.zeros(shape, dtype=torch.long, device=device)
        self.positions_BT = torch.zeros(shape, dtype=torch.long, device=device)
        self.weights_BT = torch.zeros(shape, dtype=torch.float32, device=device)
        self.outcome_2 = torch.zeros(2, device=device)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.run = Replayed(self._work, device)

    def _work(self) -> None:
        self.outcome_2.copy_(torch.stack(self.work(self.ids_BT, self.positions_BT, self.weights_BT)))

    def step(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, weights_BT: np.ndarray, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, gradient norm before clipping) of a step. Raises ValueError for a batch of another shape."""
        if ids_BT.shape != self.ids_BT.shape:
            raise ValueError(
                f"a recorded step takes batches of one shape: {ids_BT.shape} after {tuple(self.ids_BT.shape)}"
            )
        parts = (self.ids_BT, ids_BT), (self.positions_BT, positions_BT), (self.weights_BT, weights_BT)
        for buffer, values in parts:
            buffer.copy_(torch.from_numpy(values.copy()), non_blocking=True)
        for tensor in self.rates:
            tensor.fill_(rate)
        self.run()
        loss, norm = self.outcome_2.clone()
        return loss, norm

    @property
    def recorded(self) -> bool:
        return self.run.recording is not None

    @torch.no_grad()
    def take(self, model: torch.nn.Module) -> None:
        """Start from another model's weights and buffers, moved into this graph's memory; the optimizer forgets."""
        theirs = {name: tensor for name, tensor in named_tensors(model)}
        ours = dict(named_tensors(self.model))
        for name, tensor in theirs.items():
            ours[name].copy_(tensor)
        modules = dict(model.named_modules())
        for name in theirs:
            owner, _, leaf = name.rpartition(".")
            module = modules[owner]
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = ours[name]
        self.model = model
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()


def named_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers by every name that they have: tied ones more than once."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def shared_graph(key: Hashable, model: torch.nn.Module, make: Callable[[], StepGraph]) -> StepGraph:
    """The graph that an earlier run of this process recorded under the key, with the model's weights; else a new one.
    The earlier run's model holds the same memory, so it must not be used any more.
    """
    found = _kept.pop(key, None)
    if found is not None and found.recorded:
        found.take(model)
    else:
        found = make()
    _kept[key] = found
    while len(_kept) > KEPT:
        del _kept[next(iter(_kept))]
    return found


def recorded_values(config: ExtendConfig, model: PreTrainedModel, shape: tuple[int, int]) -> Hashable:
    """Everything that is fixed by a recording of a training step; weights, frequencies, rate and batch are not. The
    frequencies are a buffer, but YaRN's factor on cos and sin is a Python number.
    """
    architecture: dict[str, Any] = model.config.to_dict()
    for free in ("rope_parameters", "max_position_embeddings", "_name_or_path", "transformers_version", "use_cache"):
        architecture.pop(free, None)
    scales = [one for m in model.modules() for one in sorted(vars(m).items()) if one[0].endswith("attention_scaling")]
    trained = ("beta1", "beta2", "weight_decay", "clip", "autocast", "dtype", "attention", "compile", "micro_rows")
    lora = (config.lora_rank, config.lora_alpha, config.lora_targets, *config.lora_also) if config.lora_rank else None
    tensors = [(name, str(t.device), t.dtype, tuple(t.shape), t.requires_grad) for name, t in named_tensors(model)]
    return (
        json.dumps(architecture, sort_keys=True, default=str),
        type(model).__name__,
        tuple(scales),
        tuple(getattr(config, name) for name in trained),
        lora,
        shape,
        tuple(tensors),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def check_device(config: ExtendConfig, model: PreTrainedModel, here: World) -> None:
    """Raises ValueError for several processes, another device than CUDA, dropout, or frequencies chosen by length."""
    needs = f"compile={config.compile!r} needs"
    device = torch.device(here.device).type
    if here.size > 1:
        raise ValueError(f"{needs} a single process: {here.size} processes")
    if device not in DEVICES:
        raise ValueError(f"{needs} a CUDA device: device={device!r}")
    settings = model.config.to_dict()
    dropout = {key: value for key, value in settings.items() if key.endswith(("dropout", "pdrop")) and value}
    if dropout:
        raise ValueError(f"{needs} a model without dropout: {dropout}")
    if length_rope.rows_alone(model):
        parameters = getattr(model.config, "rope_parameters", None)
        raise ValueError(f"{needs} frequencies that do not depend on the length: rope_parameters={parameters}")
