"""The benchmarks' own arithmetic: rows of small runs against what follows from their parts."""

import subprocess

import pytest

from benchmarks.speed import busy, train, verifying
from endprompt.results import read_rows


def test_the_table_puts_each_number_under_its_head():
    def row(task, metric, value, suite="training-speed", **more):
        return {"suite": suite, "task": task, "length": 64, "metric": metric, "value": value} | more

    speeds = [row("fast", "tokens_per_s", 12345.6), row("fast", "peak_gib", 110.25), row("slow", "tokens_per_s", 7.0)]
    head, fast, slow = train.table(speeds).splitlines()
    places = {name: head.index(name) + len(name) for name in ("tokens/s", "GiB")}
    assert fast[: places["tokens/s"]].split()[-1] == "1.235e+04" and fast[: places["GiB"]].split()[-1] == "110.2"
    assert slow.split() == ["slow", "7"] and "MFU" not in head


def test_a_command_is_timed_beside_a_busy_core_with_threads_of_both_kinds(monkeypatch):
    """What each of the four runs is given, and what runs beside it; afterwards nothing does."""
    started, seen = [], []

    def start(command, real=subprocess.Popen):
        started.append(real(command))
        return started[-1]

    def run(command, env, **kwargs):
        beside = sum(process.poll() is None for process in started)
        seen.append((env.get("GOMP_SPINCOUNT"), env.get("OMP_WAIT_POLICY"), beside, command[-1]))
        return subprocess.CompletedProcess(command, int(len(seen) == 9))

    monkeypatch.setattr(busy.subprocess, "Popen", start)
    monkeypatch.setattr(busy.subprocess, "run", run)
    monkeypatch.setattr("endprompt.runs.git_revision", lambda: None)  # it runs git
    rows = busy.measure(2, ["verify", "here"])
    one = [("300000", None, 0, "here"), (None, "passive", 0, "here")]
    assert seen == [x for kind in [*one, *((a, b, 1, c) for a, b, _, c in one)] for x in (kind, kind)]
    assert [(row["method"], row["beside"]) for row in rows] == [
        (waiting, beside) for beside in ("nothing", "one busy core") for waiting in ("spinning", "asleep")
    ]
    with pytest.raises(ValueError, match="ended with 1: endprompt verify here"):
        busy.measure(1, ["verify", "here"])
    assert all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_verify_is_timed_on_every_head_of_the_shape(tmp_path, monkeypatch):
    monkeypatch.setattr("endprompt.runs.git_revision", lambda: None)
    command = [
        "--model",
        "tiny",
        "--target",
        "256",
        "--device",
        "cpu",
        "--runs",
        "2",
        "--out",
        f"{tmp_path}/rows.jsonl",
    ]
    verifying.main(command)
    rows = read_rows(tmp_path / "rows.jsonl")
    told = [(row["task"], row["run"], row["n"], row.get("holds")) for row in rows]
    assert told == [(task, run, 8, holds) for run in (0, 1) for task, holds in (("verify", True), ("predict", None))]
    assert all(0 < row["value"] < 600 and row["length"] == 256 for row in rows)
