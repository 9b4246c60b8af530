"""What every measurement shares: a clock that waits for the device, and the rows."""

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


def speed_rows(values: dict[str, float], **about: Any) -> list[dict[str, Any]]:
    """A result row of suite training-speed for each metric, with device, versions and revision."""
    from endprompt.results import result_row
    from endprompt.runs import environment

    shared = {"suite": "training-speed", "seed": 0, "environment": environment(), **about}
    return [result_row(metric=metric, value=value, **shared) for metric, value in values.items()]
