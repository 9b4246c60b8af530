"""Many processes as one trainer: torch's own process groups and FSDP2, started by torchrun.

    torchrun --nproc-per-node 8 -m endprompt.cli extend ...

Every process holds a share of each weight (`fully_shard`), works on its share of a step's rows, and the step is the
same as one process would have made: gradients are sums over all rows divided by the weight total of all rows.
Without torchrun there is one process and nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from endprompt.files import sole_use


class Context:
    """The processes that share each row's tokens: `rank` of `size` holds the tokens of its part, in their order.

    Attention sees the whole row for a part of the heads (Jacobs et al. 2023, arXiv:2309.14509): each process sends the
    heads of the others away and gets their tokens of its own, and back afterwards. So any kernel serves, and each
    process does the same work whatever the mask. Legend: B rows, H heads, T tokens of the row, t = T / size tokens of a
    part, D head dim.
    """

    def __init__(self, group: Any):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def part(self, x_BT: torch.Tensor) -> torch.Tensor:
        """This process's tokens of something whole [B, T, ...]."""
        return x_BT.tensor_split(self.size, dim=1)[self.rank].contiguous()

    def whole(self, x_Bt: torch.Tensor) -> torch.Tensor:
        """All tokens [B, T, ...] of what each process has a part of; without gradients."""
        parts = [torch.empty_like(x_Bt) for _ in range(self.size)]
        dist.all_gather(parts, x_Bt.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over these processes, in place."""
        dist.all_reduce(value, group=self.group)
        return value

    def to_heads(self, x_BHtD: torch.Tensor) -> torch.Tensor:
        """[B, H, t, D], all heads of a part, to [B, H / size, T, D], some heads of the whole row."""
        parts = x_BHtD.unflatten(1, (self.size, -1)).movedim(1, 0)
        return self._exchanged(parts).movedim(0, 2).flatten(2, 3)

    def to_tokens(self, x_BThD: torch.Tensor) -> torch.Tensor:
        """[B, T, H / size, D] to [B, t, H, D], the way back."""
        parts = x_BThD.unflatten(1, (self.size, -1)).movedim(1, 0)
        return self._exchanged(parts).movedim(0, 2).flatten(2, 3)

    def _exchanged(self, parts: torch.Tensor) -> torch.Tensor:
        """The n-th of `parts` goes to the n-th process; what comes from each, in their order."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        return all_to_all_single_autograd(parts.contiguous(), None, None, self.group)


@functools.cache
def _contexts(size: int) -> Context:
    """This process's group of so many neighbours; every process must call it, once."""
    ranks = range(dist.get_world_size())
    groups = [dist.new_group(ranks[start : start + size]) for start in ranks[::size]]
    return Context(groups[dist.get_rank() // size])


@dataclass(frozen=True)
class World:
    """This process (rank) among all (size), and the device it computes on.

    context: the processes that share its rows, if several do; `share` of `shares` is its share of a step's rows.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    context: Context | None = None

    @property
    def shares(self) -> int:
        return self.size // (self.context.size if self.context else 1)

    @property
    def share(self) -> int:
        return self.rank // (self.context.size if self.context else 1)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0


#: How long processes wait for each other at the start, and in any collective later: one may write a whole checkpoint
#: meanwhile. torchrun ends all of them sooner when one has ended.
START, LONGEST = timedelta(seconds=60), timedelta(minutes=30)


def world(device: str, context: int = 1, alike: Mapping[str, Any] | None = None) -> World:
    """The processes that torchrun started, or this one alone. device: cpu, cuda or auto.

    context: processes that share a row, a divisor of their number. alike: what must be the same on all of them, such as
    versions. The process group stays for the runs that follow, to the end of the process. Raises ValueError if the
    device is not there, and on every process if they do not meet, differ, or cannot talk to each other.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(device=device)
    place = int(os.environ.get("LOCAL_RANK", "0"))
    about: dict[str, Any] = {"host": socket.gethostname(), **(alike or {}), "torch": torch.__version__, "kind": device}
    if device == "cuda":
        device = f"cuda:{place}"
        if place < torch.cuda.device_count():
            torch.cuda.set_device(device)
            about["gpu_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30)
        else:
            about["fault"] = f"each process needs a GPU of its own: process {place}, {torch.cuda.device_count()} GPUs"
    if not dist.is_initialized():
        _meet(about)
        # not sooner: a later run of these processes would wait for a second group for ever
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return World(dist.get_rank(), dist.get_world_size(), device, _contexts(context) if context > 1 else None)


#: Where the processes count who fails: with the main process, and with the last one, which outlives it and its node.
_stores: list[dist.Store] = []


def _meet(about: dict[str, Any]) -> None:
    """Start the process group, once all processes are there and alike; each of them sees what all say of themselves."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        store, rank, size = next(rendezvous("env://", timeout=START))
        _stores.append(store)
        if rank == size - 1:
            _stores.append(last := dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
            family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as way:
                way.connect(place)  # sends nothing: it finds the address by which this node is known to the others
                store.set("last", json.dumps([way.getsockname()[0], last.port]))
        store.set(f"about/{rank}", json.dumps(about))
        store.wait([f"about/{other}" for other in range(size)], START)
        abouts = [json.loads(store.get(f"about/{other}")) for other in range(size)]
        if rank < size - 1:
            host, its_port = json.loads(store.get("last"))
            with contextlib.suppress(RuntimeError):  # a run needs it for nothing else
                _stores.append(dist.TCPStore(host, its_port, wait_for_workers=False, timeout=START))
        if rank == size - 1:  # a store goes with its process: these two stay till the others have read
            store.wait([f"read/{other}" for other in range(rank)], START)
        store.set(f"read/{rank}", "")
        if rank == 0:
            store.wait([f"read/{other}" for other in range(size)], START)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        unmet = ValueError(f"the processes have not met at {address}:{port} within {START.seconds} s: {reason}")
        if isinstance(error, dist.DistNetworkError) and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            unmet.add_note("alone")  # the main process is not there to say it
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _stores.clear()  # the main process has waited as long, says it, and takes the store with it
        raise unmet from error
    if faults := [f"{one['fault']} ({one['host']})" for one in abouts if "fault" in one]:
        raise ValueError(faults[0])
    _check_alike(abouts)
    cuda = about["kind"] == "cuda"
    late = threading.Timer(START.seconds, _give_up, [f"NCCL has not started within {START.seconds} s: NCCL_DEBUG=WARN"])
    try:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST)
        if cuda:
            late.start()
            dist.all_reduce(torch.zeros(1, device="cuda"))
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise ValueError(f"the processes cannot talk to each other: {str(error).partition(chr(10))[0]}") from error
    finally:
        late.cancel()


def _check_alike(abouts: list[dict[str, Any]]) -> None:
    first = abouts[0]
    for other, one in enumerate(abouts):
        for key in sorted(one.keys() - {"host"}):
            if one[key] != first.get(key):
                raise ValueError(
                    f"all processes must have the same {key}: {first.get(key)!r} on {first['host']} (process 0), "
                    f"{one[key]!r} on {one['host']} (process {other})"
                )


def check_alike(about: Mapping[str, Any]) -> None:
    """Raises ValueError on every process if one has something else of this than the main one, such as other files."""
    _check_alike(gathered({"host": socket.gethostname(), **about}))


def _give_up(message: str) -> None:
    """End a process that waits for what does not come, in one line of all of them."""
    if first_to_fail():
        print(f"endprompt: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def first_to_fail() -> bool:
    """Whether this process is to say its error, which others may have met as well: the first that asks does, or, before
    they have met, the main one. Where the main process has gone without a word the last one's count holds.
    """
    counts: list[int] = []
    for store in _stores:  # each is told, so that the next holds when one goes

        def ask(store: dist.Store = store) -> None:
            with contextlib.suppress(RuntimeError):
                counts.append(store.add("failed", 1))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(10)  # a node without power does not even refuse
    return counts[:1] == [1] if _stores else os.environ.get("RANK", "0") == "0"


#: The part of torch's message that says where in its source.
SOURCE = re.compile(r"\[\S*/gloo/\S+\] ")


@contextlib.contextmanager
def losses(kept: Callable[[], str]) -> Iterator[None]:
    """Work that others may leave: raises ValueError with the reason and what is `kept` where a process is lost."""
    try:
        yield
    except Exception as error:
        said = str(error)
        place = SOURCE.search(said)
        if not place and not isinstance(error, dist.DistError):
            raise
        reason = said[place.end() if place else 0 :].partition("\n")[0].partition(". This is")[0]
        raise ValueError(f"another process has ended or is out of reach: {reason}; {kept()}") from error


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


#: torch 2.13 has other names for these; 2.11 knows the old ones alone.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def sum_to_parts(values_N: torch.Tensor, start: int, end: int) -> None:
    """Sum over all processes, in place, of which each needs its part alone, start to end; what is beside it is lost.

    The parts follow each other by rank; where they are not equal, every process gets all sums.
    """
    if values_N.numel() == dist.get_world_size() * (end - start):
        _reduce_scatter(values_N[start:end], values_N)
    else:
        dist.all_reduce(values_N)


def gather_parts(values_N: torch.Tensor, start: int, end: int) -> None:
    """Give each process the others' parts, in place; parts as of `sum_to_parts`."""
    if values_N.numel() == dist.get_world_size() * (end - start):
        _all_gather(values_N, values_N[start:end])
        return
    values_N[:start], values_N[end:] = 0, 0
    dist.all_reduce(values_N)  # exact, since all but one addend are 0


def apart() -> Any:
    """A group of all processes for work of the host beside the steps; every process must call it. None if alone."""
    return (
        _apart() if dist.is_initialized() else None
    )  # alone is not remembered: a fork of this process may have others


@functools.cache
def _apart() -> Any:
    return dist.new_group(backend="gloo", timeout=LONGEST)


def from_main(value: Any, group: Any = None) -> Any:
    """The main process's value, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


@contextlib.contextmanager
def only_run(output: str | os.PathLike[str], here: World) -> Iterator[None]:
    """Hold an output for this run, by its main process. Raises ValueError on every process if another run holds it."""
    with contextlib.ExitStack() as held:
        by_main(here, lambda: held.enter_context(sole_use(output)))
        lock = f"{os.path.realpath(output)}.lock"
        if blind := [host for host, sees in gathered((socket.gethostname(), os.path.exists(lock))) if not sees]:
            raise ValueError(f"the output must be in a folder that every node sees: {blind[0]}: output={str(output)!r}")
        yield


def by_main(here: World, work: Callable[[], object], group: Any = None) -> None:
    """Let the main process do something while all wait; what it raises is raised on every process."""
    try:
        if here.main:
            work()
    except Exception as error:
        from_main(str(error) or type(error).__name__, group)
        raise
    said = from_main(None, group)
    if said is not None:
        raise ValueError(said)


def gathered(value: Any, group: Any = None) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
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
    backward pass, the last one would be gathered again at once, and they and the rest through a step (`hold`).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(here.device.partition(":")[0], (here.size,))
    # inputs stay as they are: loss weights must not be rounded
    policy = MixedPrecisionPolicy(torch.bfloat16 if bfloat16 else None, reduce_dtype, cast_forward_inputs=False)
    units: list[Any] = list(layers)
    held: list[Any] = units[max(0, len(units) - keep_gathered) :]
    for layer in units:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=layer not in held)
    root.held = [fully_shard(root, mesh=mesh, mp_policy=policy), *held]  # type: ignore[assignment]
    for this, following in itertools.pairwise(units):
        this.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([this])


def hold(root: torch.nn.Module, more: bool) -> None:
    """Before a backward pass: whether more of this step follow, for which what is kept gathered stays whole."""
    for unit in getattr(root, "held", ()):
        unit.set_reshard_after_backward(not more, recurse=False)


def reshard(root: torch.nn.Module) -> None:
    """Let go of what a forward pass without a backward one has left whole."""
    for module in root.modules():
        getattr(module, "reshard", lambda: None)()  # FSDP2's


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
