"""The trainer's commands; each imports what it needs when it is called."""

import os

from endprompt.cli import CompletionConfig, HelpConfig
from endprompt.config import ExtendConfig, PrepareConfig
from endprompt.env import EnvConfig
from endprompt.plan import PlanConfig


def extend(config: ExtendConfig) -> int:
    """Train: extend a checkpoint's window and write a standard checkpoint directory."""
    from endprompt import train
    from endprompt.train import curves

    try:
        path = train.extend(config)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(getattr(stop, "flags", {})) from None
    if os.environ.get("RANK", "0") == "0":  # once for all processes of torchrun
        curves.show(path)
        print(path)
    return 0


def prepare(config: PrepareConfig) -> int:
    """Documents (JSONL, Parquet, text, a hub data set) to token shards that training maps into memory."""
    from endprompt import data

    print(data.prepare(config))
    return 0


def plan(config: PlanConfig) -> int:
    """Estimate a run: memory by part, tokens/s, GPU-hours, and which settings fit."""
    from endprompt import plan as estimates

    return estimates.plan(config)


def env(config: EnvConfig) -> None:
    """Versions, device and optional packages, for a bug report: no secrets, no user names."""
    from endprompt import env as surroundings

    surroundings.env(config)


def completion(config: CompletionConfig) -> None:
    """Print the script that completes commands and flags in bash or zsh."""
    from endprompt import cli

    print(cli.script(config.shell), end="")


def help(config: HelpConfig) -> None:
    """A command's manual: what it does, its options in groups, recipes, exit codes, environment."""
    import pydoc

    from endprompt import cli

    pydoc.pager(cli.manual(config.command))
