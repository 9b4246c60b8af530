"""Settings of `endprompt bench`."""

from dataclasses import dataclass

METHODS = {
    "endprompt": "short rows with an end prompt of 20 tokens at the end of the target window, linear scaling",
    "full": "rows of the whole target window, linear scaling, activation checkpointing, this trainer's kernels",
    "longlora": "rows of the whole target window, shifted sparse attention, LoRA r 8 on q, k, v, o with trained "
    "embeddings and norms, activation checkpointing, this trainer's kernels",
    "lora": "rows as of endprompt, LoRA r 8 on q, k, v, o with trained embeddings and norms",
    "qlora": "as lora, the other matrices of the layers in 4 bits (NF4)",
    "reference": "rows of the whole target window through transformers as it is: stock SDPA, activation checkpointing, "
    "its own loss over all logits (at 65,536 tokens they do not fit: with whole_logits=false this trainer's loss), no "
    "compilation; at the target window this is LCEG's protocol",
}


@dataclass
class BenchConfig:
    """What is measured: a method at its row length.

    Args:
        output: directory that gets results.jsonl
        shape: llama3-8b, llama2-7b, mistral-7b, llama3-1b, small or tiny
        method: endprompt, full, longlora, lora, qlora or reference
        row_tokens: physical tokens of a row
        target: the extended window
        micro_rows: rows that go through the model at once
        rows: rows of an optimizer step
        attention: as in extend
        optimizer: lean, adamw or none (forward and backward alone)
        fused: as in extend
        float8: none, exact or fast (accumulation of the backward products)
        recompute: activation checkpointing: none, selective, attention or full
        whole_logits: the reference's own loss, over all logits at once; if not, this trainer's
        compile: torch.compile each decoder layer
        timed: micro-batches that are timed, after two that are not (one, if only one is timed)
        whole_step: time one whole optimizer step instead
        name: the task of the rows
    """

    output: str = "bench"
    shape: str = "llama3-8b"
    method: str = "endprompt"
    row_tokens: int = 8192
    target: int = 65536
    micro_rows: int = 2
    rows: int = 64
    attention: str = "sdpa"
    optimizer: str = "lean"
    fused: bool = True
    float8: str = "none"
    recompute: str = "selective"
    whole_logits: bool = True
    compile: bool = True
    timed: int = 3
    whole_step: bool = False
    name: str = ""
