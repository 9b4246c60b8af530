"""Speed and memory of training steps on random weights of a named shape, as result rows.

    tokens/s = physical tokens of a step / its seconds, optimizer included
    FLOPs of a token = 6 P + 6 A T         (forward 2, backward 4; recomputation is not counted)
        P  parameters that are multiplied: all but the embeddings
        A  query heads x head dim x layers; causal attention multiplies a query by T/2 keys and T/2 values on average
      LongLoRA: 4 P + 6 A T 15/64          (no gradients of frozen matrices, shifted attention; LoRA's own products,
                                            a thousandth, and the trained embeddings' look-up are not counted)
    MFU = tokens/s x FLOPs of a token / dense bfloat16 peak of the device (989.4e12 for H100 and H200, their datasheet),
        also where the products run in float8
    peak memory: the most that torch's allocator held in tensors; held: what it held before the timed micro-batches,
        weights, gradients and moments among it

Speed does not depend on the values of the weights beyond the power they draw, so random ones serve. The measurements of
a suite run in processes of their own: one that runs out of memory ends alone. `--suite h200` is the whole comparison on
one GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "A800": 312e12}
GIB = 2**30

#: Llama shapes: vocabulary, hidden, layers, heads, key/value heads, intermediate, window, RoPE base, tied.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, float, bool]] = {
    "llama3-8b": (128256, 4096, 32, 32, 8, 14336, 8192, 500000.0, False),
    "llama2-7b": (32000, 4096, 32, 32, 32, 11008, 4096, 10000.0, False),
    "mistral-7b": (32768, 4096, 32, 32, 8, 14336, 32768, 1000000.0, False),
    "llama3-1b": (128256, 2048, 16, 32, 8, 8192, 8192, 500000.0, True),
    "small": (1024, 512, 6, 8, 4, 1536, 256, 10000.0, False),
    "tiny": (256, 64, 2, 4, 2, 128, 64, 10000.0, False),
}
METHODS = {
    "endprompt": "short rows with an end prompt of 20 tokens at the end of the target window, linear scaling",
    "full": "rows of the whole target window, linear scaling, activation checkpointing, this trainer's kernels",
    "longlora": "rows of the whole target window, shifted sparse attention, LoRA r 8 on q, k, v, o with trained "
    "embeddings and norms, activation checkpointing, this trainer's kernels",
    "reference": "rows of the whole target window through transformers as it is: stock SDPA, activation checkpointing, "
    "its own loss over all logits (at 65,536 tokens they do not fit: with whole_logits=false this trainer's loss), no "
    "compilation; at the target window this is LCEG's protocol",
}


@dataclass
class BenchConfig:
    """What is measured. A method at its row length is one measurement; a suite is a list of them.

    Args:
        output: directory that gets results.jsonl
        suite: none for one measurement, or h200: the published comparison, on one GPU
        parts: of the suite, only those whose name begins with one of these, separated by semicolons; empty for all
        seconds: the suite starts nothing that its estimate puts beyond this
        tiny: the suite with toy sizes, on any machine: a rehearsal, its numbers mean nothing
        shape: llama3-8b, llama2-7b, mistral-7b, llama3-1b, small or tiny
        method: endprompt, full, longlora or reference
        row_tokens: physical tokens of a row
        target: the extended window
        micro_rows: rows that go through the model at once
        rows: rows of an optimizer step
        attention: as in extend
        optimizer: lean, adamw or none (forward and backward alone)
        sums: dtype of the lean optimizer's gradient sums, float32 or bfloat16
        fused_sums: add weight gradients to the sums inside the matrix products
        joint: one product for q, k and v, and one for gate and up
        fused: with the lean optimizer's converted layers, norms, SwiGLU and rotations in kernels of their own with the
            products around them (see endprompt/fused.py); float8 layers have none
        float8: none, exact or fast (accumulation of the backward products)
        float8_head: with float8, also the logits and the gradient that goes down from them
        recompute: activation checkpointing: none, full, or selective (by memory_budget)
        memory_budget: with selective, the share of the activations that a compiled layer may keep; 0 for what extend
            takes
        whole_logits: the reference's own loss, over all logits at once; if not, this trainer's
        compile: torch.compile each decoder layer
        timed: micro-batches that are timed, after two that are not (one, if only one is timed)
        warm_layers: the micro-batches that are not timed run only so many layers, and memory is mapped at once: long
            rows start sooner; 0 for all layers
        whole_step: time one whole optimizer step instead
        profile: also say where the time of a micro-batch goes, by kind of kernel
        name: the task of the rows
    """

    output: str = "bench"
    suite: str = "none"
    parts: str = ""
    seconds: float = 480.0
    tiny: bool = False
    shape: str = "llama3-8b"
    method: str = "endprompt"
    row_tokens: int = 8192
    target: int = 65536
    micro_rows: int = 2
    rows: int = 64
    attention: str = "sdpa"
    optimizer: str = "lean"
    sums: str = "float32"
    fused_sums: bool = True
    joint: bool = True
    fused: bool = True
    float8: str = "none"
    float8_head: bool = False
    recompute: str = "selective"
    memory_budget: float = 0.0
    whole_logits: bool = True
    compile: bool = True
    timed: int = 3
    warm_layers: int = 0
    whole_step: bool = False
    profile: bool = False
    name: str = ""


def check(config: BenchConfig) -> None:
    """Raises ValueError naming key, value and rule."""
    from endprompt.config import FLOAT8

    choices = {
        "suite": ("none", *SUITES),
        "shape": tuple(SHAPES),
        "method": tuple(METHODS),
        "optimizer": ("lean", "adamw", "none"),
        "sums": ("float32", "bfloat16"),
        "float8": FLOAT8,
        "recompute": ("none", "selective", "full"),
    }
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}: {key}={getattr(config, key)!r}")
    for key in ("row_tokens", "target", "micro_rows", "rows", "timed"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key} must be at least 1: {key}={getattr(config, key)}")
    if not 0 <= config.memory_budget <= 1:
        raise ValueError(f"memory_budget must be in [0, 1]: memory_budget={config.memory_budget}")
    if config.warm_layers < 0:
        raise ValueError(f"warm_layers must not be negative: warm_layers={config.warm_layers}")
    if config.row_tokens > config.target:
        raise ValueError(f"a row must fit into the target: row_tokens={config.row_tokens} target={config.target}")
    if config.rows % config.micro_rows:
        raise ValueError(f"micro_rows must divide rows: micro_rows={config.micro_rows} rows={config.rows}")
    if config.method == "reference" and config.optimizer == "lean" and config.fused_sums:
        raise ValueError("the reference is transformers as it is: set fused_sums=false or optimizer=none")
    if config.float8_head and config.float8 == "none":
        raise ValueError(f"float8_head needs float8: float8_head={config.float8_head} float8={config.float8!r}")
    if config.float8 != "none" and config.optimizer != "lean":
        raise ValueError(f"float8 needs the lean optimizer: optimizer={config.optimizer!r}")


def bench(config: BenchConfig) -> int:
    """Run the measurement or the suite; rows go to results.jsonl, a table to stdout. 1 if a measurement failed."""
    check(config)
    # forked parts start CUDA themselves, so this process must not: NVML answers whether there is a device
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    if config.suite == "none":
        from endprompt.rows import append_rows

        rows = measure(config)
        append_rows(output / "results.jsonl", rows)
        print(table(rows))
        return 0
    suite = Suite(config, output)
    with suite.table_at_the_end():
        SUITES[config.suite](suite)
    return 1 if suite.failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# One measurement


def model_config(shape: str) -> Any:
    """LlamaConfig of a named shape."""
    from transformers import LlamaConfig

    vocabulary, hidden, layers, heads, groups, intermediate, window, base, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=intermediate,
        max_position_embeddings=window,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )


def multiplied_parameters(shape: str) -> int:
    """Parameters that a token is multiplied by: the decoder layers' matrices and the head."""
    vocabulary, hidden, layers, heads, groups, intermediate, *_ = SHAPES[shape]
    head_dim = hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * groups)
    return layers * (attention + 3 * hidden * intermediate) + vocabulary * hidden


def flops_per_token(shape: str, row_tokens: int, method: str = "full") -> float:
    """FLOPs of one token's forward and backward pass in a causal row, as the module's docstring counts them."""
    hidden, layers = SHAPES[shape][1:3]
    products, attention = 6.0 * multiplied_parameters(shape), 6.0 * hidden * layers * row_tokens
    if method == "longlora":
        # half of the heads see T/8 keys on average instead of T/2; those with moved borders 3/4 T/8 + 1/4 T/16
        return products * 4 / 6 + attention * 15 / 64
    return products + attention


def measure(config: BenchConfig) -> list[dict[str, Any]]:
    """Result rows of one measurement, in this process. Raises torch.OutOfMemoryError if it does not fit."""
    import torch

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
        peak = next((value for name, value in PEAKS.items() if name in torch.cuda.get_device_name()), None)
        if peak is not None:
            values["mfu_percent"] = 100 * speed * flops_per_token(config.shape, config.row_tokens, config.method) / peak
    if config.profile:
        values |= run.profile()
    return rows_of(config, values, loss=run.last_loss)


def rows_of(config: BenchConfig, values: dict[str, float], **extra: Any) -> list[dict[str, Any]]:
    from endprompt.rows import environment, result_row

    about = environment()
    setting = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_A_SETTING}
    return [
        result_row(
            suite="training-speed",
            task=config.name or config.method,
            length=config.target,
            metric=metric,
            value=value,
            model=config.shape,
            method=config.method,
            seed=0,
            what=METHODS[config.method],
            setting=setting,
            environment=about,
            **extra,
        )
        for metric, value in values.items()
    ]


#: Micro-batches that a profile looks at.
PROFILED = 2

NOT_A_SETTING = frozenset({"output", "suite", "parts", "seconds", "tiny", "name"})


class Run:
    """Model, optimizer and rows of one measurement."""

    def __init__(self, config: BenchConfig, device: Any):
        import torch

        from endprompt import linears
        from endprompt.fused import fuse
        from endprompt.model import extended_config, new_model, training_attention
        from endprompt.optim import LeanAdamW
        from endprompt.recompute import memory_budget

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
        if config.method == "longlora":
            self.model = with_lora(self.model)
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
        self.decoder: Any = self.model.get_base_model().model if config.method == "longlora" else self.model.model
        fused = 0
        if config.method == "reference" or config.recompute == "full":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if config.method == "longlora":
                self.model.enable_input_require_grads()
        if (
            config.optimizer == "lean"
            and config.method != "longlora"
            and (config.fused_sums or config.float8 != "none")
        ):
            if config.joint:
                linears.join(self.model)
            linears.convert(self.model, config.float8)
            if config.fused and config.float8 == "none":
                fused = fuse(self.model, keep=config.recompute == "none")
                if not fused:
                    say("fused: no layer can be, they stay as they are")
        if config.compile and config.method != "reference":
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
        if config.method != "endprompt":
            return position_ids("contiguous", config.row_tokens, 0, config.target)
        prompt = min(20, config.row_tokens // 2)
        return position_ids("endprompt", config.row_tokens - prompt, prompt, config.target)

    def micro_batch(self) -> None:
        """Forward and backward of `micro_rows` rows."""
        import torch

        from endprompt.float8 import Float8Matrix
        from endprompt.loss import linear_cross_entropy, next_tokens
        from endprompt.train import attention_backends

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
        from endprompt.linears import after_step
        from endprompt.optim import clip_gradients

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
        import torch

        wait = torch.cuda.synchronize if self.device.type == "cuda" else (lambda: None)
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds = time.perf_counter() - started
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


def with_lora(model: Any) -> Any:
    """LongLoRA's trained parts: LoRA r 8, alpha 16 on q, k, v, o; embeddings and norms whole."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "norm" in name:
            parameter.requires_grad_(True)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Loss curves: does a leaner step still learn?

ARMS = {
    "exact": "float32 weights and AdamW of torch, products in bfloat16",
    "lean": "bfloat16 weights, stochastic rounding, one-byte moments, float32 gradient sums",
    "lean-float8-exact": "the same with float8 layers, backward products accumulated in float32",
    "lean-float8-fast": "the same with float8 layers, fast accumulation everywhere",
    "lean-float8-fast-head": "the same, logits and their gradient to the layers in float8 too",
    "nearest": "bfloat16 weights and AdamW of torch: what stochastic rounding is for",
}


def learning_rows(rows: int, tokens: int, vocabulary: int, seed: int) -> Any:
    """Rows that can be learnt, int64 [rows, tokens]: a walk with 4 ways on from a token, then its copy."""
    import numpy as np

    ways = np.random.default_rng(0).integers(0, vocabulary, (vocabulary, 4))
    rng = np.random.default_rng([1, seed])
    half = tokens // 2
    out = np.empty((rows, tokens), np.int64)
    out[:, 0] = rng.integers(0, vocabulary, rows)
    for t in range(1, half):
        out[:, t] = ways[out[:, t - 1], rng.integers(0, 4, rows)]
    out[:, half : 2 * half] = out[:, :half]
    return out


def loss_curve(
    arm: str, steps: int, rows: int, lr: float, shape: str = "small", compile: bool = False
) -> list[dict[str, Any]]:
    """Train a small model from scratch; one row a tenth step. The same weights and the same data for every arm."""
    import torch

    from endprompt import linears
    from endprompt.float8 import Float8Matrix
    from endprompt.loss import linear_cross_entropy
    from endprompt.model import new_model, training_attention
    from endprompt.optim import clip_gradients, make_optimizer
    from endprompt.rows import environment, result_row

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(shape)
    config.use_cache = False
    model = new_model(config, seed=0, dtype="float32", attention=training_attention("sdpa"), device=str(device)).train()
    exact, lean = arm == "exact", arm.startswith("lean")
    if not exact:
        model.to(torch.bfloat16)
    optimizer = make_optimizer("lean" if lean else "adamw", model, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    float8 = arm.split("-")[2] if "float8" in arm else "none"
    if lean:
        linears.convert(model, float8)
    if compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    tokens, warmup, curve = config.max_position_embeddings, 20, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * min(1.0, (steps - step) / (0.3 * steps))
        ids = torch.from_numpy(learning_rows(rows, tokens, config.vocab_size, step)).to(device)
        labels = ids[:, 1:].reshape(-1)
        weights = torch.full(labels.shape, 1 / labels.numel(), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=exact):
            hidden = model.model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
            head = model.lm_head.weight
            head8 = Float8Matrix(head.detach(), float8 == "fast") if arm.endswith("head") else None
            loss = linear_cross_entropy(hidden, head, labels, weights, head8=head8)
        loss.backward()
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        linears.after_step(model)
        if step % 10 == 9 or step == 0:
            curve.append((step + 1, loss.detach()))
    about = environment()
    return [
        result_row(
            suite="training-loss",
            task="copy",
            length=tokens,
            metric="loss",
            value=float(value),
            model=shape,
            method=arm,
            seed=0,
            step=step,
            what=ARMS[arm],
            setting={"steps": steps, "rows": rows, "lr": lr, "compile": compile},
            environment=about,
        )
        for step, value in curve
    ]


def sum_errors(micro_batches: int, shape: str = "small") -> list[dict[str, Any]]:
    """Relative error of the gradient summed over micro-batches in float32 and in bfloat16, against float64 sums."""
    import torch

    from endprompt.loss import linear_cross_entropy
    from endprompt.model import new_model, training_attention
    from endprompt.rows import environment, result_row

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(shape)
    config.use_cache = False
    model = new_model(
        config, seed=0, dtype="bfloat16", attention=training_attention("sdpa"), device=str(device)
    ).train()
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    sums = {dtype: [torch.zeros_like(weight, dtype=dtype) for weight in weights] for dtype in dtypes}
    for index in range(micro_batches):
        ids = torch.from_numpy(learning_rows(8, config.max_position_embeddings, config.vocab_size, index)).to(device)
        labels = ids[:, 1:].reshape(-1)
        each = torch.full(labels.shape, 1 / labels.numel(), device=device)
        hidden = model.model(input_ids=ids, use_cache=False)[0]
        linear_cross_entropy(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, labels, each).backward()
        for totals in sums.values():
            for total, weight in zip(totals, weights):
                total.add_(weight.grad)
        model.zero_grad(set_to_none=True)
    rows = []
    for dtype in dtypes[1:]:
        pairs = list(zip(sums[dtype], sums[torch.float64]))
        error = sum(float((a.double() - b).square().sum()) for a, b in pairs) ** 0.5
        norm = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
        rows.append(
            result_row(
                suite="training-loss",
                task="gradient-sum",
                metric="relative_error_percent",
                value=100 * error / norm,
                n=micro_batches,
                model=shape,
                method=str(dtype).removeprefix("torch."),
                seed=0,
                environment=environment(),
            )
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Ceilings: what the device gives for the products of one layer


def rate(flops: float, work: Callable[[], Any], seconds: float = 0.15) -> float:
    """Sustained TFLOP/s of `work`, which takes `flops`."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(2):
        work()
    wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(4):
            work()
        wait()
        count += 4
    return count * flops / (time.perf_counter() - started) / 1e12


def backend_errors(shape: str, layers: int, tokens: int) -> list[dict[str, Any]]:
    """Relative error, in percent, of logits and gradients at jumped positions against the eager attention's.

    1 and 2 rows of `tokens`, the last 20 of them at the end of a window 8 times as long; the shape with fewer layers.
    """
    import torch

    from endprompt.loss import linear_cross_entropy
    from endprompt.model import new_model, training_attention
    from endprompt.rows import environment, result_row

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(shape)
    config.use_cache, config.num_hidden_layers = False, layers
    names = backends(device)
    positions = torch.cat([torch.arange(tokens - 20), torch.arange(8 * tokens - 20, 8 * tokens)]).to(device)
    generator = torch.Generator(device).manual_seed(0)
    errors: list[dict[str, Any]] = []
    model = new_model(config, seed=0, dtype="bfloat16", attention=training_attention("eager"), device=str(device))
    for batch in (1, 2):
        ids = torch.randint(config.vocab_size, (batch, tokens), device=device, generator=generator)
        labels = ids[:, 1:].reshape(-1)
        each = torch.full(labels.shape, 1 / labels.numel(), device=device)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name in ("eager", *names):
            try:
                model.set_attn_implementation(training_attention(name))
                hidden = model.model(input_ids=ids, position_ids=positions.expand(batch, -1), use_cache=False)[0]
                linear_cross_entropy(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, labels, each).backward()
                gradient = model.model.layers[0].self_attn.q_proj.weight.grad
                assert gradient is not None
                with torch.no_grad():
                    found[name] = {"logits": model.lm_head(hidden).float(), "gradient": gradient.float().clone()}
            except Exception as error:  # a package's kernel may not run here: the others still count
                say(f"attention {name}, {batch} rows: {error!r}")
            model.zero_grad(set_to_none=True)
        for name in found.keys() - {"eager"}:
            for what, value in found[name].items():
                expected = found["eager"][what]
                errors.append(
                    result_row(
                        suite="attention-backends",
                        task=what,
                        length=tokens,
                        metric="relative_error_percent",
                        value=100 * float((value - expected).norm() / expected.norm()),
                        n=batch,
                        model=shape,
                        method=name,
                        seed=0,
                        setting={"layers": layers, "rows": batch, "end_prompt": 20, "window": 8 * tokens},
                        environment=environment(),
                    )
                )
                say(f"{what}, {name}, {batch} rows: {errors[-1]['value']:.3f} % from eager")
    return errors


def backends(device: Any) -> list[str]:
    """The causal-only attentions that can be tried here, beside eager."""
    from endprompt.model import FLASH_PACKAGES

    if device.type == "cpu":
        return ["sdpa"]
    return ["sdpa", "cudnn", "flex", *(name for name in FLASH_PACKAGES if installed(name))]


def ceilings(shape: str, tokens: int) -> list[dict[str, Any]]:
    """Sustained TFLOP/s of each matrix product of a layer, on random data."""
    import torch

    from endprompt.loss import add_product

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, _, heads, groups, intermediate, *_ = SHAPES[shape][1:]
    head_dim = hidden // heads
    wide = hidden + 2 * groups * head_dim
    sizes = {
        "q, o": (hidden, hidden),
        "k, v": (groups * head_dim, hidden),
        "q+k+v in one": (wide, hidden),
        "gate, up": (intermediate, hidden),
        "gate+up in one": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    new: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    rates: dict[str, float] = {}

    for name, (out, inside) in sizes.items():
        x, w, g = (torch.randn(size, **new) for size in ((tokens, inside), (out, inside), (tokens, out)))
        total = torch.zeros(out, inside, device=device)
        flops = 2.0 * tokens * out * inside
        rates[f"{name}: output"] = rate(flops, partial(torch.matmul, x, w.t()))
        rates[f"{name}: input gradient"] = rate(flops, partial(torch.matmul, g, w))
        rates[f"{name}: weight gradient"] = rate(flops, partial(torch.matmul, g.t(), x))
        rates[f"{name}: weight gradient, added in float32"] = rate(flops, partial(add_product, total, g, x))
        if device.type == "cuda":
            rates |= float8_rates(name, x, w, g, flops)
    return rate_rows(rates, shape, tokens)


def attention_rates(shape: str, tokens: int, rows: int = 2) -> list[dict[str, Any]]:
    """TFLOP/s of the attention kernels that are there, on causal rows; the backward pass counts 2.5 times."""
    import torch

    from endprompt.model import ATTENTIONS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, _, heads, groups, *_ = SHAPES[shape][1:]

    def random(count: int) -> torch.Tensor:
        """[rows, count, tokens, head dim] in memory as projections give it: the heads of a token side by side."""
        whole = torch.randn(rows, tokens, count, hidden // heads, device=device, dtype=torch.bfloat16)
        return whole.transpose(1, 2).requires_grad_()

    query, key, value, grad = (random(count) for count in (heads, groups, groups, heads))
    parts = (query, key, value)
    causal = 2.0 * rows * tokens * tokens * hidden
    rates: dict[str, float] = {}
    for name in backends(device):
        if name == "flex" and device.type == "cuda":
            continue  # without torch.compile it makes all logits at once

        def forward(name: str = name) -> Any:
            return ATTENTIONS[name](torch.nn.Module(), query, key, value)[0]

        try:
            rates[f"attention {name}: forward"] = rate(causal, forward)
            rates[f"attention {name}: forward and backward"] = rate(
                3.5 * causal, lambda: torch.autograd.grad(forward(), parts, grad.detach().transpose(1, 2))
            )
        except Exception as error:  # a package's kernel may not run here: the others still count
            say(f"attention {name}: {error!r}")
    return rate_rows(rates, shape, tokens)


def installed(attention: str) -> bool:
    """Whether the package of a flash attention is there; it is not imported."""
    import importlib.util

    from endprompt.model import FLASH_PACKAGES

    try:
        spec = importlib.util.find_spec(FLASH_PACKAGES[attention][0])
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None  # flash-attn-4 alone leaves `flash_attn` an empty namespace


def rate_rows(rates: dict[str, float], shape: str, tokens: int) -> list[dict[str, Any]]:
    from endprompt.rows import environment, result_row

    about = environment()
    return [
        result_row(
            suite="training-speed",
            task=name,
            length=tokens,
            metric="tflop_per_s",
            value=value,
            model=shape,
            method="ceiling",
            seed=0,
            environment=about,
        )
        for name, value in rates.items()
    ]


def float8_rates(name: str, x: Any, w: Any, g: Any, flops: float) -> dict[str, float]:
    from endprompt.float8 import ACTIVATION, GRADIENT, scaled_product, to_float8

    (x8, sx), (w8, sw), (g8, sg) = to_float8(x, ACTIVATION), to_float8(w, ACTIVATION), to_float8(g, GRADIENT)
    w8t, g8t, x8t = w8.t().contiguous(), g8.t().contiguous(), x8.t().contiguous()
    rates = {f"{name}: output, float8": rate(flops, lambda: scaled_product(x8, w8.t(), sx, sw, x.dtype, True))}
    for fast in (False, True):
        how = "fast" if fast else "exact"
        rates[f"{name}: input gradient, float8 {how}"] = rate(
            flops, partial(scaled_product, g8, w8t.t(), sg, sw, x.dtype, fast)
        )
        rates[f"{name}: weight gradient, float8 {how}"] = rate(
            flops, partial(scaled_product, g8t, x8t.t(), sg, sx, x.dtype, fast)
        )
    return rates


# ---------------------------------------------------------------------------------------------------------------------
# Suites


class Suite:
    """Runs parts one after another, each in a process of its own, until the time is up."""

    def __init__(self, config: BenchConfig, output: Path):
        self.config, self.output = config, output
        self.results = output / "results.jsonl"
        self.started = time.monotonic()
        self.failed: list[str] = []
        self.can_fork: bool | None = None

    def left(self) -> float:
        return self.config.seconds - (time.monotonic() - self.started)

    def measure(self, name: str, seconds: float, **changes: Any) -> dict[str, float]:
        """One measurement of at most `seconds`; its values by metric, empty if it failed or there was no time."""
        config = dataclasses.replace(self.config, suite="none", name=name, **changes)
        if self.config.tiny:
            config = toy(config)
        check(config)
        rows = self.part(name, seconds, "measure", dataclasses.asdict(config))
        return {row["metric"]: row["value"] for row in rows}

    def part(self, name: str, seconds: float, function: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Run one of PARTS in a process of its own and append its rows to the results."""
        wanted = [prefix.strip() for prefix in self.config.parts.split(";") if prefix.strip()]
        if wanted and not any(name.startswith(prefix) for prefix in wanted):
            return []
        if self.left() < seconds * 0.6:
            say(f"[{self.clock()}] {name}: left out, {self.left():.0f} s left of {self.config.seconds:.0f}")
            self.failed.append(name)
            return []
        say(f"[{self.clock()}] {name} ...")
        began = time.monotonic()
        aside = self.output / "part.jsonl"
        aside.unlink(missing_ok=True)
        code = in_process(function, arguments, aside, min(seconds * 2, self.left() + 20), self.forks())
        rows = []
        if aside.exists():
            rows = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
            aside.unlink()
        with open(self.results, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        values = {row["metric"]: row["value"] for row in rows}
        shown = "  ".join(f"{metric} {value:,.4g}" for metric, value in values.items() if len(rows) < 12)
        say(f"[{self.clock()}] {name}: {shown or f'{len(rows)} rows'}  ({time.monotonic() - began:.0f} s, code {code})")
        if code != 0:
            self.failed.append(name)
        return rows

    def forks(self) -> bool:
        """Whether a forked process can use the device; tried once."""
        if self.can_fork is None:
            self.can_fork = in_process("touch_device", {}, self.output / "touch.jsonl", 60, True) == 0
            (self.output / "touch.jsonl").unlink(missing_ok=True)
            if not self.can_fork:
                say("forked processes cannot use the device here; every part imports for itself")
        return self.can_fork

    def clock(self) -> str:
        return f"{time.monotonic() - self.started:5.0f} s"

    @contextlib.contextmanager
    def table_at_the_end(self) -> Iterator[None]:
        import transformers.models.llama.modeling_llama

        import endprompt.train  # noqa: F401  imported here so that every forked part has them

        assert transformers.models.llama.modeling_llama
        try:
            yield
        finally:
            if self.results.exists():
                lines = self.results.read_text(encoding="utf-8").splitlines()
                print(table([json.loads(line) for line in lines]), flush=True)
            if self.failed:
                print(f"failed or left out: {', '.join(self.failed)}", flush=True)


def in_process(function: str, arguments: dict[str, Any], aside: Path, limit: float, fork: bool) -> int:
    """Exit code of a child that writes the rows of a part to `aside`; it is killed after `limit` seconds.

    A forked child inherits the imports, which saves ten seconds; it needs a parent that has not touched CUDA.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            if not fork:
                task = json.dumps({"function": function, "arguments": arguments, "aside": str(aside)})
                os.execv(sys.executable, [sys.executable, "-m", "endprompt.bench", "--part", task])
            run_part(function, arguments, aside)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    until = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, 9)
            os.waitpid(child, 0)
            return -9
        time.sleep(0.1)


def run_part(function: str, arguments: dict[str, Any], aside: Path) -> None:
    rows = PARTS[function](**arguments)
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def touch_device() -> list[dict[str, Any]]:
    """No rows; an error if this process cannot use the device that torch sees."""
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    return []


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "measure": lambda **fields: measure(BenchConfig(**fields)),
    "loss_curve": loss_curve,
    "sum_errors": sum_errors,
    "ceilings": ceilings,
    "attention_rates": attention_rates,
    "backend_errors": backend_errors,
    "touch_device": touch_device,
}


def toy(config: BenchConfig) -> BenchConfig:
    """The same measurement with sizes for a rehearsal; a kernel that needs a GPU is replaced."""
    shorter = max(32, config.row_tokens // 256)
    longer = max(128, config.target // 256)
    attention = "eager" if "flash" in config.attention else config.attention
    sizes: dict[str, Any] = {"row_tokens": shorter, "target": longer, "rows": 4, "micro_rows": 2, "timed": 1}
    return dataclasses.replace(config, shape="tiny", attention=attention, **sizes)


def h200(suite: Suite) -> None:
    """The comparison on one GPU of 141 GB, the most wanted first: what does not fit into the time is left out.

    The attention kernels; whole steps with the faster one, in bfloat16 and float8; full length with it, and both with
    cuDNN's; the reference; full length in float8; does a lean step learn; LongLoRA and the shorter window of the
    paper's Figure 4; the device's ceilings.
    """
    tiny = suite.config.tiny
    learner, layer = ("tiny", {"shape": "tiny"}) if tiny else ("small", {"shape": "llama3-8b"})
    rates = suite.part("kernels", 40, "attention_rates", {**layer, "tokens": 64 if tiny else 8192})
    suite.part("logits", 40, "backend_errors", {**layer, "layers": 2, "tokens": 64 if tiny else 1024})

    best = {"attention": faster_attention(rates, suite.config.attention)}
    sdpa = {"attention": "sdpa"}
    plain: dict[str, Any] = {"recompute": "none"}
    float8: dict[str, Any] = {"joint": False, "float8": "fast"}
    long: dict[str, Any] = {"micro_rows": 1, "timed": 1, "warm_layers": 2, "recompute": "full"}
    reference = {"method": "reference", "optimizer": "adamw", "fused_sums": False, "micro_rows": 1, "recompute": "full"}
    longlora = long | {"method": "longlora", "fused_sums": False}
    lceg = long | reference | {"whole_logits": False}
    at_64k = {"row_tokens": 65536, "target": 65536, "rows": 8}
    at_32k = {"row_tokens": 32768, "target": 32768, "rows": 16}

    suite.measure("endprompt, whole step", 65, whole_step=True, profile=True, **plain, **best)
    suite.measure("float8, whole step", 60, whole_step=True, profile=True, **float8, **best)
    suite.measure(
        "float8 with the head, whole step", 60, whole_step=True, profile=True, float8_head=True, **float8, **best
    )
    suite.measure("endprompt, sdpa", 35, profile=True, **plain, **sdpa)
    suite.measure("full, 65,536", 40, method="full", **at_64k, **long, **best)
    if best != sdpa:
        suite.measure("full, 65,536, sdpa", 35, method="full", **at_64k, **long, **sdpa)
    suite.measure("LCEG, 65,536", 35, **at_64k, **lceg)
    suite.measure("reference, short rows, with its update", 20, target=8192, **reference)
    suite.measure("full, 65,536, float8", 40, method="full", **at_64k, **(long | float8), **best)
    for arm in ("lean", "lean-float8-exact", "lean-float8-fast", "lean-float8-fast-head", "exact", "nearest"):
        learn = {"steps": 20 if tiny else 400, "rows": 4 if tiny else 64, "lr": 1e-3, "shape": learner, "compile": True}
        suite.part(f"loss, {arm}", 40, "loss_curve", {"arm": arm, **learn})
    suite.measure("longlora, 65,536", 40, **at_64k, **longlora)
    suite.measure("full, 32,768", 25, method="full", **at_32k, **long, **best)
    suite.measure("longlora, 32,768", 25, **at_32k, **longlora)
    suite.measure("LCEG, 32,768", 25, **at_32k, **lceg)
    suite.measure("short rows, target 32,768", 35, target=32768, **plain, **best)
    suite.part("gradient sums", 15, "sum_errors", {"micro_batches": 8 if tiny else 32, "shape": learner})
    suite.part("ceilings", 25, "ceilings", {**layer, "tokens": 64 if tiny else 16384})


def faster_attention(rates: list[dict[str, Any]], otherwise: str) -> str:
    """The attention with the highest rate forward and backward: a flash one by its name, sdpa for cuDNN's.

    rates: rows of `attention_rates`; without them, `otherwise`.
    """
    whole = {row["task"]: row["value"] for row in rates if row["task"].endswith(": forward and backward")}
    if not whole:
        return otherwise
    name = max(whole, key=lambda task: whole[task]).removeprefix("attention ").partition(":")[0]
    return name if name.startswith("flash") else "sdpa"


SUITES: dict[str, Callable[[Suite], None]] = {"h200": h200}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a measurement: tokens/s, hours per 1B tokens, MFU, peak memory, where the time goes."""
    by_task: dict[tuple[str, Any], dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "training-speed":
            by_task.setdefault((row["task"], row["length"]), {})[row["metric"]] = row["value"]
    columns = {
        "tokens_per_s": "tokens/s",
        "hours_per_1b_tokens": "h/1B",
        "mfu_percent": "MFU %",
        "peak_gib": "GiB",
        "micro_batch_seconds": "micro s",
        "optimizer_seconds": "optim s",
        "matmul_ms": "matmul ms",
        "attention_ms": "attn ms",
        "other_ms": "other ms",
        "idle_ms": "idle ms",
        "update_ms": "update ms",
        "tflop_per_s": "TFLOP/s",
    }
    used = [key for key in columns if any(key in values for values in by_task.values())]
    lines = [f"{'measurement':<52}" + "".join(f"{columns[key]:>11}" for key in used)]
    for (task, _), values in by_task.items():
        cells = [f"{values[key]:>11,.4g}" if key in values else f"{'':>11}" for key in used]
        lines.append(f"{task:<52}" + "".join(cells))
    curves = [row for row in rows if row["suite"] == "training-loss"]
    for method in dict.fromkeys(row["method"] for row in curves if row["metric"] == "loss"):
        points = [row for row in curves if row["method"] == method]
        shown = points[:: max(1, len(points) // 6)][:-1] + points[-1:]
        lines.append(f"loss, {method:<20}" + "  ".join(f"{row['step']}: {row['value']:.4f}" for row in shown))
    for row in curves:
        if row["metric"] != "loss":
            lines.append(f"gradient summed in {row['method']}, {row['n']} micro-batches: {row['value']:.4f} % error")
    return "\n".join(lines)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """`python -m endprompt.bench JSON`, the configuration as JSON: for machines without the command's own packages."""
    if argv[:1] == ["--part"]:
        task = json.loads(argv[1])
        run_part(task["function"], task["arguments"], Path(task["aside"]))
        return 0
    return bench(BenchConfig(**json.loads(argv[0])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
