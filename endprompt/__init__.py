"""The trainer: positions, prompts, RoPE scaling, data, model, loss, loop, checkpoints."""

import os
import platform

# Threads of products that spin while they wait take a busy machine's processors from those that they wait for. torch's
# OpenMP and numpy's OpenBLAS read this when they are imported; what the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["OMP_WAIT_POLICY"] = "passive"
if platform.machine() in ("x86_64", "AMD64"):  # elsewhere torch's own products may be OpenBLAS's
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from endprompt.calls import extend, score, verify

__all__ = ["extend", "score", "verify"]
