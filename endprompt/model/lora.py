"""LoRA with trained embeddings and norms, as LongLoRA trains (Chen et al. 2023, arXiv:2309.12307).

Low-rank updates of the attention projections, made by peft, beside embeddings and norms that train whole. Its other
half, shifted sparse attention, is the attention `shifted`. An export has the updates merged, and attends to everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Attention projections by the names that transformers' decoders give them (Phi-3 has the first three in one).
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


def add_lora(model: PreTrainedModel, rank: int, alpha: int, also: Sequence[str], seed: int) -> None:
    """Freeze the model but for LoRA updates of its attention projections and parameters whose name holds one of `also`.

    Raises ValueError if the model has no such projections.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        layers.setdefault(name.rpartition(".")[2], []).append(module)
    targets = [name for name in PROJECTIONS if name in layers]
    if not targets:
        raise ValueError(f"lora_rank={rank}: {type(model).__name__} has none of the projections {PROJECTIONS}")
    torch.manual_seed(seed)
    with _real([layer for name in targets for layer in layers[name]]):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or any(word in name for word in also))


@contextlib.contextmanager
def _real(layers: Sequence[Any]) -> Iterator[None]:
    """Weights on meta are one repeated number on the CPU meanwhile: peft makes its own where those of the layer are.

    On meta the first values of the updates would be lost, and no checkpoint has them.
    """
    unread = {layer: layer.weight for layer in layers if layer.weight.is_meta}
    for layer, weight in unread.items():
        layer.weight = torch.nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    yield
    for layer, weight in unread.items():
        layer.weight = weight


def merge(weights: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The weights with W + scale * B A in the place of each W that has an update; scale is alpha / rank.

    The sum is made in float32 and rounded once, to the dtype of W.
    """
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            merged[name] = weight
            continue
        before, after = name.split(".base_layer.")
        if after == "weight":
            a, b = (weights[f"{before}.lora_{part}.default.weight"].float() for part in "AB")
            weight = (weight.float() + scale * (b @ a)).to(weight.dtype)
        merged[f"{before}.{after}"] = weight
    return merged
