"""Kernels, layers and an optimizer that make a step faster or smaller; each has a plain way beside it."""

from endprompt.fast.layers import can_fuse, fuse
from endprompt.fast.lean import LeanAdamW

__all__ = ["LeanAdamW", "can_fuse", "fuse"]
