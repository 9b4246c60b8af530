"""Experts: the loss that keeps their load even, how many tokens each is sent, and routers that stay as they are.

The loss is the family's own (Switch Transformers, Fedus et al. 2021, arXiv:2101.03961, eq. 4), taken of each row by
itself and averaged over the rows of a step, so that it depends neither on micro-batches nor on the number of processes.
For a batch of one row it is what transformers adds to its loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from endprompt.config import ExtendConfig
    from endprompt.train.objective import Objective


def layers_of_experts(model: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """(experts, their router) of each layer that has both."""
    found = []
    for module in model.modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if isinstance(experts, torch.nn.Module) and isinstance(router, torch.nn.Module):
            found.append((experts, router))
    return found


def freeze_routers(model: torch.nn.Module) -> None:
    """Raises ValueError for a model without routers."""
    routers = [router for _, router in layers_of_experts(model)]
    if not routers:
        raise ValueError(f"freeze_router needs a model with experts: {type(model).__name__} has no router")
    for router in routers:
        router.requires_grad_(False)


def balance_weight(config: ExtendConfig, model: PreTrainedModel) -> float:
    """The weight of the loss: as set, else as the model's config says, which is 0 unless it asks for router logits.
    Raises ValueError if there is one, and the family's code has no such loss.
    """
    settings = model.config.get_text_config()
    weight = config.router_loss
    if weight is None:
        asked = getattr(settings, "output_router_logits", False)
        weight = float(getattr(settings, "router_aux_loss_coef", 0.0) or 0.0) if asked else 0.0
    if weight and not (layers_of_experts(model) and _family_loss(model)):
        raise ValueError(f"{settings.model_type} has no loss of its own that balances experts: router_loss={weight:g}")
    return weight


def _family_loss(model: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)


def balance_loss(model: Any, logits_of_layers: tuple[torch.Tensor, ...], rows: int) -> torch.Tensor:
    """The sum over rows of each row's loss. logits_of_layers: the routers', [B T, experts] of each layer."""
    loss, settings = _family_loss(model), model.config.get_text_config()
    assert loss is not None
    counts = getattr(model, "num_experts", None) or settings.num_local_experts, model.num_experts_per_tok
    by_row = zip(*(logits.chunk(rows) for logits in logits_of_layers))
    return torch.stack([loss(row, *counts) for row in by_row]).sum()


@torch.no_grad()
def tokens_an_expert(objective: Objective, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> list[int]:
    """Tokens that each expert is sent, over the layers of a forward pass; empty for models whose experts take all.
    Compiled layers run as they are written meanwhile. Every process of a sharded model must call this.
    """
    model, counted = objective.model, {}
    hooks = []

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) > 1 and isinstance(args[1], torch.Tensor) and not args[1].is_floating_point():
            size: Any = getattr(module, "num_experts", None) or args[1].max() + 1
            counted[module] = torch.bincount(args[1].flatten(), minlength=int(size))

    layers = [module for module in model.modules() if getattr(module, "_compiled_call_impl", None) is not None]
    compiled = [layer._compiled_call_impl for layer in layers]
    try:
        for layer in layers:
            layer._compiled_call_impl = None
        hooks = [experts.register_forward_pre_hook(count) for experts, _ in layers_of_experts(model)]
        if hooks:
            given = objective.given(ids_BT, positions_BT)
            objective(ids_BT, positions_BT, ids_BT, instead=lambda: model.base_model(**given)[0])
    finally:
        for hook in hooks:
            hook.remove()
        for layer, implementation in zip(layers, compiled):
            layer._compiled_call_impl = implementation
    return torch.stack(list(counted.values())).sum(0).tolist() if counted else []
