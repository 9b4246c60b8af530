"""Ctrl-C for real: exit code 130, what is done kept, and the printed command goes on to the same result."""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time

import pytest

from benchmarks.scoring import generate
from endprompt import cli, train
from endprompt.train import loop
from endprompt.train.output import Interrupted
from tests.support import ruler_helpers
from tests.support.processes import Forked
from tests.support.runs import lines_of, signalled


def fresh(arguments):
    os.execv(sys.executable, [sys.executable, "-m", "endprompt.cli", *arguments])


#: The command line in the forked process, and in a Python of its own.
COMMANDS = [cli.main, pytest.param(fresh, marks=pytest.mark.slow)]


def interrupted(command, arguments, at, begun, cwd):
    """(exit code, stdout, stderr) of the command, interrupted `at` a call, or in a Python of its own if `begun()`."""
    arguments = [*map(str, arguments)]
    if command is cli.main:
        return Forked(signalled, signal.SIGINT, *at, arguments, cwd=cwd).ended()
    command = Forked(command, arguments, cwd=cwd)
    while not begun() and command.process.is_alive():
        time.sleep(0.01)
    os.kill(command.process.pid, signal.SIGINT)
    return command.ended()


def go_on(said, capsys):
    """Run what the last line says, in this process: (its words, what it printed)."""
    line = said.splitlines()[-1]
    assert line.startswith("endprompt: interrupted, what is done is kept; go on with: ") and "Traceback" not in said
    words = shlex.split(line.partition("go on with: ")[2])
    capsys.readouterr()
    assert cli.main(words[next(i for i, word in enumerate(words) if word in ("extend", "score")) :]) == 0
    return words, capsys.readouterr()


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("command", COMMANDS)
def test_extend_ends_its_step_and_the_printed_command_ends_in_the_same_weights(
    command, llama, documents, tmp_path, capsys
):
    output = tmp_path / "with a space"
    usual = ["extend", "--model", llama, "--data", documents, "--target", 128, "--prompt", "EP_3", "--rows", 2,
             "--steps", (steps := 8 if command is cli.main else 200), "--device", "cpu", "--log-every", 1]  # fmt: skip
    log, at = output.with_name("with a space.partial") / "log.jsonl", (train.Trainer, "train_step", 4)
    code, out, said = interrupted(command, [*usual, "--output", output], at, lambda: lines(log) > 3, tmp_path)
    assert code == 130 and out == "" and "Warning" not in said and "\x1b" not in said and not output.exists()
    (state,) = (log.parent / "states").iterdir()
    stopped = int(state.name.removeprefix("step-"))
    assert stopped == 4 if command is cli.main else 3 < stopped < steps
    words, printed = go_on(said, capsys)
    assert words[-1] == "--resume" and printed.out == f"{output}\n"
    assert f"resumed from step {stopped} of {steps}" in printed.err and f"step {steps}/{steps}  loss" in printed.err
    whole = tmp_path / "whole"
    assert cli.main([*map(str, usual), "--output", str(whole)]) == 0
    assert (whole / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert [line["step"] for line in lines_of(output / "log.jsonl")] == list(range(1, steps + 1))


@pytest.mark.parametrize("command", COMMANDS)
def test_score_keeps_its_predictions(command, tmp_path, monkeypatch, capsys):
    ruler_helpers.checkpoint(tmp_path / "tiny")
    samples, at = 6 if command is cli.main else 64, (generate, "attempt", 4)
    arguments = ["score", "tiny", "--tasks", "niah_single_1", "--lengths", 512, "--samples", samples, "--batch-size", 1,
                 "--max-new-tokens", 16, "--cache-dir", "cache", "--device", "cpu", "--quiet", "--output", "run",
                 "--overwrite"]  # fmt: skip
    predictions = tmp_path / "run" / "predictions.jsonl"
    code, out, said = interrupted(command, arguments, at, lambda: lines(predictions) > 2, tmp_path)
    assert code == 130 and out == "", said
    kept = predictions.read_text().splitlines()
    assert 2 < len(kept) < samples
    monkeypatch.chdir(tmp_path)
    assert go_on(said, capsys)[0][-2:] == ["--overwrite", "false"]
    after = predictions.read_text().splitlines()
    assert len(after) == samples and after[: len(kept)] == kept


def test_nothing_saved_means_the_same_command(extend_config, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "fit", pressed)
    with pytest.raises(Interrupted) as stopped:
        train.extend(extend_config())
    assert stopped.value.flags == {}


def test_interrupt_at_the_last_step_leaves_a_whole_run(extend_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "stop_asked", lambda here: contextlib.nullcontext(lambda: True))
    config = extend_config(steps=1)
    with pytest.raises(Interrupted) as stopped:
        train.extend(config)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out.partial").exists()
    assert stopped.value.flags == {"resume": True}
    assert train.extend(dataclasses.replace(config, resume=True)) == tmp_path / "out"


@pytest.mark.parametrize("name", ["demo", "lab"])
def test_demo_and_lab_say_how_to_go_on(name, monkeypatch, capsys):
    def pressed(config):
        raise KeyboardInterrupt

    module = "benchmarks.demo.demo" if name == "demo" else "benchmarks.lab.runner.lab"
    monkeypatch.setattr(module, pressed)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/endprompt"])
    assert cli.main([name, "--output", "a b"]) == 130
    assert capsys.readouterr().err == (
        f"endprompt: interrupted, what is done is kept; go on with: endprompt {name} --output 'a b'\n"
    )


def test_interrupt_before_a_command_has_begun(monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", pressed)
    assert cli.main(["audit"]) == 130
    assert capsys.readouterr().err == "endprompt: interrupted\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["audit"]) == 130
    assert capsys.readouterr().err == ""
