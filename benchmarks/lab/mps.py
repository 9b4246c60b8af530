"""Several processes on one GPU at the same time, by NVIDIA's Multi-Process Service, where it can be had.

Without it the kernels of different processes take turns. Its control daemon needs neither root nor other settings of
the GPU, but a sandbox may refuse it: it is tried with a client that does a sum, and work goes on without it if not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from unittest import mock

CONTROL = "nvidia-cuda-mps-control"
PLACES = {"CUDA_MPS_PIPE_DIRECTORY": "pipe", "CUDA_MPS_LOG_DIRECTORY": "log"}
CLIENT = (sys.executable, "-c", "import torch; assert float(torch.ones(8, device='cuda').sum()) == 8")


@contextlib.contextmanager
def service(client: Sequence[str] = CLIENT, seconds: float = 60.0) -> Iterator[str | None]:
    """Run the service while the context lasts; None if it runs, else why it does not. Processes started inside find it
    by their environment; this process must not have used CUDA before. client: a command that succeeds if CUDA works
    through the service. seconds: it may take."""
    if shutil.which(CONTROL) is None:
        yield f"there is no {CONTROL}"
        return
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True))
        places = {name: os.path.join(directory, place) for name, place in PLACES.items()}
        for place in places.values():
            os.mkdir(place)
        stack.enter_context(mock.patch.dict(os.environ, places))
        stack.callback(_stop)
        reason = _failure([CONTROL, "-d"], seconds) or _failure(client, seconds)
        if reason:
            stack.close()
        yield reason


def _failure(command: Sequence[str], seconds: float) -> str | None:
    """Why a command failed, None if it did not. Its output goes to a file: a daemon keeps a pipe open."""
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{os.path.basename(command[0])}: {error}"
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "it said nothing"
    return f"{os.path.basename(command[0])} ended with {done.returncode}: {said}" if done.returncode else None


def _stop() -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([CONTROL], input=b"quit -t 5\n", capture_output=True, timeout=20)
