"""Outputs under faults: two runs on one, a read-only one, a full disk, a crash while scoring, damaged inputs."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.scoring import generate
from endprompt import cli, files, train
from endprompt.results import read_rows
from tests.support import ruler_helpers
from tests.support.checkpoints import make_checkpoint
from tests.support.processes import Forked
from tests.support.runs import signalled


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a checkpoint `llama` (window 512) and a haystack `story.txt`."""
    folder = tmp_path_factory.mktemp("drills")
    ruler_helpers.essay_file(folder)
    ruler_helpers.checkpoint(folder / "llama")
    return folder


def score_arguments(place: Path, output: Path, **changes) -> list[str]:
    settings = {
        "checkpoint": place / "llama",
        "tasks": "niah_single_1,niah_single_2",
        "lengths": "400",
        "samples": 4,
        "max_new_tokens": 8,
        "haystack_text": place / "story.txt",
        "cache_dir": output.parent / "cache",
        "dtype": "float32",
        "device": "cpu",
        "output": output,
        "quiet": True,
    } | changes
    checkpoint = settings.pop("checkpoint")
    return ["score", str(checkpoint), *(f"--{key}={value}" for key, value in settings.items())]


def extend_arguments(config) -> list[str]:
    given = {key: getattr(config, key) for key in ("model", "output", "target", "prompt", "rows", "steps", "device")}
    return ["extend", *(f"--{key}={value}" for key, value in given.items()), "--data", *config.data]


def commands_on(output: Path, place: Path, extend_config) -> dict[str, list[str]]:
    """Every command that writes to an output."""
    config = extend_config(output=str(output))
    return {
        "extend": extend_arguments(config),
        "score": score_arguments(place, output),
        "prepare": ["prepare", "--data", *config.data, f"--tokenizer={config.model}", f"--output={output}"],
        "demo": ["demo", f"--output={output}"],
        "verify": ["verify", str(place / "llama"), "--target=1024", f"--output={output}", "--pairs=8", "--tokens=64"],
        "figures": ["figures", f"--output={output}", "--only=table_1"],
        "lab": ["lab", "--preset=smoke", f"--output={output}", "--device=cpu"],
    }


def failed(arguments: list[str], capsys) -> str:
    """The one line that a command which fails leaves on stderr."""
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("endprompt: ")]
    return line


# ---------------------------------------------------------------------------------------- two runs on one output


def hold(output, held, over):
    with files.sole_use(output):
        multiprocessing.get_context("fork").Process(target=outlive, args=(held, over), daemon=True).start()
        signal.pause()


def outlive(held, over):
    held.send(None)
    over.recv()  # until the test is over


@pytest.fixture
def holder():
    """`holder(output)`: a process of its own that holds the output, as a run does."""
    started, ends = [], []

    def start(output: Path):
        ours, theirs = multiprocessing.Pipe()
        ends.append(multiprocessing.Pipe())
        started.append(Forked(hold, output, theirs, ends[-1][1]))
        assert ours.poll(120)
        return started[-1].process

    yield start
    for process, (end, _) in zip(started, ends):
        process.ended(0)
        end.send(None)


def test_second_run_on_an_output_refuses_and_changes_nothing(extend_config, place, tmp_path, holder, capsys):
    output = tmp_path / "out"
    other = holder(output)
    commands = commands_on(output, place, extend_config)
    del commands["figures"]  # they are drawn anew
    for name, arguments in commands.items():
        message = failed(arguments, capsys)
        assert f"another run writes to this output now (process {other.pid}): output='{output}'" in message, name
        assert not output.exists() and not (tmp_path / "out.partial").exists(), name


def test_output_of_a_killed_run_is_free_again(tmp_path, holder):
    """Also while a process that the run had forked lives on."""
    output = tmp_path / "out"
    process = holder(output)
    child = next(int(name) for name in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "out.lock").exists()
    with (
        files.sole_use(output),
        pytest.raises(ValueError, match="another run writes"),
        files.sole_use(tmp_path / "." / "out"),
    ):
        raise AssertionError("two hold it")
    assert list(tmp_path.iterdir()) == []
    os.kill(child, signal.SIGKILL)  # it lived


def take_turns(output, count):
    done = 0
    while done < 150:
        try:
            with files.sole_use(output):
                count.write_text(str(int(count.read_text()) + 1))
                done += 1
        except ValueError as error:
            assert "another run" in str(error), error


def test_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path):
    """Many processes that take turns: each is alone, and none is left with a lock on a file that is gone."""
    (tmp_path / "count").write_text("0")
    processes = [Forked(take_turns, tmp_path / "out", tmp_path / "count") for _ in range(3)]
    assert [process.ended()[0] for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "450"


# ------------------------------------------------------------------------------------------- read-only, full disk


def mounted(folder: Path, *options: str) -> bool:
    folder.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder]).returncode == 0


@pytest.fixture
def read_only(tmp_path):
    """A folder that nobody can write to, root included."""
    folder = tmp_path / "read_only"
    if os.geteuid() == 0:
        assert mounted(folder, "ro", "size=64k")
        yield folder
        subprocess.run(["umount", folder], check=True)
    else:
        folder.mkdir(mode=0o555)
        yield folder


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("demo", "verify", "figures", "lab")]


@pytest.mark.skipif(os.geteuid() == 0 and not os.access("/sys/fs", os.W_OK), reason="root that may not mount")
@pytest.mark.parametrize("name", ["extend", "score", "prepare", *SLOW])
def test_read_only_output_is_named(name, extend_config, place, read_only, capsys):
    message = failed(commands_on(read_only / "out", place, extend_config)[name], capsys)
    assert str(read_only) in message and ("Read-only" in message or "denied" in message), message


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: a file system of that size."""
    folder = tmp_path / "small"

    def make(size: int) -> Path:
        assert mounted(folder, f"size={size}")
        return folder

    yield make
    subprocess.run(["umount", folder])


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/sys/fs", os.W_OK), reason="a file system of its own needs root"
)
def test_full_disk_is_named_and_what_was_finished_stays(extend_config, place, small_disk, tmp_path, capsys):
    disk = small_disk(60_000)
    config = extend_config(output=str(disk / "out"), steps=2)
    prepare = ["prepare", "--data", *config.data, f"--tokenizer={config.model}", f"--output={disk / 'out'}"]
    for arguments in (extend_arguments(config), prepare):
        filler = disk / "filler"
        filler.write_bytes(b"x" * 40_000)
        message = failed(arguments, capsys)
        assert re.search("too little room|No space left on device", message), message
        assert not (disk / "out").exists()
        filler.unlink()
    subprocess.run(["rm", "-rf", *disk.glob("*")], check=True)

    # score: predictions that were written down before the disk was full are not made again
    output = disk / "run"
    whole = score_arguments(place, tmp_path / "elsewhere", cache_dir=tmp_path / "cache", samples=30)
    assert cli.main(whole) == 0
    capsys.readouterr()
    filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 40_000))
    arguments = score_arguments(place, output, cache_dir=tmp_path / "cache", samples=30)
    message = failed(arguments, capsys)
    assert "No space left on device" in message, message
    before = (output / "predictions.jsonl").read_bytes()
    assert before.count(b"\n") >= 8
    filler.unlink()
    assert cli.main(arguments) == 0
    after = (output / "predictions.jsonl").read_bytes()
    whole_lines = before[: before.rindex(b"\n") + 1]
    assert after.startswith(whole_lines)
    assert len(set(map(key_of, complete(after)))) == len(complete(after)) == 60
    assert values(output) == values(tmp_path / "elsewhere")


def complete(text: bytes) -> list[dict]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            assert not line.endswith(b"}")
    return lines


def key_of(entry: dict) -> tuple:
    return entry["task"], entry["index"]


def values(run: Path) -> list[tuple]:
    return [(r["task"], r["length"], r["value"], r["samples_sha256"]) for r in read_rows(run / "results.jsonl")]


# --------------------------------------------------------------------------------------------- kill -9, the clock


def killed(*where_and_what) -> None:
    assert Forked(signalled, signal.SIGKILL, *where_and_what).ended()[0] == -signal.SIGKILL


def test_killed_while_building_samples(place, tmp_path, capsys):
    arguments = score_arguments(place, tmp_path / "run")
    killed(files, "write_text", 2, [*arguments, "--prepare_only"])  # before the second task's samples stand
    kept = sorted((tmp_path / "cache").glob("*.json"))
    assert [path.name.split("-")[0] for path in kept] == ["niah_single_1"]
    stamp = kept[0].stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert kept[0].stat().st_mtime_ns == stamp, "what was built is not built again"
    assert cli.main(score_arguments(place, tmp_path / "elsewhere" / "run")) == 0
    assert values(tmp_path / "run") == values(tmp_path / "elsewhere" / "run")


def test_killed_while_scoring(place, tmp_path, capsys):
    cache = tmp_path / "cache"
    arguments = score_arguments(place, tmp_path / "run", batch_size=2, cache_dir=cache)
    killed(generate, "attempt", 4, arguments)  # two batches of two of the second task are not made yet
    predictions = tmp_path / "run" / "predictions.jsonl"
    before = predictions.read_bytes()
    assert before.count(b"\n") == 6
    predictions.write_bytes(before[:-20])  # as if the kill had come in the middle of the write
    assert cli.main(arguments) == 0
    after = predictions.read_bytes()
    assert after.startswith(before[:-20])
    assert len(complete(after)) == 8
    assert cli.main(score_arguments(place, tmp_path / "whole", batch_size=2, cache_dir=cache)) == 0
    assert values(tmp_path / "run") == values(tmp_path / "whole")


def test_row_that_a_crash_cut_off_is_written_again(place, tmp_path, capsys):
    arguments = score_arguments(place, tmp_path / "run")
    assert cli.main(arguments) == 0
    results = tmp_path / "run" / "results.jsonl"
    whole = values(tmp_path / "run")
    results.write_bytes(results.read_bytes()[:-30])
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert f"{results}: the last line was cut off by a crash" in capsys.readouterr().err
    assert values(tmp_path / "run") == whole


def test_damaged_row_is_named_and_nothing_is_overwritten(place, tmp_path, capsys):
    arguments = score_arguments(place, tmp_path / "run")
    assert cli.main(arguments) == 0
    capsys.readouterr()
    results = tmp_path / "run" / "results.jsonl"
    broken = results.read_bytes().replace(b'"value"', b'"valve"', 1)
    results.write_bytes(broken)
    assert f"{results}, line 1: a row of results must have the columns ['value']" in failed(arguments, capsys)
    assert results.read_bytes() == broken


def test_clock_that_goes_back_changes_nothing(extend_config, place, tmp_path, monkeypatch, capsys):
    """Time of day is written down and never computed with; states are told apart by their step, not their age."""
    clock = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    config = extend_config(steps=6, save_every=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = train.Trainer.save

        def save(self, states, beside):
            real(self, states)
            for number, state in enumerate(sorted(states.iterdir())):
                os.utime(state, (1e9 - number, 1e9 - number))  # the later state looks older
            if self.step == 4:
                raise KeyboardInterrupt

        patch.setattr(train.Trainer, "save", save)
        train.extend(config)
    capsys.readouterr()
    resumed = train.extend(dataclasses.replace(config, resume=True))
    assert "resumed from step 4 of 6" in capsys.readouterr().err
    steps = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert all(entry["tokens_per_s"] > 0 for entry in steps)
    assert steps[0]["time"] > steps[-1]["time"]
    assert json.loads((resumed / "endprompt.json").read_text())["seconds"] > 0
    whole = train.extend(dataclasses.replace(config, output=str(tmp_path / "whole"), save_every=0))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert cli.main(score_arguments(place, tmp_path / "run")) == 0
    assert all(row["value"] >= 0 for row in read_rows(tmp_path / "run" / "results.jsonl"))


# ------------------------------------------------------------------------------------------------- damaged inputs


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda data: data[: len(data) // 2]),
        ("model.safetensors", lambda data: b"\xff" * 64 + data[64:]),
        ("model.safetensors", lambda data: b""),
        ("config.json", lambda data: data[:-40]),
        ("config.json", lambda data: b"[]"),
        ("config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": "wide"')),
        ("config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": 48')),
        ("config.json", lambda data: data.replace(b'"vocab_size": 320', b'"vocab_size": -3')),
        ("tokenizer.json", lambda data: data[:-200]),
        ("tokenizer.json", lambda data: b"{}"),
        ("tokenizer_config.json", lambda data: b"[1]"),
    ],
)
def test_damaged_checkpoint_is_named_by_every_command(file, damage, extend_config, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "broken")
    path = checkpoint / file
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    (tmp_path / "story.txt").write_text(ruler_helpers.STORY * 5)
    commands = [
        extend_arguments(extend_config(model=str(checkpoint))),
        ["verify", str(checkpoint), "--target=128", f"--output={tmp_path / 'verify'}", "--prompt=4"],
        ["score", str(checkpoint), "--tasks=niah_single_2", "--lengths=1000", "--samples=1", "--device=cpu",
         "--beyond_window", f"--haystack_text={tmp_path / 'story.txt'}", f"--cache_dir={tmp_path / 'cache'}",
         f"--output={tmp_path / 'score'}"],
    ]  # fmt: skip
    for arguments in commands:
        message = failed(arguments, capsys)
        assert "broken" in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.npy", "completions.npy"])
def test_damaged_shard_is_named(file, extend_config, tmp_path, capsys):
    config = extend_config(data=[str(tmp_path / "shard")])
    source = extend_config().data
    assert (
        cli.main(["prepare", "--data", *source, f"--tokenizer={config.model}", f"--output={tmp_path / 'shard'}"]) == 0
    )
    capsys.readouterr()
    path = tmp_path / "shard" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path}: missing or changed since the shard was made" in failed(extend_arguments(config), capsys)
    path.unlink()
    assert f"{path}: missing or changed" in failed(extend_arguments(config), capsys)


def test_damaged_cache_is_named(place, tmp_path, capsys):
    arguments = score_arguments(place, tmp_path / "run")
    assert cli.main([*arguments, "--prepare_only"]) == 0
    capsys.readouterr()
    path = min((tmp_path / "cache").glob("*.json"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert f"{path}: this file of the cache was changed after it was written; delete it" in failed(arguments, capsys)
    path.unlink()
    assert cli.main(arguments) == 0
