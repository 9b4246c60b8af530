"""The causal-only attention, the checked frequencies, and exports that need no code of ours."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BltConfig, GPT2Config, PhimoeConfig

from endprompt import model as models
from endprompt import positions
from endprompt.model import geometry, load
from endprompt.model.attention import causal_only_sdpa
from endprompt.train import extend
from tests.support import families
from tests.support.checkpoints import TARGET, WINDOW, make_checkpoint, tiny_config

ARCHITECTURES = ["Llama", "Qwen3", "Phi3", "Gemma"]
CONTEXT, PROMPT = 24, 8


def jumped(batch: int = 2):
    """Token ids and end-prompt positions of a batch."""
    ids = torch.randint(1, 300, (batch, CONTEXT + PROMPT), generator=torch.Generator().manual_seed(3))
    places = torch.from_numpy(positions.position_ids("endprompt", CONTEXT, PROMPT, TARGET))
    return ids, places.expand(batch, -1)


@torch.no_grad()
def logits(model, ids, places, **extra):
    return model(input_ids=ids, position_ids=places, use_cache=False, **extra).logits


def first_token_reaches_the_last(model, batch: int) -> bool:
    ids, places = jumped(batch)
    changed = ids.clone()
    changed[:, 0] += 1
    return not torch.equal(logits(model, ids, places)[:, -1], logits(model, changed, places)[:, -1])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["sdpa", "eager", "flex"])
def test_end_prompt_sees_the_context(llama, name, batch):
    attention = models.training_attention(name)
    model = models.load_model(llama, attention=attention)
    assert first_token_reaches_the_last(model, batch)
    ids, places = jumped(batch)
    reference = models.load_model(llama, attention="eager")
    n = ids.shape[1]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1).expand(batch, 1, n, n)
    expected = logits(reference, ids, places, attention_mask=mask)
    torch.testing.assert_close(logits(model, ids, places), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_stock_attention_reads_the_jump_as_a_new_document(llama, name):
    """What the project's own attention is for: in training, the stock ones cut the end prompt off."""
    assert not first_token_reaches_the_last(models.load_model(llama, attention=name), batch=2)


def test_causal_only_attention_refuses_what_it_cannot_express():
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 8)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="without a cache"):
        causal_only_sdpa(module, q, k, k)
    with pytest.raises(ValueError, match="sliding window"):
        causal_only_sdpa(module, q, q, q, sliding_window=3)
    with pytest.raises(ValueError, match="attention must be one of"):
        models.training_attention("paged")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_extends_and_loads_elsewhere(architecture, checkpoints, extend_config):
    """The export loads with no code of ours, gives the trainer's logits, and its config has window and RoPE whole."""
    trained = {}

    def keep(trainer, *_):
        ids, places = jumped()
        trainer.model.eval()
        trained["logits"] = logits(trainer.model, ids, places)

    scaling = "longrope" if architecture == "Phi3" else "yarn"  # the one that transformers' Phi-3 takes
    config = extend_config(model=str(checkpoints(architecture)), scaling=scaling, steps=2)
    from endprompt.train import outcome

    original = outcome.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            outcome, "export", lambda model, *rest: (keep(type("T", (), {"model": model})), original(model, *rest))
        )
        output = extend(config)
    saved = json.loads((output / "config.json").read_text())
    assert saved["max_position_embeddings"] == TARGET
    rope = saved["rope_parameters"]
    assert rope["rope_type"] == scaling and rope["factor"] == TARGET / WINDOW
    assert rope["rope_theta"] == 10000.0 and rope["original_max_position_embeddings"] == WINDOW
    assert rope.get("partial_rotary_factor", 1.0) == (0.5 if architecture == "Phi3" else 1.0)
    assert "causal_only" not in (output / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(output)
    ids, places = jumped()
    n = ids.shape[1]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1).expand(2, 1, n, n)
    got = logits(loaded, ids, places, attention_mask=mask)
    torch.testing.assert_close(got, trained["logits"], rtol=1e-4, atol=2e-5)
    base = AutoModelForCausalLM.from_pretrained(checkpoints(architecture))
    assert loaded.get_input_embeddings().weight.shape == base.get_input_embeddings().weight.shape  # no pad token added
    assert not torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_half_precision_weights_keep_float32_frequencies(llama):
    """A bf16 angle is useless: 65535 rounds to 65536. The far angle of the fastest pair must be right to 5e-3 rad."""
    config = models.extended_config(models.load_config(llama), "none", 65536)
    model = models.load_model(llama, dtype="bfloat16", config=config)
    frequencies, _ = models.rope_geometry(config).frequencies()
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    assert rotary.inv_freq.dtype == torch.float32
    cos, sin = rotary(torch.zeros(1, 1, 1, dtype=torch.float32), torch.tensor([[65535]]))
    theirs = torch.atan2(sin, cos)[0, 0, : len(frequencies)].double().numpy()
    difference = np.angle(np.exp(1j * (theirs - 65535 * frequencies)))
    assert np.abs(difference).max() < 5e-3


def test_rope_theta_survives_scaling(checkpoints, tmp_path):
    """Setting config.rope_scaling alone would lose it."""
    source = make_checkpoint(tmp_path / "m", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    config = models.extended_config(models.load_config(source), "linear", TARGET)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
    models.load_model(source, config=config)  # and its own frequencies are ours


def test_frequencies_that_differ_from_the_config_are_noticed(llama):
    model = models.load_model(llama)
    next(m for m in model.modules() if hasattr(m, "inv_freq")).inv_freq[1] *= 1.001
    with pytest.raises(ValueError, match="differs from its config"):
        geometry.check_frequencies(model)


@pytest.mark.parametrize("architecture", ["Llama", "Phi3"])
def test_every_scaling_loads_with_our_frequencies(architecture, checkpoints, tmp_path):
    """transformers' Phi-3 takes longrope alone, and what leaves its type at `default`."""
    directory = checkpoints(architecture)
    every, taken = ["none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"], []
    for scaling in every:
        try:
            config = models.extended_config(models.load_config(directory), scaling, TARGET)
        except ValueError as error:
            assert architecture == "Phi3" and f"phi3 does not take this scaling: scaling='{scaling}'" in str(error)
            continue
        models.load_model(directory, config=config)
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
        taken.append(scaling)
    assert taken == (["none", "ntk", "longrope"] if architecture == "Phi3" else every)


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_scaled_checkpoint_extended_again_multiplies_the_factor(llama, scaling):
    once = models.extended_config(models.load_config(llama), scaling, 64)
    twice = models.extended_config(once, scaling, TARGET, window=64)
    assert twice.rope_parameters == models.extended_config(models.load_config(llama), scaling, TARGET).rope_parameters
    with pytest.raises(ValueError, match="scaled by"):
        models.extended_config(once, "ntk", TARGET)


def test_what_cannot_be_extended_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match=r"target must be above the checkpoint's window.*: target=32 window=32"):
        models.extended_config(models.load_config(llama), "linear", WINDOW)
    with pytest.raises(ValueError, match="has no RoPE"):
        models.rope_geometry(GPT2Config())
    with pytest.raises(ValueError, match="phi3 does not take this scaling"):
        models.extended_config(tiny_config("Phi3"), "yarn", TARGET)
    with pytest.raises(ValueError, match=r"phimoe does not take this scaling: scaling='longrope': .*short_mscale"):
        models.extended_config(PhimoeConfig(max_position_embeddings=WINDOW), "longrope", TARGET)
    with pytest.raises(ValueError, match="the config must state num_hidden_layers, and it does not: model_type='blt'"):
        models.rope_geometry(BltConfig())
    with pytest.raises(ValueError, match="has no option 'beta'"):
        models.extended_config(models.load_config(llama), "yarn", TARGET, beta=3)
    with pytest.raises(ValueError, match="sliding_window=16"):
        models.extended_config(tiny_config("Mistral", sliding_window=16), "linear", TARGET)
    with pytest.raises(ValueError, match="must exist"):
        models.load_model(tmp_path / "nowhere")
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(ValueError, match="unfinished run"):
        models.load_model(tmp_path / "x.partial")


@pytest.mark.parametrize("damaged", [b"", b'{"eos_token_id": [1, ', b"\xff\xfe\x00", b"[]", b"[" * 20000])
def test_damaged_generation_config_is_named_and_not_passed_over(tmp_path, damaged):
    """transformers goes on without it, so that a checkpoint with several end tokens would be exported with one."""
    source = make_checkpoint(tmp_path / "m")
    (source / "generation_config.json").write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"/m/generation_config\.json.*(not valid JSON|not UTF-8|must be a JSON object)"
    ):
        models.load_config(source)


def test_export_generates_in_padded_batches(llama, tokenizer, tmp_path):
    """The stock attention of an export knows padding, which ours does not: a batch gives what its rows give alone."""
    models.export(models.load_model(llama, attention=models.training_attention("sdpa")), tokenizer, tmp_path, "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = ["the grass is green", "here we go there and back again"]
    alone = [tokenizer(text, return_tensors="pt") for text in texts]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = [model.generate(**one, **settings)[0, one["input_ids"].shape[1] :].tolist() for one in alone]
    width = max(one["input_ids"].shape[1] for one in alone)
    ids = torch.zeros(2, width, dtype=torch.int64)
    mask = torch.zeros(2, width, dtype=torch.int64)
    for row, one in enumerate(alone):
        ids[row, width - one["input_ids"].shape[1] :] = one["input_ids"][0]
        mask[row, width - one["input_ids"].shape[1] :] = 1
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:]
    assert together.tolist() == expected


def test_export_in_half_precision_keeps_tied_weights_tied(llama, tokenizer, tmp_path):
    model = models.load_model(llama)
    models.export(model, tokenizer, tmp_path, "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    torch.testing.assert_close(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight.bfloat16())
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored < 2.1 * sum(p.numel() for p in model.parameters()) + 8192


@pytest.mark.parametrize(("family", "layers"), [("llama4_text", 4), ("dbrx", 4), ("hrm_text", 8), ("gemma3_text", 4)])
def test_decoder_layers_are_found_by_whatever_name(family, layers):
    """Each takes the hidden states: on meta their matrices are the model's but for embeddings and norms at its end."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.tiny_config(family))
    found = list(load.decoder_layers(model))
    inside = {parameter for layer in found for parameter in layer.parameters()}
    outside = [name for name, parameter in model.named_parameters() if parameter not in inside and parameter.ndim > 1]
    assert len(found) == layers
    assert all("embed" in name or "wte" in name or "lm_head" in name for name in outside), outside
