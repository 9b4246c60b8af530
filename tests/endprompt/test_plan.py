"""The plan against measured runs of one H200 and against counts made another way."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import paper_figures
from endprompt.plan import (
    HIDDEN,
    LINKS,
    PlanConfig,
    attention_seconds,
    communication_seconds,
    counted,
    memory,
    plan,
    plans,
    seconds_per_token,
    shape_of,
)
from endprompt.shapes import GIB

DATA = Path(paper_figures.__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "billions"), [("llama3-8b", 8.030), ("llama2-7b", 6.738), ("mistral-7b", 7.248), ("llama3-1b", 1.236)]
)
def test_parameters_are_counted_as_transformers_makes_them(name, billions):
    import torch
    from transformers import AutoModelForCausalLM

    from endprompt.shapes import model_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    assert shape_of(name).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape_of(name).parameters / 1e9 == pytest.approx(billions, abs=6e-4)


#: As published on the models' cards -> the config's class, what differs from its defaults, parameters in billions.
PUBLISHED = {
    "Mixtral-8x7B": ("MixtralConfig", {"sliding_window": None}, 46.703, 12.879),
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {"num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128, "max_position_embeddings": 40960},
        30.532,
        3.353,
    ),
    "Qwen3-0.6B": (
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        0.596,
        0.596,
    ),
    "Starcoder2-7B": (
        "Starcoder2Config",
        {
            "hidden_size": 4608,
            "intermediate_size": 18432,
            "num_hidden_layers": 32,
            "num_attention_heads": 36,
            "num_key_value_heads": 4,
            "sliding_window": None,
        },
        7.174,
        7.174,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_a_checkpoint_are_those_of_its_card(name, tmp_path):
    """Total and active parameters; cards count the embedding among a token's, though it is looked up."""
    import transformers

    kind, changes, total, active = PUBLISHED[name]
    getattr(transformers, kind)(**changes).save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape.parameters / 1e9 == pytest.approx(total, abs=5e-4)
    looked_up = 0 if shape.tied else shape.vocabulary * shape.hidden
    assert (shape.multiplied + looked_up) / 1e9 == pytest.approx(active, abs=2e-3)


def test_a_last_norm_without_weights_counts_nothing():
    """By hand: 320 embeddings of 32, tied; two layers of 4 matrices 32 x 32 and 3 of 32 x 48, no norm has weights."""
    import transformers

    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.OlmoConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)
    assert counted(config).parameters == 320 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48)


def test_all_experts_take_memory_and_a_few_take_time(tmp_path):
    import transformers

    transformers.MixtralConfig(sliding_window=None, max_position_embeddings=32768).save_pretrained(tmp_path)
    shape, config = shape_of(str(tmp_path)), PlanConfig(model=str(tmp_path))
    assert memory(shape, config, 8192, 1, "full")["weights"] / GIB == pytest.approx(87.0, abs=0.05)
    dense = dataclasses.replace(shape, active=shape.stored)
    assert seconds_per_token(dense, config, 8192, "none") > 3 * seconds_per_token(shape, config, 8192, "none")
    assert not any(one.fits for one in plans(config))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("DeepseekV3Config", {"num_hidden_layers": 2}, "attention by query, key, value and output matrices"),
        ("Qwen3NextConfig", {"num_hidden_layers": 2}, "layer 0 of 'qwen3_next'"),
        ("MistralConfig", {"sliding_window": 4096}, "sliding_window=4096"),
    ],
)
def test_what_the_formulas_do_not_hold_for_is_refused(tmp_path, kind, changes, message):
    import transformers

    getattr(transformers, kind)(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        shape_of(str(tmp_path))


def test_experts_that_no_key_counts_are_refused(monkeypatch):
    import transformers

    monkeypatch.setattr("endprompt.plan.EXPERTS_OF_A_TOKEN", ("taken",))
    with pytest.raises(ValueError, match="how many of 8 experts a token is sent to: 'mixtral' states none of taken"):
        counted(transformers.MixtralConfig())


#: Measurements on one H200 and on two, as the files of data/measured have them -> the plan's settings for them.
#: Not `float8 fast` of the older file: its layers could keep less than `selective` lets them keep now.
MEASURED = {
    ("h200_training", "tune: 2 rows, float32 sums"): (PlanConfig(), 2, "selective"),
    ("h200_training", "tune: 1 row, float32 sums, unfused"): (PlanConfig(fused=False), 1, "none"),
    ("h200_training", "full, 65,536"): (PlanConfig(method="full", rows=8), 1, "full"),
    ("h200_methods", "full, 65,536"): (PlanConfig(method="full", rows=8), 1, "full"),
    ("h200_methods", "full, 32,768"): (PlanConfig(method="full", rows=16, target=32768), 1, "full"),
    ("h200_methods", "longlora, 65,536"): (PlanConfig(method="longlora", rows=8), 1, "full"),
    ("h200_methods", "longlora, 32,768"): (PlanConfig(method="longlora", rows=16, target=32768), 1, "full"),
    ("h200_methods", "short rows, target 32,768"): (PlanConfig(target=32768), 2, "selective"),
    ("h200_methods", "float8"): (PlanConfig(float8="fast"), 2, "selective"),
    ("h200_methods", "float8, whole step"): (PlanConfig(float8="fast"), 2, "selective"),
    ("h200_methods", "float8, joint"): (PlanConfig(float8="fast"), 2, "selective"),
    ("h200_attention", "endprompt, whole step"): (PlanConfig(), 2, "selective"),
    ("h200_attention", "endprompt, sdpa"): (PlanConfig(), 2, "selective"),
    ("h200_attention", "float8, whole step"): (PlanConfig(float8="fast"), 2, "selective"),
    ("h200_attention", "float8 with the head, whole step"): (PlanConfig(float8="fast"), 2, "selective"),
    ("h200_attention", "full, 65,536"): (PlanConfig(method="full", rows=8), 1, "full"),
    ("h200_attention", "full, 65,536, sdpa"): (PlanConfig(method="full", rows=8), 1, "full"),
    ("h200_attention", "full, 65,536, float8"): (PlanConfig(method="full", rows=8, float8="fast"), 1, "full"),
    ("h200_attention", "full, 32,768"): (PlanConfig(method="full", rows=16, target=32768), 1, "full"),
    ("h200_attention", "longlora, 65,536"): (PlanConfig(method="longlora", rows=8), 1, "full"),
    ("h200_attention", "longlora, 32,768"): (PlanConfig(method="longlora", rows=16, target=32768), 1, "full"),
    ("h200_attention", "short rows, target 32,768"): (PlanConfig(target=32768), 2, "selective"),
    ("h200_fused", "endprompt, whole step"): (PlanConfig(), 2, "none"),
    ("h200_fused", "joined, torch's products"): (PlanConfig(), 2, "none"),
    ("h200_fused", "full, 65,536"): (PlanConfig(method="full", rows=8), 1, "full"),
    ("h200_again", "endprompt, whole step"): (PlanConfig(), 2, "none"),
    ("h200_again", "joined, torch's products"): (PlanConfig(), 2, "none"),
    ("h200_target", "endprompt, whole step"): (PlanConfig(), 2, "none"),
    ("h200_target", "extend, one process"): (PlanConfig(), 2, "none"),
    ("h200_target", "full, 65,536"): (PlanConfig(method="full", rows=8), 1, "full"),
    ("pages/h200_small_model", "SmolLM2, lean, fused, 8 rows"): (PlanConfig("smollm2-135m", rows=16), 8, "none"),
    ("pages/h200_small_model", "8B, fused"): (PlanConfig(rows=8), 2, "none"),
    ("pages/h200_small_model", "8B, not fused"): (PlanConfig(rows=8, fused=False), 2, "selective"),
    # the plan's figures stood before this was run
    ("h200_two_gpus", "extend, 2 processes"): (PlanConfig(gpus=2, optimizer="adamw", rows=32), 2, "selective"),
    ("h200_several_gpus", "extend bf16, one process"): (PlanConfig(rows=16), 2, "selective"),
    ("h200_several_gpus", "extend sharded, 2 processes"): (PlanConfig(gpus=2, rows=32), 2, "selective"),
    ("h200_several_gpus", "extend sharded float8, 2 processes"): (
        PlanConfig(gpus=2, rows=32, float8="fast"),
        2,
        "none",
    ),
    ("h200_several_gpus", "extend full recomputed, 2 processes"): (
        PlanConfig(method="full", target=131072, gpus=2, context_parallel=2, rows=1),
        1,
        "full",
    ),
    ("h200_several_gpus", "extend full, one process"): (PlanConfig(method="full", rows=1), 1, "attention"),
}


@pytest.mark.parametrize(("file", "task"), MEASURED)
def test_speed_and_memory_are_within_ten_percent_of_the_measured_rows(file, task):
    config, micro_rows, recompute = MEASURED[file, task]
    lines = (DATA / "measured" / f"{file}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"] == task]
    measured = {row["metric"]: row["value"] for row in rows}
    attention = rows[0]["setting"].get("attention", "sdpa")
    config = dataclasses.replace(config, attention=attention if config.method != "longlora" else "sdpa")
    (planned,) = [one for one in plans(config) if (one.micro_rows, one.recompute) == (micro_rows, recompute)]
    assert planned.tokens_per_s == pytest.approx(measured["tokens_per_s"], rel=0.1)
    assert planned.total_gib == pytest.approx(measured["peak_gib"], rel=0.1)


@pytest.mark.parametrize(
    ("file", "task", "attention"),
    [
        ("h200_target", "endprompt, whole step", "flash_attention_4"),
        ("h200_attention", "endprompt, sdpa", "sdpa"),
    ],
)
def test_attention_takes_what_the_profile_of_a_micro_batch_says(file, task, attention):
    rows = [json.loads(line) for line in (DATA / "measured" / f"{file}.jsonl").read_text().splitlines()]
    (measured,) = [row["value"] for row in rows if (row["task"], row["metric"]) == (task, "attention_ms")]
    planned = attention_seconds(shape_of("llama3-8b"), PlanConfig(attention=attention), 8192, "none")
    assert 1e3 * 2 * 8192 * planned == pytest.approx(measured, rel=0.03)


def test_full_length_is_as_much_slower_as_was_measured():
    rows = [json.loads(line) for line in (DATA / "measured" / "h200_target.jsonl").read_text().splitlines()]
    speed = {row["task"]: row["value"] for row in rows if row["metric"] == "tokens_per_s"}
    planned = [
        max(
            one.tokens_per_s
            for one in plans(PlanConfig(method=method, attention="flash_attention_4"))
            if one.fits and one.recompute != "attention"
        )
        for method in ("endprompt", "full")
    ]
    measured = speed["endprompt, whole step"] / speed["full, 65,536"]
    assert planned[0] / planned[1] == pytest.approx(measured, rel=0.03)


def test_the_lean_optimizer_s_bytes_by_hand():
    parts = memory(shape_of("llama3-8b"), PlanConfig(), 8192, 1, "selective")
    assert parts["weights"] == 2 * 8030261248
    assert parts["gradients"] == 4 * 8030261248
    assert parts["moments"] == pytest.approx(8030261248 * (2 + 2 * 4 / 256))  # a byte each and a scale a block of 256


def test_the_bytes_of_several_gpus_by_hand():
    """Float32 weights, gradients and moments in shards; two layers, the gradients of one, both embeddings gathered."""
    parts = memory(shape_of("llama3-8b"), PlanConfig(gpus=8, optimizer="adamw"), 8192, 1, "full")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert parts["weights"] + parts["gradients"] + parts["moments"] == 16 * 8030261248 / 8
    assert parts["gathered layers"] == (2 * 2 + 2 + 4) * (layer + 2 * 4096)
    assert parts["gathered embeddings"] == (2 + 2 + 4) * 2 * 128256 * 4096
    whole = memory(shape_of("llama3-8b"), PlanConfig(gpus=8, shard="moments"), 8192, 1, "full")
    alone = memory(shape_of("llama3-8b"), PlanConfig(), 8192, 1, "full")
    assert whole == alone | {"moments": alone["moments"] / 8}


def test_the_exchange_of_two_gpus_by_hand():
    """Half of all weights twice and half of the gradients, a part of it hidden; a shared row's heads in each layer."""
    shape, count = shape_of("llama3-8b"), 8030261248
    plain = communication_seconds(shape, PlanConfig(gpus=2), 8192, 16384, "none")
    received, copied = (2 + 2 + 4) * count / 2, (4 + 4 + 2 + 4) * count
    assert plain == pytest.approx((1 - HIDDEN) * received / LINKS["host"] + copied / 4.3e12)
    shared = PlanConfig(gpus=2, context_parallel=2, method="full", target=131072)
    heads = 2 * 2 * (4096 + 1024 + 1024 + 4096) * 32 * 65536 / 2  # forward and back, two bytes, half of them sent
    longer = communication_seconds(shape, shared, 131072, 65536, "selective") - plain
    assert longer == pytest.approx(heads / LINKS["host"])
    half, whole = (memory(shape, one, 131072, 1, "full") for one in (shared, PlanConfig(gpus=2, method="full")))
    assert half["activations"] == whole["activations"] / 2
    assert communication_seconds(shape, PlanConfig(), 8192, 16384, "none") == 0
    # whole weights: half of the sums and of the weights are received once a step, which 16 such micro-batches make
    whole = communication_seconds(shape, PlanConfig(gpus=2, shard="moments"), 8192, 16384, "none")
    assert whole == pytest.approx((4 + 2) * count / 2 / LINKS["host"] / 16)


def test_the_best_setting_comes_first_and_short_rows_beat_full_length():
    short, full = plans(PlanConfig()), plans(PlanConfig(method="full"))
    fitting = [one for one in short if one.fits]
    assert fitting == short[: len(fitting)]
    assert fitting[0].tokens_per_s == max(one.tokens_per_s for one in fitting)
    assert short[0].tokens_per_s > 2.2 * full[0].tokens_per_s
    assert fitting[0].hours == pytest.approx(1e9 / fitting[0].tokens_per_s / 3600)


def test_what_does_not_fit_says_so(capsys):
    assert plan(PlanConfig(device="A100", optimizer="adamw")) == 1
    assert "nothing fits into 77 GiB" in capsys.readouterr().out
    assert plan(PlanConfig(json=True)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["fits"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "TPU"}, "device='TPU'"),
        ({"attention": "flex"}, "attention must be one of sdpa, flash_attention_4: attention='flex'"),
        ({"method": "longlora", "attention": "flash_attention_4"}, "longlora .* attention='flash_attention_4'"),
        ({"gpus": 3, "optimizer": "adamw"}, "gpus=3 rows=64"),
        ({"shard": "moments", "optimizer": "adamw"}, "shard='moments' optimizer='adamw'"),
        ({"gpus": 4, "context_parallel": 3, "method": "full"}, "context_parallel=3 gpus=4"),
        ({"gpus": 2, "context_parallel": 2}, "method='endprompt'"),
        ({"row_tokens": 9, "target": 8}, "row_tokens=9 target=8"),
        ({"tokens": 0}, "tokens=0"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_impossible_plans_name_key_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        plans(PlanConfig(**changes))


def test_a_plan_of_a_named_shape_waits_for_no_torch():
    code = (
        "import sys; from endprompt.plan import PlanConfig, plan; plan(PlanConfig()); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_bounds_of_the_base_and_advice_are_said_and_change_nothing(tmp_path, capsys):
    def printed(**changes):
        assert plan(PlanConfig(**({"model": "smollm2-135m"} | changes))) == 0
        return capsys.readouterr().out

    lines = [
        {"target": 65536, "scaling": "yarn", "scheme": "none", "order": 9.0},
        {"target": 65536, "scaling": "linear", "scheme": "pose", "order": 1.0},
        {"target": 65536, "scaling": "llama3", "scheme": "pose", "order": 2.0},
    ]
    advice = tmp_path / "advice.jsonl"
    advice.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone, advised = printed(), printed(advice=str(advice))
    # the slowest of 32 frequencies is 100000^-(62/64); 65536 / 2 pi = 10430.4
    assert (
        f"RoPE base without scaling, {100000 ** (62 / 64):,.0f}," in alone and "above 10,430 against aliasing" in alone
    )
    assert "below 8,388,608 in float32: it is not" in alone
    assert advised.startswith(alone.rstrip("\n")) and "scaling llama3 and scheme pose come first" in advised
    assert "RoPE base" not in printed(target=8192), "the window itself is no extension"
    assert "float32: it is\n" in printed(model="llama3-8b", target=16384)
    with pytest.raises(ValueError, match="for the same target: target=32768, advice for 65536"):
        plan(PlanConfig(model="smollm2-135m", target=32768, advice=str(advice)))
    advice.write_text('{"scaling": "yarn"}\n')
    with pytest.raises(ValueError, match="must be what `endprompt predict --json` printed"):
        plan(PlanConfig(model="smollm2-135m", advice=str(advice)))
