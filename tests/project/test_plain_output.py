"""No escape codes where no terminal reads them, or where NO_COLOR asks for none; JSON where a program may read."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import coverage
from analysis.config import PositionsConfig
from benchmarks.scoring.recording import Progress
from endprompt import cli
from endprompt.distributed import World
from endprompt.train.progress import progress

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
SHOWN |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"}


def piped(*arguments):
    command = [sys.executable, "-m", "endprompt.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=SHOWN, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["extend", "--help"], ["audit"]], ids=" ".join)
def test_no_escape_codes_through_a_pipe(arguments):
    assert b"\x1b" not in piped(*arguments)


def bars_on_a_terminal() -> bytes:
    """All that the bars of training and of scoring print to one."""
    ours, theirs = pty.openpty()
    with pytest.MonkeyPatch.context() as patch, open(theirs, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        with progress(0, 2, World()) as advance:
            advance(2, {"loss": 1.5})
        Progress(2).step("vt", 2, 100, 1.0)
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    return said


def test_no_color_gives_plain_lines_on_a_terminal_too(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert b"\x1b" in bars_on_a_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = bars_on_a_terminal()
    assert b"\x1b" not in plain and b"step 2/2  loss 1.5000" in plain and b"vt: 2/2 samples" in plain


def test_positions_as_json_is_the_table(capsys):
    config = PositionsConfig(scheme="all", target=512, context=60, prompt=4)
    assert cli.main(["positions", "--scheme=all", "--target=512", "--context=60", "--prompt=4", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    table = coverage.report(config).splitlines()[2:]
    assert [one["scheme"] for one in found] == [line.split()[0] for line in table]
    assert [f"{one['gap_rms']:.4f}" for one in found] == [line.split()[2] for line in table]
    own = next(one for one in found if one["scheme"] == "endprompt")
    # a prompt of 4 at 508..511 sees a context of 60 at the distances 508 - 59 and more
    assert own["observed"] == [[0, 59], [449, 511]] and own["gap"] == [[60, 448]]
    assert own["coverage"] == pytest.approx((60 + 63) / 512)
