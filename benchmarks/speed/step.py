"""One measurement: a step of a named shape, its tokens/s, MFU and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.speed.config import METHODS, BenchConfig
from benchmarks.speed.measure import say, speed_rows, timed
from endprompt.shapes import SHAPES, model_config

GIB = 2**30


def measure(config: BenchConfig) -> list[dict[str, Any]]:
    """Result rows of one measurement, in this process. Raises torch.OutOfMemoryError if it does not fit."""
    import torch

    from endprompt.train.progress import device_peak

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(config, device)
    with run.few_layers():
        for _ in range(min(2, config.timed)):
            run.micro_batch()
    if device.type == "cuda":
        if config.warm_layers:  # what few layers did not need is mapped now and not while the time runs
            del run.loss
            torch.empty(int(0.85 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device=device)
        torch.cuda.reset_peak_memory_stats()
    values: dict[str, float] = {}
    held = torch.cuda.memory_allocated() / GIB if device.type == "cuda" else 0.0
    if config.whole_step:
        if run.optimizer is not None:  # its first step allocates and compiles
            run.optimizer_step()
        seconds = run.timed(run.whole_step)
    else:
        micro = statistics.median(run.timed(run.micro_batch) for _ in range(config.timed))
        seconds = config.rows / config.micro_rows * micro
        values["micro_batch_seconds"] = micro
        if run.optimizer is not None:
            run.optimizer_step()
            values["optimizer_seconds"] = run.timed(run.optimizer_step)
            seconds += values["optimizer_seconds"]
    speed = config.rows * config.row_tokens / seconds
    values["tokens_per_s"] = speed
    values["hours_per_1b_tokens"] = 1e9 / speed / 3600
    if device.type == "cuda":
        values["held_gib"] = held
        values["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        if not config.warm_layers:
            values["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if (peak := device_peak(device)) is not None:
            values["mfu_percent"] = 100 * speed * run.flops / peak
    if config.profile:
        values |= run.profile()
    setting = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_A_SETTING}
    return speed_rows(
        values, task=config.name or config.method, length=config.target, model=config.shape, method=config.method,
        what=METHODS[config.method], setting=setting, loss=run.last_loss,
    )  # fmt: skip


#: Micro-batches that a profile looks at.
PROFILED = 2


NOT_A_SETTING = frozenset({"output", "name"})


class Run:
    """Model, optimizer and rows of one measurement."""

    def __init__(self, config: BenchConfig, device: Any):
        import torch

        from endprompt.fast import LeanAdamW, fuse, linears
        from endprompt.model import extended_config, new_model, quantized, training_attention
        from endprompt.model.lora import add_lora
        from endprompt.train.progress import flops_per_token
        from endprompt.train.recompute import memory_budget

        self.config, self.device = config, device
        self.optimizer: Any = None
        self.last_loss: float | None = None
        base = model_config(config.shape)
        base.use_cache = False
        if config.target > base.max_position_embeddings:
            base = extended_config(base, "linear", config.target)
        attention = {"reference": "sdpa", "longlora": training_attention("shifted")}.get(config.method)
        self.model: Any = new_model(
            base,
            seed=0,
            dtype="bfloat16",
            attention=attention or training_attention(config.attention),
            device=str(device),
        )
        self.model.train()
        if config.method == "qlora":
            quantized.quantize(self.model, self.model.model.layers, str(device))
        if lora := config.method in ("longlora", "lora", "qlora"):
            add_lora(self.model, 8, 16, ["embed", "norm"], seed=0)
        self.flops = flops_per_token(self.model, config.row_tokens)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if config.optimizer == "lean":
            self.optimizer = LeanAdamW(trained, lr=2e-5, sums=getattr(torch, config.sums))
            for parameter in trained:  # so that the peak counts them from the start
                self.optimizer.moments(parameter)
        elif config.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=device.type == "cuda")
            for parameter in trained:  # so that gradients and moments are there from the start, as after any step
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        self.decoder: Any = self.model.model
        fused = 0
        if config.method == "reference" or config.recompute == "full":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if lora:
                self.model.enable_input_require_grads()
        if config.optimizer == "lean" and not lora and (config.fused_sums or config.float8 != "none"):
            if config.joint:
                linears.join(self.model)
            linears.convert(self.model, config.float8)
            if config.fused and config.float8 == "none":
                fused = fuse(self.model, keep=config.recompute == "none")
                if not fused:
                    say("fused: no layer can be, they stay as they are")
        if config.compile and config.method not in ("reference", "qlora"):
            import torch._dynamo
            import torch._functorch.config

            if config.recompute == "selective":
                budget = config.memory_budget or memory_budget(config.float8, bool(fused))
                torch._functorch.config.activation_memory_budget = budget
            for layer in self.decoder.layers:
                layer.compile(dynamic=False)
        generator = torch.Generator(device).manual_seed(0)
        shape = (config.micro_rows, config.row_tokens)
        self.ids_BT = torch.randint(SHAPES[config.shape][0], shape, device=device, generator=generator)
        self.positions_BT = torch.from_numpy(self.positions()).to(device).expand(shape).contiguous()
        self.weight = 1.0 / (config.rows * (config.row_tokens - 1))

    @contextlib.contextmanager
    def few_layers(self) -> Iterator[None]:
        """Within it the decoder runs only the first `warm_layers`, if that is set."""
        settings = self.decoder.config
        layers = settings.num_hidden_layers
        settings.num_hidden_layers = min(self.config.warm_layers or layers, layers)
        try:
            yield
        finally:
            settings.num_hidden_layers = layers

    def positions(self) -> Any:
        from endprompt.positions import position_ids

        config = self.config
        if config.method not in ("endprompt", "lora", "qlora"):
            return position_ids("contiguous", config.row_tokens, 0, config.target)
        prompt = min(20, config.row_tokens // 2)
        return position_ids("endprompt", config.row_tokens - prompt, prompt, config.target)

    def micro_batch(self) -> None:
        """Forward and backward of `micro_rows` rows."""
        import torch

        from endprompt.fast.float8 import Float8Matrix
        from endprompt.model.attention import attention_backends
        from endprompt.train.loss import linear_cross_entropy, next_tokens

        if self.config.method == "reference" and self.config.whole_logits:
            loss = self.model(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False).loss
            (loss * (self.config.micro_rows / self.config.rows)).backward()
            self.loss = loss.detach()
            return
        stock = self.config.method == "reference"
        with contextlib.nullcontext() if stock else attention_backends(self.device):
            hidden = self.decoder(input_ids=self.ids_BT, position_ids=self.positions_BT, use_cache=False)[0]
            labels, weights = next_tokens(
                self.ids_BT, hidden.new_full(self.ids_BT.shape, self.weight, dtype=torch.float32)
            )
            head = self.model.get_output_embeddings().weight
            total = getattr(head, "main_grad", None) if self.config.fused_sums and head.requires_grad else None
            rows = hidden.flatten(0, 1)
            head8 = Float8Matrix(head.detach(), self.config.float8 == "fast") if self.config.float8_head else None
            loss = linear_cross_entropy(rows, head, labels, weights, head_sum_VD=total, head8=head8, every_token=True)
            loss.backward()
        self.loss = loss.detach() * (self.config.rows / self.config.micro_rows)

    def optimizer_step(self) -> None:
        from endprompt.fast.linears import after_step
        from endprompt.train.optimizers import clip_gradients

        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # an update without gradients would cost nothing
        after_step(self.model)

    def whole_step(self) -> None:
        for _ in range(self.config.rows // self.config.micro_rows):
            self.micro_batch()
        if self.optimizer is not None:
            self.optimizer_step()

    def timed(self, work: Callable[[], None]) -> float:
        seconds, _ = timed(self.device.type, work)
        self.last_loss = float(self.loss)
        return seconds

    def profile(self) -> dict[str, float]:
        """Milliseconds of a micro-batch by kind of kernel and without any, and of an update; the longest on stderr.

        Two micro-batches in a row are looked at, so that what lies between them counts.
        """
        if self.device.type != "cuda":
            return {}
        kernels, gaps = self.time_line(self.micro_batch, PROFILED)
        times = {"matmul_ms": 0.0, "attention_ms": 0.0, "other_ms": 0.0, "idle_ms": gaps}
        for name, milliseconds in kernels.items():
            times[f"{kind_of_kernel(name)}_ms"] += milliseconds
        if self.optimizer is not None:
            kernels, gaps = self.time_line(self.optimizer_step, 1)
            times |= {"update_ms": sum(kernels.values()), "update_idle_ms": gaps}
        return times

    def time_line(self, work: Callable[[], None], times: int) -> tuple[dict[str, float], float]:
        """(milliseconds by kernel, milliseconds between kernels) of one time in so many; both told on stderr."""
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity

        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(times):
                work()
            torch.cuda.synchronize()
        found = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
        found.sort(key=lambda event: -event.self_device_time_total)
        kernels = {event.key: event.self_device_time_total / times / 1000 for event in found}
        for event in found[:24]:
            print(f"  {kernels[event.key]:9.2f} ms {event.count // times:5d} x {event.key[:110]}", file=sys.stderr)
        gaps = gaps_between(
            [
                (event.time_range.start / 1000, event.time_range.end / 1000, event.name)
                for event in profiler.events()
                if event.device_type == DeviceType.CUDA
            ]
        )
        for length, before, after in gaps[:8]:
            print(f"  {length:9.3f} ms without a kernel, {before[:50]} | {after[:50]}", file=sys.stderr)
        return kernels, sum(length for length, *_ in gaps) / times


def gaps_between(spans: list[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """The gaps of a device's time line, longest first: (length, what ended before it, what began after it).

    spans: (start, end, name) of what ran, in any order, overlapping or not.
    """
    gaps, end, last = [], None, ""
    for start, stop, name in sorted(spans):
        if end is not None and start > end:
            gaps.append((start - end, last, name))
        if end is None or stop > end:
            end, last = stop, name
    return sorted(gaps, reverse=True)


def kind_of_kernel(name: str) -> str:
    name = name.lower()
    if any(part in name for part in ("sdpa", "fmha", "flash", "attention")):
        return "attention"
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "cublas", "xmma", "scaled_mm")):
        return "matmul"
    return "other"
