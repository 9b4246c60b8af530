"""A worker process: takes cells one by one and keeps what they share (compiled code, recorded graphs, samples)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.lab.matrix import Answer
from endprompt.files import end_with_parent


def settle(log: Path, threads: int) -> None:
    """A quiet process that ends with its parent: output to a file, Ctrl-C left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = str(threads)


def work(pipe: Connection, log: str, place: Any, threads: int) -> None:
    """Answer each cell that comes through the pipe, until None comes or it is closed. After an error that no check
    foresaw the process ends, since a GPU may be left unusable: it is replaced by another."""
    settle(Path(log), threads)
    import torch

    from benchmarks.lab import cells
    from endprompt.train import determinism

    torch.set_num_threads(threads)
    if place.deterministic:
        determinism.prepare()
    pipe.send(Answer(ready=True))
    with contextlib.suppress(EOFError):
        while (cell := pipe.recv()) is not None:
            try:
                pipe.send(cells.run(cell, place))
            except (ValueError, OSError) as error:
                pipe.send(failed(error))
            except Exception as error:
                pipe.send(dataclasses.replace(failed(error), last=True))
                return


def failed(error: Exception) -> Answer:
    first = (str(error).strip().splitlines() or [""])[0][:500]
    return Answer(error=f"{type(error).__name__}: {first}", trace=traceback.format_exc())
