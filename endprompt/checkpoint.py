"""Training states: complete or absent, checked by hash, the last few kept.

A state is a directory `step-00000100` with `tensors.safetensors` (weights and optimizer, no pickle) and, written last,
`state.json` (step, configuration, sha256). It is written aside, flushed to the disk and renamed, so a crash at any
moment leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    step: int
    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]


def collect(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors that the next step depends on, by name; tied weights appear once."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put `collect`'s tensors back. Raises ValueError if names or shapes are another model's."""
    for name, parameter in model.named_parameters():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != parameter.shape:
            raise ValueError(f"the saved state is of another model: parameter {name} is missing or of another shape")
        with torch.no_grad():
            parameter.copy_(saved)
        prefix = f"optimizer.{name}."
        state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            optimizer.state[parameter] = {
                # AdamW keeps its step counter on the CPU unless it is fused or capturable
                key: value.to(parameter.device) if value.dim() or _on_device(optimizer) else value.clone()
                for key, value in state.items()
            }


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))


def save_state(directory: Path, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any], keep: int) -> Path:
    """Write the state of `step`, keep the last `keep`. Raises OSError (a full disk) with the earlier ones intact."""
    from safetensors.torch import save_file

    final = directory / f"step-{step:08d}"
    aside = directory / f"step-{step:08d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_file(tensors, aside / TENSORS)
        _sync(aside / TENSORS)
        record = {"step": step, "sha256": file_sha256(aside / TENSORS), **about}
        (aside / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        _sync(aside / STATE)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(directory)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{final}: the training state could not be written, earlier ones are intact: {error}") from error
    for old in states(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def states(directory: Path) -> list[Path]:
    """Finished states in rising order of their step."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir() and path.suffix != ".partial")


def newest_state(directory: Path) -> TrainingState | None:
    """The newest whole state; a damaged one is named on stderr and the one before it is used. None if there is none."""
    from safetensors.torch import load_file

    for path in reversed(states(directory)):
        try:
            about = json.loads((path / STATE).read_text(encoding="utf-8"))
            if file_sha256(path / TENSORS) != about["sha256"]:
                raise ValueError(f"sha256 of {TENSORS} differs")
            return TrainingState(int(about["step"]), load_file(path / TENSORS), about)
        except (OSError, ValueError, KeyError) as error:
            print(f"endprompt: WARNING: {path} is damaged ({error}); trying the one before", file=sys.stderr)
    return None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
