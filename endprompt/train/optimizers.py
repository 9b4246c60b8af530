"""Optimizers: AdamW as torch has it, and a lean AdamW that trains 8B parameters on one GPU.

The lean one keeps bfloat16 weights and no float32 copy of them. Gradients of the micro-batches are summed in float32
(`parameter.main_grad`): in bfloat16 an addend below 1/256 of the sum is lost, and 32 micro-batches lose about half a
percent. A new weight is rounded stochastically, with the probability that makes the expectation exact, so updates far
below one unit in the last place still add up. The two moments take one byte a parameter each, logarithmic codes with
one float32 scale (the largest magnitude) a block of 256, rounded stochastically too: with nearest rounding a moving
average that changes by less than half a code stands still. The second is kept as its root, which halves the range it
needs. Random bits are a hash of (seed, step, parameter, element), so a resumed run is exact and devices agree. Memory:
2 (weight) + 4 (gradient sum) + 2 (moments) bytes a parameter, 60 GiB at 8.03B, against 16 bytes for float32 masters.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from endprompt.fast.lean import BLOCK, LeanAdamW

OPTIMIZERS = ("adamw", "masters", "lean")


def make_optimizer(
    name: str,
    model: torch.nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    seed: int = 0,
    recorded: bool = False,
    among: tuple[int, int] = (0, 1),
) -> torch.optim.Optimizer:
    """The optimizer by name over the parameters that require a gradient. recorded: adamw whose steps a CUDA graph can
    hold: its rate is a tensor on the parameters' device. among: this process's rank and the number of those that have
    the whole model and share the lean optimizer's work. Raises ValueError for an unknown name.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "lean":
        rank, size = among
        return LeanAdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, seed=seed, rank=rank, size=size)
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}: optimizer={name!r}")
    fused = bool(parameters) and parameters[0].device.type == "cuda"
    if recorded:
        rate = torch.tensor(lr, dtype=torch.float32, device=parameters[0].device)
        made = torch.optim.AdamW(
            parameters, lr=rate, betas=betas, weight_decay=weight_decay, fused=fused, capturable=fused
        )
        made._warned_capturable_if_run_uncaptured = True  # its first steps run as written
        return made
    exact = MasterAdamW if name == "masters" else torch.optim.AdamW
    return exact(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer keeps of all parameters in a training state, beside them; sharded ones count whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, LeanAdamW):
        return sum(-(-parameter.numel() // BLOCK) * (2 * BLOCK + 8) for parameter in parameters)
    copies = 3 if isinstance(optimizer, MasterAdamW) else 2
    return copies * sum(parameter.nbytes for parameter in parameters)


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> torch.Tensor:
    """Scale all gradients so that their common norm is at most `limit` (0 for no limit); the norm before, no sync."""
    if isinstance(optimizer, LeanAdamW):
        return optimizer.clip(limit or math.inf)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)


class MasterAdamW(torch.optim.AdamW):
    """torch's AdamW over float32 copies (masters) of the parameters; gradients and weights pass between the two."""

    def __init__(self, params: Iterable[torch.nn.Parameter], **options: Any):
        self.masters = {p: torch.nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in params}
        super().__init__(list(self.masters.values()), **options)
        for parameter in self.masters:
            parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, parameter: torch.Tensor) -> None:
        master = self.masters[parameter]  # type: ignore[index]
        gradient = parameter.grad
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter, master in self.masters.items():
            parameter.copy_(master)
