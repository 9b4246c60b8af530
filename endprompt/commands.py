"""The trainer's commands; each imports what it needs when it is called."""

from __future__ import annotations

from endprompt.train import ExtendConfig


def extend(config: ExtendConfig) -> int:
    """Train: extend a checkpoint's window and write a standard checkpoint directory."""
    from endprompt import train

    path = train.extend(config)
    print(path)
    return 0
