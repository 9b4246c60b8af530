"""The trainer: positions, prompts, RoPE scaling, data, model, loss, loop, checkpoints."""

import os

# Threads of torch's products that spin while they wait take a busy machine's processors from those that they wait for.
# OpenMP reads this when torch is imported; what the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["OMP_WAIT_POLICY"] = "passive"

from endprompt.calls import extend, score, verify

__all__ = ["extend", "score", "verify"]
