"""Training runs that are cut off, and what runs leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from endprompt import cli, train
from endprompt.config import ExtendConfig
from endprompt.train import run


def interrupted(*_, **__):
    raise KeyboardInterrupt


def cut_off(config: ExtendConfig, step: int | None = None) -> None:
    """A run that stops before this step, or before it would finish."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if step is None:
            patch.setattr(run, "finish", interrupted)
        else:
            real = train.Trainer.train_step
            patch.setattr(
                train.Trainer,
                "train_step",
                lambda self, *rest: (interrupted if self.step == step else real)(self, *rest),
            )
        train.extend(config)


def resumed(config: ExtendConfig, step: int | None = None) -> Path:
    """The output of a run that was cut off and went on from its newest state."""
    cut_off(config, step)
    return train.extend(dataclasses.replace(config, resume=True))


def signalled(number: signal.Signals, owner: Any, name: str, calls: int, arguments: list[str]) -> int:
    """Run a command that gets the signal at the given call of the given function, for a process of its own."""
    real, made = getattr(owner, name), []

    def call(*given, **more):
        made.append(name)
        if len(made) == calls:
            os.kill(os.getpid(), number)
        return real(*given, **more)

    setattr(owner, name, call)
    return cli.main(arguments)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_of(directory: Path) -> list[dict]:
    """The steps of a run's log, without what evaluations add to it."""
    return [entry for entry in lines_of(directory / "log.jsonl") if "by_position" not in entry]


def losses_of(directory: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(directory) if "loss" in entry]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same_weights(left: Path, right: Path) -> bool:
    ours, theirs = weights_of(left), weights_of(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
