"""Matrix products on float8 tensor cores with one scale a tensor: e4m3 for activations and weights, e5m2 for gradients.

Legend: M rows, K inside of a product, N columns.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

ACTIVATION, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
FLOAT8 = ("none", "exact", "fast")


def to_float8(
    x: torch.Tensor, dtype: torch.dtype, known: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in float8, the float32 scalar that it must be multiplied by to give x). known: that scalar of the same x."""
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().amax().float().clamp(min=1e-12) if known is None else known.reciprocal()
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal()


def both_layouts(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight in float8, its transpose in rows, the scale)."""
    weight8, scale = to_float8(weight, ACTIVATION)
    return weight8, weight8.t().contiguous(), scale


def scaled_product(
    a_MK: torch.Tensor, b_KN: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    """a @ b of float8 matrices; a in rows, b in columns (the transpose of a contiguous matrix)."""
    if a_MK.device.type != "cuda":
        return ((a_MK.float() @ b_KN.float()) * (a_scale * b_scale)).to(dtype)
    return torch._scaled_mm(a_MK, b_KN, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


@functools.cache
def fused(convert: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """On CUDA two fused kernels (the largest magnitude, then the copies); on the CPU as written."""
    return torch.compile(convert, dynamic=True) if device.type == "cuda" else convert
