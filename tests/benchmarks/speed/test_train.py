"""The arithmetic of the benchmark by hand, and its parts on toy sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.speed import step, train
from benchmarks.speed.config import BenchConfig
from benchmarks.speed.train import check

RECIPES = sorted((Path(train.__file__).parents[1] / "recipes" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_run(path):
    check(BenchConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))))


def test_adamw_is_measured_with_gradients_and_moments():
    import torch

    config = BenchConfig(shape="tiny", method="reference", row_tokens=32, target=64, rows=2, optimizer="adamw")
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
        ({"row_tokens": 9, "target": 8}, "row_tokens=9 target=8"),
        ({"float8": "fast", "optimizer": "adamw"}, "optimizer='adamw'"),
        ({"method": "reference"}, "adamw or none: lean"),
    ],
)
def test_impossible_settings_name_key_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        check(BenchConfig(**changes))


@pytest.mark.parametrize(
    "method", ["endprompt", "reference", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "longlora"))]
)
def test_one_measurement_of_each_method(method, tmp_path, capsys):
    own = {"optimizer": "none"} if method == "reference" else {}
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
