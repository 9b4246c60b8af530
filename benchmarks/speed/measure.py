"""What every measurement shares: a clock that waits for the device, the rows, and what the device itself gives."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of work on a device, "cpu" or "cuda"."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - began, result


def rate(device: str, flops: float, work: Callable[[], Any], seconds: float = 0.15) -> float:
    """Sustained TFLOP/s of `work`, which takes `flops`, after a warm-up."""

    def four_times() -> None:
        for _ in range(4):
            work()

    four_times()
    spent, count = 0.0, 0
    while spent < seconds:
        spent += timed(device, four_times)[0]
        count += 4
    return count * flops / spent / 1e12


def speed_rows(values: dict[str, float], **about: Any) -> list[dict[str, Any]]:
    """A result row of suite training-speed for each metric, with device, versions and revision."""
    from endprompt.results import result_row
    from endprompt.runs import environment

    shared = {"suite": "training-speed", "seed": 0, "environment": environment(), **about}
    return [result_row(metric=metric, value=value, **shared) for metric, value in values.items()]


def attention_rates(shape: str, tokens: int, rows: int = 2) -> list[dict[str, Any]]:
    """TFLOP/s of the attention kernels that are there, on causal rows; the backward pass counts 2.5 times."""
    import torch

    from endprompt.model import ATTENTIONS
    from endprompt.shapes import SHAPES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, _, heads, groups, *_ = SHAPES[shape][1:]

    def random(count: int) -> torch.Tensor:
        """[rows, count, tokens, head dim] in memory as projections give it: the heads of a token side by side."""
        whole = torch.randn(rows, tokens, count, hidden // heads, device=device, dtype=torch.bfloat16)
        return whole.transpose(1, 2).requires_grad_()

    query, key, value, grad = (random(count) for count in (heads, groups, groups, heads))
    parts = (query, key, value)
    causal = 2.0 * rows * tokens * tokens * hidden
    found: list[dict[str, Any]] = []
    for name in backends(device):

        def forward(name: str = name) -> Any:
            return ATTENTIONS[name](torch.nn.Module(), query, key, value)[0]

        def both() -> Any:
            return torch.autograd.grad(forward(), parts, grad.detach().transpose(1, 2))

        try:
            for kind, flops, work in (("forward", causal, forward), ("forward and backward", 3.5 * causal, both)):
                values = {"tflop_per_s": rate(device, flops, work)}
                task = f"attention {name}: {kind}"
                found += speed_rows(values, task=task, length=tokens, model=shape, method="ceiling")
        except Exception as error:  # a package's kernel may not run here: the others still count
            say(f"attention {name}: {error!r}")
    return found


def backends(device: str) -> list[str]:
    """The causal-only attentions whose speed can be measured here: flex needs torch.compile."""
    from endprompt.model.attention import FLASH_PACKAGES

    if device == "cpu":
        return ["sdpa"]
    return ["sdpa", "cudnn", *(name for name in FLASH_PACKAGES if installed(name))]


def installed(attention: str) -> bool:
    """Whether the package of a flash attention is there; it is not imported."""
    import importlib.util

    from endprompt.model.attention import FLASH_PACKAGES

    try:
        spec = importlib.util.find_spec(FLASH_PACKAGES[attention][0])
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None  # flash-attn-4 alone leaves `flash_attn` an empty namespace
