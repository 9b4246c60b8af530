"""The trainer's commands; each imports what it needs when it is called."""

from __future__ import annotations

from endprompt.config import ExtendConfig, PrepareConfig


def extend(config: ExtendConfig) -> int:
    """Train: extend a checkpoint's window and write a standard checkpoint directory."""
    from endprompt import train

    path = train.extend(config)
    print(path)
    return 0


def prepare(config: PrepareConfig) -> int:
    """Documents (JSONL, Parquet, text, a hub data set) to token shards that training maps into memory."""
    from endprompt import prepare as shards

    print(shards.prepare(config))
    return 0
