"""Activation checkpointing of decoder layers: what is kept for the backward pass and what is computed again.

none keeps everything. full keeps each layer's input and runs the layer's forward pass again; attention keeps what
attention gives as well, so that its forward pass does not run again. selective keeps what is expensive to make (matrix
products, attention) and computes the rest again (norms, activations, rotations).
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from endprompt.fast.flash4 import flash4

ATTENTION = (
    *("_flash_attention_forward", "_scaled_dot_product_flash_attention_for_cpu"),
    *(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
)
KEPT = {"attention": ATTENTION, "selective": ("mm", "addmm", "bmm", "_scaled_mm", *ATTENTION)}


@functools.cache
def _kept_operators(kind: str) -> frozenset[Any]:
    aten = (getattr(torch.ops.aten, name).default for name in KEPT[kind] if hasattr(torch.ops.aten, name))
    return frozenset((*aten, flash4._opoverload))


def _policy(kind: str, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _kept_operators(kind) else CheckpointPolicy.PREFER_RECOMPUTE


#: By kind, so that layers share what is compiled.
_CONTEXTS: dict[str, Any] = {
    kind: functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, kind)) for kind in KEPT
}


def checkpoint_layers(layers: Iterable[torch.nn.Module], kind: str) -> None:
    """Change the layers' forward in place. kind: none, selective, attention or full."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind in KEPT:
        options["context_fn"] = _CONTEXTS[kind]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, **options)


def memory_budget(float8: str, fused: bool = False) -> float:
    """The share of a compiled layer's activations that torch's partitioner may keep for `selective`.

    Compiled layers need no checkpointing to run their element-wise work again: the partitioner plans it, in steps. A
    budget just below 1 gives up norms and activation functions and no more, which in bfloat16 leaves 70% of what it
    would keep at 1; only a budget below that share runs attention and products again. In float8 norms and activation
    functions are given up already at 1, so every budget below it costs products. Fused layers make their norms and
    activation functions again themselves: at 1 they keep as much as others at 0.99, and below it attention runs again.
    """
    return 1.0 if fused or float8 != "none" else 0.99
