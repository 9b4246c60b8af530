"""The trainer's matrix products in bfloat16, by torch or by the algorithm that a measurement on this GPU chose.

Three kinds make up a linear layer: its output x W.T, the gradient of its input g W, and that of its weight g.T x, which
is added to a float32 sum. `choose_products` has each (kind, size) that comes up measured once: all algorithms that
cuBLASLt proposes, briefly, then the best for longer, in turns, with the device as hot as training makes it. At its
power limit the fastest is the one that takes the least energy, which is not always the one proposed first.

Legend: M, N rows and columns of the result, K length of the sums.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from endprompt import cublaslt

#: A product's pointers must be multiples of this, or torch makes it.
ALIGNED = 256
#: Seconds: of load before the first choice; of the second look, at those that three calls each have left; of a
#: finalist's turn before it is timed, and while it is.
HEAT, LOOK, SETTLE, TURN = 2.0, 0.03, 0.05, 0.16
#: How many a look leaves, the first proposal and torch aside; turns of a finalist.
LEFT, FINALISTS, TURNS = 16, 4, 5

#: Where choices are kept.
CHOICES = Path("~/.cache/endprompt/products.json").expanduser()

_choosing = False
_file: Path | None = None
#: The algorithm of a product, None for torch's way; what is not here has not come up.
_chosen: dict[cublaslt.Key, cublaslt.Algorithm | None] = {}
#: What was measured: a product's milliseconds by candidate, numbered as cuBLASLt proposes them; "torch" is torch's way.
measured: dict[cublaslt.Key, dict[str, float]] = {}


@contextlib.contextmanager
def choose_products(wanted: bool = True, file: Path | None = None) -> Iterator[None]:
    """Within it the products of a GPU take the algorithms that measured fastest; those that come up are measured.

    file: choices are read from it and written to it, so that a later process measures nothing twice; what another GPU
    model or version of cuBLAS wrote is not taken.
    """
    global _choosing, _file
    before = _choosing, _file
    _choosing = wanted and torch.cuda.is_available() and cublaslt.library() is not None
    _file = file if _choosing else None
    if _file is not None:
        _read(_file)
    try:
        yield
    finally:
        _choosing, _file = before


def _here() -> dict[str, Any]:
    return {"device": torch.cuda.get_device_name(), "cublaslt": cublaslt.version(), "torch": torch.__version__}


def _read(file: Path) -> None:
    if not file.is_file():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["here"] != _here():
        return
    for choice in found["choices"]:
        key = tuple(choice["product"])
        data = choice["algorithm"]
        _chosen.setdefault(key, None if data is None else cublaslt.Algorithm.from_buffer_copy(bytes.fromhex(data)))
        measured.setdefault(key, choice["milliseconds"])


def _write(file: Path) -> None:
    """Whole or not at all: several processes may choose at once."""
    choices = [
        {
            "product": list(key),
            "algorithm": None if algorithm is None else bytes(algorithm).hex(),
            "milliseconds": measured.get(key, {}),
        }
        for key, algorithm in _chosen.items()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    aside.write_text(json.dumps({"here": _here(), "choices": choices}, indent=1), encoding="utf-8")
    aside.replace(file)


def times(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """a b in the type of both; for torch.compile one operator where algorithms are chosen, else torch's own product."""
    return product(a_MK, b_KN) if _choosing else a_MK @ b_KN


def plus_times(added_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """added + a b in the type of all; where algorithms are chosen the product adds, and rounds once."""
    return plus_product(added_MN, a_MK, b_KN) if _choosing else added_MN + a_MK @ b_KN


def product_into(
    out_MN: torch.Tensor,
    a_MK: torch.Tensor,
    b_KN: torch.Tensor,
    adds: bool,
    added_MN: torch.Tensor | None = None,
) -> None:
    """out = a b, or out += a b in the type of out, in place; out = added + a b, if that is given.

    added: of out's type and layout.
    """
    if _choosing and _on_gpu(out_MN):
        key = _key(out_MN, a_MK, b_KN, adds)
        if key is not None:
            if key not in _chosen:
                _chosen[key] = _choose(key, a_MK, b_KN, out_MN)
                if _file is not None:
                    _write(_file)
            algorithm = _chosen[key]
            if algorithm is not None:
                cublaslt.multiply(key, algorithm, a_MK, b_KN, out_MN, added_MN)
                return
    if added_MN is not None:
        out_MN.copy_(added_MN)
    _torch_product(out_MN, a_MK, b_KN, adds)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"


def _torch_product(out_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, adds: bool) -> None:
    if not adds:
        torch.mm(a_MK, b_KN, out=out_MN)
    elif out_MN.dtype == a_MK.dtype:
        out_MN.addmm_(a_MK, b_KN)
    else:
        torch.addmm(out_MN, a_MK, b_KN, out_dtype=out_MN.dtype, out=out_MN)


def _key(out_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, adds: bool) -> cublaslt.Key | None:
    """None for what torch shall make."""
    if a_MK.dtype != torch.bfloat16 or any(part.data_ptr() % ALIGNED for part in (out_MN, a_MK, b_KN)):
        return None
    try:
        return cublaslt.key_of(a_MK, b_KN, out_MN, adds)
    except ValueError:  # gaps in memory
        return None


def _choose(
    key: cublaslt.Key, a_MK: torch.Tensor, b_KN: torch.Tensor, out_MN: torch.Tensor
) -> cublaslt.Algorithm | None:
    """The fastest algorithm of a product; the matrices' values are not changed."""
    scratch, adds = torch.zeros_like(out_MN), bool(key[-2])
    algorithms: list[cublaslt.Algorithm | None] = [None, *cublaslt.candidates(key)]

    def work(algorithm: cublaslt.Algorithm | None) -> None:
        if algorithm is None:
            _torch_product(scratch, a_MK, b_KN, adds)
        else:
            cublaslt.multiply(key, algorithm, a_MK, b_KN, scratch)

    if not measured:
        seconds_of(partial(work, None), HEAT)
    brief = []
    for algorithm in algorithms:
        try:
            brief.append(seconds_of(partial(work, algorithm)))
        except RuntimeError:  # proposed, but it does not run
            brief.append(math.inf)
    left = sorted((i for i in range(2, len(algorithms)) if brief[i] < math.inf), key=brief.__getitem__)[:LEFT]
    longer = {i: seconds_of(partial(work, algorithms[i]), LOOK) for i in left}
    best = sorted(left, key=longer.__getitem__)[:FINALISTS]
    finalists = [i for i in (0, 1, *best) if i < len(algorithms) and brief[i] < math.inf]
    turns: dict[int, list[float]] = {i: [] for i in finalists}
    for turn in range(TURNS):
        for i in finalists if turn % 2 else finalists[::-1]:
            seconds_of(partial(work, algorithms[i]), SETTLE)  # the clock follows the load
            turns[i].append(seconds_of(partial(work, algorithms[i]), TURN))
    mean = {i: statistics.mean(found) for i, found in turns.items()}
    measured[key] = {str(i - 1) if i else "torch": 1e3 * seconds for i, seconds in mean.items()}
    for i in sorted(mean, key=mean.__getitem__):
        if i == 0 or _agrees(partial(work, algorithms[i]), partial(work, None), scratch):
            return algorithms[i]
    return None


def _agrees(work: Callable[[], None], other: Callable[[], None], result: torch.Tensor) -> bool:
    """Whether two ways to a result, from zeros, differ by roundings only."""
    result.zero_()
    work()
    found = result.clone()
    result.zero_()
    other()
    return bool(found.sub_(result).norm() <= 0.01 * result.norm())


def seconds_of(work: Callable[[], Any], seconds: float = 0.0) -> float:
    """Seconds of one call on the GPU, in a row of them that takes as long as is asked or three calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def row(count: int) -> float:
        begin.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    work()
    once = row(3)
    return row(max(3, round(seconds / max(once, 1e-6)))) if seconds else once


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@torch.library.custom_op("endprompt::product", mutates_args=())
def product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """a b in the type of both."""
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    product_into(out_MN, a_MK, b_KN, adds=False)
    return out_MN


@product.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("endprompt::plus_product", mutates_args=())
def plus_product(added_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """added + a b in the type of all."""
    added_MN = added_MN.contiguous()
    out_MN = torch.empty_like(added_MN)
    product_into(out_MN, a_MK, b_KN, adds=True, added_MN=added_MN)
    return out_MN


@plus_product.register_fake
def _(added: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return added.new_empty(added.shape)


@register_flop_formula(torch.ops.endprompt.product)  # what seems to cost nothing would be computed again
def _flops(a: tuple[int, ...], b: tuple[int, ...], *others: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(torch.ops.endprompt.plus_product)
def _plus_flops(added: tuple[int, ...], *others: Any, **kwargs: Any) -> int:
    return _flops(*others)
