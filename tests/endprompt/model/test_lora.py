"""LoRA with trained embeddings and norms: what trains, and that the export has it merged."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.scoring import ScoreConfig
from benchmarks.scoring import run as scoring
from endprompt import model as models
from endprompt import train
from endprompt.config import check_processes
from endprompt.model import load, lora, quantized
from endprompt.train import run as training
from tests.support.checkpoints import make_checkpoint, tiny_config
from tests.support.runs import lines_of, log_of, losses_of, resumed, same_weights, weights_of


def test_only_updates_embeddings_and_norms_train(llama):
    model = models.load_model(llama)
    lora.add_lora(model, 4, 16, ["embed", "norm"], seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.embed_tokens.weight" in trained and "model.norm.weight" in trained
    assert {n.rpartition(".")[0].rpartition(".layers.")[2] for n in trained if "lora_A" in n} == {
        f"{layer}.self_attn.{part}_proj.lora_A.default" for layer in (0, 1) for part in "qkvo"
    }
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all("base_layer" in name or "mlp" in name for name in frozen) and len(frozen) == 2 * 7


def test_merge_equals_pefts_own(llama):
    from peft import LoraConfig, get_peft_model

    base = models.load_model(llama)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    weights = {name: x.clone() for name, x in tuned.base_model.model.state_dict().items()}
    merged = lora.merge(weights, 16 / 4)
    expected = tuned.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-6)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(expected[query], weights_of(llama)[query])


@pytest.mark.parametrize("architecture", ["Llama", "Phi3"])
def test_trained_updates_are_merged_at_export(checkpoints, extend_config, architecture):
    caught = {}
    original = training.finish

    def keep(trainer, *rest):
        trainer.model.eval()
        with torch.no_grad():
            caught["logits"] = trainer.model(input_ids=ids, use_cache=False).logits
        return original(trainer, *rest)

    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(2))
    base = checkpoints(architecture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "finish", keep)
        scaling = "longrope" if architecture == "Phi3" else "linear"
        output = train.extend(extend_config(model=str(base), scaling=scaling, lora_rank=4, steps=3, lr=1e-2))
    before, after = weights_of(base), weights_of(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("mlp" in name for name in changed)
    assert any("self_attn" in name for name in changed) and any("norm" in name for name in changed)
    loaded = AutoModelForCausalLM.from_pretrained(output).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, caught["logits"], rtol=1e-4, atol=2e-5)
    assert "lora" not in (output / "config.json").read_text()


@pytest.mark.parametrize(
    ("group", "also", "adapter"),
    [("all", ["embed", "norm"], "beside"), pytest.param("mlp", [], "only", marks=pytest.mark.slow)],
)
def test_the_adapter_is_what_peft_loads(llama, extend_config, tmp_path, group, also, adapter):
    """On the base with the config beside it: the logits of the merged run, tied embeddings and norms among them."""
    from peft import PeftModel
    from transformers import AutoConfig

    options = {"scaling": "yarn", "lora_rank": 4, "lora_also": also, "lora_targets": group, "steps": 2, "lr": 1e-2}
    out = train.extend(extend_config(output=str(tmp_path / "out"), adapter=adapter, **options))
    folder = out / "adapter" if adapter == "beside" else out
    merged = out if adapter == "beside" else train.extend(extend_config(output=str(tmp_path / "merged"), **options))
    assert (out / "model.safetensors").exists() is (adapter == "beside")
    about = json.loads((folder / "adapter_config.json").read_text())
    names = {"all": {"q", "k", "v", "o", "gate", "up", "down"}, "mlp": {"gate", "up", "down"}}[group]
    assert {name.removesuffix("_proj") for name in about["target_modules"]} == names
    base = AutoModelForCausalLM.from_pretrained(llama, config=AutoConfig.from_pretrained(folder))
    tuned = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=ids).logits
        torch.testing.assert_close(tuned(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert ("PeftModel" in (out / "README.md").read_text()) is (adapter == "only")
    scaled, other = AutoConfig.from_pretrained(folder), make_checkpoint(tmp_path / "other", seed=7)
    shutil.copy(folder / "config.json", shutil.copytree(llama, tmp_path / "scaled"))
    asked = ScoreConfig(str(tmp_path / "scaled"), backend_args=f"peft={folder}", device="cpu", dtype="float32")
    with torch.no_grad():
        found = scoring.load(asked, 60, 1, scaled, models.load_tokenizer(llama)).model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"was trained with rope_parameters=.*'yarn'.*, and .* has .*'default'.*: give"
    ):
        lora.check_adapter(folder, llama, models.load_config(llama))
    with pytest.raises(ValueError, match=r"the adapter was trained on another base, whose weights are not .*other's"):
        scoring.load(ScoreConfig(str(other), backend_args=f"peft={folder}"), 1, 1, scaled, None)


@pytest.mark.parametrize(
    ("about", "base", "said"),
    [
        ({"r": 8}, {}, r"the shape of \S*0.self_attn.k_proj.lora_A.weight is \(8, 32\), the file has \(4, 32\)"),
        ({}, {"hidden_size": 64}, r"of another model or rank: .*lora_A.weight is \(4, 64\), the file has \(4, 32\)"),
        ({}, {"num_hidden_layers": 3}, r"layers.2.self_attn.k_proj.lora_A.weight is \(4, 32\), the file has None"),
        ({"target_modules": ["q_proj"]}, {}, r"k_proj.lora_A.weight is None, the file has \(4, 32\)"),
        ({"target_modules": ["c_attn"]}, {}, r"does not fit .*: Target modules \S*c_attn\S* not found"),
        ({"peft_type": "LATER"}, {}, r"the adapter does not fit .*LATER"),
        ({"base_model_name_or_path": "some/other"}, {}, None),
    ],
)
def test_an_adapter_of_pefts_goes_onto_its_base_alone(llama, tmp_path, capsys, about, base, said):
    """By names and shapes, before anything is loaded; which weights it was trained on, it does not say."""
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=4, target_modules=["k_proj", "q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), options).save_pretrained(tmp_path)
    settings = tmp_path / "adapter_config.json"
    lora.check_adapter(tmp_path, llama, models.load_config(llama))
    assert "goes onto" not in capsys.readouterr().err
    settings.write_text(json.dumps(json.loads(settings.read_text()) | about))
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        lora.check_adapter(tmp_path, llama, tiny_config("Llama", **base))
    assert said or "the adapter is for some/other by its adapter_config.json, and goes onto" in capsys.readouterr().err
    settings.unlink()
    with pytest.raises(
        ValueError, match=r"must be a folder with adapter_config.json and .* has no adapter_config.json"
    ):
        lora.check_adapter(tmp_path, llama, models.load_config(llama))


@pytest.mark.parametrize(("architecture", "also"), [("Llama", ["embed", "norm"]), ("Qwen2", [])])
def test_the_lean_optimizer_trains_lora_as_float32_masters_do(checkpoints, extend_config, tmp_path, architecture, also):
    """Llama's layers would be joined and fused, but for the frozen matrices in them."""
    options = {"model": str(checkpoints(architecture)), "lora_rank": 4, "lora_also": also, "dtype": "bfloat16"}
    runs = [
        train.extend(extend_config(output=str(tmp_path / name), optimizer=name, steps=6, lr=1e-2, **options))
        for name in ("lean", "masters")
    ]
    logs = [log_of(run) for run in runs]
    for lean, masters in zip(*logs, strict=True):
        assert lean["loss"] == pytest.approx(masters["loss"], rel=5e-3)
        assert lean["grad_norm"] == pytest.approx(masters["grad_norm"], rel=0.1)
    assert logs[0][-1]["loss"] < logs[0][0]["loss"] - 0.1
    before, after = weights_of(checkpoints(architecture)), weights_of(runs[0])
    changed = {name for name in before if not torch.equal(before[name].bfloat16().float(), after[name])}
    wanted = {name for name in before if "_proj.weight" in name and "self_attn" in name}
    wanted |= {name for name in before if any(word in name for word in also)}
    assert changed == wanted


def test_model_without_such_projections_is_refused(tmp_path):
    model = models.load_model(make_checkpoint(tmp_path / "m"))
    for layer in load.decoder_layers(model):
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="lora_rank=4: LlamaForCausalLM has none of the projections"):
        lora.add_lora(model, 4, 16, [], seed=0)


def test_shifted_attention_trains_and_whole_attention_evaluates(extend_config, documents, tmp_path):
    """Two groups' tokens do not see each other in training; held-out loss and export attend to everything."""
    held = {"eval_data": [str(documents)], "eval_lengths": [27], "eval_rows": 2, "eval_every": 1}  # 27: not 8 parts
    options = {"scheme": "contiguous", "prompt": None, "lora_rank": 4, "steps": 2}
    runs = [
        train.extend(extend_config(output=str(tmp_path / name), attention=name, **options, **held))
        for name in ("shifted", "sdpa")
    ]
    assert losses_of(runs[0]) != losses_of(runs[1])
    values = [[row["value"] for row in lines_of(run / "results.jsonl")] for run in runs]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert json.loads((runs[0] / "config.json").read_text()).get("_attn_implementation") in (None, "sdpa")


def four_bit(llama, dtype="float32"):
    """(model in 4 bits, the same model of what its matrices stand for)."""
    attention = models.training_attention("sdpa")
    packed, whole = (models.load_model(llama, dtype=dtype, attention=attention) for _ in range(2))
    quantized.quantize(packed, load.decoder_layers(packed), "cpu")
    whole.load_state_dict({name: quantized.unpacked(p).detach() for name, p in packed.named_parameters()}, strict=False)
    return packed, whole


def test_a_base_in_4_bits_is_the_model_that_its_matrices_stand_for(llama):
    """Logits and gradients of the updates, with the code book of the paper's NF4 typed here."""
    pytest.importorskip("bitsandbytes")
    packed, whole = four_bit(llama)
    original = weights_of(llama)
    levels = torch.tensor([-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0])
    levels = torch.cat([levels, torch.tensor([0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617])])
    levels = torch.cat([levels, torch.tensor([0.72295684, 1.0])])
    changed = {
        name for name, x in whole.state_dict().items() if name in original and not torch.equal(x, original[name])
    }
    assert changed == {name for name in original if "_proj" in name}
    for name in changed:
        blocks, found = (x.reshape(-1, 64) for x in (original[name], whole.state_dict()[name]))
        largest = blocks.abs().amax(1, keepdim=True)
        wanted = levels[((blocks / largest)[..., None] - levels).abs().argmin(-1)] * largest
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=float(largest.max()) / 50)  # scales have 8 bits
    ids = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    made = []
    for model in (packed, whole):
        lora.add_lora(model, 4, 16, ["embed", "norm"], seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=generator)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        made.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected, others) = made
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == others.keys() and all(map(lambda n: "lora" in n or "embed" in n or "norm" in n, others))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["masters", pytest.param("lean", marks=pytest.mark.slow)])
def test_a_run_in_4_bits_resumes_and_its_export_is_what_was_trained(llama, extend_config, tmp_path, optimizer):
    """The merged export and the adapter on the base in 4 bits have the logits of the model at its last step."""
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoConfig

    options = {"quantize": "4bit", "lora_rank": 4, "dtype": "bfloat16", "optimizer": optimizer, "lr": 1e-2}
    options |= {"export_dtype": "float32", "adapter": "beside", "save_every": 1, "lora_targets": "all"}
    runs = [extend_config(output=str(tmp_path / name), **options) for name in ("whole", "cut")]
    out, other = train.extend(runs[0]), resumed(runs[1], step=2)
    assert same_weights(out, other)
    assert losses_of(out)[-1] < losses_of(out)[0]
    ids = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    base = AutoModelForCausalLM.from_pretrained(llama, config=AutoConfig.from_pretrained(out / "adapter"))
    base.load_state_dict(four_bit(llama, "bfloat16")[1].state_dict())
    tuned = PeftModel.from_pretrained(base, out / "adapter").eval()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=ids).logits
        torch.testing.assert_close(tuned(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_4_bits_are_refused_where_they_cannot_be(checkpoints, extend_config, monkeypatch):
    with pytest.raises(ValueError, match="matrices in 4 bits need a single process: quantize='4bit', 2 processes"):
        check_processes(extend_config(quantize="4bit", lora_rank=4), 2, 32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(
        ValueError, match=r"needs the package bitsandbytes .* with kernels for this device: device='cpu'"
    ):
        train.extend(extend_config(quantize="4bit", lora_rank=4))
