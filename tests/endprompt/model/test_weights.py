"""What a checkpoint's files hold against what the model takes: refused, said, or nothing to say."""

import contextlib
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3_5TextConfig

from benchmarks import scoring
from benchmarks.scoring import ScoreConfig
from benchmarks.scoring.hf import Complete
from endprompt import model as models
from endprompt.model import shares
from endprompt.train import extend
from tests.support.checkpoints import VOCABULARY, make_checkpoint

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip


def change(directory, added=None, dropped=(), **config):
    """Tensors added to the file or dropped from it, keys of config.json changed."""
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in dropped}
    save_file(tensors | (added or {}), path, {"format": "pt"})
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | config))
    return directory


def checkpoint_of(config_class, directory, **own):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32}
    sizes |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(config_class(**sizes, **own)).save_pretrained(directory)
    from tests.support.checkpoints import make_tokenizer

    make_tokenizer().save_pretrained(directory)
    return directory


def readings(directory):
    """The three ways into a model: before work, by one process, by a share of many."""
    config = models.load_config(directory)
    given = {"dtype": "float32", "attention": models.training_attention("sdpa"), "config": config}
    return [
        lambda: shares.check_weights(directory, **given),
        lambda: models.load_model(directory, **given),
        lambda: shares.model_to_fill(directory, **given),
        lambda: Complete.from_pretrained(str(directory), config=config),
    ]


def llama_with(tmp_path, made=None, **changes):
    return change(make_checkpoint(tmp_path / "m", **(made or {})), **changes)


@pytest.mark.parametrize(
    ("made", "changes", "said"),
    [
        ({"attention_bias": True}, {"attention_bias": False},
         r"holds 8 weights that the model does not have, such as model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"num_hidden_layers": 3}, {"num_hidden_layers": 2},
         r"holds 9 weights that the model does not have, such as model\.layers\.2\.input_layernorm\.weight"),
        ({}, {"dropped": ["model.norm.weight"]}, r"lacks 1 of the model's weights, such as model\.norm\.weight"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False},
         r"lacks 1 of the model's weights, such as lm_head\.weight"),
        ({}, {"added": {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}},
         r"holds 1 weights that the model does not have, such as model\.layers\.0\.self_attn\.q_norm\.weight"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_on_every_way(tmp_path, made, changes, said):
    directory = llama_with(tmp_path, made, **changes)
    for reading in readings(directory):
        with pytest.raises(ValueError, match=said) as raised:
            reading()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int32])
def test_weights_that_are_whole_numbers_are_refused(tmp_path, dtype):
    """transformers casts them: a model of numbers that were to be scaled, which answers and trains."""
    name = "model.layers.1.mlp.up_proj.weight"
    directory = llama_with(tmp_path, added={name: torch.ones(48, 32).to(dtype)})
    for reading in readings(directory)[:3]:
        with pytest.raises(ValueError, match=rf"/m: weights must be floating-point numbers, and {name} is [IUB]"):
            reading()
    asked = ScoreConfig(str(directory), device="cpu")
    with pytest.raises(ValueError, match="weights must be floating-point numbers"):
        scoring.score(asked)


def test_other_shapes_are_named_on_every_way(tmp_path):
    directory = llama_with(tmp_path, intermediate_size=40)
    for reading in readings(directory)[:3]:
        with pytest.raises(ValueError, match=r"down_proj\.weight is \(32, 48\), the model's is \(32, 40\)"):
            reading()


def test_what_every_model_computes_by_itself_is_no_weight(tmp_path):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    old |= {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4), "model.rotary_emb.inv_freq": torch.ones(4)}
    directory = llama_with(tmp_path, added=old)
    before, *others = readings(directory)
    assert before() == []
    for reading in others:
        reading()


def test_a_head_beside_tied_embeddings(tmp_path):
    """The same numbers twice are one weight; others are kept apart, as transformers does, on every way."""
    directory = make_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    table = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    for head, tied in ((table.clone(), True), (table + 1e-3, False)):
        change(directory, added={"lm_head.weight": head})
        before, one, many, _ = readings(directory)
        assert len(before()) == (0 if tied else 1)
        for model in (one(), many()):
            assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
            assert model.config.tie_word_embeddings is tied
        theirs = AutoModelForCausalLM.from_pretrained(directory)
        assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) is tied


@pytest.mark.parametrize(
    ("config_class", "own", "key", "names"),
    [
        (Qwen3_5TextConfig, HYBRID, "mtp_num_hidden_layers", ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]),
        (DeepseekV3Config, LATENT, "num_nextn_predict_layers",
         ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight"]),
    ],
)  # fmt: skip
def test_layers_of_multi_token_prediction_are_left_out_aloud(
    tmp_path, capsys, extend_config, config_class, own, key, names
):
    """They are said, the config that is written promises none, and the card says it too."""
    directory = checkpoint_of(config_class, tmp_path / "m", **own)
    change(directory, added={name: torch.ones(8, 8) for name in names}, **{key: 1})
    before, one, many, score = readings(directory)
    said = rf"2 weights of multi-token prediction are left out, such as {names[0]}"
    assert [note.startswith(said) for note in before()] == [True]
    for reading in (one, many, score):
        reading()
    assert said not in capsys.readouterr().err
    asked = ScoreConfig(str(directory), device="cpu", tasks="niah_single_1", lengths="32")
    for reading in (lambda: scoring.score(asked), lambda: models.load_model(directory)):
        with contextlib.suppress(ValueError):  # the window is too small for a sample
            reading()
        told = capsys.readouterr().err
        assert told.count(said) == 1 and "written" not in told
    output = extend(extend_config(model=str(directory), scaling="linear", steps=1))
    assert capsys.readouterr().err.count(said) == 1
    assert json.loads((output / "config.json").read_text())[key] == 0
    assert said in (output / "README.md").read_text() and str(tmp_path) not in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "own", "said"),
    [
        ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
         "falcon: its attention is its own and cannot be chosen: this family cannot be trained"),
        ("GPTNeoXJapanese", {"intermediate_multiple_size": 2},
         "gpt_neox_japanese: its attention is its own and cannot be chosen: this family cannot be trained"),
        ("Gemma2", {"head_dim": 8, "sliding_window": 128},
         r"gemma2: this attention has no soft-capping .* attention=eager or flex has"),
    ],
)  # fmt: skip
def test_a_family_whose_attention_is_not_the_asked_one_is_refused_before_any_work(
    tmp_path, extend_config, family, own, said
):
    directory = checkpoint_of(getattr(transformers, f"{family}Config"), tmp_path / "m", **own)
    with pytest.raises(ValueError, match=said):
        extend(extend_config(model=str(directory), data=["nowhere.jsonl"]))
