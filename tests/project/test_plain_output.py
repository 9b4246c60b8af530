"""No escape codes where no terminal reads them, or where NO_COLOR asks for none; JSON where a program may read."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import coverage
from analysis.config import PositionsConfig
from benchmarks import commands, scoring
from endprompt import cli

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
SHOWN |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"}


def piped(*arguments):
    command = [sys.executable, "-m", "endprompt.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=SHOWN, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["extend", "--help"], ["audit"]], ids=" ".join)
def test_no_escape_codes_through_a_pipe(arguments):
    assert b"\x1b" not in piped(*arguments)


def on_a_terminal(code: str, **environment) -> bytes:
    """All that a script prints to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=SHOWN | environment
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait(timeout=60) == 0, said
    return said


BARS = """
from endprompt.distributed import World
from endprompt.train.progress import progress
from benchmarks.scoring.recording import Progress
with progress(0, 2, World()) as advance:
    advance(2, {"loss": 1.5})
bar = Progress(2)
bar.step("vt", 2, 100, 1.0)
"""


def test_no_color_gives_plain_lines_on_a_terminal_too():
    plain = on_a_terminal(BARS, NO_COLOR="1")
    assert b"\x1b" not in plain and b"step 2/2  loss 1.5000" in plain and b"vt: 2/2 samples" in plain
    assert b"\x1b" in on_a_terminal(BARS)


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


def predictions(directory, scores):
    directory.mkdir()
    with open(directory / "predictions.jsonl", "w") as file:
        for index, value in enumerate(scores):
            entry = {"task": "vt@64", "index": index, "prompt_sha256": str(index), "prediction": "ü", "score": value}
            file.write(json.dumps(entry | {"outputs": ["a"]}) + "\n")
    return str(directory)


def test_compare_and_show_as_json(tmp_path, capsys):
    first, second = predictions(tmp_path / "a", [0, 100, 0, 0]), predictions(tmp_path / "b", [100, 100, 0, 100])
    commands.score(scoring.ScoreConfig(second, compare=first, json=True))
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["task"], row["first"], row["second"], row["difference"], row["n"]) == ("vt@64", 25.0, 75.0, 50.0, 4)
    commands.score(scoring.ScoreConfig(second, show="vt", wrong=True, json=True))
    (entry,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (entry["index"], entry["prediction"]) == (2, "ü")
    with pytest.raises(ValueError, match="json is for compare and show"):
        scoring.ScoreConfig("x", json=True)
