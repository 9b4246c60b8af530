"""Processes forked from the tests' own: what it has imported is there already, where a new Python takes seconds.

What a fresh Python does (its imports, how it is started) has tests with a fresh one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.lab import runner


class Forked:
    """A process that runs `function(*arguments)` and exits with what that returns; `process` is multiprocessing's."""

    def __init__(self, function: Callable, *arguments, cwd: Path | None = None, **environment: str):
        self.folder = tempfile.TemporaryDirectory()
        self.printed = [Path(self.folder.name) / name for name in ("out", "err")]
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(function, *arguments))
        self.cwd, self.environment = cwd, environment
        self.process.start()

    def _run(self, function: Callable, *arguments) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # torch makes its pool of threads anew after a fork, and two threads that ask for it at once find none
        torch.set_num_threads(torch.get_num_threads())
        os.environ.update(self.environment)
        os.chdir(self.cwd or os.getcwd())
        for number, path in enumerate(self.printed, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.exit(function(*arguments))

    def ended(self, timeout: float = 280) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) once it has ended; it is killed after so many seconds."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, *(path.read_text() for path in self.printed)


def several(count: int, function: Callable, *arguments, seconds: float = 280) -> tuple[list[int], str]:
    """So many processes as torchrun starts them, each of which runs `function(*arguments)`: (exit codes, all print)."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": str(count)}
    ranks = [Forked(function, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in range(count)]
    codes, *printed = zip(*[rank.ended(seconds) for rank in ranks])
    return list(codes), "\n".join(text for stream in printed for text in stream)


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """The lab's processes inside are forked, too."""
    forking = types.SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    with mock.patch.object(runner, "multiprocessing", forking):
        yield
