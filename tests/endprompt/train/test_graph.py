"""The recorded training step, with the recording itself replaced by plain calls: buffers, loads, rules."""

from __future__ import annotations

import json

import pytest
import torch

from endprompt import data, distributed, train
from endprompt.model import extended_config, load_config, load_model, load_tokenizer, training_attention
from endprompt.train import graph
from endprompt.train.loss import linear_cross_entropy


@pytest.fixture
def on_cpu(monkeypatch):
    """Steps as written where a GPU would replay them; graphs of earlier runs are used again all the same."""
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "_kept", {})
    monkeypatch.setattr(graph.StepGraph, "recorded", True)


@pytest.fixture
def trainer(extend_config, monkeypatch):
    """`trainer(compile="graph", ...)`: a Trainer that has made no step."""

    def make(**changes) -> train.Trainer:
        monkeypatch.setattr("endprompt.config.check_recordable", lambda config: None)
        config = extend_config(**changes)
        tokenizer = load_tokenizer(config.model)
        new = extended_config(load_config(config.model), config.scaling, config.target)
        model = load_model(config.model, attention=training_attention(config.attention), config=new)
        spec = data.row_spec(config, 32, tokenizer)
        rows = data.Rows(data.load_documents(config.data, tokenizer), spec)
        return train.Trainer(config, model, rows, config.steps, None)

    return make


def steps_of(made: train.Trainer, count: int = 4) -> list[float]:
    return [float(made.train_step(made.batch(i), 1e-3 * (i + 1))[0]) for i in range(count)]


def weights_of(made: train.Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


@pytest.mark.parametrize("changes", [{}, {"micro_rows": 2}, {"clip": 0.05, "weight_decay": 0.1}, {"lora_rank": 2}])
def test_steps_are_those_of_the_eager_trainer(on_cpu, trainer, changes):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    eager, recorded = trainer(**changes), trainer(compile="graph", **changes)
    assert steps_of(recorded) == pytest.approx(steps_of(eager), rel=1e-5)
    torch.testing.assert_close(weights_of(recorded), weights_of(eager), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "llama3"])
def test_a_later_run_uses_the_graph_with_its_own_weights_and_frequencies(on_cpu, trainer, scaling):
    first = trainer(compile="graph", seed=3)
    steps_of(first)
    second = trainer(compile="graph", scaling=scaling)
    assert second.graph is first.graph and second.optimizer is first.optimizer
    plain = trainer(scaling=scaling)
    assert steps_of(second) == pytest.approx(steps_of(plain), rel=1e-5)
    torch.testing.assert_close(weights_of(second), weights_of(plain), rtol=1e-4, atol=1e-6)
    assert len(list(second.model.parameters())) == len(list(plain.model.parameters()))  # tied ones stay tied
    for name, buffer in plain.model.named_buffers():
        torch.testing.assert_close(dict(second.model.named_buffers())[name], buffer)
    assert second.model.config.rope_parameters == plain.model.config.rope_parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling": "yarn"},  # its factor on cos and sin is a number, not a tensor
        {"clip": 0.5},
        {"beta2": 0.99},
        {"rows": 2},
        {"row_tokens": 24},
        {"autocast": True},
        {"attention": "eager"},
        {"micro_rows": 1},
    ],
)
def test_what_is_fixed_by_a_recording_gets_a_graph_of_its_own(on_cpu, trainer, changes):
    assert trainer(compile="graph").graph is not trainer(compile="graph", **changes).graph


def test_what_is_not_uses_a_graph_again_and_old_ones_are_dropped(on_cpu, trainer):
    first = trainer(compile="graph")
    assert trainer(compile="graph", lr=5e-4, seed=9, prompt_weight=1.0).graph is first.graph
    made = [trainer(compile="graph", clip=clip).graph for clip in (1.0, 2.0, 3.0, 4.0)]
    assert list(graph._kept.values()) == made[-graph.KEPT :]


def test_a_whole_run_exports_what_the_eager_run_does(on_cpu, extend_config, tmp_path, monkeypatch):
    monkeypatch.setattr(graph.StepGraph, "recorded", False)
    from safetensors.torch import load_file

    found = {}
    for kind in ("none", "graph"):
        monkeypatch.setattr("endprompt.config.check_recordable", lambda config: None)
        path = train.extend(extend_config(compile=kind, output=str(tmp_path / kind), schedule="linear", steps=5))
        lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        found[kind] = load_file(path / "model.safetensors"), [line["loss"] for line in lines if "loss" in line]
    assert found["graph"][1] == pytest.approx(found["none"][1], rel=1e-5)
    for name, tensor in found["none"][0].items():
        torch.testing.assert_close(found["graph"][0][name], tensor, rtol=1e-4, atol=1e-6)


def test_tokens_without_weight_cost_nothing_but_work():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(20, 8, generator=generator), torch.randn(50, 8, generator=generator)
    labels, weights = torch.randint(50, (20,), generator=generator), torch.rand(20, generator=generator)
    weights[::3] = 0
    found = []
    for every in (False, True):
        h, e = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = linear_cross_entropy(h, e, labels, weights, every_token=every)
        loss.backward()
        found.append((loss.detach(), h.grad, e.grad))
    torch.testing.assert_close(found[0], found[1])
    assert not found[1][1][::3].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cpu"}, "device"),
        ({"device": "auto", "optimizer": "masters"}, "optimizer"),
        ({"device": "auto", "dtype": "bfloat16"}, "optimizer"),
        ({"device": "auto", "checkpointing": "full"}, "checkpointing"),
        ({"device": "auto", "scaling": "dynamic"}, "scaling"),
        ({"device": "auto", "attention": "flex"}, "attention"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(extend_config, changes, words):
    with pytest.raises(ValueError, match=f"compile='graph' needs {words} to be"):
        train.extend(extend_config(compile="graph", **changes))


def test_dropout_and_other_devices_are_refused(trainer):
    made = trainer()
    config = made.config
    config.compile = "graph"
    with pytest.raises(ValueError, match="a CUDA device: device='cpu'"):
        graph.check_device(config, made.model, made.here)
    made.model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"without dropout: \{'attention_dropout': 0\.1\}"):
        graph.check_device(config, made.model, distributed.World(device="cuda"))
    with pytest.raises(ValueError, match="a single process: 2 processes"):
        graph.check_device(config, made.model, distributed.World(size=2, device="cuda:0"))


def test_a_batch_of_another_shape_is_refused(on_cpu, trainer):
    made = trainer(compile="graph")
    short = made.rows.batch(0, 2)
    with pytest.raises(ValueError, match=r"one shape: \(2, 32\) after \(4, 32\)"):
        made.train_step(short, 1e-3)
