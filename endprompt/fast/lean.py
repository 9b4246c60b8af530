"""AdamW with moments of one byte and bfloat16 weights that round at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from endprompt import distributed
from endprompt.distributed import local, shard_starts
from endprompt.fast.available import triton_kernels

BLOCK = 256

CHUNK = 1 << 24  # elements that go through the update at once, where torch makes it

OCTAVES_FIRST, LEVELS_FIRST = 14.0, 127  # signed: 8% from code to code

OCTAVES_ROOT, LEVELS_ROOT = 16.0, 255  # 4.5% from code to code

MOMENTS = ("first", "first_scale", "root", "root_scale")


class Shard(NamedTuple):
    """What this process holds of a flattened parameter of `whole` elements: those from `start` to before `end`. It
    updates the blocks that begin there, `first` to before `last`. cut: blocks of which others hold a part.
    """

    start: int
    end: int
    whole: int
    cut: tuple[int, ...]

    @classmethod
    def of(cls, parameter: torch.Tensor, rank: int = 0, size: int = 1) -> Shard:
        """rank, size: of processes that each have the whole parameter; they update equal parts of whole blocks."""
        starts = shard_starts(parameter)
        if starts is None:
            whole, part = parameter.numel(), -(-parameter.numel() // (BLOCK * size)) * BLOCK
            return cls(min(rank * part, whole), min((rank + 1) * part, whole), whole, ())
        rank, whole = parameter.device_mesh.get_local_rank(), parameter.numel()  # type: ignore[attr-defined]
        cut = {start // BLOCK for start in starts if start % BLOCK and start < whole}
        return cls(starts[rank], starts[rank + 1], whole, tuple(sorted(cut)))

    @property
    def first(self) -> int:
        return -(-self.start // BLOCK)

    @property
    def last(self) -> int:
        return -(-self.end // BLOCK)

    def held(self, block: int) -> tuple[slice, slice]:
        """Where the elements of a block that are held here lie in the shard, and in the block."""
        low, high = max(self.start, block * BLOCK), min(self.end, (block + 1) * BLOCK)
        here, there = (slice(low - base, max(low, high) - base) for base in (self.start, block * BLOCK))
        return here, there


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with one-byte moments, stochastic rounding and gradient sums of its own:
    backward passes add to `parameter.main_grad` and leave `parameter.grad` empty, so `step` sees the sum since
    `zero_grad`.

    Of sharded parameters (DTensor) each process updates what it holds, block by block and with the random bits of the
    whole one's elements, so that the number of processes changes no weight; a block that the shards cut is put together
    for the process that has its first element. Processes that all have whole parameters, `size` of them, sum their
    gradients once a step, in float32, and each has the moments of a part alone, which it updates (ZeRO's P_os,
    Rajbhandari et al. 2020, arXiv:1910.02054). Raises ValueError for beta2 > 0.99: the moments' rounding noise is sigma
    / sqrt(1 - beta2^2) with sigma = 1.8%, 6% at 0.95 and 13% at 0.99, and at 0.999 it would be 40%.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
    ):
        if not 0 <= betas[1] <= 0.99:
            raise ValueError(f"the lean optimizer needs beta2 in [0, 0.99], its one-byte moments do: beta2={betas[1]}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.clipped: torch.Tensor | None = None
        self.shards = {parameter: Shard.of(parameter, rank, size) for parameter in self.parameters()}
        self.whole = size > 1  # whether every process has whole parameters
        self.sharded = self.whole or any(shard_starts(parameter) is not None for parameter in self.shards)
        for parameter in self.parameters():
            parameter.main_grad = torch.zeros_like(local(parameter.detach()), dtype=torch.float32)  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_add_to_sum)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters():
            parameter.grad = None
            parameter.main_grad.zero_()  # type: ignore[attr-defined]

    @torch.no_grad()
    def clip(self, limit: float) -> torch.Tensor:
        """Norm of the gradient sums; `step` will scale them by min(1, limit / norm)."""
        if self.whole:
            for parameter in self.parameters():
                distributed.sum_to_parts(parameter.main_grad.view(-1), *self.part(parameter))  # type: ignore[attr-defined]
        norms = torch._foreach_norm([self._held(p)[1] for p in self.parameters()])
        norm = torch.stack([n.float() for n in norms]).norm()
        if self.sharded:
            norm = distributed.total(norm.square()).sqrt()
        self.clipped = (limit / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        work, numbers = [], []
        cut = self._cut_blocks()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.moments(parameter)
                state["step"] += 1
                work.append((parameter, state))
                numbers.append(self._numbers(group, int(state["step"])))
        seeds = [_mix(self.seed, int(state["step"]), index) for index, (_, state) in enumerate(work)]
        # what the host knows goes over in one piece: a copy for each parameter would hold it up
        for device in {parameter.device for parameter, _ in work}:
            ours = [index for index, (parameter, _) in enumerate(work) if parameter.device == device]
            number = torch.tensor([numbers[i] for i in ours], dtype=torch.float32).to(device, non_blocking=True)
            seed = torch.tensor([seeds[i] for i in ours], dtype=torch.int32).to(device, non_blocking=True)
            for place, index in enumerate(ours):
                self._step(*work[index], number[place], seed[place], cut)
        if cut:
            self._give_back(cut)
        if self.whole:
            for parameter in self.parameters():
                distributed.gather_parts(parameter.view(-1), *self.part(parameter))
        self.clipped = None

    def part(self, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """Start and end of what this process updates of a whole parameter, flattened; only the last parts are less."""
        return self.shards[parameter].start, self.shards[parameter].end

    def _held(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """What this process updates, flat: (weights, gradient sums)."""
        part = slice(*self.part(parameter)) if self.whole else slice(None)
        return local(parameter.detach()).view(-1)[part], parameter.main_grad.view(-1)[part]  # type: ignore[attr-defined]

    def _cut_blocks(self) -> dict[tuple[torch.nn.Parameter, int], torch.Tensor]:
        """Of each block that the shards cut its [gradients, weights], whole, on every process; empty without any."""
        keys = [(parameter, block) for parameter, shard in self.shards.items() for block in shard.cut]
        if not keys:
            return {}
        made = torch.zeros(len(keys), 2, BLOCK, device=keys[0][0].device)
        for (parameter, block), both in zip(keys, made):
            here, there = self.shards[parameter].held(block)
            both[0, there] = parameter.main_grad.view(-1)[here].float()  # type: ignore[attr-defined]
            both[1, there] = local(parameter).view(-1)[here].float()
        return dict(zip(keys, distributed.total(made)))

    def _give_back(self, cut: dict[tuple[torch.nn.Parameter, int], torch.Tensor]) -> None:
        """Take the new weights of cut blocks from the processes that have made them, in float32."""
        made = torch.stack([both[1] for both in cut.values()])
        mine = [self.shards[parameter].first <= block < self.shards[parameter].last for parameter, block in cut]
        made[~torch.tensor(mine, device=made.device)] = 0
        for (parameter, block), weights in zip(cut, distributed.total(made)):
            here, there = self.shards[parameter].held(block)
            local(parameter).view(-1)[here] = weights[there].to(parameter.dtype)

    @staticmethod
    def _numbers(group: dict[str, Any], step: int) -> list[float]:
        """What `_update` reads as `number`."""
        beta1, beta2 = group["betas"]
        return [group["lr"], group["weight_decay"], beta1, beta2, group["eps"], 1 - beta1**step, 1 - beta2**step]

    def moments(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """The state of one parameter, zeros before its first step."""
        state = self.state[parameter]
        if not state:
            blocks, device = self.shards[parameter].last - self.shards[parameter].first, parameter.device
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["first"] = torch.zeros(blocks, BLOCK, dtype=torch.int8, device=device)
            state["root"] = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device)
            state["first_scale"] = torch.zeros(blocks, 1, dtype=torch.float32, device=device)
            state["root_scale"] = torch.zeros(blocks, 1, dtype=torch.float32, device=device)
        return state

    def _step(
        self,
        parameter: torch.nn.Parameter,
        state: dict[str, Any],
        number: torch.Tensor,
        seed: torch.Tensor,
        cut: dict[tuple[torch.nn.Parameter, int], torch.Tensor],
    ) -> None:
        shard = self.shards[parameter]
        weights, sums = self._held(parameter)
        first = shard.first * BLOCK
        if shard.first == shard.last:
            return
        if not shard.cut:
            self._update_blocks(weights, sums, state, number, seed, first)
            return
        # copies from the first block that begins here to the end of the last one, which others may hold
        sizes = min(shard.last * BLOCK, shard.whole) - first, shard.end - first
        both = cut.get((parameter, shard.last - 1))
        parts = [torch.empty(sizes[0], dtype=x.dtype, device=x.device) for x in (sums, weights)]
        for row, (part, x) in enumerate(zip(parts, (sums, weights))):
            part[: sizes[1]] = x[first - shard.start :]
            if both is not None:
                begins = (shard.last - 1) * BLOCK
                part[begins - first :] = both[row, : sizes[0] + first - begins].to(x.dtype)
        self._update_blocks(parts[1], parts[0], state, number, seed, first)
        weights[first - shard.start :] = parts[1][: sizes[1]]
        for block in shard.cut:
            if shard.first <= block < shard.last:
                new = parts[1][block * BLOCK - first : (block + 1) * BLOCK - first]
                cut[parameter, block][1, : len(new)] = new.float()

    def _update_blocks(
        self,
        weights: torch.Tensor,
        sums: torch.Tensor,
        state: dict[str, Any],
        number: torch.Tensor,
        seed: torch.Tensor,
        first: int,
    ) -> None:
        """The update of blocks that follow each other, in place; first: of their elements in the whole parameter."""
        scale = self.clipped if self.clipped is not None else torch.ones((), device=weights.device)
        moments = tuple(state[key] for key in MOMENTS)
        kernels = triton_kernels(weights)
        if kernels:
            levels, octaves = (LEVELS_FIRST, LEVELS_ROOT), (OCTAVES_FIRST, OCTAVES_ROOT)
            kernels.lean_update(weights, sums, moments, number, scale, seed, levels, octaves, first)
            return
        for start in range(0, weights.numel(), CHUNK):
            end = min(start + CHUNK, weights.numel())
            blocks = slice(start // BLOCK, -(-end // BLOCK))
            parts = [moment[blocks] for moment in moments]
            # the first index in wrapping int32: chunks of any size draw the same bits
            rest: Any = {"number": number, "scale": scale, "seed": seed, "first_index": wrapped(first + start)}
            weight, total = weights[start:end], sums[start:end]
            if (end - start) % BLOCK:
                # the last block is padded on copies; its padding has no gradient and stays 0
                padding = (0, BLOCK - (end - start) % BLOCK)
                padded = torch.nn.functional.pad(weight, padding).view(-1, BLOCK)
                gradient = torch.nn.functional.pad(total, padding).view(-1, BLOCK)
                _update(padded, gradient, *parts, **rest)
                weight.copy_(padded.view(-1)[: end - start])
            else:
                _update(weight.view(-1, BLOCK), total.view(-1, BLOCK), *parts, **rest)


def _add_to_sum(parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        parameter.main_grad.add_(local(parameter.grad))  # type: ignore[attr-defined]
        parameter.grad = None


def wrapped(index: int) -> int:
    """An index as a signed number of 32 bits, as hashed for the random bits."""
    return (index + 2**31) % 2**32 - 2**31


def _update(
    weight_NB: torch.Tensor,
    grad_NB: torch.Tensor,
    first_NB: torch.Tensor,
    first_scale_N1: torch.Tensor,
    root_NB: torch.Tensor,
    root_scale_N1: torch.Tensor,
    number: torch.Tensor,
    scale: torch.Tensor,
    seed: torch.Tensor,
    first_index: int,
) -> None:
    """AdamW of N blocks in place. number: lr, decay, betas, eps, corrections. seed, first_index: of the random bits."""
    lr, decay, beta1, beta2, eps, correction1, correction2 = number.unbind()
    index_NB = torch.arange(weight_NB.numel(), dtype=torch.int32, device=weight_NB.device).view(weight_NB.shape)
    index_NB = index_NB + first_index
    bits_NB = random_bits(index_NB, seed)
    more_NB = random_bits(index_NB, seed ^ 0x5BD1E995)
    grad = grad_NB.float() * scale
    sign = first_NB.to(torch.int32).sign().float()
    first = sign * decode(first_NB.to(torch.int32).abs(), LEVELS_FIRST, OCTAVES_FIRST) * first_scale_N1
    root = decode(root_NB.to(torch.int32), LEVELS_ROOT, OCTAVES_ROOT) * root_scale_N1
    first = beta1 * first + (1 - beta1) * grad
    root = (beta2 * root * root + (1 - beta2) * grad * grad).sqrt()
    step = (first / correction1) / (root / correction2.sqrt() + eps)
    weight = weight_NB.float() * (1 - lr * decay) - lr * step
    weight_NB.copy_(round_to_bfloat16(weight, bits_NB) if weight_NB.dtype == torch.bfloat16 else weight)

    top_first = first.abs().amax(dim=1, keepdim=True)
    level = encode(first.abs() / top_first.clamp(min=1e-38), LEVELS_FIRST, OCTAVES_FIRST, _unit(more_NB))
    first_NB.copy_((level * first.sign().to(torch.int32)).to(torch.int8))
    first_scale_N1.copy_(top_first)
    top_root = root.amax(dim=1, keepdim=True)
    level = encode(root / top_root.clamp(min=1e-38), LEVELS_ROOT, OCTAVES_ROOT, _unit(more_NB >> 16))
    # a root that is rounded to 0 would divide by eps: keep the smallest code, which only makes the step smaller
    root_NB.copy_(level.clamp(min=1).to(torch.uint8))
    root_scale_N1.copy_(top_root)


def encode(value: torch.Tensor, levels: int, octaves: float, uniform: torch.Tensor) -> torch.Tensor:
    """Codes 0..levels (int32) of values in [0, 1], stochastic: the expectation of `decode` is the value. Code 0 is 0;
    codes 1..levels are evenly spaced in the logarithm, from 2^-octaves to 1. uniform: in [0, 1).
    """
    place = 1 + (value.clamp(min=1e-30).log2() + octaves) * ((levels - 1) / octaves)
    below = place.floor().clamp(0, levels - 1).to(torch.int32)
    low, high = decode(below, levels, octaves), decode(below + 1, levels, octaves)
    return below + (uniform < (value - low) / (high - low)).to(torch.int32)


def decode(code: torch.Tensor, levels: int, octaves: float) -> torch.Tensor:
    value = torch.exp2((code.float() - 1) * (octaves / (levels - 1)) - octaves)
    return torch.where(code > 0, value, 0.0)


def round_to_bfloat16(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up or down with the probability that keeps the expectation; bits: random int32."""
    # adding 16 random bits below the ones that stay carries over with just that probability, for either sign
    rounded = (value.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return rounded.view(torch.float32).to(torch.bfloat16)


def random_bits(index: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """32 random bits an element: the integer hash `lowbias32` (Wellons 2018) of index and seed, in wrapping int32."""
    x = (index * -0x61C88647) ^ seed
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975  # 0x846ca68b
    return x ^ ((x >> 16) & 0xFFFF)


def _unit(bits: torch.Tensor) -> torch.Tensor:
    return (bits & 0xFFFF).float() * (1 / 65536)


def _mix(*parts: int) -> int:
    """A signed 32-bit seed of the parts, by splitmix64."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return (state & 0xFFFFFFFF) - 2**31
