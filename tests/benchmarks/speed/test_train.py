"""The arithmetic of the benchmark by hand, and its parts on toy sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.speed import step, train
from benchmarks.speed.config import BenchConfig
from benchmarks.speed.step import kind_of_kernel
from benchmarks.speed.train import check

RECIPES = sorted((Path(train.__file__).parents[1] / "recipes" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_run(path):
    check(BenchConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))))


def test_adamw_is_measured_with_gradients_and_moments():
    import torch

    config = BenchConfig(
        shape="tiny", method="reference", row_tokens=32, target=64, rows=2, optimizer="adamw", fused_sums=False
    )
    run = step.Run(config, torch.device("cpu"))
    parameters = list(run.model.parameters())
    assert all("exp_avg" in run.optimizer.state[parameter] for parameter in parameters)
    run.micro_batch()
    run.optimizer_step()
    before = [parameter.detach().clone() for parameter in parameters]
    assert all(parameter.grad is not None for parameter in parameters)
    run.optimizer_step()  # the moments move the weights though the gradients are zero
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "llama9"}, "shape='llama9'"),
        ({"method": "magic"}, "method='magic'"),
        ({"micro_rows": 3}, "micro_rows=3 rows=64"),
        ({"memory_budget": 1.5}, "memory_budget=1.5"),
        ({"warm_layers": -1}, "warm_layers=-1"),
        ({"row_tokens": 9, "target": 8}, "row_tokens=9 target=8"),
        ({"float8": "fast", "optimizer": "adamw"}, "optimizer='adamw'"),
        ({"float8_head": True}, "float8_head=True float8='none'"),
        ({"method": "reference"}, "fused_sums=false"),
    ],
)
def test_impossible_settings_name_key_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        check(BenchConfig(**changes))


@pytest.mark.parametrize(
    "method", ["endprompt", "reference", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "longlora"))]
)
def test_one_measurement_of_each_method(method, tmp_path, capsys):
    own = {"optimizer": "none", "fused_sums": False} if method == "reference" else {}
    recompute = "full" if method != "endprompt" else "none"
    config = BenchConfig(
        output=str(tmp_path),
        shape="tiny",
        method=method,
        row_tokens=32 if method == "endprompt" else 128,
        target=128,
        rows=4,
        compile=False,
        timed=1,
        recompute=recompute,
        **own,
    )
    assert train.bench(config) == 0
    rows = {row["metric"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    speed = rows["tokens_per_s"]["value"]
    seconds = 2 * rows["micro_batch_seconds"]["value"] + rows.get("optimizer_seconds", {"value": 0})["value"]
    assert speed == pytest.approx(4 * config.row_tokens / seconds)
    assert rows["hours_per_1b_tokens"]["value"] == pytest.approx(1e9 / speed / 3600)
    assert rows["tokens_per_s"]["setting"]["row_tokens"] == config.row_tokens
    assert rows["tokens_per_s"]["loss"] == pytest.approx(np.log(256), abs=0.3)  # random weights know nothing
    assert f"{speed:,.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopB_NTN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3", "attention"),
        ("triton_poi_fused_add_mul_silu_0", "other"),
    ],
)
def test_kernels_by_kind(name, kind):
    assert kind_of_kernel(name) == kind


def test_warm_layers_leave_the_model_as_it_was():
    import torch

    config = BenchConfig(
        shape="tiny", row_tokens=32, target=128, rows=4, compile=False, warm_layers=1, optimizer="none"
    )
    config.fused_sums = False
    run = step.Run(config, torch.device("cpu"))
    with run.few_layers():
        run.micro_batch()
    used = [layer.mlp.down_proj.weight.grad is not None for layer in run.decoder.layers]
    run.micro_batch()
    assert used == [True, False]
    assert all(layer.mlp.down_proj.weight.grad is not None for layer in run.decoder.layers)


def test_gaps_of_a_time_line_are_what_no_kernel_covers():
    spans = [(5.0, 6.0, "d"), (0.0, 2.0, "a"), (1.0, 1.5, "b"), (1.9, 3.0, "c"), (6.0, 7.0, "e"), (7.25, 8.0, "f")]
    assert step.gaps_between(spans) == [(2.0, "c", "d"), (0.25, "e", "f")]
    assert step.gaps_between([]) == step.gaps_between(spans[:1]) == []
    covered = np.zeros(800, bool)  # by counting hundredths
    for start, end, _ in spans:
        covered[round(100 * start) : round(100 * end)] = True
    assert sum(gap[0] for gap in step.gaps_between(spans)) == pytest.approx((~covered).sum() / 100)


def test_a_profile_is_of_one_micro_batch_and_one_update(monkeypatch, capsys):
    """With torch's profiler stood in for: two micro-batches of a product and a norm with a gap, then an update."""
    from types import SimpleNamespace

    from torch.autograd import DeviceType

    class Profiler:
        def __init__(self, **settings):
            self.made = []

        def __enter__(self):
            done.clear()
            return self

        def __exit__(self, *_):
            at = 1000.0
            for name, length, wait in done:
                self.made.append((name, at + wait, at + wait + length))
                at += wait + length

        def events(self):
            def event(kind, name, start, end):
                return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

            return [event(DeviceType.CPU, "launch", 0, 9e9), *(event(DeviceType.CUDA, *one) for one in self.made)]

        def key_averages(self):
            spent = {"launch": [0]}
            for name, start, end in self.made:
                spent.setdefault(name, []).append(end - start)
            return [
                SimpleNamespace(key=name, count=len(each), self_device_time_total=sum(each))
                for name, each in spent.items()
            ]

    done = []
    monkeypatch.setattr("torch.profiler.profile", Profiler)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    run = object.__new__(step.Run)
    run.device, run.optimizer = SimpleNamespace(type="cuda"), object()
    run.micro_batch = lambda: done.extend([("nvjet_product", 3000.0, 500.0), ("triton_red_norm", 1000.0, 0.0)])
    run.optimizer_step = lambda: done.extend([("triton_update", 7000.0, 0.0), ("triton_update", 7000.0, 250.0)])
    found = run.profile()
    of_a_batch = {"matmul_ms": 3.0, "attention_ms": 0.0, "other_ms": 1.0, "idle_ms": 0.25}
    assert found == of_a_batch | {"update_ms": 14.0, "update_idle_ms": 0.25}
    said = capsys.readouterr().err
    assert "3.00 ms     1 x nvjet_product" in said and "0.500 ms without a kernel, triton_red_norm | nvjet" in said
    run.optimizer = None
    assert "update_ms" not in run.profile()
