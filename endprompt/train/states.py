"""Training states: complete or absent, checked by hash, the last few kept.

A state is a directory `step-00000100` with the files of torch.distributed.checkpoint (weights and optimizer, each
process its own share) and, written last, `state.json` (step, configuration, sha256 of every file). It is written aside,
flushed to the disk and renamed, so a crash at any moment leaves the one before. A state can be loaded by another number
of processes than wrote it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import EnumMeta
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from endprompt import files
from endprompt.distributed import World, by_main, from_main, gathered, local, shard_starts
from endprompt.fast.lean import BLOCK
from endprompt.files import file_sha256, parse_object, write_text

STATE = "state.json"


@dataclass(frozen=True)
class TrainingState:
    """A whole state on the disk. about: what `save_state` was given."""

    step: int
    path: Path
    about: dict[str, Any]


def collect(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, here: World | None = None
) -> dict[str, torch.Tensor]:
    """The live tensors that the next step depends on, by name; tied weights appear once.

    Matrices in 4 bits are left out: they are made of the checkpoint again. here: of weights that every process has
    whole, the rows that this one is to write.
    """
    frozen = {name for name, parameter in model.named_parameters() if hasattr(parameter, "quant_state")}
    tensors = {f"model.{name}": x.detach() for name, x in model.named_parameters() if name not in frozen}
    if here is not None and getattr(optimizer, "whole", False):
        tensors = {name: Part.of_rows(x, here.rank, here.size) if x.ndim else x for name, x in tensors.items()}
    masters = getattr(optimizer, "masters", {})
    for name, parameter in model.named_parameters():
        if parameter in masters:
            tensors[f"optimizer.{name}.master"] = masters[parameter].detach()
        shard = getattr(optimizer, "shards", {}).get(parameter)
        for key, value in optimizer.state.get(masters.get(parameter, parameter), {}).items():
            if shard is not None and shard.whole > shard.end - shard.start and value.ndim == 2:
                # moments in blocks, of which a process has those that begin in its shard
                value = Part.of(value, shard.first, -(-shard.whole // BLOCK))
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


class Part(torch.Tensor):
    """Some of a tensor's first dimension, from `start`, the rest of which other processes hold; as DCP asks for it."""

    start: int
    rows: int

    @classmethod
    def of(cls, held: torch.Tensor, start: int, rows: int) -> Part:
        """rows: of the whole. The memory is `held`'s."""
        part = held.as_subclass(cls)
        part.start, part.rows = start, rows
        return part

    @classmethod
    def of_rows(cls, whole: torch.Tensor, rank: int, size: int) -> Part:
        """This process's share of the rows of what all have."""
        each = -(-len(whole) // size)
        return cls.of(whole[rank * each : (rank + 1) * each], min(rank * each, len(whole)), len(whole))

    def size(self, dim: int | None = None) -> Any:
        """Of the whole."""
        whole = torch.Size((self.rows, *self.shape[1:]))
        return whole if dim is None else whole[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size((self.start, *(0,) * (self.ndim - 1))), self.shape)] * bool(len(self))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.as_subclass(torch.Tensor))
        made = [(chunk, TensorWriteData(chunk, properties, self.size())) for chunk in self.__create_chunk_list__()]
        kind = WriteItemType.SHARD
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), kind, tensor_data=data) for chunk, data in made]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    """Load a state into the model and the optimizer. Raises ValueError if names or shapes are another model's."""
    _make_optimizer_state(optimizer)
    check_index(state.path / ".metadata")
    try:
        with _one_process_is_meant():
            dcp.load(collect(model, optimizer), checkpoint_id=state.path)
    except (RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{state.path}: the state is of another model or optimizer: {reason}") from error


def _member(enum: Any, name: str) -> Any:
    """What `getattr` stands for in an index: Python before 3.11.4 pickles the members of an enum by it."""
    if isinstance(enum, EnumMeta) and name in enum.__members__:
        return enum[name]
    raise pickle.UnpicklingError(f"it takes {name!r} of {enum!r}")


class _Index(pickle.Unpickler):
    """Reads the index of torch.distributed.checkpoint, which is a pickle, and nothing else that a pickle can hold."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        found = super().find_class(module, name) if "." not in name and module in sys.modules else None
        own = isinstance(found, type) and found.__module__.startswith("torch.distributed.checkpoint.")
        plain = module == "torch" and (found is torch.Size or isinstance(found, torch.dtype))
        path = isinstance(found, type) and issubclass(found, PurePath)
        if own or plain or path or (module, name) == ("torch.serialization", "_get_layout"):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_index(path: Path) -> None:
    """Raises ValueError if a state's index holds anything but the places of tensors: a pickle can run code."""
    try:
        with open(path, "rb") as file:
            _Index(file).load()
    except Exception as error:  # a damaged pickle raises whatever its bytes run into
        raise ValueError(f"{path}: the state's index is not one that this program wrote: {error}") from None


def _make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its tensors, by a step that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def staged(tensors: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the host, which can be saved while steps change the tensors.

    kept: the copies of the save before, whose memory is used again; pinned, so that a GPU writes them at full speed.
    """
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        held = tensor.as_subclass(torch.Tensor) if isinstance(tensor, Part) else local(tensor)
        if name not in kept:
            kept[name] = torch.empty_like(held, device="cpu", pin_memory=held.is_cuda)
        made[name] = kept[name].copy_(held, non_blocking=True)
        if isinstance(tensor, Part):
            made[name] = Part.of(made[name], tensor.start, tensor.rows)
        elif (starts := shard_starts(tensor)) is not None:
            row = starts[dist.get_rank()] // max(1, tensor[:1].numel())
            made[name] = Part.of(made[name], row, len(tensor))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made


def save_state(
    directory: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    about: dict[str, Any],
    keep: int,
    here: World | None = None,
    group: Any = None,
) -> Path:
    """Write the state of `step`, keep the last `keep`. Raises OSError (a full disk) with the earlier ones intact.

    group: `distributed.apart`, in a thread beside the steps.
    """
    here = here or World()
    final, aside = directory / name_of(step), directory / f"{name_of(step)}.partial"

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def end() -> None:
        record = {"step": step, "sha256": hashes | _hashes([aside / ".metadata"]), **about}
        (aside / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        files._sync(aside / STATE)
        files._sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        files._sync(directory)
        for old in states(directory)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    hashes: dict[str, str] = {}
    try:
        by_main(here, begin, group)
        writer = dcp.FileSystemWriter(aside, single_file_per_rank=True, sync_files=True)
        with _one_process_is_meant():
            dcp.save(tensors, storage_writer=writer, process_group=group)
        for part in gathered(_hashes(sorted(aside.glob(f"__{here.rank}_*"))), group):
            hashes |= part
        by_main(here, end, group)
    except (Exception, dcp.api.CheckpointException) as error:
        if here.main:
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{final}: the state could not be written, earlier ones are intact: {_root(error)}") from error
    return final


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without a process group torch warns that it assumes a single process, which is what it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _root(error: BaseException) -> BaseException | str:
    """What went wrong on the first process that failed."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def name_of(step: int) -> str:
    """The folder of a step's state."""
    return f"step-{step:08d}"


def states(directory: Path) -> list[Path]:
    """Finished states in rising order of their step."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir() and path.suffix != ".partial")


def last_good(directory: Path) -> str:
    """Where a run that has to stop can be taken up again, for a message."""
    kept = states(directory)
    return f"the last good state is {kept[-1]}" if kept else "no training state was saved (save_every=0)"


def forget_after(path: Path, step: int) -> None:
    """Drop lines that a run wrote beyond the step that it resumes from, and a line that a crash has cut off."""
    if not path.exists():
        return
    kept = [line for _, line, record in files.sound_lines(path) if record is not None and record.get("step", 0) <= step]
    write_text(path, "".join(f"{line}\n" for line in kept))


def newest_state(directory: Path, here: World | None = None) -> TrainingState | None:
    """The newest whole state; a damaged one is named on stderr and the one before it is used. None if there is none."""
    found = _newest(directory) if here is None or here.main else None
    return from_main(found)


def _newest(directory: Path) -> TrainingState | None:
    for path in reversed(states(directory)):
        try:
            about = parse_object((path / STATE).read_bytes(), STATE)
            wanted = about["sha256"]
            for name, digest in _hashes([path / name for name in wanted]).items():
                if digest != wanted[name]:
                    raise ValueError(f"sha256 of {name} differs")
            return TrainingState(int(about["step"]), path, about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"endprompt: WARNING: {path} is damaged ({error}); trying the one before", file=sys.stderr)
    return None


def _hashes(paths: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor(8) as pool:
        return {path.name: digest for path, digest in zip(paths, pool.map(file_sha256, paths))}
