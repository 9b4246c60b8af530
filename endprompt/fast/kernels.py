# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for RMSNorm, SwiGLU and rotations of a decoder layer, for the loss and the lean optimizer's update.

`fast.layers`, `train.loss` and `fast.lean` decide when they run, and have the same work in torch. They move memory and
do little else, so each number is read and written once, 16 bytes at a time, with enough of them on the way; arithmetic
is in float32 whatever the tensors hold. The launches are for an H200, where
`paper_figures/data/measured/pages/h200_kernels.jsonl` has them measured beside others.

    RMSNorm (Zhang & Sennrich 2019), as Llama rounds it:  r = (mean(x^2) + eps)^-1/2,  n = w * round(x * r)
        dx = r * (g - x r mean(g x r)),  g = w dn;   dw = sum over tokens of dn * round(x * r)
    SwiGLU (Shazeer 2020):  h = gate * s(gate) * up,  s the logistic function
        dgate = dh * up * s (1 + gate (1 - s)),  dup = dh * gate * s
    RoPE:  y1 = x1 cos1 - x2 sin1,  y2 = x2 cos2 + x1 sin2  for the halves of a head
    Cross-entropy:  l = w (log sum exp z - z[y]),  dz = w (softmax z - onehot y)

Of the update `lean._update` is the definition; its logarithms and powers are the GPU's fast ones here: a code or a
weight on the edge between two roundings can fall to the other side. Imports triton. Legend: M tokens, D hidden size, F
intermediate size, V vocabulary, H query heads, G key/value heads.
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
    """How a kernel is launched. block: entries a program works on (element-wise kernels); warps: of a program;
    programs: on each multiprocessor at once, of kernels that loop; stages: of their loops, more than 1 to load ahead.
    """

    block: int = 0
    warps: int = 8
    programs: int = 1
    stages: int = 1


SWIGLU = Launch(block=2048, warps=8)
#: Of rows of 4,096 numbers; wider ones take more warps, narrower ones fewer.
NORM = Launch(warps=4)
NORM_BACKWARD = Launch(programs=2)
ROTATE = Launch(warps=4)
CROSS_ENTROPY = Launch(block=32768, warps=32)
#: block: here blocks of the optimizer's moments.
LEAN_UPDATE = Launch(block=8)


def warps_for(width: int, launch: Launch) -> int:
    """Warps for rows of `width`, a power of two: the launch's at 4,096, in proportion elsewhere, 1 to 16."""
    return max(1, min(16, launch.warps * width // 4096))


def swiglu(gate_MF: torch.Tensor, up_MF: torch.Tensor) -> torch.Tensor:
    out_MF = torch.empty_like(gate_MF)
    rows, size = gate_MF.shape
    with _on(gate_MF):
        _swiglu[(rows * triton.cdiv(size, SWIGLU.block),)](
            *(gate_MF, up_MF, out_MF), F=size, BLOCK=SWIGLU.block, num_warps=SWIGLU.warps
        )
    return out_MF


def swiglu_backward(
    grad_MF: torch.Tensor,
    gate_MF: torch.Tensor,
    up_MF: torch.Tensor,
    again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, h made again or, without `again`, an empty tensor)."""
    rows, size = gate_MF.shape
    grad_gate_MF, grad_up_MF = torch.empty_like(grad_MF), torch.empty_like(grad_MF)
    out_MF = grad_MF.new_empty((rows, size) if again else 0)
    with _on(gate_MF):
        _swiglu_backward[(rows * triton.cdiv(size, SWIGLU.block),)](
            *(grad_MF, gate_MF, up_MF, grad_gate_MF, grad_up_MF, out_MF),
            AGAIN=again,
            F=size,
            BLOCK=SWIGLU.block,
            num_warps=SWIGLU.warps,
        )
    return grad_gate_MF, grad_up_MF, out_MF


def rms_norm(
    x_MD: torch.Tensor, added_MD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
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
            num_warps=warps_for(width, NORM),
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
    """(gradient of x, the norm made again, float32 (D,): gradient of the weight). grads_MD: 1 to 3 gradients of the
    norm, which are added; grad_sum_MD: the gradient of x by another way, added too.
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
            num_warps=warps,
        )
    return grad_x_MD, out_MD, parts_PD.sum(0)


def rotate(
    query_BTHD: torch.Tensor, key_BTGD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys after RoPE. cos, sin: B may be 1. All contiguous."""
    (batch, tokens, heads, width), groups = query_BTHD.shape, key_BTGD.shape[2]
    outs = torch.empty_like(query_BTHD), torch.empty_like(key_BTGD)
    with _on(query_BTHD):
        _rotate[(batch * tokens,)](
            *(query_BTHD, key_BTGD, cos_BTD, sin_BTD, *outs, tokens, 0 if cos_BTD.shape[0] == 1 else tokens * width),
            H=heads,
            G=groups,
            HALF=width // 2,
            HEADS=triton.next_power_of_2(heads),
            GROUPS=triton.next_power_of_2(groups),
            LANES=triton.next_power_of_2(width // 2),
            num_warps=ROTATE.warps,
        )
    return outs


def cross_entropy(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor, launch: Launch = CROSS_ENTROPY
) -> torch.Tensor:
    """float32 (N,): weighted losses. The logits are overwritten by their gradient."""
    rows, size = logits_NV.shape
    block = min(launch.block, max(1024, triton.next_power_of_2(size)))
    losses_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    with _on(logits_NV):
        _cross_entropy[(rows,)](
            *(logits_NV, labels_N, weights_N, losses_N),
            V=size,
            BLOCK=block,
            SIDE_BY_SIDE=8,
            num_warps=max(1, launch.warps * block // launch.block),
        )
    return losses_N


def lean_update(
    weight_S: torch.Tensor,
    grad_S: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    number: torch.Tensor,
    scale: torch.Tensor,
    seed: torch.Tensor,
    levels: tuple[int, int],
    octaves: tuple[float, float],
    first: int = 0,
) -> None:
    """One step of the lean optimizer on S entries of a parameter, in place. moments: codes of the first one and their
    scales, codes of the root of the second and theirs, in blocks; the last may be longer than the parameter. levels,
    octaves: of the two codes. first: index of the first entry.
    """
    size, block = weight_S.numel(), moments[0].shape[1]
    with _on(weight_S):
        _lean_update[(triton.cdiv(triton.cdiv(size, block), LEAN_UPDATE.block),)](
            *(weight_S, grad_S, *moments, number, scale, seed, size, first),
            STOCHASTIC=weight_S.dtype == torch.bfloat16,
            LEVELS_FIRST=levels[0],
            LEVELS_ROOT=levels[1],
            OCTAVES_FIRST=octaves[0],
            OCTAVES_ROOT=octaves[1],
            BLOCK=block,
            BLOCKS=LEAN_UPDATE.block,
            num_warps=LEAN_UPDATE.warps,
        )


def _on(x: torch.Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _multiprocessors(x: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 2


@triton.jit
def _swiglu(gate_MF, up_MF, out_MF, F: tl.constexpr, BLOCK: tl.constexpr):
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = None if F % BLOCK == 0 else at < F
    gate = tl.load(gate_MF + row * F + at, mask=inside).to(tl.float32)
    up = tl.load(up_MF + row * F + at, mask=inside).to(tl.float32)
    tl.store(out_MF + row * F + at, (gate * tl.sigmoid(gate) * up).to(out_MF.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    grad_MF,
    gate_MF,
    up_MF,
    grad_gate_MF,
    grad_up_MF,
    out_MF,
    AGAIN: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = None if F % BLOCK == 0 else at < F
    grad = tl.load(grad_MF + row * F + at, mask=inside).to(tl.float32)
    gate = tl.load(gate_MF + row * F + at, mask=inside).to(tl.float32)
    up = tl.load(up_MF + row * F + at, mask=inside).to(tl.float32)
    logistic = tl.sigmoid(gate)
    silu = gate * logistic
    grad_gate = grad * up * (logistic + silu * (1.0 - logistic))
    tl.store(grad_gate_MF + row * F + at, grad_gate.to(grad_gate_MF.dtype.element_ty), mask=inside)
    tl.store(grad_up_MF + row * F + at, (grad * silu).to(grad_up_MF.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(out_MF + row * F + at, (silu * up).to(out_MF.dtype.element_ty), mask=inside)


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
):
    program = tl.program_id(0).to(tl.int64)  # and so is the loop's row
    column = tl.arange(0, WIDTH)
    inside = None if WIDTH == D else column < D
    zero = None if WIDTH == D else 0.0
    weight = tl.load(weight_D + column, mask=inside, other=zero).to(tl.float32)
    part = tl.zeros([WIDTH], dtype=tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0)):
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


@triton.jit
def _halves(row, lane, HALF: tl.constexpr):
    """A head's values in float32, its first half and its second."""
    inside = lane < HALF
    first = tl.load(row + lane, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(row + HALF + lane, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn_back(
    grad, out, cos1, cos2, sin1, sin2, lane, N: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    head = tl.arange(0, HEADS)
    at = head[:, None] * (2 * HALF) + lane[None, :]
    inside = (head < N)[:, None] & (lane < HALF)[None, :]
    first = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(grad + at + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + at, (first * cos1[None, :] + second * sin2[None, :]).to(kind), mask=inside)
    tl.store(out + at + HALF, (second * cos2[None, :] - first * sin1[None, :]).to(kind), mask=inside)


@triton.jit
def _rotate(
    query,
    key,
    cos,
    sin,
    out_query,
    out_key,
    tokens,
    batch_row,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    turn = token // tokens * batch_row + token % tokens * (2 * HALF)
    cos1, cos2 = _halves(cos + turn, lane, HALF)
    sin1, sin2 = _halves(sin + turn, lane, HALF)
    # turned back by the negative angle
    at = token * (H * 2 * HALF)
    _turn_back(query + at, out_query + at, cos1, cos2, -sin2, -sin1, lane, H, HALF, HEADS)
    at = token * (G * 2 * HALF)
    _turn_back(key + at, out_key + at, cos1, cos2, -sin2, -sin1, lane, G, HALF, GROUPS)


@triton.jit
def _cross_entropy(
    logits, labels, weights, losses, V: tl.constexpr, BLOCK: tl.constexpr, SIDE_BY_SIDE: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    label = tl.load(labels + token)
    weight = tl.load(weights + token)
    of_label = tl.load(row + label).to(tl.float32)
    at = tl.arange(0, BLOCK // SIDE_BY_SIDE)[:, None] * SIDE_BY_SIDE + tl.arange(0, SIDE_BY_SIDE)[None, :]
    scale: tl.constexpr = 1.4426950408889634  # powers of 2 are what the hardware has
    # a largest and a sum for each thread's numbers, so that threads wait for each other once and not in each block
    top = tl.full((BLOCK // SIDE_BY_SIDE,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK // SIDE_BY_SIDE,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + at, mask=start + at < V, other=float("-inf"), eviction_policy="evict_last")
        x = x.to(tl.float32) * scale
        higher = tl.maximum(top, tl.max(x, axis=1))
        # where nothing has been seen yet all is -inf, whose difference is none
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[:, None]), axis=1)
        top = higher
    highest = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp2(top - highest), axis=0)
    lse = highest + tl.log2(total)
    tl.store(losses + token, weight * (lse / scale - of_label))
    for start in range(0, V, BLOCK):
        inside = start + at < V
        x = tl.load(row + start + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32) * scale
        grad = (tl.exp2(x - lse) - (start + at == label).to(tl.float32)) * weight
        tl.store(row + start + at, grad.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _random_bits(index, seed):
    x = (index * -0x61C88647) ^ seed
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _unit(bits):
    return (bits & 0xFFFF).to(tl.float32) * (1.0 / 65536.0)


@triton.jit
def _decode(code, LEVELS: tl.constexpr, OCTAVES: tl.constexpr):
    value = tl.exp2((code.to(tl.float32) - 1.0) * (OCTAVES / (LEVELS - 1)) - OCTAVES)
    return tl.where(code > 0, value, 0.0)


@triton.jit
def _encode(value, uniform, LEVELS: tl.constexpr, OCTAVES: tl.constexpr):
    place = 1.0 + (tl.log2(tl.maximum(value, 1e-30)) + OCTAVES) * ((LEVELS - 1) / OCTAVES)
    below = tl.minimum(tl.maximum(tl.floor(place), 0.0), LEVELS - 1.0)
    high = tl.exp2(below * (OCTAVES / (LEVELS - 1)) - OCTAVES)
    low = tl.where(below > 0, tl.exp2((below - 1.0) * (OCTAVES / (LEVELS - 1)) - OCTAVES), 0.0)
    return below.to(tl.int32) + (uniform * (high - low) < value - low).to(tl.int32)


@triton.jit
def _lean_update(
    weight_S,
    grad_S,
    first_NB,
    first_scale_N,
    root_NB,
    root_scale_N,
    number,
    scale,
    seed,
    size,
    first_index,
    STOCHASTIC: tl.constexpr,
    LEVELS_FIRST: tl.constexpr,
    LEVELS_ROOT: tl.constexpr,
    OCTAVES_FIRST: tl.constexpr,
    OCTAVES_ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    lr = tl.load(number)
    decay = tl.load(number + 1)
    beta1 = tl.load(number + 2)
    beta2 = tl.load(number + 3)
    eps = tl.load(number + 4)
    inverse1 = 1.0 / tl.load(number + 5)
    inverse2 = 1.0 / tl.sqrt(tl.load(number + 6))
    chance = tl.load(seed)

    block_N = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at_NB = block_N[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at_NB < size
    there = block_N < (size + BLOCK - 1) // BLOCK
    there_NB = there[:, None] & (tl.arange(0, BLOCK)[None, :] >= 0)
    index_NB = (at_NB + first_index).to(tl.int32)
    bits = _random_bits(index_NB, chance)
    more = _random_bits(index_NB, chance ^ 0x5BD1E995)

    grad = tl.load(grad_S + at_NB, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    code = tl.load(first_NB + at_NB, mask=there_NB, other=0).to(tl.int32)
    top = tl.load(first_scale_N + block_N, mask=there, other=0.0)
    first = _decode(tl.abs(code), LEVELS_FIRST, OCTAVES_FIRST) * top[:, None]
    first = tl.where(code < 0, -first, first)
    code = tl.load(root_NB + at_NB, mask=there_NB, other=0).to(tl.int32)
    top = tl.load(root_scale_N + block_N, mask=there, other=0.0)
    root = _decode(code, LEVELS_ROOT, OCTAVES_ROOT) * top[:, None]

    first = beta1 * first + (1.0 - beta1) * grad
    root = tl.sqrt(beta2 * root * root + (1.0 - beta2) * grad * grad)
    step = first * inverse1 / (root * inverse2 + eps)
    weight = tl.load(weight_S + at_NB, mask=inside, other=0.0).to(tl.float32) * (1.0 - lr * decay) - lr * step
    if STOCHASTIC:
        rounded = (weight.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) & -0x10000
        weight = rounded.to(tl.float32, bitcast=True)
    tl.store(weight_S + at_NB, weight.to(weight_S.dtype.element_ty), mask=inside)

    # 2e-38 and not less: a constant below float32's normal numbers would make all of it float64
    size_first = tl.abs(first)
    top = tl.max(size_first, axis=1)
    level = _encode(size_first * (1.0 / tl.maximum(top, 2e-38))[:, None], _unit(more), LEVELS_FIRST, OCTAVES_FIRST)
    level = tl.where(first < 0, -level, tl.where(first > 0, level, 0))
    tl.store(first_NB + at_NB, level.to(tl.int8), mask=there_NB)
    tl.store(first_scale_N + block_N, top, mask=there)
    top = tl.max(root, axis=1)
    level = _encode(root * (1.0 / tl.maximum(top, 2e-38))[:, None], _unit(more >> 16), LEVELS_ROOT, OCTAVES_ROOT)
    tl.store(root_NB + at_NB, tl.maximum(level, 1).to(tl.uint8), mask=there_NB)
    tl.store(root_scale_N + block_N, top, mask=there)
