"""Multimodal checkpoints: the text model inside is extended as it would be alone, and nothing else changes a byte."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from endprompt import train
from endprompt.model import wrapper
from endprompt.model.load import load_config
from tests.support.checkpoints import make_tokenizer

TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32, "sliding_window": 8,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def gemma(directory):
    from transformers import Gemma3Config

    text = TEXT | {"layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=319)
    return made(directory, config)


def mistral(directory):
    from transformers import Mistral3Config

    text = TEXT | {"model_type": "mistral", "sliding_window": None}
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=319, tie_word_embeddings=False)
    return made(directory, config)


def qwen(directory):
    """Text keys beside the others and names without the wrapper's, as the published Qwen2.5-VL has them."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
              "fullatt_block_indexes": [0]}  # fmt: skip
    text = TEXT | {"sliding_window": None, "head_dim": None, "rope_parameters": rope, "tie_word_embeddings": False}
    made(directory, Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=319, video_token_id=318))
    about = json.loads((directory / "config.json").read_text())
    text = about.pop("text_config")
    about |= {key: value for key, value in text.items() if key not in ("model_type", "rope_parameters")}
    about |= {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    (directory / "config.json").write_text(json.dumps(about))
    return directory


def qwen3(directory):
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    text = TEXT | {"rope_parameters": rope}
    text.pop("sliding_window")
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=319, video_token_id=318)
    return made(directory, config)


def made(directory, config):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if "vis" in name:
            parameter.data.view(-1)[:3] = torch.tensor([-0.0, 1e-42, float("nan")])  # what arithmetic would not leave
    model.save_pretrained(directory, max_shard_size="30KB")
    make_tokenizer().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text('{"size": 28}')
    return directory


def tensors_of(directory):
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    "make", [gemma, *(pytest.param(make, marks=pytest.mark.slow) for make in (mistral, qwen, qwen3))]
)
def test_the_text_model_is_extended_and_the_rest_stays(make, tmp_path, extend_config, monkeypatch, capsys):
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path / "cache"))
    source = make(tmp_path / "whole")
    asked = extend_config(model=str(source), scaling="yarn", steps=2, output=str(tmp_path / "out"))
    out = train.extend(asked)
    assert "is extended and put back, the rest stays as it is" in capsys.readouterr().err
    text = wrapper.text_of(source, load_config(source))
    alone = train.extend(dataclasses.replace(asked, model=str(text), output=str(tmp_path / "alone")))
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    own = {name for name in before if not any(word in name for word in ("vision", "visual", "projector"))}
    assert 0 < len(own) < len(before)
    for name, tensor in before.items():
        stored = [(one.dtype, one.shape, one.numpy().tobytes()) for one in (tensor, after[name])]
        assert (stored[0] == stored[1]) is (name not in own), name
    assert {path.name for path in source.glob("*.safetensors*")} == {path.name for path in out.glob("*.safetensors*")}
    config, old = (json.loads((one / "config.json").read_text()) for one in (out, source))
    text, old_text = (one.get("text_config", one) for one in (config, old))
    assert text["max_position_embeddings"] == 128
    full = text["rope_parameters"]
    full = full.get("full_attention", full)
    assert (full["rope_type"], full["factor"]) == ("yarn", 4.0)
    assert full.get("mrope_section") == {qwen: [2, 1, 1], qwen3: [4, 2, 2]}.get(make)
    for one in (text, old_text):
        for key in ("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"):
            one.pop(key, None)
    assert config == old
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    ids = torch.randint(1, 318, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(alone)(input_ids=ids).logits
        found = AutoModelForImageTextToText.from_pretrained(out)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert json.loads((out / "endprompt.json").read_text())["model"] == "whole"


@pytest.mark.slow
@pytest.mark.parametrize("make", [gemma, mistral, qwen, qwen3])
def test_other_commands_read_the_text_model(make, tmp_path, monkeypatch):
    """Positions and plan say of the whole what they say of its text model alone."""
    from analysis import config as settings
    from analysis import coverage
    from endprompt import plan

    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    whole = make(tmp_path / "whole")
    both = [whole, shutil.copytree(wrapper.text_checkpoint(whole), tmp_path / "text")]
    assert load_config(both[1]).get_text_config() is not load_config(whole).get_text_config()
    assert plan.shape_of(str(whole)) == plan.shape_of(str(both[1]))
    said = [coverage.report(settings.PositionsConfig(target=128, context=24, prompt=8, model=str(one))) for one in both]
    assert said[0] == said[1] and ("scales their frequencies" in said[0])


def test_another_config_of_the_same_weights_is_another_text_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path / "cache"))
    source = gemma(tmp_path / "m")
    first = wrapper.text_of(source, load_config(source))
    about = json.loads((source / "config.json").read_text())
    about["text_config"]["sliding_window"] = 16
    (source / "config.json").write_text(json.dumps(about))
    second = wrapper.text_of(source, load_config(source))
    assert [load_config(one).sliding_window for one in (first, second)] == [8, 16]


def test_names_that_are_not_known_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path / "cache"))
    source = made(tmp_path / "m", load_config(gemma(tmp_path / "first")))
    for path in source.glob("*.safetensors"):
        save_file({f"other.{name}": t for name, t in load_file(path).items()}, path, {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"other.{name}": place for name, place in index["weight_map"].items()}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"name the weights of the text model \(gemma3_text\) in no way that is known"):
        wrapper.text_of(source, load_config(source))
