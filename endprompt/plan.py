"""What a run needs before it is started: memory by part, tokens/s, GPU-hours, and which settings fit.

A model of the step, not a measurement; its rates are what one H200 gave for Llama-3-8B's shape. A checkpoint's
parameters are counted on its own model, made without weights. Per token, with P parameters that it is multiplied with
(of experts, those that it is sent to), L layers, hidden size h, query width q, key/value width k, intermediate size i,
and rows of T tokens:

    matrix products   6 P FLOPs; 2 more for each decoder parameter with full recomputation; 4 P with LoRA
    attention         2 T q L FLOPs forward (causal), 2.5 times that backward; a quarter with shifted sparse attention;
                      at a rate that grows with T, as less of it is on the diagonal: rate T / (T + diagonal)
    the rest          memory traffic: 31 numbers of width h and 9 of width i a layer, forward and backward
    activations       selective: 2 h + 2 q + 2 k + 2 i numbers a layer (norms and SwiGLU's product are made again);
                      none: 2 h + i more, i more where layers are fused; full: h a layer, and one layer whole;
                      attention: h + q a layer, and one layer whole; attention does not run again;
                      none and selective in float8, where the compiler makes norms and SwiGLU's product again by
                      itself: 3 h + i of one byte (what the products read) and h + 2 k + 2 i of two

Several GPUs: weights, sums and moments are sharded (FSDP2), each GPU has its rows and the layers that are gathered at
once. Every micro-batch gathers the weights twice and reduces the gradients once, of which a GPU receives (n - 1) / n;
the step waits for what is not hidden behind computation, and for the copies in and out of the collectives' buffers.
GPUs that share a row (context parallelism) send queries, keys, values and outputs through all-to-all in each layer,
which nothing hides. With `shard` moments the weights and sums are whole on each GPU; once a step the sums are exchanged
in float32 and the weights in bfloat16, behind nothing. Within a host of 8 the links are NVLink's; `LINKS` and `HIDDEN`
are assumptions until measured.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from endprompt.config import check_fields
from endprompt.files import read_json_lines
from endprompt.rope import COHERENCE, base_bounds, base_frequencies
from endprompt.shapes import GIB, SHAPES, Shape, tokens_at_a_time


@dataclass(frozen=True)
class Device:
    """bfloat16 and float8 matrix rates in FLOP/s as sustained in training (conversions to float8 included), memory
    traffic in bytes/s, usable memory in GiB. Only the H200's are measured (docs/speed.md); the H100's float8 rate is
    scaled from it.
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

RECOMPUTES = ("none", "selective", "attention", "full")
AGAIN = ("attention", "full")  # those that run a layer's products again


@dataclass(frozen=True)
class Attention:
    """An H200's rates in FLOP/s at endless rows, forward and backward, and the tokens that the diagonal costs; measured
    in steps of 8,192 and 65,536 tokens a row (docs/speed.md), on other devices in proportion to the products'.
    """

    forward: float
    backward: float
    diagonal: float


ATTENTIONS = {
    "sdpa": Attention(625e12, 494e12, 1311),
    "flash_attention_4": Attention(682e12, 587e12, 1400),
}
#: What heads of 64 or less reach of these rates, forward and backward: cuDNN's kernels in the step of SmolLM2's shape.
#: flash-attn-4 was not measured with them and is taken to lose as much.
NARROW_HEADS = (0.79, 0.9)


#: Bytes/s that a GPU receives in a collective: within a host of 8 by NVLink (without its multicast), beyond over 400
#: Gbit/s a GPU. HIDDEN: the share of gathering and reducing that computation covers.
LINKS = {"host": 240e9, "beyond": 40e9}
HOST, HIDDEN = 8, 0.3


@dataclass
class PlanConfig:
    """The run to plan.

    Args:
        model: a checkpoint (directory, hub's ORG/NAME, GGUF file), or a shape's name as in bench
        method: endprompt (short rows), full (rows of the whole target) or longlora
        target: the extended window
        row_tokens: physical tokens of a row; default the model's window for endprompt, else the target
        window: of the checkpoint, where its config leaves open whether it is stated before or after scaling
        gpus: how many, of one kind; 8 of them in a host
        context_parallel: GPUs that share each row, for method full
        shard: weights or moments, as in extend; moments with the lean optimizer
        reduce_dtype: in which gradients are summed over the GPUs: float32 or bfloat16
        device: H200, H100 or A100
        tokens: training tokens of the run
        rows: rows of one step
        attention: sdpa (cuDNN's) or flash_attention_4; longlora takes sdpa
        optimizer: lean or adamw (float32 masters)
        fused: the lean optimizer's layers are fused, as extend has them by itself where it can
        float8: none or fast
        advice: a file of what `endprompt predict --json` printed for this target: its first choice is named, no more
        json: print one JSON object a setting instead of a table
    """

    model: str = "llama3-8b"
    method: str = "endprompt"
    target: int = 65536
    row_tokens: int | None = None
    window: int | None = None
    gpus: int = 1
    context_parallel: int = 1
    shard: str = "weights"
    reduce_dtype: str = "float32"
    device: str = "H200"
    tokens: int = 1_000_000_000
    rows: int = 64
    attention: str = "sdpa"
    optimizer: str = "lean"
    fused: bool = True
    float8: str = "none"
    advice: str | None = None
    json: bool = False
    WORD: ClassVar[str] = "model"  # what a word without a flag is

    @property
    def shards(self) -> int:
        """GPUs over which weights and gradient sums are cut."""
        return self.gpus if self.shard == "weights" else 1


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


#: Keys under which the families of transformers state how many experts a token is sent to.
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def shape_of(model: str, window: int | None = None) -> Shape:
    """The shape by name, or of a checkpoint's config. Raises ValueError for neither, and for what cannot be planned."""
    if model in SHAPES:
        vocabulary, hidden, layers, heads, groups, intermediate, window, theta, tied = SHAPES[model]
        head_dim = hidden // heads
        sizes = (vocabulary, hidden, layers, head_dim * groups, intermediate, window, tied, hidden, head_dim)
        return Shape(*sizes, base=1 / float(base_frequencies(theta, head_dim)[-1]))
    from endprompt.model import load_config
    from endprompt.model.kinds import check_layers
    from endprompt.model.wrapper import text_config

    config = text_config(load_config(model))
    shape = counted(config, window)
    check_layers(config, shape.window)
    return shape


def counted(config: Any, window: int | None = None) -> Shape:
    """The shape of transformers' own model of this config, made without weights (a second for any size). Raises
    ValueError where the formulas of this module do not hold: attention by other than query, key, value and output
    matrices of the config's heads, or experts of which the config does not say how many a token takes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from endprompt.model import rope_geometry
    from endprompt.model.geometry import said, window_of

    geometry = rope_geometry(config)
    kind, hidden = config.model_type, config.hidden_size
    head_dim = geometry.head_dim
    query = head_dim * config.num_attention_heads
    kv = head_dim * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever the family's own code runs into
        raise ValueError(f"transformers makes no model of this config: {kind!r}: {said(error)}") from error
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    attention_matrices = 2 * hidden * (query + kv)
    stored = active = 0
    for number, layer in enumerate(layers):
        attention = [module for module in layer.children() if type(module).__name__.endswith("Attention")]
        found = sum(p.numel() for module in attention for p in module.parameters() if p.dim() == 2)
        if found != attention_matrices:
            raise ValueError(
                f"plan knows layers with attention by query, key, value and output matrices: layer {number} of "
                f"{kind!r} has {found:,} parameters in such matrices where {query=} {kv=} {hidden=} give "
                f"{attention_matrices:,}"
            )
        stored += sum(p.numel() for p in layer.parameters())
        active += sum(p.numel() for p in layer.parameters() if p.dim() > 1) - unused_experts(config, layer)
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    other = sum(p.numel() for p in model.parameters()) - stored - embeddings.numel() * (1 if tied else 2)
    intermediate = round((active / len(layers) - attention_matrices) / (3 * hidden))
    vocabulary, reads = embeddings.shape[0], window_of(config, window).window
    sizes = (vocabulary, hidden, len(layers), kv, intermediate, reads, tied, query, head_dim, stored, active, other)
    return Shape(*sizes, base=1 / float(geometry.frequencies()[0].min()))


def unused_experts(config: Any, layer: Any) -> int:
    """Parameters of the layer's experts that a token is not sent to."""
    matrices = [p for name, p in layer.named_parameters() if ".experts." in f".{name}" and p.dim() == 3]
    stacked = sum(p.numel() for p in matrices)
    singles = [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] == "experts"]
    listed = [module for module in singles if not any(p.dim() == 3 for p in module.parameters())]
    size = stacked + sum(p.numel() for module in listed for p in module.parameters())
    if not size:
        return 0
    count = matrices[0].shape[0] if matrices else len(listed[0])
    for key in EXPERTS_OF_A_TOKEN:
        if isinstance(taken := getattr(config, key, None), int):
            return size - size * taken // count
    raise ValueError(
        f"plan must know how many of {count} experts a token is sent to: {config.model_type!r} states none of "
        f"{', '.join(EXPERTS_OF_A_TOKEN)}"
    )


def attention_seconds(shape: Shape, config: PlanConfig, row_tokens: int, recompute: str) -> float:
    """Seconds of attention for one token, forward and backward, on one GPU."""
    rates = ATTENTIONS[config.attention]
    reach = row_tokens / 4 if config.method == "longlora" else row_tokens
    forward = 2.0 * reach * shape.query * shape.layers
    scale = DEVICES[config.device].matmul / DEVICES["H200"].matmul * reach / (reach + rates.diagonal)
    reached = NARROW_HEADS if shape.head_dim <= 64 else (1.0, 1.0)
    backward = 2.5 * forward / (rates.backward * reached[1])
    return (forward * (2 if recompute == "full" else 1) / (rates.forward * reached[0]) + backward) / scale


def seconds_per_token(shape: Shape, config: PlanConfig, row_tokens: int, recompute: str) -> float:
    """Seconds of one token's forward and backward pass on one GPU."""
    device = DEVICES[config.device]
    decoder, head = shape.active, shape.vocabulary * shape.hidden
    lora = config.method == "longlora"
    again = recompute in AGAIN
    passes = (2 if lora else 3) + again
    rate = device.matmul if config.float8 == "none" else device.float8
    products = 2 * passes * decoder / rate + 2 * (2 if lora else 3) * head / device.matmul
    attention = attention_seconds(shape, config, row_tokens, recompute)
    numbers = shape.layers * (31 * shape.hidden + 9 * shape.intermediate)
    # 2 bytes a number, and a fifth more for what the compiler does not fuse
    return products + attention + 2.4 * numbers * (1.3 if again else 1) / device.traffic


def communication_seconds(shape: Shape, config: PlanConfig, row_tokens: int, tokens: float, recompute: str) -> float:
    """Seconds by which one GPU's micro-batch of so many of its tokens is longer for its exchange with the others."""
    # queries, keys, values, outputs, and the gradients of all four; outputs that are kept are not sent again
    passes = {"full": 3.0, "attention": 2.0 + (shape.query + 2 * shape.kv) / (2 * shape.query + 2 * shape.kv)}
    gpus, context = config.gpus, config.context_parallel
    if gpus == 1:
        return 0.0
    link, traffic = LINKS["host" if gpus <= HOST else "beyond"], DEVICES[config.device].traffic
    reduced = {"float32": 4.0, "bfloat16": 2.0}[config.reduce_dtype]
    sent = passes.get(recompute, 2.0) * 2.0 * (2 * shape.query + 2 * shape.kv) * shape.layers * tokens
    heads = sent * (context - 1) / context / LINKS["host" if context <= HOST else "beyond"]
    if config.shards == 1:
        exchanged = (4.0 + 2.0) * shape.parameters * (gpus - 1) / gpus / link
        return heads + exchanged * tokens * gpus / (config.rows * row_tokens)
    received = (2 * 2.0 + reduced) * shape.parameters * (gpus - 1) / gpus
    # gathered weights are read and written once more, gradients read and written in the dtype that they are reduced in
    copies = (2 * 2 * 2.0 + 2.0 + reduced) * shape.parameters / traffic
    return (1 - HIDDEN) * received / link + copies + heads


def memory(shape: Shape, config: PlanConfig, row_tokens: int, micro_rows: int, recompute: str) -> dict[str, float]:
    """Bytes on one GPU, by part."""
    count = shape.parameters
    norms = (2 * shape.layers + 1) * shape.hidden
    trained = count
    if config.method == "longlora":  # rank 8 on q, k, v, o
        lora = shape.layers * 8 * (4 * shape.hidden + 2 * shape.query + 2 * shape.kv)
        trained = shape.vocabulary * shape.hidden + norms + lora
    bytes_of = {"lean": (2.0, 4.0, 2 + 8 / 256), "adamw": (4.0, 4.0, 8.0)}[config.optimizer]
    weights = 2.0 * count if config.optimizer == "lean" else 2.0 * (count - trained) + 4.0 * trained
    parts = {
        "weights": weights / config.shards,
        "gradients": bytes_of[1] * trained / config.shards,
        "moments": bytes_of[2] * trained / config.gpus,
    }
    if config.float8 != "none":
        # sharded layers convert what they gather
        parts["float8 weights"] = 2.0 * shape.stored / (1 if config.shards == 1 else shape.layers)
    if config.shards > 1:
        reduced = {"float32": 4.0, "bfloat16": 2.0}[config.reduce_dtype]
        # two layers' weights and one's gradients in bfloat16, and those in float32 while they are summed over the GPUs
        parts["gathered layers"] = (2 * 2.0 + 2.0 + reduced) * shape.stored / shape.layers
        # embeddings and head belong to the root, which stays gathered
        parts["gathered embeddings"] = (2.0 + 2.0 + reduced) * shape.embeddings
    tokens = micro_rows * row_tokens // config.context_parallel
    selective = 2.0 * (2 * shape.hidden + 2 * shape.query + 2 * shape.kv + 2 * shape.intermediate)
    fused = config.fused and config.optimizer == "lean"  # norms are made again in any case
    whole = selective + 2.0 * ((0 if fused else 2 * shape.hidden) + shape.intermediate)
    if config.float8 != "none":
        operands = 3.0 * shape.hidden + shape.intermediate
        selective = whole = operands + 2.0 * (shape.query + 2 * shape.kv + 2 * shape.intermediate)
    kept = {"selective": selective, "none": whole, "full": 2.0 * shape.hidden}
    kept["attention"] = kept["full"] + 2.0 * shape.query
    parts["activations"] = kept[recompute] * shape.layers * tokens
    loss = 2 * 2.0 * min(tokens, tokens_at_a_time(shape.vocabulary)) * shape.vocabulary
    if recompute in AGAIN:  # the loss has let go of its logits before a layer is made again
        parts["one layer again"], loss = max(whole * tokens, loss), 0.0
    parts["loss and work space"] = loss + 3 * 2.0 * shape.hidden * tokens + 2 * GIB
    return parts


def plans(config: PlanConfig) -> list[Plan]:
    """The settings of a run, fastest first among those that fit. Raises ValueError naming key, value and rule."""
    choices = {"method": METHODS, "device": tuple(DEVICES), "attention": tuple(ATTENTIONS)}
    choices |= {"optimizer": ("lean", "adamw"), "float8": ("none", "fast"), "reduce_dtype": ("float32", "bfloat16")}
    choices["shard"] = ("weights", "moments")
    check_fields(config, choices, dict.fromkeys(("target", "gpus", "tokens", "rows", "context_parallel"), 1))
    context = config.context_parallel
    if config.shard == "moments" and config.optimizer != "lean":
        raise ValueError(f"shard='moments' is the lean optimizer's: shard='moments' optimizer={config.optimizer!r}")
    if context > 1 and (config.gpus % context or config.method != "full"):
        raise ValueError(
            f"GPUs that share a row are for method=full, and divide the others: context_parallel={context} "
            f"gpus={config.gpus} method={config.method!r}"
        )
    if config.rows % (config.gpus // context):
        raise ValueError(
            f"the number of GPUs must divide the rows of a step: gpus={config.gpus} rows={config.rows}"
            + (f" context_parallel={context}" if context > 1 else "")
        )
    if config.method == "longlora" and config.attention != "sdpa":
        raise ValueError(f"longlora has its own attention, on sdpa: attention={config.attention!r}")
    if config.model not in SHAPES and not config.model.strip():
        raise ValueError(f"model must be a checkpoint directory or one of {', '.join(SHAPES)}: model={config.model!r}")
    shape = shape_of(config.model, config.window)
    row_tokens = config.row_tokens or (shape.window if config.method == "endprompt" else config.target)
    if row_tokens > config.target:
        raise ValueError(f"a row must fit into the target: row_tokens={row_tokens} target={config.target}")
    made = []
    for recompute in RECOMPUTES:
        for micro_rows in (1, 2, 4, 8):
            if config.rows % (micro_rows * config.gpus // context) or micro_rows * row_tokens % context:
                continue
            parts = memory(shape, config, row_tokens, micro_rows, recompute)
            fits = sum(parts.values()) / GIB <= DEVICES[config.device].memory
            each = seconds_per_token(shape, config, row_tokens, recompute)
            # the gradient sums are read and written once a micro-batch
            held = micro_rows * row_tokens / context  # tokens of a GPU's micro-batch
            each += 8.0 * shape.parameters / config.shards / DEVICES[config.device].traffic / held
            each += communication_seconds(shape, config, row_tokens, held, recompute) / held
            speed = config.gpus / each
            hours = config.tokens / speed / 3600
            made.append(Plan(micro_rows, recompute, parts, fits, speed, hours, hours * config.gpus))
    return sorted(made, key=lambda plan: (not plan.fits, -plan.tokens_per_s, plan.total_gib))


def fitting(config: PlanConfig, micro_rows: int, usable_gib: float) -> str:
    """What to change in a run that was out of memory with `micro_rows`, by the estimate, for its message."""
    shape = shape_of(config.model, config.window)
    row_tokens = config.row_tokens or shape.window
    smallest, sharing = 0.0, config.gpus // config.context_parallel
    micros = [m for m in (8, 4, 2, 1) if m <= micro_rows and config.rows % (m * sharing) == 0]
    for recompute in RECOMPUTES:
        for micro in micros:
            smallest = sum(memory(shape, config, row_tokens, micro, recompute).values()) / GIB
            if smallest <= 0.9 * usable_gib:
                return f"micro_rows={micro} checkpointing={recompute} fits ({smallest:.1f} of {usable_gib:.1f} GiB)"
    return (
        f"nothing fits ({smallest:.1f} GiB at least, of {usable_gib:.1f}): take shorter rows, more GPUs or a lean run"
    )


def report(config: PlanConfig, made: list[Plan]) -> str:
    """The settings as a table, and the memory of the best one by part."""
    shape = shape_of(config.model, config.window)
    used = f", {shape.multiplied / 1e9:.2f}B multiplied with a token" if shape.active < 0.9 * shape.stored else ""
    lines = [
        f"{shape.parameters / 1e9:.3f}B parameters{used}",
        f"{'micro rows':>10}  {'recompute':<10}{'GiB':>8}  {'fits':<5}{'tokens/s':>10}{'hours':>9}{'GPU-hours':>11}",
    ]
    for plan in made:
        lines.append(
            f"{plan.micro_rows:>10}  {plan.recompute:<10}{plan.total_gib:>8.1f}  {'yes' if plan.fits else 'no':<5}"
            f"{plan.tokens_per_s:>10,.0f}{plan.hours:>9.1f}{plan.gpu_hours:>11.1f}"
        )
    said = advised(config, shape)
    best = made[0]
    if not best.fits:
        return "\n".join([*lines, *said, f"nothing fits into {DEVICES[config.device].memory:.0f} GiB: take more GPUs"])
    lines.append(f"\nmemory of the first, GiB a GPU (of {DEVICES[config.device].memory:.0f} usable):")
    lines += [f"  {part:<22}{size / GIB:>8.1f}" for part, size in best.memory.items()]
    return "\n".join([*lines, *said])


def advised(config: PlanConfig, shape: Shape) -> list[str]:
    """What is said of the target beside the settings: the bounds on the RoPE base, and what `predict` put first. Raises
    ValueError if the file of advice is of another target or holds no line of `predict`.
    """
    said = []
    if shape.base is not None and config.target > shape.window:
        bounds = base_bounds(config.target, shape.layers)
        inside = max(bounds["aliasing"], bounds["stability"]) <= shape.base < bounds["precision"]
        said.append(
            f"\nRoPE base without scaling, {shape.base:,.0f}, for {config.target:,} tokens: by arXiv 2602.10959 above "
            f"{bounds['aliasing']:,.0f} against aliasing, above {bounds['stability']:,.0f} to keep {COHERENCE:g} of "
            f"the slowest component through {shape.layers} layers, below {bounds['precision']:,.0f} in float32: "
            + ("it is" if inside else "it is not")
        )
    if config.advice is None:
        return said
    lines = [line for _, line in read_json_lines(config.advice)]
    if not lines or not all({"target", "scaling", "scheme", "order"} <= line.keys() for line in lines):
        raise ValueError(f"advice must be what `endprompt predict --json` printed: advice={config.advice!r}")
    if others := {line["target"] for line in lines} - {config.target}:
        raise ValueError(f"advice must be for the same target: target={config.target}, advice for {others.pop()}")
    best = max((line for line in lines if line["scheme"] != "none"), key=lambda line: line["order"])
    return [
        *said,
        f"advice of predict: scaling {best['scaling']} and scheme {best['scheme']} come first "
        f"(order {best['order']:.1f}; what that is worth: `endprompt predict`); nothing here follows it by itself",
    ]


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
