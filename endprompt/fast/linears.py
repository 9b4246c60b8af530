"""Linear layers for the lean optimizer: weight gradients summed where they are made, products in float8 if asked.

`convert` changes the decoder layers' nn.Linear in place; names, weights and the exported state stay. In bfloat16 the
weight gradient is added to the float32 sum `weight.main_grad` by the matrix product itself (beta = 1): this saves its
memory and one pass over all gradients a micro-batch.

In float8 a layer's three products (output, input gradient, weight gradient) run on float8 tensor cores with one scale a
tensor, as torchao's "tensorwise" recipe does: e4m3 for activations and weights, e5m2 for gradients, the largest
magnitude mapped to the format's largest number. Weights are converted once a step, not once a micro-batch. Embeddings,
attention and the head stay in bfloat16. `exact` accumulation promotes partial sums to
float32 in the two backward products; `fast` leaves them in the tensor cores' shorter accumulators everywhere. Legend: M
tokens, K input features, N output features.
"""

import functools
from typing import Any

import torch
from torch import nn

from endprompt.fast.float8 import ACTIVATION, FLOAT8, GRADIENT, both_layouts, fused, scaled_product, to_float8


def convert(model: nn.Module, float8: str = "none", sums: bool = True) -> int:
    """Change every bias-free nn.Linear in the decoder layers that the lean optimizer trains; how many were changed.

    Call it after the optimizer, which makes the sums. sums: False for a model that is about to be sharded, whose
    gradients are passed back to be summed over the processes; its layers in float8 convert the weight as it is gathered
    for each pass. Raises ValueError for an unknown float8 or none to change.
    """
    if float8 not in FLOAT8:
        raise ValueError(f"float8 must be one of {', '.join(FLOAT8)}: float8={float8!r}")
    changed = 0
    for name, module in model.named_modules():
        if ".layers." not in f".{name}." or type(module) is not nn.Linear or module.bias is not None:
            continue
        if (getattr(module.weight, "main_grad", None) is None) == sums:
            continue
        if sums:
            module.register_buffer("weight_sum", module.weight.main_grad, persistent=False)
        if float8 == "none":
            module.__class__ = SummingLinear
        else:
            if module.in_features % 16 or module.out_features % 16:
                raise ValueError(f"float8 needs sizes that are multiples of 16: {name} is {tuple(module.weight.shape)}")
            module.__class__ = Float8Linear
            module.fast_backward = float8 == "fast"
            if sums:
                module.convert_weight()
        changed += 1
    if not changed:
        raise ValueError("no linear layer to convert: the lean optimizer must be made first (optimizer=lean)")
    return changed


def after_step(model: nn.Module) -> None:
    """Convert the new weights to float8; for models without float8 layers there is nothing to do."""
    for module in model.modules():
        if isinstance(module, Float8Linear) and "weight_sum" in module._buffers:
            module.convert_weight()


class SummingLinear(nn.Linear):
    """nn.Linear whose backward adds the weight gradient to `weight_sum`."""

    weight_sum: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Summing.apply(x, self.weight, self.weight_sum)


class Float8Linear(nn.Linear):
    """A linear layer in float8; weight8_NK and its transpose are copies, made anew after each optimizer step. Without a
    sum (sharded) there are no copies: each pass converts the weight that is whole for it.
    """

    COPIES = ("weight8_NK", "weight8_KN", "weight_scale")
    fast_backward: bool

    @torch.no_grad()
    def convert_weight(self) -> None:
        converted = fused(both_layouts, self.weight.device)(self.weight)
        for name, value in zip(self.COPIES, converted):
            if name in self._buffers:
                getattr(self, name).copy_(value)
            else:
                self.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Float8.apply(
            x,
            self.weight,
            *(self._buffers.get(name) for name in ("weight_sum", *self.COPIES)),
            self.fast_backward,
        )


@torch.library.custom_op("endprompt::add_weight_gradient", mutates_args=("total_NK",))
def add_weight_gradient(total_NK: torch.Tensor, grad_MN: torch.Tensor, x_MK: torch.Tensor) -> None:
    add_product(total_NK, grad_MN, x_MK)


class _Summing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_NK: torch.Tensor, total_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight_NK, total_NK)
        return (x.reshape(-1, x.shape[-1]) @ weight_NK.t()).view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight_NK, total_NK = ctx.saved_tensors
        grad_MN, x_MK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        add_weight_gradient(total_NK, grad_MN, x_MK)
        return (grad_MN @ weight_NK).view(x.shape), None, None


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_NK: torch.Tensor,
        total_NK: torch.Tensor | None,
        weight8_NK: torch.Tensor | None,
        weight8_KN: torch.Tensor | None,
        weight_scale: torch.Tensor | None,
        fast: bool,
    ) -> torch.Tensor:
        x8_MK, x_scale = to_float8(x.reshape(-1, x.shape[-1]), ACTIVATION)
        if weight8_NK is None or weight_scale is None:
            weight8_NK, weight_scale = to_float8(weight_NK, ACTIVATION)
        kept = weight_NK if weight8_KN is None else weight8_KN
        ctx.save_for_backward(x8_MK, x_scale, kept, weight_scale, total_NK)
        ctx.fast, ctx.shape = fast, x.shape
        out = scaled_product(x8_MK, weight8_NK.t(), x_scale, weight_scale, x.dtype, True)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x8_MK, x_scale, weight8_KN, weight_scale, total_NK = ctx.saved_tensors
        if total_NK is None:
            weight8_KN = to_float8(weight8_KN, ACTIVATION, weight_scale)[0].t().contiguous()
        grad8_MN, grad_scale = to_float8(grad.reshape(-1, grad.shape[-1]), GRADIENT)
        grad_x = scaled_product(grad8_MN, weight8_KN.t(), grad_scale, weight_scale, grad.dtype, ctx.fast)
        grad8_NM, x8_KM = grad8_MN.t().contiguous(), x8_MK.t().contiguous()
        product = scaled_product(grad8_NM, x8_KM.t(), grad_scale, x_scale, grad.dtype, ctx.fast)
        if total_NK is not None:
            total_NK.add_(product)
        return grad_x.reshape(ctx.shape), product if total_NK is None else None, *(None,) * 5


def add_product(total_NK: torch.Tensor, a_MN: torch.Tensor, b_MK: torch.Tensor) -> None:
    """total += a.T @ b in float32, in place; on CUDA one matrix product that reads bfloat16 and adds in float32."""
    if total_NK.device.type == "cuda" and total_NK.dtype != a_MN.dtype:
        if not _adds_in_float32():
            total_NK += a_MN.t() @ b_MK
            return
        torch.addmm(total_NK, a_MN.t(), b_MK, out_dtype=total_NK.dtype, out=total_NK)
    else:
        total_NK.addmm_(a_MN.t().to(total_NK.dtype), b_MK.to(total_NK.dtype))


@functools.cache
def _adds_in_float32() -> bool:
    """Whether this device's addmm reads bfloat16 and adds to a float32 tensor in place; tried once."""
    a = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    total = torch.full((16, 16), 0.5, device="cuda")
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 16.5).all())
