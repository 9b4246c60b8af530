"""Many processes as one trainer: torch's own process groups and FSDP2, started by torchrun.

    torchrun --nproc-per-node 8 -m endprompt.cli extend ...

Every process holds a share of each weight (`fully_shard`), works on its share of a step's rows, and the step is the
same as one process would have made: gradients are sums over all rows divided by the weight total of all rows.
Without torchrun there is one process and nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from endprompt.files import sole_use


@dataclass(frozen=True)
class World:
    """This process (rank) among all (size), and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0


def world(device: str) -> World:
    """The processes that torchrun started, or this one alone. device: cpu, cuda or auto.

    The process group stays for the runs that follow, to the end of the process. Raises ValueError if the device is not
    there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(device=device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(_leave)  # not sooner: a later run of these processes would wait for a second group for ever
    return World(dist.get_rank(), dist.get_world_size(), device)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def only_run(output: str | os.PathLike[str], here: World) -> Iterator[None]:
    """Hold an output for this run, by its main process. Raises ValueError on every process if another run holds it."""
    with contextlib.ExitStack() as held:
        by_main(here, lambda: held.enter_context(sole_use(output)))
        yield


def by_main(here: World, work: Callable[[], object]) -> None:
    """Let the main process do something while all wait; what it raises is raised on every process."""
    try:
        if here.main:
            work()
    except Exception as error:
        from_main(str(error) or type(error).__name__)
        raise
    said = from_main(None)
    if said is not None:
        raise ValueError(said)


def gathered(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shard(
    root: torch.nn.Module,
    layers: Iterable[torch.nn.Module],
    here: World,
    bfloat16: bool,
    reduce_dtype: torch.dtype = torch.float32,
    keep_gathered: int = 1,
) -> None:
    """FSDP2: each layer a unit of its own, the rest with the root; the next unit is gathered while one computes.

    bfloat16: float32 weights are gathered and multiplied in bfloat16, so that the shards are masters. reduce_dtype: of
    the gradients' sums over the processes. keep_gathered: so many last layers stay whole from their forward to their
    backward pass; the last one would be gathered again at once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(here.device.partition(":")[0], (here.size,))
    # inputs stay as they are: loss weights must not be rounded
    policy = MixedPrecisionPolicy(torch.bfloat16 if bfloat16 else None, reduce_dtype, cast_forward_inputs=False)
    units: list[Any] = list(layers)
    for number, layer in enumerate(units):
        kept = number >= len(units) - keep_gathered
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not kept)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for this, following in itertools.pairwise(units):
        this.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([this])


def reshard(root: torch.nn.Module) -> None:
    """Let go of what a forward pass without a backward one has left whole."""
    for module in root.modules():
        release = getattr(module, "reshard", None)  # FSDP2's
        if release is not None:
            release()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a sharded tensor, sharing its memory; any other tensor as it is."""
    held = getattr(tensor, "to_local", None)
    return tensor if held is None else held()


def shard_starts(tensor: torch.Tensor) -> list[int] | None:
    """The first element of each process's shard of a tensor, flattened, and the end of the last; None if it is whole.

    The first dimension is cut as torch.chunk cuts: all shards are equal, the last ones may be less or nothing.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return None
    rows = tensor.shape[0]
    return [min(rank * -(-rows // mesh.size()), rows) * (tensor.numel() // rows) for rank in range(mesh.size() + 1)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, on every process; any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def say(message: str, here: World | None = None) -> None:
    """Tell the user, once for all processes."""
    if os.environ.get("RANK", "0") == "0" if here is None else here.main:
        print(message, file=sys.stderr, flush=True)
