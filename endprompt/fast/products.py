"""A weight's gradient added to the sum that it belongs to."""

from __future__ import annotations

import functools

import torch


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
