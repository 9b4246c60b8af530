"""The benchmarks' own arithmetic: rows of small runs against what follows from their parts."""

import json

import numpy as np
import pytest

from benchmarks.speed import measure, train
from benchmarks.speed.step import flops_per_token, multiplied_parameters


def rows_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is 1/32 s after the last, so that each call that is timed takes so long."""
    now = iter(np.arange(1, 10_000) / 32)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(now)))


def test_a_rate_counts_the_work_of_its_rounds_alone(clock):
    calls = []
    # rounds of four, 1/32 s each: the fifth ends at 0.15625 s, beyond the 0.15 s asked for
    value = measure.rate("cpu", 3e12, lambda: calls.append(1))
    assert len(calls) == 4 + 5 * 4  # one round to warm up
    assert value == pytest.approx(20 * 3.0 / 0.15625, rel=1e-9)


def test_attention_s_backward_pass_counts_two_and_a_half_times(clock):
    rows = {row["task"]: row["value"] for row in measure.attention_rates("tiny", 16, rows=2)}
    causal = 2 * 2 * 16 * 16 * 64  # rows, two halves of T x T products of all heads
    assert rows["attention sdpa: forward"] == pytest.approx(causal * 20 / 0.15625 / 1e12)
    assert rows["attention sdpa: forward and backward"] == pytest.approx(3.5 * causal * 20 / 0.15625 / 1e12)


def test_mistral_s_flops_by_hand():
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    products = 32 * layer + 32768 * 4096
    assert flops_per_token("mistral-7b", 32768) == 6 * products + 6 * 32768 * 4096 * 32
    assert multiplied_parameters("llama3-1b") == 128256 * 2048 + 16 * (
        2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
    )


def test_the_table_puts_each_number_under_its_head():
    def row(task, metric, value, suite="training-speed", **more):
        return {"suite": suite, "task": task, "length": 64, "metric": metric, "value": value} | more

    speeds = [row("fast", "tokens_per_s", 12345.6), row("fast", "peak_gib", 110.25), row("slow", "tokens_per_s", 7.0)]
    head, fast, slow = train.table(speeds).splitlines()
    places = {name: head.index(name) + len(name) for name in ("tokens/s", "GiB")}
    assert fast[: places["tokens/s"]].split()[-1] == "1.235e+04" and fast[: places["GiB"]].split()[-1] == "110.2"
    assert slow.split() == ["slow", "7"] and "MFU" not in head
