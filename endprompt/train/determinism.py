"""Training that repeats bit for bit on a GPU: the same device model, versions and settings give the same weights. Left
alone, a GPU adds some gradients up in the order in which its blocks happen to end, and torch.compile takes whichever
variant of a kernel was fastest when it looked. On a CPU runs repeat anyway.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
#: Sizes of its buffers with which cuBLAS repeats (NVIDIA's cuBLAS documentation, results reproducibility).
WORKSPACES = (":4096:8", ":16:8")


def prepare() -> None:
    """Set what cuBLAS reads once. Raises ValueError if it is set to something with which it does not repeat."""
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise ValueError(f"deterministic needs {WORKSPACE} to be one of {', '.join(WORKSPACES)}: {given!r}")


@contextlib.contextmanager
def repeatable(wanted: bool = True) -> Iterator[None]:
    """Within it torch takes deterministic algorithms, or raises RuntimeError where an operation has none."""
    if not wanted:
        yield
        return
    import torch._inductor.config as compiler

    prepare()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    by_rule = getattr(compiler, "deterministic", None)  # releases before 2.10 do not have it
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # nothing here reads what was not written
        if by_rule is not None:
            compiler.deterministic = True  # kernels chosen by rule and not by a race
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        if by_rule is not None:
            compiler.deterministic = by_rule
