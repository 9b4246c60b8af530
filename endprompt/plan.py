"""What a run needs before it is started: memory by part, tokens/s, GPU-hours, and which settings fit.

A model of the step, not a measurement; its rates are what one H200 gave for Llama-3-8B's shape. Per token, with
P multiplied parameters, L layers, hidden size h, key/value width k, intermediate size i, and rows of T tokens:

    matrix products   6 P FLOPs; 2 more for each decoder parameter with full recomputation; 4 P with LoRA
    attention         2 T h L FLOPs forward (causal), 2.5 times that backward; a quarter with shifted sparse attention;
                      at a rate that grows with T, as less of it is on the diagonal: rate T / (T + diagonal)
    the rest          memory traffic: 31 numbers of width h and 9 of width i a layer, forward and backward
    activations       selective: 4 h + 2 k + 2 i numbers a layer (norms and SwiGLU's product are made again);
                      none: 2 h + i more, i more where layers are fused; full: h a layer, and one layer whole;
                      none and selective in float8, where the compiler makes norms and SwiGLU's product again by
                      itself: 3 h + i of one byte (what the products read) and h + 2 k + 2 i of two

Several GPUs: weights, sums and moments are sharded (FSDP2), each GPU has its rows and the layers that are gathered at
once, and 7% are taken off for what communication does not hide (assumptions until they are measured).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """bfloat16 matrix rate in FLOP/s as sustained in training, memory traffic in bytes/s, usable memory in GiB.

    The float8 rate has in it the conversions to float8. Only the H200's rates are measured (docs/speed.md); the float8
    rate of an H100 is scaled from it.
    """

    matmul: float
    float8: float
    traffic: float
    memory: float


DEVICES = {
    "H200": Device(708e12, 1100e12, 4.3e12, 137.0),
    "H100": Device(680e12, 1057e12, 3.0e12, 77.0),
    "A100": Device(240e12, 240e12, 1.7e12, 77.0),
}
METHODS = ("endprompt", "full", "longlora")


@dataclass(frozen=True)
class Attention:
    """An H200's rates in FLOP/s at endless rows, forward and backward, and the tokens that the diagonal costs.

    Measured in training steps of 8,192 and 65,536 tokens a row (docs/speed.md); elsewhere they go with the products'.
    """

    forward: float
    backward: float
    diagonal: float


ATTENTIONS = {
    "sdpa": Attention(625e12, 494e12, 1311),
    "flash_attention_4": Attention(682e12, 587e12, 1400),
}


@dataclass
class PlanConfig:
    """The run to plan.

    Args:
        model: a checkpoint directory, or a shape's name as in bench
        method: endprompt (short rows), full (rows of the whole target) or longlora
        target: the extended window
        row_tokens: physical tokens of a row; default the model's window for endprompt, else the target
        gpus: how many, of one kind
        device: H200, H100 or A100
        tokens: training tokens of the run
        rows: rows of one step
        attention: sdpa (cuDNN's) or flash_attention_4; longlora takes sdpa
        optimizer: lean or adamw (float32 masters)
        fused: the lean optimizer's layers are fused, as extend has them by itself where it can
        float8: none or fast
        json: print one JSON object a setting instead of a table
    """

    model: str = "llama3-8b"
    method: str = "endprompt"
    target: int = 65536
    row_tokens: int | None = None
    gpus: int = 1
    device: str = "H200"
    tokens: int = 1_000_000_000
    rows: int = 64
    attention: str = "sdpa"
    optimizer: str = "lean"
    fused: bool = True
    float8: str = "none"
    json: bool = False


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    hidden: int
    layers: int
    kv: int
    intermediate: int
    window: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        return 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.intermediate

    @property
    def multiplied(self) -> int:
        return self.layers * self.layer_parameters + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.multiplied + norms + (0 if self.tied else self.vocabulary * self.hidden)


@dataclass(frozen=True)
class Plan:
    """One setting: bytes of each part on one GPU, and what the step gives."""

    micro_rows: int
    recompute: str
    memory: dict[str, float]
    fits: bool
    tokens_per_s: float
    hours: float
    gpu_hours: float

    @property
    def total_gib(self) -> float:
        return sum(self.memory.values()) / GIB


def shape_of(model: str) -> Shape:
    """The shape by name, or of a checkpoint's config. Raises ValueError for neither."""
    from endprompt.bench import SHAPES

    if model in SHAPES:
        vocabulary, hidden, layers, heads, groups, intermediate, window, _, tied = SHAPES[model]
        return Shape(vocabulary, hidden, layers, hidden // heads * groups, intermediate, window, tied)
    from endprompt.model import load_config, rope_geometry

    config = load_config(model)
    geometry = rope_geometry(config)
    return Shape(
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        geometry.head_dim * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        config.intermediate_size,
        geometry.window,
        bool(config.tie_word_embeddings),
    )


def attention_seconds(shape: Shape, config: PlanConfig, row_tokens: int, recompute: str) -> float:
    """Seconds of attention for one token, forward and backward, on one GPU."""
    rates = ATTENTIONS[config.attention]
    reach = row_tokens / 4 if config.method == "longlora" else row_tokens
    forward = 2.0 * reach * shape.hidden * shape.layers
    scale = DEVICES[config.device].matmul / DEVICES["H200"].matmul * reach / (reach + rates.diagonal)
    return (forward * (2 if recompute == "full" else 1) / rates.forward + 2.5 * forward / rates.backward) / scale


def seconds_per_token(shape: Shape, config: PlanConfig, row_tokens: int, recompute: str) -> float:
    """Seconds of one token's forward and backward pass on one GPU."""
    device = DEVICES[config.device]
    decoder, head = shape.layers * shape.layer_parameters, shape.vocabulary * shape.hidden
    lora = config.method == "longlora"
    passes = (2 if lora else 3) + (1 if recompute == "full" else 0)
    rate = device.matmul if config.float8 == "none" else device.float8
    products = 2 * passes * decoder / rate + 2 * (2 if lora else 3) * head / device.matmul
    attention = attention_seconds(shape, config, row_tokens, recompute)
    numbers = shape.layers * (31 * shape.hidden + 9 * shape.intermediate)
    # 2 bytes a number, and a fifth more for what the compiler does not fuse
    return products + attention + 2.4 * numbers * (1.3 if recompute == "full" else 1) / device.traffic


def tokens_at_a_time(vocabulary: int, device: str = "cuda") -> int:
    """Tokens whose logits are there at once: at most 2**30 logits on a GPU, 2**23 on a CPU.

    On a GPU a multiple of 256: cuBLAS makes products in tiles of so many rows, and what a last tile lacks is lost.
    """
    if device != "cuda":
        return max(1, 2**23 // vocabulary)
    tokens = max(1, 2**30 // vocabulary)
    return tokens - tokens % 256 or tokens


def memory(shape: Shape, config: PlanConfig, row_tokens: int, micro_rows: int, recompute: str) -> dict[str, float]:
    """Bytes on one GPU, by part."""
    count = shape.parameters
    norms = (2 * shape.layers + 1) * shape.hidden
    trained = count
    if config.method == "longlora":  # rank 8 on q, k, v, o
        lora = shape.layers * 8 * (6 * shape.hidden + 2 * shape.kv)
        trained = shape.vocabulary * shape.hidden + norms + lora
    bytes_of = {"lean": (2.0, 4.0, 2 + 8 / 256), "adamw": (4.0, 4.0, 8.0)}[config.optimizer]
    weights = 2.0 * count if config.optimizer == "lean" else 2.0 * (count - trained) + 4.0 * trained
    parts = {
        "weights": weights / config.gpus,
        "gradients": bytes_of[1] * trained / config.gpus,
        "moments": bytes_of[2] * trained / config.gpus,
    }
    decoder = shape.layers * shape.layer_parameters
    if config.float8 != "none":
        parts["float8 weights"] = 2.0 * decoder / config.gpus
    if config.gpus > 1:
        # two layers' weights and one's gradients in bfloat16, and those in float32 while they are summed over the GPUs
        parts["gathered layers"] = (2 * 2.0 + 2.0 + 4.0) * shape.layer_parameters
        # embeddings and head belong to the root, which stays gathered
        parts["gathered embeddings"] = (2.0 + 2.0 + 4.0) * shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    tokens = micro_rows * row_tokens
    selective = 2.0 * (4 * shape.hidden + 2 * shape.kv + 2 * shape.intermediate)
    fused = config.fused and config.optimizer == "lean"  # norms are made again in any case
    whole = selective + 2.0 * ((0 if fused else 2 * shape.hidden) + shape.intermediate)
    if config.float8 != "none":
        operands = 3.0 * shape.hidden + shape.intermediate
        selective = whole = operands + 2.0 * (shape.hidden + 2 * shape.kv + 2 * shape.intermediate)
    layer = {"selective": selective, "none": whole, "full": 2.0 * shape.hidden}[recompute]
    parts["activations"] = layer * shape.layers * tokens
    loss = 2 * 2.0 * min(tokens, tokens_at_a_time(shape.vocabulary)) * shape.vocabulary
    if recompute == "full":  # the loss has let go of its logits before a layer is made again
        parts["one layer again"], loss = max(whole * tokens, loss), 0.0
    parts["loss and work space"] = loss + 3 * 2.0 * shape.hidden * tokens + 2 * GIB
    return parts


def plans(config: PlanConfig) -> list[Plan]:
    """The settings of a run, fastest first among those that fit. Raises ValueError naming key, value and rule."""
    from endprompt.bench import SHAPES

    choices = {
        "method": METHODS,
        "device": tuple(DEVICES),
        "attention": tuple(ATTENTIONS),
        "optimizer": ("lean", "adamw"),
        "float8": ("none", "fast"),
    }
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}: {key}={getattr(config, key)!r}")
    for key in ("target", "gpus", "tokens", "rows"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key} must be at least 1: {key}={getattr(config, key)}")
    if config.rows % config.gpus:
        raise ValueError(f"the number of GPUs must divide the rows of a step: gpus={config.gpus} rows={config.rows}")
    if config.method == "longlora" and config.attention != "sdpa":
        raise ValueError(f"longlora has its own attention, on sdpa: attention={config.attention!r}")
    if config.gpus > 1 and config.optimizer == "lean":
        raise ValueError(f"the lean optimizer is for one GPU; take optimizer=adamw: gpus={config.gpus}")
    if config.model not in SHAPES and not config.model.strip():
        raise ValueError(f"model must be a checkpoint directory or one of {', '.join(SHAPES)}: model={config.model!r}")
    shape = shape_of(config.model)
    row_tokens = config.row_tokens or (shape.window if config.method == "endprompt" else config.target)
    if row_tokens > config.target:
        raise ValueError(f"a row must fit into the target: row_tokens={row_tokens} target={config.target}")
    made = []
    for recompute in ("none", "selective", "full"):
        for micro_rows in (1, 2, 4, 8):
            if config.rows % (micro_rows * config.gpus):
                continue
            parts = memory(shape, config, row_tokens, micro_rows, recompute)
            fits = sum(parts.values()) / GIB <= DEVICES[config.device].memory
            each = seconds_per_token(shape, config, row_tokens, recompute)
            # the gradient sums are read and written once a micro-batch
            each += 8.0 * shape.multiplied / DEVICES[config.device].traffic / (micro_rows * row_tokens)
            speed = config.gpus / each * (0.93 if config.gpus > 1 else 1.0)
            hours = config.tokens / speed / 3600
            made.append(Plan(micro_rows, recompute, parts, fits, speed, hours, hours * config.gpus))
    return sorted(made, key=lambda plan: (not plan.fits, -plan.tokens_per_s, plan.total_gib))


def fitting(config: PlanConfig, micro_rows: int, usable_gib: float) -> str:
    """What to change in a run that was out of memory with `micro_rows`, by the estimate, for its message."""
    shape = shape_of(config.model)
    row_tokens = config.row_tokens or shape.window
    smallest = 0.0
    for recompute in ("none", "selective", "full"):
        for micro in (m for m in (8, 4, 2, 1) if m <= micro_rows and config.rows % (m * config.gpus) == 0):
            smallest = sum(memory(shape, config, row_tokens, micro, recompute).values()) / GIB
            if smallest <= 0.9 * usable_gib:
                return f"micro_rows={micro} checkpointing={recompute} fits ({smallest:.1f} of {usable_gib:.1f} GiB)"
    return (
        f"nothing fits ({smallest:.1f} GiB at least, of {usable_gib:.1f}): take shorter rows, more GPUs or a lean run"
    )


def report(config: PlanConfig, made: list[Plan]) -> str:
    """The settings as a table, and the memory of the best one by part."""
    lines = [
        f"{'micro rows':>10}  {'recompute':<10}{'GiB':>8}  {'fits':<5}{'tokens/s':>10}{'hours':>9}{'GPU-hours':>11}"
    ]
    for plan in made:
        lines.append(
            f"{plan.micro_rows:>10}  {plan.recompute:<10}{plan.total_gib:>8.1f}  {'yes' if plan.fits else 'no':<5}"
            f"{plan.tokens_per_s:>10,.0f}{plan.hours:>9.1f}{plan.gpu_hours:>11.1f}"
        )
    best = made[0]
    if not best.fits:
        return "\n".join([*lines, f"nothing fits into {DEVICES[config.device].memory:.0f} GiB: take more GPUs"])
    lines.append(f"\nmemory of the first, GiB a GPU (of {DEVICES[config.device].memory:.0f} usable):")
    lines += [f"  {part:<22}{size / GIB:>8.1f}" for part, size in best.memory.items()]
    return "\n".join(lines)


def plan(config: PlanConfig) -> int:
    """Print the settings of a run; 1 if none fits."""
    made = plans(config)
    if config.json:
        for one in made:
            about: dict[str, Any] = dataclasses.asdict(one) | {"total_gib": one.total_gib}
            print(json.dumps(about))
    else:
        print(report(config, made))
    return 0 if made[0].fits else 1
