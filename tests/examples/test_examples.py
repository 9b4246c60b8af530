"""The examples at tiny size: the losses of the first steps, and of what they save, are those of `endprompt extend`."""

import importlib.util
import itertools
import json
import random
import sys
import types
from pathlib import Path

import pytest
import torch

from endprompt import train
from endprompt.collate import PositionalCollator
from endprompt.config import ExtendConfig
from endprompt.data import Rows, load_documents, row_spec
from endprompt.model import load_config, load_model
from tests.support.checkpoints import TARGET, VOCABULARY, WINDOW, WORDS
from tests.support.runs import losses_of, weights_of

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def texts(tmp_path):
    """JSONL of 20 documents that each have room for one row of the window, and not for two."""
    draw = random.Random(3)
    path = tmp_path / "texts.jsonl"
    lines = (" ".join(draw.choice(WORDS) for _ in range(99))[: draw.randint(145, 210)] for _ in range(20))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def in_the_order_of_training(texts, config, tokenizer):
    rows = Rows(load_documents([str(texts)], tokenizer), row_spec(config, WINDOW, tokenizer))
    assert len(rows) == 20
    lines = texts.read_text().splitlines()
    path = texts.with_name("ordered.jsonl")
    path.write_text("".join(lines[rows.unit(index)] + "\n" for index in range(20)))
    return path


def loaded(example):
    found = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("example", "family", "scheme", "prompt", "weight", "scaling"),
    [
        ("loop", "Llama", "endprompt-random", "EP_3", 0.1, "yarn"),
        pytest.param("trainer", "Llama", "endprompt", "EP_3", 0.1, "linear", marks=pytest.mark.slow),
        pytest.param("trl_sft", "Llama", "endprompt", "EP_3", 1.0, "yarn", marks=pytest.mark.slow),
        pytest.param("trl_sft", "Qwen3", "pose", "none", 1.0, "linear", marks=pytest.mark.slow),
        pytest.param("trl_sft", "Gemma3Text", "endprompt", "EP_3", 1.0, "linear", marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_those_of_the_trainer(
    checkpoints, texts, tokenizer, tmp_path, example, family, scheme, prompt, weight, scaling
):
    config = ExtendConfig(
        model=str(checkpoints(family)),
        data=[str(texts)],
        output=str(tmp_path / "ours"),
        target=TARGET,
        scheme=scheme,
        prompt=prompt,
        prompt_weight=weight,
        scaling=scaling,
        **{"rows": 4, "steps": 5, "warmup": 0, "lr": 1e-3, "device": "cpu", "log_every": 1},
    )
    ours, theirs = train.extend(config), tmp_path / "theirs"
    module = loaded(example)
    options = {
        **{"model": config.model, "data": in_the_order_of_training(texts, config, tokenizer), "output": theirs},
        **{"target": TARGET, "row-tokens": WINDOW, "scheme": scheme, "prompt": prompt, "scaling": scaling},
        **{"steps": 5, "lr": 1e-3, "rows": 4},
    }
    if example != "loop":  # micro-batches of a step
        options |= {"rows": 2, "accumulate": 2}
    losses = module.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    assert losses == pytest.approx(losses_of(ours), abs=2e-5)
    assert load_config(theirs).rope_parameters == load_config(ours).rope_parameters
    row = torch.randint(0, VOCABULARY, (1, TARGET), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # loaded as anyone would, which also compares loss and logits with transformers' own
        exported = [float(load_model(path)(row, labels=row).loss) for path in (ours, theirs)]
    assert exported[0] == pytest.approx(exported[1], abs=2e-5)
    expected = weights_of(ours)
    for name, found in weights_of(theirs).items():
        assert float((found - expected[name]).abs().max()) < 2e-4, name


@pytest.mark.slow
def test_packed_rows_in_trl_have_the_loss_of_their_documents(checkpoints, texts, tokenizer, tmp_path):
    """By stock eager attention over each document by itself, positions as PoSE's are drawn for a row of its length."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    lines = [json.loads(line)["text"][:60] for line in texts.read_text().splitlines()]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    base, out = checkpoints("Qwen3"), tmp_path / "out"
    options = {"model": base, "data": texts, "output": out, "target": TARGET, "row-tokens": 64, "scaling": "linear"}
    options |= {"steps": 1, "lr": 1e-9, "rows": 2, "accumulate": 1}
    (found,) = loaded("trl_sft").main(
        ["--packed", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    )
    ids = [[*tokenizer(line, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for line in lines]
    packed = trl.pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), 64)
    collator = PositionalCollator(tokenizer, scheme="pose", target=TARGET, row_tokens=64)
    batch = collator([packed[i] | {"index": i} for i in range(2)])
    assert max(len(packed[i]["seq_lengths"]) for i in range(2)) > 1
    model = load_model(out, attention="eager")
    total = count = 0.0
    for ids, positions, real in zip(batch["input_ids"], batch["position_ids"], batch["attention_mask"]):
        ends = [*torch.nonzero(positions == 0)[:, 0].tolist(), int(real.sum())]
        for first, end in itertools.pairwise(ends):
            row, places = ids[None, first:end], positions[None, first:end]
            with torch.no_grad():
                logits = model(row, position_ids=places, attention_mask=torch.ones_like(row)).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            count += end - first - 1
    assert found == pytest.approx(total / count, abs=2e-5)


def test_conversations_are_made_of_two_sets(tmp_path):
    answer = "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24"
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "How many clips?", "answer": answer}) + "\n")
    turns = [{"speaker": "USER", "utterance": "A table?"}, {"speaker": "SYSTEM", "utterance": "For how many?"}]
    (tmp_path / "dialogues_001.json").write_text(json.dumps([{"turns": turns}] * 2))
    module = loaded("conversations")
    (made,) = module.gsm8k(tmp_path / "train.jsonl")
    assert [turn["role"] for turn in made] == ["user", "assistant"]
    assert made[1]["content"] == "Natalia sold 48/2 = 24 clips.\nThe answer is 24."
    first, second = module.sgd(tmp_path / "dialogues_001.json")
    assert first == second == [
        {"role": "user", "content": "A table?"}, {"role": "assistant", "content": "For how many?"},
    ]  # fmt: skip


def test_axolotls_plugin_prepares_the_model_and_lays_rows_out(monkeypatch, llama, tokenizer):
    """axolotl stands in as its plugin's base class and the arguments that it calls plugins and collators with."""
    base, loaders = (types.ModuleType(f"axolotl.{name}") for name in ("integrations.base", "loaders.utils"))
    base.BasePlugin, loaders.load_model_config = object, lambda cfg: load_config(cfg.base_model)
    for module in (base, loaders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    plugin = loaded("axolotl_plugin").EndPromptPlugin()
    settings = {"scheme": "endprompt", "prompt": "EP_3", "target": TARGET, "scaling": "yarn"}
    config = types.SimpleNamespace(endprompt=settings, sample_packing=False, eval_sample_packing=None, base_model=llama)
    model = load_model(llama)
    model.config.max_position_embeddings = 2 * WINDOW  # as axolotl states a sequence_len above the window
    plugin.pre_lora_load(config, model)
    make, options = plugin.get_collator_cls_and_kwargs(config, is_eval=False)
    batch = make(tokenizer, **({"return_tensors": "pt", "padding": True, "pad_to_multiple_of": 64} | options))(
        [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}]
    )
    assert batch["position_ids"][0, -1] == TARGET - 1 and model.config.max_position_embeddings == TARGET
    assert model.config.rope_parameters["factor"] == TARGET / WINDOW
    assert model(**batch).loss.isfinite()
    config.sample_packing = True
    with pytest.raises(ValueError, match="sample_packing must be false"):
        plugin.get_collator_cls_and_kwargs(config)
