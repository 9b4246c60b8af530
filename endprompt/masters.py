"""AdamW with float32 masters of bfloat16 weights.

At a learning rate of 2e-5 an update is mostly below half a unit in the last place of a bfloat16 weight, and rounding to
nearest loses it. Here gradients are summed over micro-batches and applied in float32; the bfloat16 weights are the
masters, rounded. Memory: 2 + 4 (master) + 4 (gradient sum) + 8 (moments) bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class MasterAdamW(torch.optim.AdamW):
    """torch's AdamW over float32 copies of the parameters; gradients and weights pass between the two.

    masters: of each parameter, its copy. The optimizer's own parameters, and their gradients, are the copies.
    """

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
