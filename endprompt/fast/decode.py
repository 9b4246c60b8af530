# mypy: disable-error-code="no-untyped-def"
"""Triton kernels for a step of generation: a token's keys and values into the cache, and its attention over the cache.

`benchmarks.scoring.laid_out` decides when they run, and has the same work in torch. Imports triton.

Legend: B rows, H query heads, G key/value heads, S places of the cache, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from endprompt.fast.kernels import Launch, _multiprocessors, _on

#: By a head's size. block: here places of the cache. Measured on an H200, `pages/h200_recorded_steps.txt`.
ATTEND = {64: Launch(block=64, warps=2, programs=4, stages=3), 128: Launch(block=64, warps=4, programs=4, stages=4)}
ROOM = 160 * 1024  # bytes of shared memory that these loads ahead take; GPUs with less load 1 block ahead


def keep(
    key_BGD: torch.Tensor,
    value_BGD: torch.Tensor,
    keys_BGSD: torch.Tensor,
    values_BGSD: torch.Tensor,
    slot_B: torch.Tensor,
) -> None:
    """Writes one token's keys and values of each row at its place of the cache."""
    batch, groups, places, width = keys_BGSD.shape
    with _on(keys_BGSD):
        _keep[(batch * groups,)](
            *(key_BGD, value_BGD, keys_BGSD, values_BGSD, slot_B, places),
            G=groups,
            D=width,
            LANES=triton.next_power_of_2(width),
            num_warps=1,
        )


def attend(
    query_BHD: torch.Tensor,
    keys_BGSD: torch.Tensor,
    values_BGSD: torch.Tensor,
    begin_B: torch.Tensor,
    end_B: torch.Tensor,
    scale: float,
    launch: Launch | None = None,
) -> torch.Tensor:
    """Attention [B, H, D] of one query for each head over places begin..end - 1 of each row and no other; zeros where
    there is none. D: a power of two, 16 or more; at most 16 heads to a key head. Each row's places are shared out among
    programs (flash-decoding), so that few rows keep the device busy; the parts come together in fixed order.
    """
    (batch, heads, width), (_, groups, places, _) = query_BHD.shape, keys_BGSD.shape
    launch = launch or ATTEND[width]
    programs = -(-launch.programs * _multiprocessors(query_BHD) // (batch * groups))
    splits = max(1, min(programs, places // (4 * launch.block), 128))
    parts = query_BHD.new_empty(batch * heads, splits, width, dtype=torch.float32)
    tops, sums = (query_BHD.new_empty(batch * heads, splits, dtype=torch.float32) for _ in range(2))
    out_BHD = torch.empty_like(query_BHD)
    with _on(query_BHD):
        _attend[(batch * groups, splits)](
            *(query_BHD, keys_BGSD, values_BGSD, begin_B, end_B, parts, tops, sums, scale * 1.4426950408889634, places),
            G=groups,
            R=heads // groups,
            D=width,
            BLOCK=launch.block,
            STAGES=1 if keys_BGSD.element_size() > 2 else launch.stages if _shared(query_BHD) >= ROOM else 2,
            num_warps=launch.warps,
        )
        _together[(batch * heads,)](
            *(parts, tops, sums, out_BHD, splits), D=width, SPLITS=triton.next_power_of_2(splits), num_warps=4
        )
    return out_BHD


def _shared(x: torch.Tensor) -> int:
    """Bytes of shared memory that a program may have."""
    if x.device.type != "cuda":
        return ROOM
    return int(getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 0))


@triton.jit
def _keep(key, value, keys, values, slots, places, G: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < D
    to = (head * places + tl.load(slots + head // G)) * D + lane
    tl.store(keys + to, tl.load(key + head * D + lane, mask=inside), mask=inside)
    tl.store(values + to, tl.load(value + head * D + lane, mask=inside), mask=inside)


@triton.jit
def _attend(
    query,
    keys,
    values,
    begins,
    ends,
    parts,
    tops,
    sums,
    scale,
    places,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    begin = tl.load(begins + head // G).to(tl.int32)
    end = tl.load(ends + head // G).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK) * BLOCK
    first = begin + split * chunk
    last = tl.minimum(first + chunk, end)
    lane = tl.arange(0, D)
    member = tl.arange(0, 16)  # queries of the group's heads; the tensor cores take 16 at least
    place = tl.arange(0, BLOCK)
    there = (member < R)[:, None] & (lane >= 0)[None, :]
    q = tl.load(query + (head * R + member)[:, None] * D + lane[None, :], mask=there, other=0.0)
    base = head * places * D
    top = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    out = tl.zeros((16, D), tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        inside = start + place < last
        at = base + (start + place)[:, None] * D + lane[None, :]
        k = tl.load(keys + at, mask=inside[:, None], other=0.0)
        v = tl.load(values + at, mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))  # finite: each block has a place
        weight = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = higher
    to = (head * R + member) * splits + split
    tl.store(tops + to, top, mask=member < R)
    tl.store(sums + to, total, mask=member < R)
    tl.store(parts + to[:, None] * D + lane[None, :], out, mask=there)


@triton.jit
def _together(parts, tops, sums, out, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    lane = tl.arange(0, D)
    inside = split < splits
    top = tl.load(tops + head * splits + split, mask=inside, other=float("-inf"))
    highest = tl.max(top, axis=0)
    share = tl.where(top == float("-inf"), 0.0, tl.exp2(top - highest))
    total = tl.sum(share * tl.load(sums + head * splits + split, mask=inside, other=0.0), axis=0)
    part = tl.load(
        parts + (head * splits + split)[:, None] * D + lane[None, :],
        mask=inside[:, None] & (lane >= 0)[None, :],
        other=0.0,
    )
    whole = tl.sum(share[:, None] * part, axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + head * D + lane, whole.to(out.dtype.element_ty))
