"""What the commands take: typed dataclasses and the rules that their values must hold. Imports no torch."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from endprompt.files import read_object
from endprompt.positions import PIECES, SCHEMES, WITH_PROMPT
from endprompt.prompts import check_names


@dataclass
class ExtendConfig:
    """How a checkpoint is extended.

    Checkpoints:
        model: checkpoint to start from: a directory, a hub's ORG/NAME (@REVISION), or a GGUF file
        output: directory of the extended checkpoint; it appears when the run is finished
        save_every: steps between training states; 0 for none
        async_save: write training states while the next steps run, from a copy in the host's memory
        keep: how many training states are kept
        export_dtype: of the exported weights; default the checkpoint's own
        resume: go on from the newest training state of this output
        resume_or_start: resume if this output is unfinished or whole, else start; for what starts a run again by itself
        overwrite: replace a finished output

    Data:
        data: JSONL (.gz, .zst), Parquet or text files, also at addresses such as s3://, or prepared token shards; a
            mixture has a weight behind each,
            books.jsonl:0.6 code:0.4, which are shares of the tokens
        max_epochs: largest number of passes over any source; default no limit
        row_tokens: physical tokens of a row, context and end prompt; default the checkpoint's window
        rows: rows of one step
        micro_rows: rows that go through the model at once; default all of a step
        steps: optimizer steps; or give tokens
        tokens: physical training tokens, instead of steps
        completion_weight: loss weight of a document's completion
        chat_loss: of records with messages, score all turns of the assistant, or as a completion its last one alone:
            assistant or completion
        text_weight: loss weight of the text in front of a completion (default 1), and of what the assistant did not
            write (default 0)
        short_documents: drop (and count) documents shorter than a row, pack them one after the other as one text, or
            put several apart in a row, each with attention, positions and an end prompt of its own
        order: of the documents in each pass: shuffled, or long-first
        long_documents: split longer ones into several rows, or truncate them to their first
        seed: of positions, prompts and the order of documents

    Method:
        target: the extended window L, in tokens
        scheme: positions of a row: contiguous, endprompt, endprompt-random, pose, endprompt-pose, anchors, sliding,
            sentences, endprompt-sentences
        scaling: RoPE scaling: none, linear (position interpolation), ntk, dynamic, yarn, llama3,
            longrope
        factor: scaling factor; default target / window; of a checkpoint that is scaled already, by how much more
        window: of the checkpoint, in tokens, where its config leaves open whether it is stated before or after scaling
        rope_options: the scaling's own options, such as beta_fast and beta_slow of yarn, low_freq_factor and
            high_freq_factor of llama3, short_factor and long_factor (a divisor a frequency) of longrope, which default
            to 1 and to ntk's divisors
        prompt: the end prompt: EP_1, EP_2, EP_3, "text:YOUR WORDS", or a list of cues drawn from; recall or
            question (a document's own, else recall); none for schemes without one; default EP_1
            where the scheme needs one
        prompt_weight: loss weight of the end prompt's scored tokens; default 0.1 for cues, 1 for what quotes
        recall_span: tokens that a recall prompt copies from the context
        recall_given: how many of them carry no loss
        anchors: number of anchors of the anchors scheme
        lora_rank: rank of LoRA updates of the attention projections, merged at the end; 0 trains all weights
        lora_alpha: their scale is lora_alpha / lora_rank
        lora_also: with LoRA, parameters whose name holds one of these train whole
        lora_targets: matrices that get updates: attention, mlp or all (linear ones of the layers)
        quantize: none, or 4bit: with LoRA, the matrices of the layers in NF4 (QLoRA), by bitsandbytes
        adapter: of LoRA: `merged` into the model, `beside` it too (adapter/), or the adapter `only`
        router_loss: weight of the loss that keeps the load of experts even; default as the model's config says
        freeze_router: train nothing of what chooses experts

    Optimizer:
        optimizer: adamw, masters (AdamW on float32 copies of bfloat16 weights), lean (bfloat16 weights with stochastic
            rounding and one-byte moments: 8B on one GPU), or auto: masters for bfloat16, else adamw
        lr: learning rate
        warmup: warm-up steps, linear from 0
        schedule: constant, linear or cosine
        decay: share of the steps at the end over which linear and cosine fall to 0
        weight_decay: of AdamW
        beta1: of AdamW
        beta2: of AdamW
        clip: largest norm of the gradient; 0 for none
        divergence: stop when the smoothed loss is this far above its best, in nats; 0 for never. A loss that is not
            finite stops a run in any case

    Precision:
        dtype: of the weights that are trained: float32 or bfloat16
        autocast: multiply in bfloat16 while the weights stay as they are
        float8: products of the decoder layers in float8: none, exact or fast; needs the lean optimizer
        fused: with the lean optimizer, norms and SwiGLU of the decoder layers in kernels of their own, on a GPU with
            triton; layers in float8, and those of families other than Llama, Mistral, Qwen2 and Qwen3, stay as they are
        attention: sdpa, eager, flex, cudnn, flash_attention_2, flash_attention_3, flash_attention_4, all causal only;
            or shifted, LongLoRA's
        checkpointing: activations kept for the backward pass: none keeps all, selective recomputes what is cheap, full
            recomputes each layer, attention recomputes all of it but attention
        compile: layers (torch.compile of each decoder layer), none, or auto (layers on a GPU); graph records a whole
            step as one CUDA graph, graph+layers one of compiled layers: for models whose steps are bound by launches
        device: cpu, cuda or auto
        deterministic: repeat bit for bit on a GPU too, where the same device, versions and settings are given; some
            percent slower. On a CPU runs repeat anyway

    Several GPUs:
        context_parallel: processes that share the tokens of each row, for long rows of scheme contiguous; they exchange
            heads for tokens around attention, so they must divide the heads and the row
        shard: weights (FSDP2: each process holds a share of all there is), or moments: each has the weights and
            gradient sums whole, computes as a single one does, and sums gradients once a step: faster, where the memory
            is there (endprompt plan). The latter needs the lean optimizer
        reduce_dtype: in which gradients are summed over the processes: float32, or bfloat16 at half the traffic
        keep_gathered: so many last layers stay whole through a step, instead of being gathered twice for each of its
            micro-batches; costs their weights in memory

    Evaluation:
        eval_data: held-out documents, as data
        eval_every: steps between evaluations; 0 for only at the end
        eval_lengths: lengths of the evaluated rows; default the row and the target
        eval_rows: held-out rows a length, as far as the text goes
        eval_needles: rows with a needle a length; 0 for none
        log_every: steps between lines of the log
        report: tensorboard, wandb, or both, beside log.jsonl
    """

    #: Of earlier configurations, with the value that it always has now.
    GONE: ClassVar[dict[str, Any]] = {"pieces": 3, "float8_head": False}

    model: str = ""
    output: str = ""
    save_every: int = 0
    async_save: bool = True
    keep: int = 2
    export_dtype: str | None = None
    resume: bool = False
    resume_or_start: bool = False
    overwrite: bool = False

    data: list[str] = dataclasses.field(default_factory=list)
    max_epochs: float | None = None
    row_tokens: int | None = None
    rows: int = 64
    micro_rows: int | None = None
    steps: int | None = None
    tokens: int | None = None
    completion_weight: float = 1.0
    chat_loss: str = "assistant"
    text_weight: float | None = None
    short_documents: str = "drop"
    long_documents: str = "split"
    order: str = "shuffled"
    seed: int = 0

    target: int = 0
    scheme: str = "endprompt"
    scaling: str = "linear"
    factor: float | None = None
    window: int | None = None
    rope_options: dict[str, Any] | None = None
    prompt: str | list[str] | None = None
    prompt_weight: float | None = None
    recall_span: int = 40
    recall_given: int = 12
    anchors: int = 4
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_also: list[str] = dataclasses.field(default_factory=lambda: ["embed", "norm"])
    lora_targets: str = "attention"
    quantize: str = "none"
    adapter: str = "merged"
    router_loss: float | None = None
    freeze_router: bool = False

    optimizer: str = "auto"
    lr: float = 2e-5
    warmup: int = 20
    schedule: str = "constant"
    decay: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    divergence: float = 3.0

    dtype: str = "float32"
    autocast: bool = False
    float8: str = "none"
    fused: bool = True
    attention: str = "sdpa"
    checkpointing: str = "none"
    compile: str = "auto"
    device: str = "auto"
    deterministic: bool = False

    context_parallel: int = 1
    shard: str = "weights"
    reduce_dtype: str = "float32"
    keep_gathered: int = 1

    eval_data: list[str] = dataclasses.field(default_factory=list)
    eval_every: int = 0
    eval_lengths: list[int] | None = None
    eval_rows: int = 8
    eval_needles: int = 0
    log_every: int = 10
    report: list[str] = dataclasses.field(default_factory=list)


#: Attentions whose gradients can be summed in a fixed order.
REPEATABLE = ("sdpa", "eager", "shifted")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
DUPLICATES = ("keep", "exact", "near")
CHAT_LOSSES = ("assistant", "completion")
FLOAT8 = ("none", "exact", "fast")
ONE_OF: dict[str, tuple[str | None, ...]] = {
    "scheme": tuple(SCHEMES),
    "chat_loss": CHAT_LOSSES,
    "order": ("shuffled", "long-first"),
    "schedule": ("constant", "linear", "cosine"),
    "optimizer": ("auto", "adamw", "masters", "lean"),
    "float8": FLOAT8,
    "dtype": ("float32", "bfloat16"),
    "shard": ("weights", "moments"),
    "reduce_dtype": ("float32", "bfloat16"),
    "export_dtype": (None, *EXPORT_DTYPES),
    "compile": ("auto", "layers", "none", "graph", "graph+layers"),
    "device": ("auto", "cpu", "cuda"),
    "checkpointing": ("none", "selective", "attention", "full"),
    "lora_targets": ("attention", "mlp", "all"),
    "adapter": ("merged", "beside", "only"),
    "quantize": ("none", "4bit"),
}
AT_LEAST = {
    **dict.fromkeys(("prompt_weight", "completion_weight", "warmup", "weight_decay", "clip", "seed", "save_every"), 0),
    **dict.fromkeys(("lora_rank", "divergence", "eval_every", "eval_needles", "router_loss", "keep_gathered"), 0),
    **dict.fromkeys(("context_parallel", "factor", "rows", "micro_rows", "steps", "tokens"), 1),
    **dict.fromkeys(("keep", "log_every", "lora_alpha", "eval_rows"), 1),
    **dict.fromkeys(("max_epochs", "text_weight"), 0),
    "row_tokens": 2,
}


def check(key: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key} must be {rule}: {key}={value!r}")


def check_given(config: Any, *keys: str) -> None:
    """Raises ValueError for a field that is empty."""
    for key in keys:
        if not getattr(config, key):
            raise ValueError(f"{key} must be given: {key}={getattr(config, key)!r}")


def check_fields(config: Any, choices: Mapping[str, Sequence[str | None]], least: Mapping[str, int]) -> None:
    """Raises ValueError for a field that is none of its choices, or below its least value (None is not)."""
    for key, names in choices.items():
        check(key, getattr(config, key), getattr(config, key) in names, f"one of {', '.join(filter(None, names))}")
    for key, bound in least.items():
        value = getattr(config, key)
        check(key, value, value is None or value >= bound, f"at least {bound}")


@dataclass(frozen=True)
class Source:
    """A source of a mixture: a file or a shard, its weight, and what it was prepared from, if it was."""

    path: str
    weight: float
    prepared_from: str = ""

    @property
    def name(self) -> str:
        return self.prepared_from or self.path


def mixture(data: list[str]) -> list[Source]:
    """The sources of a mixture, FILE:WEIGHT each, or the one that `prepare` made; empty if none has a weight. What has
    such a name is a file. Raises ValueError for a weight that is not a finite number above 0, or if only some sources
    have one.
    """
    if len(data) == 1 and (manifest := Path(data[0], "manifest.json")).is_file():
        made = read_object(manifest).get("mixture", [])
        return [Source(str(Path(data[0], one["shard"])), float(one["weight"]), one["source"]) for one in made]
    parts = [(text, *text.rpartition(":")[::2]) for text in data]
    weighted = [path and not Path(text).exists() and _is_number(weight) for text, path, weight in parts]
    if not any(weighted):
        return []
    for (text, _, weight), known in zip(parts, weighted):
        if not known:
            raise ValueError(f"in a mixture every source has a weight, as in FILE:0.5: data={text!r}")
        if not 0 < float(weight) < math.inf:
            raise ValueError(f"a source's weight must be a finite number above 0: data={text!r}")
    return [Source(path, float(weight)) for _, path, weight in parts]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_values(config: ExtendConfig) -> None:
    """The rules of single settings. Raises ValueError naming key, value and rule."""
    check_fields(config, ONE_OF, AT_LEAST)
    if prompts := prompt_names(config):
        check_names(prompts)


def check_config(config: ExtendConfig) -> None:
    """Raises ValueError naming key, value and rule for what no run can use."""
    check_given(config, "model", "output")
    check_values(config)
    mixture(config.data)
    if mixture(config.eval_data):
        raise ValueError(f"held-out text has no weights: eval_data={config.eval_data}")
    check("lr", config.lr, math.isfinite(config.lr) and config.lr > 0, "a finite number above 0")
    check("decay", config.decay, 0 <= config.decay <= 1, "between 0 and 1")
    for key in ("beta1", "beta2"):
        check(key, getattr(config, key), 0 <= getattr(config, key) < 1, "in [0, 1)")
    check("eval_lengths", config.eval_lengths, min(config.eval_lengths or [2]) >= 2, "at least 2 tokens each")
    if config.float8 != "none" and config.optimizer != "lean":
        raise ValueError(f"float8 needs the lean optimizer: float8={config.float8!r} optimizer={config.optimizer!r}")
    if config.shard == "moments" and config.optimizer != "lean":
        raise ValueError(f"shard='moments' is the lean optimizer's: shard='moments' optimizer={config.optimizer!r}")
    if config.optimizer == "lean" and (config.dtype != "bfloat16" or config.autocast):
        raise ValueError(
            f"the lean optimizer trains bfloat16 weights as they are: dtype={config.dtype!r} autocast={config.autocast}"
        )
    if config.float8 != "none" and config.lora_rank:
        raise ValueError(
            f"float8 is for matrices that train, and LoRA freezes them: float8={config.float8!r} "
            f"lora_rank={config.lora_rank}"
        )
    for key, usual in (("lora_targets", "attention"), ("adapter", "merged"), ("quantize", "none")):
        if getattr(config, key) != usual and not config.lora_rank:
            raise ValueError(f"{key} needs LoRA: {key}={getattr(config, key)!r} lora_rank=0")
    if config.deterministic and config.attention not in REPEATABLE:
        raise ValueError(
            f"deterministic needs attention to be one of {', '.join(REPEATABLE)}, whose gradients can be summed in a "
            f"fixed order: deterministic={config.deterministic} attention={config.attention!r}"
        )
    if config.compile.startswith("graph"):
        check_recordable(config)
    if config.short_documents == "apart":
        check_apart_scaling(config.scaling, "short_documents='apart'")
    if (config.steps is None) == (config.tokens is None):
        raise ValueError(f"give either steps or tokens: steps={config.steps} tokens={config.tokens}")


def check_apart_scaling(scaling: str, asked: str) -> None:
    """Raises ValueError naming what asked for documents apart, if a scaling's frequencies are one set for a row."""
    if scaling in ("dynamic", "longrope"):
        raise ValueError(
            f"the frequencies of scaling={scaling} depend on a row's farthest position, so its documents would not be "
            f"apart: {asked}"
        )


def check_processes(config: ExtendConfig, processes: int, row_tokens: int) -> None:
    """Raises ValueError if so many processes cannot share the run."""
    context = config.context_parallel
    if context > 1:
        needless = {"scheme": config.scheme != "contiguous", "attention": config.attention == "shifted"}
        for key, short in needless.items():
            if short:
                raise ValueError(
                    "context parallelism is for long rows under full attention, and this run needs none: "
                    f"{key}={getattr(config, key)!r} context_parallel={context}"
                )
        if config.short_documents == "apart":
            raise ValueError(
                "the documents of a row are kept apart by the whole row: short_documents='apart' "
                f"context_parallel={context}"
            )
        if processes % context:
            raise ValueError(f"context_parallel must divide the number of processes: {context}, {processes}")
        lengths = [row_tokens, *((config.eval_lengths or [config.target]) if config.eval_data else [])]
        if uneven := [length for length in lengths if length % context]:
            raise ValueError(f"context_parallel must divide the tokens of every row: {context}, {uneven[0]} tokens")
    if config.rows % (processes // context):
        shared = f", {context} of which share a row" if context > 1 else ""
        raise ValueError(f"rows must be a multiple of the number of processes: rows={config.rows}, {processes}{shared}")
    if processes > 1 and config.quantize != "none":
        raise ValueError(
            f"matrices in 4 bits need a single process: quantize={config.quantize!r}, {processes} processes"
        )
    if processes > 1 and config.compile.startswith("graph"):
        raise ValueError(
            f"a recorded step needs a single process; several take compile=layers: compile={config.compile!r}, "
            f"{processes} processes"
        )


def check_recordable(config: ExtendConfig) -> None:
    """Raises ValueError if no CUDA graph can hold a step of this configuration."""
    rules = {
        "device": (config.device != "cpu", "cuda or auto"),
        "optimizer": (config.optimizer in ("auto", "adamw") and config.dtype == "float32", "adamw on float32 weights"),
        "checkpointing": (config.checkpointing == "none", "none"),
        "attention": (config.attention != "flex", "one that needs no block mask"),
        "short_documents": (config.short_documents != "apart", "drop or pack"),
        "quantize": (config.quantize == "none", "none"),
        "scaling": (config.scaling not in ("dynamic", "longrope"), "one whose frequencies do not depend on positions"),
    }
    for key, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(
                f"compile={config.compile!r} needs {key} to be {rule}: {key}={getattr(config, key)!r}"
                + (f" dtype={config.dtype!r}" if key == "optimizer" else "")
            )


def method_name(config: ExtendConfig) -> str:
    """`scheme+prompt+scaling`, the `method` of result rows."""
    number = {"anchors": config.anchors, "sentences": PIECES, "endprompt-sentences": PIECES}
    scheme = f"{config.scheme}{number.get(config.scheme, '')}"
    names = prompt_names(config)
    return "+".join([scheme, *(["/".join(names)] if names else []), config.scaling])


def prompt_names(config: ExtendConfig) -> list[str]:
    """The end prompts by name, an empty list for none; EP_1 if the scheme needs one and none is named."""
    if config.prompt is None:
        return ["EP_1"] if config.scheme in WITH_PROMPT else []
    if config.prompt == "none":
        return []
    return [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)


@dataclass
class PrepareConfig:
    """Which documents become a token shard.

    Args:
        data: JSONL (.gz, .zst), Parquet or text files, also at addresses such as s3://, or hub:ID for a data set of the
            Hugging Face hub (streamed); with a weight behind each, books.jsonl:0.6 code.jsonl:0.4, they become a
            mixture, a shard a source
        output: directory of the shard; it appears when it is whole
        tokenizer: checkpoint whose tokenizer is used: a directory, a hub's ORG/NAME (@REVISION), or a GGUF file
        hub_name: configuration of the hub's data set
        hub_split: its split
        append_eos: end each document with the tokenizer's EOS token
        chat_loss: of records with messages, score all turns of the assistant, or as a completion its last one alone:
            assistant or completion
        min_tokens: shorter documents are dropped, and counted
        max_tokens: longer documents are cut there, and counted; default no limit
        longer: what is done with them: cut, or drop
        duplicates: of documents with the same tokens (exact), or nearly so (near, by datasketch), the first stays; keep
            keeps all
        near_threshold: share of their runs of 5 tokens (Jaccard index) that makes two documents near duplicates
        max_documents: stop after so many of a mixture's source, or of all; default none
        overwrite: replace a finished output
    """

    data: list[str] = dataclasses.field(default_factory=list)
    output: str = ""
    tokenizer: str = ""
    hub_name: str | None = None
    hub_split: str = "train"
    append_eos: bool = True
    chat_loss: str = "assistant"
    min_tokens: int = 2
    max_tokens: int | None = None
    longer: str = "cut"
    duplicates: str = "keep"
    near_threshold: float = 0.8
    max_documents: int | None = None
    overwrite: bool = False


def check_prepare_config(config: PrepareConfig) -> None:
    check_given(config, "data", "output", "tokenizer")
    check_fields(config, {}, dict.fromkeys(("min_tokens", "max_tokens", "max_documents"), 1))
    if config.max_tokens is not None and config.max_tokens < config.min_tokens:
        raise ValueError(f"max_tokens must not be below min_tokens={config.min_tokens}: max_tokens={config.max_tokens}")
    check_fields(config, {"chat_loss": CHAT_LOSSES, "longer": ("cut", "drop"), "duplicates": DUPLICATES}, {})
    check("near_threshold", config.near_threshold, 0 < config.near_threshold <= 1, "above 0 and at most 1")
    if config.longer == "drop" and config.max_tokens is None:
        raise ValueError(f"longer=drop needs max_tokens: max_tokens={config.max_tokens}")
    mixture(config.data)
    check_output(config.output, config.overwrite, "manifest.json", "shard")


def check_output(output: str, overwrite: bool, mark: str, what: str) -> None:
    """Raises ValueError if the output stands already, unless it may be replaced and is one of ours: it holds `mark`."""
    path = Path(output)
    if path.is_symlink() or path.is_mount():  # it is replaced by a rename at the end, which neither can be
        raise ValueError(f"the output must be a folder of its own, not a link or a mount point: output={output!r}")
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"the output exists already; choose another or set overwrite: output={output!r}")
    if not (path / mark).is_file():
        raise ValueError(f"overwrite replaces an earlier {what} only, which has a {mark}: output={output!r}")
