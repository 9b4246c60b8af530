"""Whether kernels of our own can run: they need triton and a GPU."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch


@functools.cache
def kernels_module() -> Any:
    """`endprompt.fast.kernels`, or None where triton is missing."""
    try:
        return importlib.import_module("endprompt.fast.kernels")
    except ImportError:
        return None


def triton_kernels(x: torch.Tensor) -> Any:
    """`endprompt.fast.kernels` if its kernels can work on this tensor, else None.

    TRITON_INTERPRET=1 runs them on a CPU, for tests.
    """
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    return kernels_module()
