"""What the machine can do: kernels of our own, which need triton and a GPU, and products in bfloat16."""

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
    """`endprompt.fast.kernels` if they can work on this tensor (on a CPU with TRITON_INTERPRET=1), else None."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    return kernels_module()


def bfloat16_matmuls() -> bool:
    """Whether this CPU has instructions for them (AVX-512, AMX); without, they take many times as long as float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
