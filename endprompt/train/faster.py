"""What makes a model train fast, in one call: fused and summing layers, float8, recomputation, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from endprompt.config import ExtendConfig
from endprompt.distributed import say, shard_starts
from endprompt.fast import can_fuse, fuse, linears
from endprompt.model.load import decoder_layers
from endprompt.train.recompute import checkpoint_layers, memory_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_fast(
    model: PreTrainedModel, config: ExtendConfig, device: torch.device, balanced: bool = False
) -> dict[str, float]:
    """Change the model's layers in place as the configuration asks; settings of torch's compiler while a step runs.

    Call it when the optimizer is made: the lean one has the sums that converted layers add to; a sharded model's are
    converted before (`convert`). Fused layers come before recomputation, which wraps the forward pass that they have by
    then. balanced: the logits of routers are read, which compiled layers do not give.
    """
    sharded = any(shard_starts(parameter) is not None for parameter in model.parameters())
    if config.optimizer == "lean" and not sharded:
        convert(model, config, device)
    fused = any(hasattr(layer, "keep_swiglu") for layer in decoder_layers(model))
    compiled = config.compile == "layers" or (
        config.compile == "auto" and device.type == "cuda" and not balanced and config.quantize == "none"
    )
    budget: dict[str, float] = {}
    if compiled and config.checkpointing == "selective":
        budget = {"activation_memory_budget": memory_budget(config.float8, fused)}
    else:
        checkpoint_layers(decoder_layers(model), config.checkpointing)
    if compiled:
        for layer in decoder_layers(model):
            layer.compile()
    return budget


def convert(model: PreTrainedModel, config: ExtendConfig, device: torch.device, sums: bool = True) -> None:
    """Change the layers for the lean optimizer, and fuse those that can be if that is asked for. sums: False for a
    model that is about to be sharded, whose gradients are not summed where they are made.
    """
    # LoRA's frozen matrices have no sums, and its layers do more than a product
    wanted = config.fused and config.float8 == "none" and not config.lora_rank and can_fuse(device)
    if sums or config.float8 != "none":
        linears.convert(model, config.float8, sums)
    if wanted and not fuse(model, keep=config.checkpointing == "none"):
        say("fused: no layer of this model can be, they stay as they are")
