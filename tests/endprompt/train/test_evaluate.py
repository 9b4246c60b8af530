"""Evaluation during training against numbers computed another way, the guard, and the reports."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from endprompt import model as models
from endprompt import train
from endprompt.data import Documents
from endprompt.distributed import World
from endprompt.train import Objective, evaluate, progress


def text(n):
    return Documents(np.arange(n, dtype=np.uint32) % 300, np.array([0, n]), np.array([n]))


def test_held_out_rows_are_spread_and_do_not_overlap():
    rows = evaluate.held_out_rows(text(100), 20, 3)
    assert [int(ids[0]) for ids, _ in rows] == [0, 40, 80]
    assert all(weights.tolist() == [0.0] + [1.0] * 19 for _, weights in rows)
    assert len(evaluate.held_out_rows(text(100), 30, 8)) == 3
    for ids, weights in evaluate.held_out_rows(text(100), 22, 3, (7, 8)):  # the same text with BOS in front
        assert ids[:2].tolist() == [7, 8] and ids[2] in (0, 40, 80) and weights.tolist() == [0.0] * 2 + [1.0] * 20
    with pytest.raises(ValueError, match="must be as long as"):
        evaluate.held_out_rows(text(10), 20, 1)


def test_needle_rows_hide_a_number_and_ask_for_it(tokenizer):
    encode = lambda words: tokenizer(words, add_special_tokens=False)["input_ids"]  # noqa: E731
    rows = evaluate.needle_rows(text(400), 200, 4, encode, seed=3)
    depths = []
    led = evaluate.needle_rows(text(400), 200, 4, encode, seed=3, lead=(1,))
    assert all(len(ids) == 200 and ids[0] == 1 for ids, _ in led)
    for ids, weights in rows:
        assert len(ids) == 200
        words = tokenizer.decode(ids)
        key = words.rpartition("is ")[2]
        assert key.isdigit() and len(key) == 5
        assert words.count(f"The pass key is {key}. Remember it: {key} is the pass key.") == 1
        assert tokenizer.decode(ids[weights > 0]) == f" {key}"
        needle = encode(evaluate.NEEDLE.format(key=key))
        depths.append(next(i for i in range(200) if ids[i : i + len(needle)].tolist() == needle))
    assert depths == sorted(depths) and len({tuple(ids) for ids, _ in rows}) == 4
    with pytest.raises(ValueError, match="a row must be longer: eval_lengths=30"):
        evaluate.needle_rows(text(400), 30, 1, encode, seed=3)
    with pytest.raises(ValueError, match="must fill a needle row: it has 50 of"):
        evaluate.needle_rows(text(50), 200, 1, encode, seed=3)


@torch.no_grad()
def test_held_out_loss_is_torchs_mean(llama):
    model = models.load_model(llama, attention=models.training_attention("sdpa"))
    held = evaluate.Evaluation(text(200), [16, 32], 4, 0, lambda words: [], seed=0)
    found = list(held.measure(Objective(model, autocast=False), World()))
    assert [(one.task, one.length, one.n) for one in found] == [("held_out", 16, 4), ("held_out", 32, 4)]
    for one in found:
        ids = torch.stack([torch.from_numpy(row) for row, _ in evaluate.held_out_rows(text(200), one.length, 4)])
        assert one.value == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_needle_counts_rows_with_all_tokens_right():
    rows = [(np.arange(4), np.array([0, 0, 1, 1], dtype=np.float32)) for _ in range(5)]
    held = evaluate.Evaluation.__new__(evaluate.Evaluation)
    held.rows, held.needles = {}, {4: rows}
    answers = iter([1.0, 0.0, 1.0, 0.0, 0.0])

    def objective(ids, positions, weights, hits):
        assert hits and positions.tolist() == [[0, 1, 2, 3]]
        return torch.tensor(next(answers))

    (found,) = held.measure(objective, World())
    assert found == evaluate.Measured("needle", "exact_match", 4, 40.0, 5, found.samples_sha256)


@torch.no_grad()
def test_hits_need_every_scored_token(llama):
    model = models.load_model(llama, attention=models.training_attention("sdpa"))
    ids = torch.randint(1, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    for place in (10, 11):  # write what the model predicts into the last two places
        ids[0, place] = model(input_ids=ids[:, :place], use_cache=False).logits[0, -1].argmax()
    weights = torch.zeros(1, 12)
    weights[:, 10:] = 1.0
    places, objective = torch.arange(12)[None], Objective(model, autocast=False)
    assert float(objective(ids, places, weights, True)) == 1.0
    ids[0, 10] = (ids[0, 10] + 1) % 300  # one wrong token of two
    assert float(objective(ids, places, weights, True)) == 0.0


def test_run_is_evaluated_on_its_way_and_at_its_end(extend_config, documents):
    held = {"eval_data": [str(documents)], "eval_lengths": [96, 128], "eval_rows": 3, "eval_needles": 2}
    output = train.extend(extend_config(steps=4, eval_every=2, **held))
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(row["step"], row["task"], row["length"]) for row in rows] == [
        (step, task, length) for step in (2, 4) for task in ("held_out", "needle") for length in (96, 128)
    ]
    assert {(row["metric"], row["n"]) for row in rows} == {("loss", 3), ("exact_match", 2)}
    assert {row["method"] for row in rows} == {"endprompt+EP_3+linear"}
    told = [row["samples_sha256"] for row in rows]  # a run that goes on with another text has rows of two, told apart
    assert told[:4] == told[4:] and len(set(told)) == 4
    plain = train.extend(extend_config(steps=4, output=str(output) + "-plain"))
    same = ((path / "model.safetensors").read_bytes() for path in (output, plain))
    assert next(same) == next(same)  # evaluation leaves no trace in the weights


def test_log_forgets_what_came_after_the_resumed_step(tmp_path):
    from endprompt.train.states import forget_after

    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"note": "no step"}\n{"step": 3}\n{"step": 2}\n{"st')
    forget_after(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"note": "no step"}\n{"step": 2}\n'


def test_reports_go_to_the_trackers_asked_for(extend_config, monkeypatch):
    calls, ended = [], []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda exit_code: ended.append(exit_code)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.extend(extend_config(steps=2, report=["wandb"]))
    assert (
        ended == [0] and [step for step, _ in calls] == [1, 2] and {"loss", "lr", "tokens_per_s"} <= calls[0][1].keys()
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"report=wandb needs a package \(.*\): pip install wandb"):
        train.extend(extend_config(steps=2, report=["wandb"], overwrite=True))
    with pytest.raises(ValueError, match="report must be one of tensorboard, wandb"):
        train.extend(extend_config(steps=2, report=["paper"], overwrite=True))


def test_flops_of_a_token_by_hand(llama):
    """Llama-3-8B: 7.50e9 multiplied parameters (no input embedding) and attention over 8,192 tokens give 51.5 GFLOP."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    assert progress.flops_per_token(model, 8192) == 6 * matrices + 6 * 32 * 4096 * 8192
    assert progress.flops_per_token(model, 8192) == pytest.approx(51.4e9, rel=3e-3)
    model.set_attn_implementation(models.training_attention("shifted"))
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    head = 128256 * 4096
    expected = 4 * matrices + 2 * head + 6 * 32 * 4096 * 8192 * 15 / 64
    assert progress.flops_per_token(model, 8192) == expected


def test_clock_and_line():
    assert progress.clock(3725.4) == "1:02:05"
    line = progress.described({"loss": 2.0, "tokens_per_s": 12345.6, "mfu": 0.614, "peak_gib": 80.12})
    assert line == "loss 2.0000  12,346 tokens/s  MFU 61%  80.1 GiB"
