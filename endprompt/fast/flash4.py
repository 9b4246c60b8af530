"""The kernels of flash-attn-4 as operators of torch: as they come torch.compile would cut a layer into pieces at the
call. The count of FLOPs is for activation checkpointing: what seems to cost nothing would be computed again.

Legend: B batch, T tokens, H query heads, G key/value heads, D head dim.
"""

import importlib
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

MODULE = "flash_attn.cute.interface"


@torch.library.custom_op("endprompt::flash4", mutates_args=())
def flash4(
    query_BTHD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGD: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(causal attention [B, T, H, D], log-sum-exp of its logits [B, H, T] in float32)."""
    flash: Any = importlib.import_module(MODULE)
    out, lse = flash.flash_attn_func(
        query_BTHD, key_BTGD, value_BTGD, softmax_scale=scaling, causal=True, return_lse=True
    )
    return out.contiguous(), lse.contiguous()


flash4.register_fake(
    lambda query, *_: (
        query.new_empty(query.shape),
        query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=torch.float32),
    )
)


@torch.library.custom_op("endprompt::flash4_backward", mutates_args=())
def flash4_backward(
    grad_BTHD: torch.Tensor,
    query_BTHD: torch.Tensor,
    key_BTGD: torch.Tensor,
    value_BTGD: torch.Tensor,
    out_BTHD: torch.Tensor,
    lse_BHT: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flash: Any = importlib.import_module(MODULE)
    grads = flash._flash_attn_bwd(query_BTHD, key_BTGD, value_BTGD, out_BTHD, grad_BTHD, lse_BHT, scaling, True)
    query, key, value = (grad.contiguous() for grad in grads[:3])
    return query, key, value


flash4_backward.register_fake(
    lambda grad, query, key, value, *_: (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
    return *flash4_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scaling), None


flash4.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.endprompt.flash4)
def _flops(query: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, tokens, heads, width = query
    return 2 * batch * heads * tokens * tokens * width  # two products of 2 T T D, of which causal attention needs half


@register_flop_formula(torch.ops.endprompt.flash4_backward)
def _flops_backward(grad: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _flops(grad) * 5 // 2


def attend(
    query_BTHD: torch.Tensor, key_BTGD: torch.Tensor, value_BTGD: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention [B, T, H, D]; scaling: default D ** -0.5."""
    scaling = query_BTHD.shape[-1] ** -0.5 if scaling is None else scaling
    return flash4(query_BTHD.contiguous(), key_BTGD.contiguous(), value_BTGD.contiguous(), scaling)[0]
