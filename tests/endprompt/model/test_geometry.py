"""Windows, RoPE keys and configs of extended checkpoints; values typed by hand or transformers' own."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from endprompt import model as models
from endprompt import rope
from endprompt.model import extended_config, extended_rope_parameters, geometry, load, rope_geometry

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256}
LISTS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
SMALL |= {"num_hidden_layers": 1, "intermediate_size": 32}


def scaled(window, parameters, **changes):
    parameters = {"rope_theta": 10000.0} | parameters
    return LlamaConfig(**(SMALL | {"max_position_embeddings": window, "rope_parameters": parameters} | changes))


@pytest.mark.parametrize(
    ("stated", "parameters", "window", "original", "factor"),
    [
        (256, {}, 256, 256, 1),
        (256, YARN, 1024, 256, 4),  # Qwen2.5 with YaRN switched on
        (1024, YARN, 1024, 256, 4),
        (320, YARN, 1024, 256, 4),  # Qwen3: 40960 stated, 32768 trained
        (2048, YARN, 2048, 256, 4),  # extended by less than target / window
        (1024, YARN | {"factor": None}, 1024, 256, 4),
        (256, {"rope_type": "dynamic", "factor": 4.0}, 1024, 256, 4),
        (256, {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 256}, 1024, 256, 4),
        (1024, {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 256}, 1024, 256, 4),
        (256, {"rope_type": "linear", "factor": 1.0}, 256, 256, 1),
        (4096, YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 4096, 256, 4),
        (1024, LONG | LISTS, 1024, 256, 4),
        (256, LONG | LISTS | {"factor": 4.0}, 1024, 256, 4),
    ],
)
def test_window_original_and_factor(stated, parameters, window, original, factor):
    found = geometry.window_of(scaled(stated, parameters))
    assert (found.window, found.original, found.factor) == (window, original, factor)


def test_linear_scaling_that_states_no_original_window_is_asked_about(tmp_path):
    config = scaled(256, {"rope_type": "linear", "factor": 4.0})
    with pytest.raises(
        ValueError, match=r"max_position_embeddings=256 .* linear .* by 4 .*: give window=256 or window=1024"
    ):
        geometry.window_of(config)
    assert geometry.window_of(config, 1024) == geometry.Window(1024, 256, 4)
    assert geometry.window_of(config, 256) == geometry.Window(256, 64, 4)
    assert geometry.window_of(config, needed=256).window == 256  # which both readings allow
    with pytest.raises(ValueError, match="leaves open"):
        geometry.window_of(config, needed=257)
    with pytest.raises(ValueError, match="window=512"):
        geometry.window_of(config, 512)
    for other in ({"factor": 0.5}, {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}):
        with pytest.raises(ValueError, match=r"its factor be at least 1: factor=0\.5"):
            geometry.window_of(scaled(256, {"rope_type": "linear"} | other))
    config.save_pretrained(tmp_path)
    (tmp_path / "endprompt.json").write_text(json.dumps({"window": 64, "target": 256}))
    assert geometry.window_of(models.load_config(tmp_path)) == geometry.Window(256, 64, 4)  # an export of ours


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
@pytest.mark.parametrize("stated", [256, 1024])
def test_scaled_checkpoint_is_extended_from_what_it_reads(scaling, stated):
    config = scaled(stated, YARN | {"rope_type": scaling})
    parameters = extended_rope_parameters(config, scaling, 2048)
    assert parameters == YARN | {"rope_type": scaling, "factor": 8.0}
    assert extended_rope_parameters(config, scaling, 2048, factor=3.0)["factor"] == 12.0
    for inside in (512, 1024):
        with pytest.raises(ValueError, match=f"above the checkpoint's window.*: target={inside} window=1024"):
            extended_rope_parameters(config, scaling, inside)


@pytest.mark.parametrize(
    ("stated", "before", "options", "after"),
    [
        # Llama 3.1: 8,192 trained, 131,072 stated, factor 8, and not 16: twice as far is a factor of 16
        (4096, YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 8.0}, {},
         {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0}),
        (4096, YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 8.0},
         {"high_freq_factor": 4.0}, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        (1024, {"rope_type": "dynamic", "factor": 4.0}, {}, {"factor": 8.0}),
        (4096, LONG | LISTS | {"factor": 16.0}, {"long_factor": [9.0] * 8},
         {"factor": 32.0, "short_factor": LISTS["short_factor"], "long_factor": [9.0] * 8}),
    ],
)  # fmt: skip
def test_a_scaled_checkpoint_goes_on_by_its_own_scaling(stated, before, options, after):
    """To twice its window; Llama 3's slowest pair then turns half as fast as before."""
    config = scaled(stated, before)
    kind, window = before["rope_type"], 4096
    extended = extended_config(config, kind, 2 * window, **options)
    own = {"rope_type": kind, "rope_theta": 10000.0} | after
    own |= {} if kind == "dynamic" else {"original_max_position_embeddings": 256}
    assert extended.rope_parameters == own
    assert extended.max_position_embeddings == (stated if kind == "dynamic" else 2 * window)
    attention_scale(extended)
    if kind == "llama3":
        slowest = [
            rope_geometry(c).frequencies(length)[0][-1] for c, length in ((config, window), (extended, 2 * window))
        ]
        assert slowest[0] / slowest[1] == pytest.approx(2, rel=0.02)
    for other in {"linear", "yarn", "none", "llama3", "dynamic"} - {kind}:
        with pytest.raises(
            ValueError, match=f"scaled by '{kind}' already; it is extended again by scaling={kind} alone"
        ):
            extended_config(config, other, 2 * window)


def test_what_is_stated_for_one_window_is_asked_for_another():
    config = scaled(1024, LONG | LISTS)
    with pytest.raises(
        ValueError, match=r"searched for a window of 1024: give those for target=2048 as .*long_factor, 8"
    ):
        extended_config(config, "longrope", 2048)
    start = extended_config(scaled(256, {}), "longrope", 1024)  # with the divisors of no search
    assert extended_config(start, "longrope", 2048).rope_parameters == LONG | rope.longrope_start(16, 8) | {"factor": 8}
    config = scaled(1024, LONG | LISTS | {"attention_factor": 1.3, "factor": 4.0})
    with pytest.raises(ValueError, match=r"attention_factor=1.3 was stated for factor 4"):
        extended_config(config, "longrope", 2048, long_factor=[9.0] * 8)


def test_hunyuan_s_alpha_is_a_base(tmp_path):
    """With the keys of the published checkpoints; transformers' own module has the frequencies before and after."""
    alpha = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0, "beta_fast": 32}
    alpha |= {"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = transformers.HunYuanDenseV1Config(**SMALL, head_dim=16, max_position_embeddings=256, rope_parameters=alpha)
    attention_scale(config)
    assert geometry.window_of(config) == geometry.Window(256, 256, 1.0)
    extended = extended_config(config, "linear", 1024)
    assert extended.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0 * 1000 ** (16 / 14)}
    attention_scale(extended)


def attention_scale(config):
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config)
    geometry.check_frequencies(model)
    return next(module.attention_scaling for module in model.modules() if hasattr(module, "attention_scaling"))


@pytest.mark.parametrize(
    ("own", "scale"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1.2079441541679836 / 1.1039720770839918),
        ({"attention_factor": 1.0}, 1.0),
        ({}, 1.2079441541679836),
        ({"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "finetuned": True}, 1.2079441541679836),
    ],
)
def test_all_keys_of_yarn_are_carried(own, scale):
    extended = extended_config(scaled(1024, YARN | own), "yarn", 2048)
    assert extended.rope_parameters == YARN | own | {"factor": 8.0}
    assert attention_scale(extended) == pytest.approx(scale, abs=1e-12)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (YARN | {"attention_factor": 1.25}, "attention_factor=1.25 was stated for factor 4.*1.2079"),
        (YARN | {"alpha": 1000.0}, "alpha=1000.0"),
        ({"mscale": 1.0}, "mscale=1.0 .rope_type='default'"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        (YARN | {"mscale": "1", "mscale_all_dim": "1"}, "mscale='1'"),
        (YARN | {"rope_type": "spiral"}, "scaled by 'spiral'"),
        ({"rope_type": "linear", "factor": "4"}, "factor='4'"),
    ],
)
def test_keys_that_cannot_be_right_any_more_are_refused(parameters, words):
    config = scaled(1024, {})
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0} | parameters
    with pytest.raises(ValueError, match=words):
        extended_config(config, "yarn", 2048)


def test_stated_attention_factor_gives_way_to_the_users():
    config = scaled(1024, YARN | {"attention_factor": 1.25})
    assert extended_config(config, "yarn", 2048, attention_factor=1.5).rope_parameters["attention_factor"] == 1.5


def test_ministral3_keeps_the_growth_of_its_queries(monkeypatch):
    """Which counts from the original window: that stays, whatever is extended."""
    own = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 1024}
    config = transformers.Ministral3Config(
        **SMALL, head_dim=16, max_position_embeddings=1024, rope_parameters=YARN | own
    )
    extended = extended_config(config, "yarn", 2048)
    assert extended.rope_parameters == YARN | own | {"factor": 8.0, "max_position_embeddings": 2048}
    model = models.new_model(
        extended, seed=0, dtype="float32", attention=models.training_attention("sdpa"), device="cpu"
    )
    places, given = torch.tensor([[0, 1, 2, 700, 701, 702]]), []
    attentions = transformers.models.ministral3.modeling_ministral3.ALL_ATTENTION_FUNCTIONS
    name = model.config._attn_implementation
    attend = attentions[name]

    def watch(module, query, *rest, **more):
        given.append(query.norm(dim=-1)[0, 0])
        return attend(module, query, *rest, **more)

    monkeypatch.setitem(attentions._local_mapping, name, watch)
    for beta in (0.1, 0.0):
        model.config.rope_parameters["llama_4_scaling_beta"] = beta
        model(input_ids=torch.arange(1, 7)[None], position_ids=places, use_cache=False)
    grown = 1 + 0.1 * float(torch.log(torch.tensor(3.0)))  # floor(700 / 256) = 2
    torch.testing.assert_close(given[0] / given[1], torch.tensor([1.0] * 3 + [grown] * 3))


def test_null_head_dim_is_stated_and_the_model_builds():
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2, max_position_embeddings=256, head_dim=None)
    config.head_dim = None
    extended = extended_config(config, "yarn", 2048)
    assert extended.head_dim == 16 and config.head_dim is None
    load.check_builds(extended)
    config.rope_parameters["partial_rotary_factor"] = None
    load.check_builds(extended_config(config, "yarn", 2048))
    extended.head_dim = None
    with pytest.raises(ValueError, match="transformers makes no model of this config"):
        load.check_builds(extended)


def test_refusals_name_the_cause(tmp_path):
    with pytest.raises(ValueError, match=r"multimodal checkpoint: its text model has the RoPE \(text_config\)"):
        rope_geometry(transformers.Mistral3Config())
    with pytest.raises(ValueError, match="its own, not one of rope_parameters: model_type='gptj'"):
        rope_geometry(transformers.GPTJConfig())
    with pytest.raises(ValueError, match=r"quantized.*gptq"):
        extended_config(scaled(256, {}, quantization_config={"quant_method": "gptq"}), "linear", 2048)
    scaled(256, {}).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\): merge it first"):
        models.load_config(tmp_path)


def test_export_points_at_no_file_or_layer_of_its_source(llama, tokenizer, tmp_path):
    model = models.load_model(llama, config=extended_config(models.load_config(llama), "dynamic", 128))
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    model.config.num_nextn_predict_layers = 1
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    models.export(model, tokenizer, tmp_path, "float32")
    config = json.loads((tmp_path / "config.json").read_text())
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "auto_map" not in config and "auto_map" not in about
    assert config["num_nextn_predict_layers"] == 0
    assert about["model_max_length"] == 128 and config["max_position_embeddings"] == 32  # dynamic states the old one
