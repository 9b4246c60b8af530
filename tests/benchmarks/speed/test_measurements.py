"""The benchmarks' own arithmetic: rows of small runs against what follows from their parts."""

import json

import numpy as np
import pytest
import torch

from analysis import sweep
from analysis.spectra import rope_freqs
from benchmarks.speed import analysis, learning, rates, train
from benchmarks.speed.step import flops_per_token, multiplied_parameters


def rows_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------- benchmarks.speed.analysis


@pytest.fixture
def small(monkeypatch):
    """A sixteenth of the heads at distances below 600, two configurations in place of two hundred."""
    monkeypatch.setattr(analysis, "HEADS", 4)
    monkeypatch.setattr(analysis, "LENGTHS", (300, 600))
    monkeypatch.setattr(analysis, "WINDOW", 75)


def analysed(folder, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench", f"--output={folder}", *arguments])
    analysis.main()
    return {(row["task"], row["metric"], row["length"]): row for row in rows_in(folder)}


def test_ratios_of_the_analysis_follow_from_its_seconds(small, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(analysis, "configurations", lambda options: [])
    monkeypatch.setattr(analysis, "naive", lambda *a: asked.append(a) or 7.0)
    found = analysed(tmp_path / "run", monkeypatch, "--pairs=3", "--repeats=1")
    short, long = (found["sweep", "seconds", length]["value"] for length in (300, 600))
    assert found["sweep", "naive_over_fused", 300]["value"] == pytest.approx(7.0 / short)
    assert found["sweep", "time_at_double_length", 600]["value"] == pytest.approx(long / short)
    assert found["sweep", "seconds", 300]["n"] == 4 * 3 and [call[2] for call in asked] == [300, 600]
    assert all(0 < found["sweep", f"median_relative_width_order{k}", 600]["value"] < 0.1 for k in range(3))
    assert found["certificate", "evaluations", 600]["value"] > 0
    assert f"{long:.4g}" in capsys.readouterr().out


def test_the_naive_loop_is_scaled_from_its_sample_and_catches_a_bound_that_is_too_small(small):
    omega, _ = rope_freqs(500000.0, 128, "linear", 8, 75)
    generator = torch.Generator().manual_seed(0)
    z = torch.complex(*torch.randn(2, 6, 64, generator=generator))
    found = sweep.Sweep(omega, 300, spacing=4.0, dtype="float32", device="cpu").maxima(z)
    clock = iter([10.0, 14.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.time, "perf_counter", lambda: next(clock))
        assert analysis.naive(omega, z, 300, found, 60) == 60.0  # 4 seconds for 4 spectra
    found.size[1][2] *= 0.5
    with pytest.raises(ArithmeticError, match="order=1 place=2"):
        analysis.naive(omega, z, 300, found, 60)


def test_two_hundred_configurations_are_asked_about(small, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(analysis, "answer", lambda omega, *rest: asked.append((len(omega), *rest)) or (0.0, 0.0))
    monkeypatch.setattr(analysis, "sweeps", lambda options: [])
    found = analysed(tmp_path / "run", monkeypatch)
    assert len(asked) == 1 + 200 and found["observability", "seconds_200_configurations", 32 * 75]["n"] == 200
    assert len(set(asked[1:])) == 200 and {rest[1] for rest in asked[1:]} == {75 * f for f in (2, 4, 8, 16, 32)}


def test_verify_is_timed_on_random_weights_whose_bounds_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "WINDOW", 128)
    found = analysed(tmp_path / "run", monkeypatch, "--verify=tiny")
    row = found["verify", "seconds", 8 * 128]
    assert row["holds"] is True and row["n"] == 2 * 4 * 16 and 0 < row["value"] < 120
    held = [r for r in rows_in(tmp_path / "run" / "verify") if r["metric"].startswith("share_within")]
    assert held and {r["value"] for r in held} == {1.0}


# ----------------------------------------------------------------------------------------------- benchmarks.speed.train


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is 1/32 s after the last, so that a measurement of 0.15 s has four rounds of four."""
    now = iter(np.arange(1, 10_000) / 32)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: float(next(now)))


def test_a_rate_counts_the_work_of_its_rounds_alone(clock):
    calls = []
    # after the start 1, 2, 3, 4 and 5 / 32 s, which is too late for a fifth round; the end is seen at 6 / 32 s
    value = rates.rate(3e12, lambda: calls.append(1))
    assert len(calls) == 2 + 16  # two to warm up
    assert value == pytest.approx(16 * 3.0 / 0.1875, rel=1e-9)


def test_ceilings_are_those_of_a_layer_s_products(clock):
    rows = {row["task"]: row for row in rates.ceilings("tiny", 8)}
    # hidden 64, 4 heads and 2 groups of 16, intermediate 128; 2 FLOPs a multiply-add; 16 products in 0.1875 s
    sizes = {"q, o": (64, 64), "k, v": (32, 64), "q+k+v in one": (128, 64), "gate, up": (128, 64),
             "gate+up in one": (256, 64), "down": (64, 128)}  # fmt: skip
    kinds = ("output", "input gradient", "weight gradient", "weight gradient, added in float32")
    assert set(rows) == {f"{name}: {kind}" for name in sizes for kind in kinds}
    for name, (out, inside) in sizes.items():
        expected = 2 * 8 * out * inside * 16 / 0.1875 / 1e12
        assert [rows[f"{name}: {kind}"]["value"] for kind in kinds] == pytest.approx([expected] * 4)
    assert all(row["metric"] == "tflop_per_s" and row["length"] == 8 for row in rows.values())


def test_attention_s_backward_pass_counts_two_and_a_half_times(clock):
    rows = {row["task"]: row["value"] for row in rates.attention_rates("tiny", 16, rows=2)}
    causal = 2 * 2 * 16 * 16 * 64  # rows, two halves of T x T products of all heads
    assert rows["attention sdpa: forward"] == pytest.approx(causal * 16 / 0.1875 / 1e12)
    assert rows["attention sdpa: forward and backward"] == pytest.approx(3.5 * causal * 16 / 0.1875 / 1e12)


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
    losses = [
        row("copy", "loss", 2.0 - step / 100, "training-loss", method="lean", step=step) for step in range(0, 70, 10)
    ]
    error = row("gradient-sum", "relative_error_percent", 0.67, "training-loss", method="bfloat16", n=32)
    head, fast, slow, shown, sums = train.table([*speeds, *losses, error]).splitlines()
    places = {name: head.index(name) + len(name) for name in ("tokens/s", "GiB")}
    assert fast[: places["tokens/s"]].split()[-1] == "1.235e+04" and fast[: places["GiB"]].split()[-1] == "110.2"
    assert slow.split() == ["slow", "7"] and "MFU" not in head
    assert shown.startswith("loss, lean") and "0: 2.0000" in shown and shown.endswith("60: 1.4000")
    assert sums == "gradient summed in bfloat16, 32 micro-batches: 0.6700 % error"


@pytest.mark.parametrize("arm", ["exact", "lean", "nearest"])
def test_a_loss_curve_falls_and_is_written_each_tenth_step(arm):
    rows = learning.loss_curve(arm, steps=30, rows=8, lr=3e-3, shape="tiny")
    assert [row["step"] for row in rows] == [1, 10, 20, 30]
    assert rows[0]["value"] == pytest.approx(np.log(256), abs=0.2) and rows[-1]["value"] < rows[0]["value"] - 0.3
    assert {row["what"] for row in rows} == {learning.ARMS[arm]}


# ------------------------------------------------------------------------------------------------------- small steps


def test_small_steps_are_timed_and_their_losses_compared(tmp_path, monkeypatch, capsys):
    """Recorded steps run as written on a CPU, so every loss must be that of the plain ones."""
    from benchmarks.speed import steps
    from endprompt.train import graph

    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "_kept", {})
    monkeypatch.setattr(graph.StepGraph, "recorded", True)
    monkeypatch.setattr(steps, "SHAPES", {"256": (1, 1e-3)})
    changes = {"output": str(tmp_path / "run"), "modes": ["none", "graph"], "steps": 6, "fold": 2, "samples": 2}
    assert steps.main([json.dumps(changes | {"device": "cpu"})]) == 0, capsys.readouterr().err
    found = {(row["task"], row["metric"]): row["value"] for row in rows_in(tmp_path / "run")}
    assert {task for task, _ in found} == {"step none", "step graph", "step graph, again", "scoring"}
    for task in ("step none", "step graph", "step graph, again"):
        assert found[task, "loss difference"] == pytest.approx(0, abs=2e-3) and found[task, "ms a step"] > 0
    assert found["step none", "loss difference"] == 0
    assert found["scoring", "seconds a pass"] > 0
    monkeypatch.setattr(steps, "steps", lambda *_: 1 / 0)
    monkeypatch.setattr(steps, "scoring", lambda *_: {"seconds a pass": 1.0})
    changes["output"] = str(tmp_path / "other")
    assert steps.main([json.dumps(changes | {"device": "cpu"})]) == 1
    assert "none                 FAILED ZeroDivisionError" in capsys.readouterr().err
    assert [row["task"] for row in rows_in(tmp_path / "other")] == ["scoring"]  # what works is still measured
