"""Decoder layers whose element-wise work is in kernels of its own, with the order of the backward pass written out.

torch.compile makes good kernels for what it sees at once, but in a layer's backward pass matrix products stand between:
the norm's gradient reads its input twice, sums the products' gradients and the residual's in passes of their own, and
norm and SwiGLU are made again apart. Here one kernel reads what is there once and writes all that comes of it:

    SwiGLU's        grad_h, gate, up                      -> grad_gate, grad_up, h again
    RMSNorm's       x, its scale, grad_residual, 1 to 3   -> grad_x, the norm again, float32 gradient of its weight
                    gradients of the norm

`fuse` builds the layers of Llama, Mistral, Qwen2 and Qwen3 on them. For the backward pass they keep the residual
stream, one number a token, gate and up: nothing that the compiler must choose. Names, weights and the exported state
stay. Without triton, or on a CPU, the same operators do the same work in torch. Legend: B batch, T tokens, D hidden
size, F intermediate size, M = B T, N output features, K input features.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from endprompt.fast.available import kernels_module, triton_kernels
from endprompt.fast.linears import SummingLinear, add_weight_gradient

#: Classes of a family are these with Attention, MLP, RMSNorm and DecoderLayer behind.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
#: Rows of the norm that a kernel holds at once; wider ones are torch's.
WIDEST = 16384

# The same work in torch; shapes and results are the operators'


def torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    wide = gate.float()
    return (wide * wide.sigmoid() * up.float()).to(gate.dtype)


def torch_swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = gate.dtype
    grad, gate, up = grad.float(), gate.float(), up.float()
    logistic = gate.sigmoid()
    silu = gate * logistic
    out = (silu * up).to(dtype) if again else gate.new_empty(0, dtype=dtype)
    return (grad * up * (logistic + silu * (1 - logistic))).to(dtype), (grad * silu).to(dtype), out


def torch_norm(
    x_MD: torch.Tensor, added_MD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sum_MD = x_MD if added_MD is None else x_MD + added_MD
    wide = sum_MD.float()
    scale_M = torch.rsqrt(wide.square().mean(-1) + eps)
    return sum_MD, weight_D * (wide * scale_M[:, None]).to(x_MD.dtype), scale_M


def torch_norm_backward(
    x_MD: torch.Tensor,
    scale_M: torch.Tensor,
    weight_D: torch.Tensor,
    grad_sum_MD: torch.Tensor,
    grads_MD: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, exact = grads_MD[0].float(), x_MD.float() * scale_M[:, None]
    for one in grads_MD[1:]:
        grad = grad + one.float()
    unit = exact.to(x_MD.dtype)
    grad_weight = (grad * unit.float()).sum(0)
    grad = grad * weight_D.float()
    grad_x = scale_M[:, None] * (grad - exact * (grad * exact).mean(-1, keepdim=True)) + grad_sum_MD.float()
    return grad_x.to(x_MD.dtype), weight_D * unit, grad_weight


# Operators, opaque to torch.compile on purpose: it would pull them apart again. None writes into what it reads.


@torch.library.custom_op("endprompt::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of two [M, F]; made in float32 and rounded once."""
    gate, up = gate.contiguous(), up.contiguous()
    kernels = triton_kernels(gate)
    return kernels.swiglu(gate, up) if kernels else torch_swiglu(gate, up).contiguous()


swiglu.register_fake(lambda gate, up: gate.new_empty(gate.shape))


@torch.library.custom_op("endprompt::swiglu_backward", mutates_args=())
def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, silu(gate) * up); without `again` the last is empty."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    kernels = triton_kernels(gate)
    return (kernels.swiglu_backward if kernels else torch_swiglu_backward)(grad, gate, up, again)


swiglu_backward.register_fake(
    lambda grad, gate, up, again: (
        *(x.new_empty(x.shape) for x in (gate, up)),
        gate.new_empty(gate.shape if again else 0),
    )
)


@torch.library.custom_op("endprompt::rms_norm", mutates_args=())
def rms_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight * round(x * scale), float32 (M,) scale = 1 / root of (mean of squares + eps)), rounded as Llama does."""
    return _norm(x_MD.contiguous(), None, weight_D, eps)[1:]


rms_norm.register_fake(lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)))


@torch.library.custom_op("endprompt::add_rms_norm", mutates_args=())
def add_rms_norm(
    x_MD: torch.Tensor, added_MD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + added, its norm, the norm's scale): `rms_norm` of a sum that is made on the way."""
    return _norm(x_MD.contiguous(), added_MD.contiguous(), weight_D, eps)


add_rms_norm.register_fake(
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32))
)


def _norm(
    x_MD: torch.Tensor, added_MD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels = triton_kernels(x_MD) if x_MD.shape[1] <= WIDEST else None
    return (kernels.rms_norm if kernels else torch_norm)(x_MD, added_MD, weight_D, eps)


@torch.library.custom_op("endprompt::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    x_MD: torch.Tensor,
    scale_M: torch.Tensor,
    weight_D: torch.Tensor,
    grad_sum_MD: torch.Tensor,
    grads_MD: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of x, the norm of x again, float32 gradient of the weight). grads_MD: 1 to 3 gradients of the norm,
    which count together; grad_sum_MD: what else comes down to x, added to its gradient.
    """
    x_MD, grad_sum_MD, grads_MD = x_MD.contiguous(), grad_sum_MD.contiguous(), [one.contiguous() for one in grads_MD]
    kernels = triton_kernels(x_MD) if x_MD.shape[1] <= WIDEST else None
    work = kernels.rms_norm_backward if kernels else torch_norm_backward
    return work(x_MD, scale_M, weight_D, grad_sum_MD, grads_MD)


rms_norm_backward.register_fake(
    lambda x, scale, weight, *_: (
        *(x.new_empty(x.shape) for _ in range(2)),
        weight.new_empty(weight.shape, dtype=torch.float32),
    )
)


class _NormLinears(torch.autograd.Function):
    """(x + added, and for each weight its product with the norm of that sum); `added` may be None. The sum is an output
    so that its other gradient comes back here, where the kernel adds it. `weights_and_sums`: first the weights [N, K],
    then as many float32 sums or None: a weight with a sum has its gradient added there, another one that trains has it
    passed back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: torch.Tensor,
        added_MD: torch.Tensor | None,
        norm_weight_D: torch.Tensor,
        eps: float,
        *weights_and_sums: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        weights: Any = weights_and_sums[: len(weights_and_sums) // 2]
        if added_MD is None:
            sum_MD = x_MD.view_as(x_MD)
            norm_MD, scale_M = rms_norm(x_MD, norm_weight_D, eps)
            ctx.save_for_backward(x_MD, scale_M, norm_weight_D, *weights_and_sums)
        else:
            sum_MD, norm_MD, scale_M = add_rms_norm(x_MD, added_MD, norm_weight_D, eps)
            ctx.save_for_backward(sum_MD, scale_M, norm_weight_D, *weights_and_sums)
        ctx.adds = added_MD is not None
        return sum_MD, *(norm_MD @ weight.t() for weight in weights)

    @staticmethod
    def backward(ctx: Any, grad_sum_MD: torch.Tensor, *grads_MN: torch.Tensor) -> tuple[Any, ...]:
        x_MD, scale_M, norm_weight_D, *weights_and_sums = ctx.saved_tensors
        count = len(grads_MN)
        weights, sums = weights_and_sums[:count], weights_and_sums[count:]
        grads_MD = [grad_MN @ weight for grad_MN, weight in zip(grads_MN, weights)]
        grad_x, norm_MD, grad_norm_weight = rms_norm_backward(x_MD, scale_M, norm_weight_D, grad_sum_MD, grads_MD)
        grad_weights = [
            _weight_gradient(total, grad_MN, norm_MD, needed)
            for total, grad_MN, needed in zip(sums, grads_MN, ctx.needs_input_grad[4 : 4 + count])
        ]
        grad_norm_weight = grad_norm_weight.to(norm_weight_D.dtype)
        return grad_x, grad_x if ctx.adds else None, grad_norm_weight, None, *grad_weights, *(None,) * count


class _SwigluLinear(torch.autograd.Function):
    """residual + (silu(gate) * up) @ weight.T for gate and up [M, F]. keep: SwiGLU is kept for the backward pass. A
    layer's last output must be no view: FSDP2's hook is on it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual_BTN: torch.Tensor,
        weight_NF: torch.Tensor,
        total_NF: torch.Tensor | None,
        keep: bool,
        gate_MF: torch.Tensor,
        up_MF: torch.Tensor,
    ) -> torch.Tensor:
        h_MF = swiglu(gate_MF, up_MF)
        ctx.keep = keep
        ctx.save_for_backward(weight_NF, total_NF, h_MF if keep else None, gate_MF, up_MF)
        return residual_BTN + (h_MF @ weight_NF.t()).view(residual_BTN.shape)

    @staticmethod
    def backward(ctx: Any, grad_BTN: torch.Tensor) -> tuple[Any, ...]:
        grad_MN = grad_BTN.reshape(-1, grad_BTN.shape[-1])
        weight_NF, total_NF, kept_MF, gate_MF, up_MF = ctx.saved_tensors
        *grads, again_MF = swiglu_backward(grad_MN @ weight_NF, gate_MF, up_MF, not ctx.keep)
        h_MF = kept_MF if ctx.keep else again_MF
        grad_weight = _weight_gradient(total_NF, grad_MN, h_MF, ctx.needs_input_grad[1])
        return grad_BTN, grad_weight, None, None, *grads


def _weight_gradient(
    total_NK: torch.Tensor | None, grad_MN: torch.Tensor, x_MK: torch.Tensor, needed: bool
) -> torch.Tensor | None:
    """Added to the sum if there is one, else returned if it is needed."""
    if total_NK is not None:
        add_weight_gradient(total_NK, grad_MN, x_MK)
        return None
    return grad_MN.t() @ x_MK if needed else None


def norm_linears(
    x_BTD: torch.Tensor, added_BTD: torch.Tensor | None, norm: Any, linears: Sequence[nn.Linear]
) -> tuple[torch.Tensor, ...]:
    """(x + added [B, T, D], then for each linear layer its output [B, T, N] for the RMSNorm of that sum). norm: a
    module with `weight` and `variance_epsilon`. Raises ValueError for more than 3 linear layers.
    """
    if len(linears) > 3:
        raise ValueError(f"a norm is fused with 3 linear layers at most: {len(linears)}")
    shape = x_BTD.shape[:-1]
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    added_MD = None if added_BTD is None else added_BTD.reshape(x_MD.shape)
    weights, sums = [linear.weight for linear in linears], [_sum_of(linear) for linear in linears]
    outs = _NormLinears.apply(x_MD, added_MD, norm.weight, norm.variance_epsilon, *weights, *sums)
    return tuple(out.view(*shape, out.shape[-1]) for out in outs)


def swiglu_linear(
    residual_BTN: torch.Tensor, expanded: Sequence[torch.Tensor], linear: nn.Linear, keep: bool = False
) -> torch.Tensor:
    """residual [B, T, N] + output of a linear layer for silu(gate) * up; expanded: gate and up [B, T, F]. keep: see
    `fuse`.
    """
    parts = (part.reshape(-1, part.shape[-1]) for part in expanded)
    return _SwigluLinear.apply(residual_BTN, linear.weight, _sum_of(linear), keep, *parts)


def _sum_of(linear: nn.Linear) -> torch.Tensor | None:
    return linear.weight_sum if isinstance(linear, SummingLinear) else None


def fuse(model: nn.Module, keep: bool = False) -> int:
    """Give the decoder layers that can have it the fused forward pass in training; how many were changed.

    A layer of FAMILIES can if its MLP is SwiGLU of plain linear layers without biases, converted by `linears.convert`
    or not; its first half, up to attention, is fused if q, k and v are such layers too. Others, those in float8, and a
    GPU without triton stay. Call it after `convert`. keep: keep SwiGLU's output for the backward pass instead of making
    it again there: 2 bytes a token and intermediate feature in each layer.
    """
    changed = 0
    layers: list[Any] = list(model.modules())
    for layer in layers:
        family = next((name for name in FAMILIES if type(layer).__name__ == f"{name}DecoderLayer"), None)
        if family is None or not _fusable(layer, family):
            continue
        attention = layer.self_attn
        layer.fused_attention = (
            type(attention).__name__ == f"{family}Attention"
            and all(_plain(getattr(attention, name, None)) for name in PROJECTIONS)
            and type(layer.input_layernorm).__name__ == f"{family}RMSNorm"
        )
        layer.keep_swiglu = keep
        layer.__class__ = _fused_class(type(layer))  # type: ignore[arg-type]
        changed += 1
    return changed


def can_fuse(device: torch.device) -> bool:
    """Whether this device has what fused layers need: triton, if it is a GPU."""
    return device.type != "cuda" or kernels_module() is not None


def _fusable(layer: Any, family: str) -> bool:
    mlp = layer.mlp
    if type(mlp).__name__ != f"{family}MLP" or type(layer.post_attention_layernorm).__name__ != f"{family}RMSNorm":
        return False
    parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation") or not all(_plain(part) for part in parts):
        return False
    return can_fuse(mlp.down_proj.weight.device)


def _plain(linear: Any) -> bool:
    return type(linear) in (nn.Linear, SummingLinear) and linear.bias is None


@functools.cache
def _fused_class(base: Any) -> type:
    """A subclass with the fused forward, one for all layers: a forward bound to each would be compiled for each."""
    return type(f"Fused{base.__name__}", (base,), {"forward": _layer, "plain_forward": base.forward})


def _layer(
    module: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The families' own layer, fused; their own forward pass where it is not training, with a cache, or cast."""
    kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
    kwargs |= {"position_embeddings": position_embeddings}
    norm, mlp = module.post_attention_layernorm, module.mlp
    cast = hidden_states.dtype != norm.weight.dtype or torch.is_autocast_enabled(hidden_states.device.type)
    if not module.training or past_key_values is not None or cast:
        return module.plain_forward(hidden_states, past_key_values=past_key_values, **kwargs)
    if module.fused_attention:
        residual, attended = _attention(module, hidden_states, **kwargs)
    else:
        residual = hidden_states
        attended, _ = module.self_attn(module.input_layernorm(hidden_states), past_key_values=None, **kwargs)
    residual, *expanded = norm_linears(residual, attended, norm, [mlp.gate_proj, mlp.up_proj])
    return swiglu_linear(residual, expanded, mlp.down_proj, module.keep_swiglu)


def _attention(
    layer: Any, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the residual stream, what attention adds to it)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

    module = layer.self_attn
    projections = [getattr(module, name) for name in PROJECTIONS]
    residual, *made = norm_linears(hidden_states, None, layer.input_layernorm, projections)
    query, key, value = (part.unflatten(-1, (-1, module.head_dim)) for part in made)
    if hasattr(module, "q_norm"):  # Qwen3
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    # Qwen's layers say it each, Mistral's for all, Llama's never
    kwargs["sliding_window"] = getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window"):
        kwargs["sliding_window"] = getattr(module.config, "sliding_window", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    kwargs |= {"dropout": module.attention_dropout, "scaling": module.scaling}
    out, _ = attend(module, query, key, value, attention_mask, **kwargs)
    return residual, module.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous())
