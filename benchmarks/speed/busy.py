"""Seconds of a command of this project on a CPU, alone and beside a process that keeps one core busy.

    python -m benchmarks.speed.busy OUTPUT.jsonl REPEATS verify CHECKPOINT --target 65536 --output runs/verify

The command is run with threads that spin while they wait, as OpenMP's do by themselves, and with threads that sleep, as
this project has them. A row for each of the four: the least of the repeats. `load_average` is that of the minute before
the first of them: only where it is near 0 was the machine idle. What the command prints goes to stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import say, speed_rows, timed
from endprompt.results import append_rows

#: What OpenMP does by itself, and what this project asks for.
WAITING = {"spinning": {"GOMP_SPINCOUNT": "300000"}, "asleep": {"OMP_WAIT_POLICY": "passive"}}
COMMAND = [sys.executable, "-c", "import sys; from endprompt.cli import main; sys.exit(main())"]
BUSY = [sys.executable, "-c", "while True: pass"]


def measure(repeats: int, command: list[str]) -> list[dict[str, Any]]:
    """The four rows. Raises ValueError if the command fails."""
    rows = []
    around = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for beside in ("nothing", "one busy core"):
        for waiting, settings in WAITING.items():
            about = {"method": waiting, "beside": beside, "load_average": os.getloadavg()[0], "repeats": repeats}
            other = subprocess.Popen(BUSY) if beside == "one busy core" else None
            try:
                taken = [timed("cpu", partial(once, command, around | settings))[0] for _ in range(repeats)]
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
            say(f"{command[0]}, threads {waiting}, beside {beside}: {min(taken):.1f} s")
            about |= {"suite": "cpu-speed", "task": command[0], "model": " ".join(command[1:])}
            rows += speed_rows({"seconds": min(taken)}, **about)
    return rows


def once(command: list[str], around: dict[str, str]) -> None:
    code = subprocess.run([*COMMAND, *command], env=around, stdout=2).returncode
    if code:
        raise ValueError(f"the command ended with {code}: endprompt {' '.join(command)}")


if __name__ == "__main__":
    append_rows(Path(sys.argv[1]), measure(int(sys.argv[2]), sys.argv[3:]))
