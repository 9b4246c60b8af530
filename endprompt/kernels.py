# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for RMSNorm and SwiGLU of a decoder layer; `endprompt.fused` decides when they run.

They move memory and do little else, so what matters is that each number is read and written once, 16 bytes at a time,
with enough of them on the way. All arithmetic is in float32, whatever the tensors hold. The launches are for an H200:
`python -m endprompt.fused_bench` measures them beside others.

RMSNorm (Zhang & Sennrich 2019), as Llama rounds it:  r = (mean(x^2) + eps)^-1/2,  n = w * round(x * r)
    dx = r * (g - x r mean(g x r)),  g = w dn;   dw = sum over tokens of dn * round(x * r)
SwiGLU (Shazeer 2020):  h = gate * s(gate) * up,  s the logistic function
    dgate = dh * up * s (1 + gate (1 - s)),  dup = dh * gate * s

Imports triton, so it is imported only where that is there.
Legend: M tokens, D hidden size, S entries of a whole tensor.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    block: entries a program works on (element-wise kernels); warps: of a program. programs: of the norm's backward
    kernel, on each multiprocessor at once; stages: of its loop over tokens, more than 1 to load tokens ahead.
    """

    block: int = 0
    warps: int = 8
    programs: int = 1
    stages: int = 1


SWIGLU = Launch(block=2048, warps=8)
SWIGLU_BACKWARD = Launch(block=2048, warps=8)
#: Of rows of 4,096 numbers; wider ones take more warps, narrower ones fewer.
NORM = Launch(warps=4)
NORM_BACKWARD = Launch(warps=8, programs=2)


def warps_for(width: int, launch: Launch) -> int:
    """Warps for rows of `width`, a power of two: the launch's at 4,096, in proportion elsewhere, 1 to 16."""
    return max(1, min(16, launch.warps * width // 4096))


def swiglu(gate_S: torch.Tensor, up_S: torch.Tensor, launch: Launch = SWIGLU) -> torch.Tensor:
    out_S = torch.empty_like(gate_S)
    size = gate_S.numel()
    with _on(gate_S):
        _swiglu[(triton.cdiv(size, launch.block),)](
            gate_S, up_S, out_S, size, BLOCK=launch.block, EVEN=size % launch.block == 0, num_warps=launch.warps
        )
    return out_S


def swiglu_backward(
    grad_S: torch.Tensor, gate_S: torch.Tensor, up_S: torch.Tensor, again: bool, launch: Launch = SWIGLU_BACKWARD
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, h made again or, without `again`, an empty tensor)."""
    grad_gate_S, grad_up_S = torch.empty_like(gate_S), torch.empty_like(up_S)
    out_S = torch.empty_like(gate_S) if again else gate_S.new_empty(0)
    size = gate_S.numel()
    with _on(gate_S):
        _swiglu_backward[(triton.cdiv(size, launch.block),)](
            *(grad_S, gate_S, up_S, grad_gate_S, grad_up_S, out_S, size),
            AGAIN=again,
            BLOCK=launch.block,
            EVEN=size % launch.block == 0,
            num_warps=launch.warps,
        )
    return grad_gate_S, grad_up_S, out_S


def rms_norm(
    x_MD: torch.Tensor, added_MD: torch.Tensor | None, weight_D: torch.Tensor, eps: float, launch: Launch = NORM
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + added, or an empty tensor without `added`; its norm; float32 (M,): 1 / root mean square of each token)."""
    rows, size = x_MD.shape
    out_MD, scale_M = torch.empty_like(x_MD), x_MD.new_empty(rows, dtype=torch.float32)
    sum_MD = x_MD.new_empty(0) if added_MD is None else torch.empty_like(x_MD)
    width = triton.next_power_of_2(size)
    with _on(x_MD):
        _rms_norm[(rows,)](
            *(x_MD, x_MD if added_MD is None else added_MD, weight_D, sum_MD, out_MD, scale_M, eps),
            ADD=added_MD is not None,
            D=size,
            WIDTH=width,
            num_warps=warps_for(width, launch),
        )
    return sum_MD, out_MD, scale_M


def rms_norm_backward(
    x_MD: torch.Tensor,
    scale_M: torch.Tensor,
    weight_D: torch.Tensor,
    grad_sum_MD: torch.Tensor,
    grads_MD: list[torch.Tensor],
    launch: Launch = NORM_BACKWARD,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of x, the norm made again, float32 (D,): gradient of the weight).

    grads_MD: 1 to 3 gradients of the norm, which are added; grad_sum_MD: the gradient of x by another way, added too.
    """
    rows, size = x_MD.shape
    width = triton.next_power_of_2(size)
    warps = warps_for(width, launch)
    programs = min(rows, launch.programs * _multiprocessors(x_MD) * max(1, launch.warps // warps))
    grad_x_MD, out_MD = torch.empty_like(x_MD), torch.empty_like(x_MD)
    parts_PD = x_MD.new_empty((programs, size), dtype=torch.float32)
    one, two, three = (*grads_MD, *(grads_MD[0],) * (3 - len(grads_MD)))
    with _on(x_MD):
        _rms_norm_backward[(programs,)](
            *(x_MD, scale_M, weight_D, grad_sum_MD, one, two, three, grad_x_MD, out_MD, parts_PD, rows),
            GRADS=len(grads_MD),
            D=size,
            WIDTH=width,
            STAGES=launch.stages,
            num_warps=warps,
        )
    return grad_x_MD, out_MD, parts_PD.sum(0)


def _on(x: torch.Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _multiprocessors(x: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 2


@triton.jit
def _swiglu(gate_S, up_S, out_S, size, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = None if EVEN else at < size - start
    gate = tl.load(gate_S + start + at, mask=inside).to(tl.float32)
    up = tl.load(up_S + start + at, mask=inside).to(tl.float32)
    tl.store(out_S + start + at, (gate * tl.sigmoid(gate) * up).to(out_S.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    grad_S,
    gate_S,
    up_S,
    grad_gate_S,
    grad_up_S,
    out_S,
    size,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = None if EVEN else at < size - start
    grad = tl.load(grad_S + start + at, mask=inside).to(tl.float32)
    gate = tl.load(gate_S + start + at, mask=inside).to(tl.float32)
    up = tl.load(up_S + start + at, mask=inside).to(tl.float32)
    logistic = tl.sigmoid(gate)
    silu = gate * logistic
    grad_gate = grad * up * (logistic + silu * (1.0 - logistic))
    tl.store(grad_gate_S + start + at, grad_gate.to(grad_gate_S.dtype.element_ty), mask=inside)
    tl.store(grad_up_S + start + at, (grad * silu).to(grad_up_S.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(out_S + start + at, (silu * up).to(out_S.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm(
    x_MD, added_MD, weight_D, sum_MD, out_MD, scale_M, eps, ADD: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = None if WIDTH == D else column < D
    zero = None if WIDTH == D else 0.0
    at = row * D  # 64 bits for the row alone: the columns' need but 32
    x = tl.load(x_MD + at + column, mask=inside, other=zero)
    dtype = x.dtype
    if ADD:
        x = (x.to(tl.float32) + tl.load(added_MD + at + column, mask=inside, other=zero).to(tl.float32)).to(dtype)
        tl.store(sum_MD + at + column, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_D + column, mask=inside, other=zero).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(scale_M + row, scale)
    unit = (x * scale).to(dtype).to(tl.float32)
    tl.store(out_MD + at + column, (weight * unit).to(dtype), mask=inside)


@triton.jit
def _rms_norm_backward(
    x_MD,
    scale_M,
    weight_D,
    grad_sum_MD,
    one_MD,
    two_MD,
    three_MD,
    grad_x_MD,
    out_MD,
    parts_PD,
    rows,
    GRADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # and so is the loop's row
    column = tl.arange(0, WIDTH)
    inside = None if WIDTH == D else column < D
    zero = None if WIDTH == D else 0.0
    weight = tl.load(weight_D + column, mask=inside, other=zero).to(tl.float32)
    part = tl.zeros([WIDTH], dtype=tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        at = row * D
        stored = tl.load(x_MD + at + column, mask=inside, other=zero)
        grad = tl.load(one_MD + at + column, mask=inside, other=zero).to(tl.float32)
        if GRADS > 1:
            grad += tl.load(two_MD + at + column, mask=inside, other=zero).to(tl.float32)
        if GRADS > 2:
            grad += tl.load(three_MD + at + column, mask=inside, other=zero).to(tl.float32)
        grad_sum = tl.load(grad_sum_MD + at + column, mask=inside, other=zero).to(tl.float32)
        scale = tl.load(scale_M + row)
        exact = stored.to(tl.float32) * scale
        unit = exact.to(stored.dtype).to(tl.float32)
        part += grad * unit
        grad = grad * weight
        along = tl.sum(grad * exact, axis=0) / D
        tl.store(out_MD + at + column, (weight * unit).to(out_MD.dtype.element_ty), mask=inside)
        grad_x = scale * (grad - exact * along) + grad_sum
        tl.store(grad_x_MD + at + column, grad_x.to(grad_x_MD.dtype.element_ty), mask=inside)
    tl.store(parts_PD + program * D + column, part, mask=inside)
