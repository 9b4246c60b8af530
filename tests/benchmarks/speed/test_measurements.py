"""The benchmarks' own arithmetic: rows of small runs against what follows from their parts."""

import pytest

from benchmarks.speed import train, verifying
from endprompt.results import read_rows


def test_the_table_puts_each_number_under_its_head():
    def row(task, metric, value, suite="training-speed", **more):
        return {"suite": suite, "task": task, "length": 64, "metric": metric, "value": value} | more

    speeds = [row("fast", "tokens_per_s", 12345.6), row("fast", "peak_gib", 110.25), row("slow", "tokens_per_s", 7.0)]
    head, fast, slow = train.table(speeds).splitlines()
    places = {name: head.index(name) + len(name) for name in ("tokens/s", "GiB")}
    assert fast[: places["tokens/s"]].split()[-1] == "1.235e+04" and fast[: places["GiB"]].split()[-1] == "110.2"
    assert slow.split() == ["slow", "7"] and "MFU" not in head


@pytest.mark.slow
def test_verify_is_timed_on_every_head_of_the_shape(tmp_path, monkeypatch):
    monkeypatch.setattr("endprompt.runs.git_revision", lambda: None)
    verifying.main(f"--model tiny --target 256 --device cpu --runs 2 --out {tmp_path}/rows.jsonl".split())
    rows = read_rows(tmp_path / "rows.jsonl")
    told = [(row["task"], row["run"], row["n"], row.get("holds")) for row in rows]
    assert told == [(task, run, 8, holds) for run in (0, 1) for task, holds in (("verify", True), ("predict", None))]
    assert all(0 < row["value"] < 600 and row["length"] == 256 for row in rows)
