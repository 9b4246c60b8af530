"""Training's loss and logits against transformers' own, for families that have something beside the plain decoder."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from endprompt import model as models
from endprompt import train
from endprompt.model import kinds, length_rope, parity
from endprompt.model.attention import registered_name
from endprompt.train import Objective
from tests.support.checkpoints import make_checkpoint

COMMON = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SPARSE = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "first_k_dense_replace": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 1,
    "mamba_n_groups": 1, "mamba_chunk_size": 16, "head_dim": 8,
}  # fmt: skip


def random_model(family: str, attention: str, **changes):
    config = getattr(transformers, f"{family}Config")(**(COMMON | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=models.training_attention(attention))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def objective_of(family: str, attention: str = "sdpa", **changes) -> Objective:
    return Objective(random_model(family, attention, **changes), autocast=False)


@pytest.mark.parametrize(
    ("family", "changes", "plain"),
    [
        ("Llama", {}, True),
        ("Llama", {"tie_word_embeddings": True}, True),
        ("Mixtral", {"num_local_experts": 4}, True),
        ("Phi", {}, False),  # its head has a bias
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, False),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None}, True),
        ("Granite", {"logits_scaling": 8.0}, False),
        ("Granite", {"logits_scaling": 1.0}, True),
        ("Cohere", {"logit_scale": 0.0625}, False),
        ("FalconH1", MAMBA | {"lm_head_multiplier": 0.05}, False),
        ("FalconH1", MAMBA | {"lm_head_multiplier": 1.0}, True),
        ("MiniCPM3", SPARSE | {"hidden_size": 32, "dim_model_base": 8}, False),
    ],
)
def test_a_head_is_plain_if_logits_are_the_product(family, changes, plain):
    """By the numbers of the family's own forward: also on meta, where there are no weights to multiply."""
    model = random_model(family, "eager", **changes)
    assert parity.plain_head(model) is plain
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert parity.plain_head(empty) is plain
    ids = torch.arange(8)[None]
    with torch.no_grad():
        product = model.base_model(input_ids=ids)[0] @ model.get_output_embeddings().weight.T
        assert torch.allclose(product, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6) is plain


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
         | {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("Gemma2", {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 64}),
        ("FalconH1", MAMBA | {"lm_head_multiplier": 0.05}),
        ("Granite", {"logits_scaling": 8.0, "attention_multiplier": 0.5}),
    ],
)  # fmt: skip
def test_eager_trains_with_transformers_loss(family, changes):
    """Sinks, caps and multipliers: the loss of a row at jumped positions, and its gradient, are transformers' own."""
    objective = objective_of(family, "eager", **changes)
    model = objective.model
    parity.check_forward(objective)
    ids = torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(16), torch.arange(40, 48)]).expand(2, -1)
    weights = torch.rand(2, 24, generator=torch.Generator().manual_seed(2))
    weights[:, 0] = 0
    loss = objective(ids, positions, weights)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = (losses * weights[:, 1:].flatten()).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("DeepseekV32", SPARSE, "deepseek_v32: .* the causal-only attentions: its own code reads the attention mask"),
        ("GlmMoeDsa", SPARSE, "glm_moe_dsa: this family cannot be trained with the causal-only attentions"),
        ("Llama4Text", {"head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 48},
         r"llama4_text: training \(contiguous positions, attention=eager\) does not compute what transformers does"),
        ("Mistral", {"sliding_window": 16}, "mistral: .* sliding window: window=16 is below the row's 48"),
        ("Doge", {"num_experts": 4}, "doge: .* has one of its own"),
        ("GPTNeoXJapanese", {}, "gpt_neox_japanese: its attention is its own and cannot be chosen"),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0,
                                       "partial_rotary_factor": 0.5}},
         r"llama: .*: transformers' own eager forward pass of it fails \(The size of tensor a \(8\) must match"),
    ],
)  # fmt: skip
def test_what_needs_a_mask_of_its_own_is_refused_in_one_line(family, changes, said):
    objective = objective_of(family, "eager", **changes)
    with pytest.raises(ValueError, match=said) as raised:
        parity.check_forward(objective)
    assert "\n" not in str(raised.value) and "Error" not in str(raised.value)
    assert objective.model.config._attn_implementation == registered_name("eager")


def test_chunks_below_the_target_are_refused_however_long():
    """A short row fits into one chunk and shows nothing: the config says it, before any work."""
    own = {"attention_chunk_size": 128, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}
    config = transformers.Llama4TextConfig(**(COMMON | own))
    kinds.check_layers(config, 128)
    with pytest.raises(ValueError, match=r"attention_chunk_size=128 target=129"):
        kinds.check_layers(config, 129)


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "GPTNeoX"])
def test_rounding_in_bfloat16_is_no_difference(family):
    objective = objective_of(family)
    frequencies = objective.model.base_model.rotary_emb.inv_freq.clone()
    objective.model.to(torch.bfloat16)
    objective.model.base_model.rotary_emb.inv_freq = frequencies
    parity.check_forward(objective)


def test_a_fault_of_the_attention_is_found(monkeypatch):
    """Each in turn: another scale in one layer, a row that is not causal, and one that is cut at the jump."""
    right = models.ATTENTIONS["sdpa"]

    def scaled(module, q, k, v, mask=None, **kwargs):
        return right(module, q, k, v, mask, **(kwargs | {"scaling": 1.01 * kwargs["scaling"]}))

    def seeing_all(module, q, k, v, mask=None, **kwargs):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=kwargs["scaling"]).transpose(1, 2), None

    for wrong in (scaled, seeing_all):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(models.ATTENTIONS, "sdpa", wrong)
            with pytest.raises(ValueError, match="does not compute what transformers does"):
                parity.check_forward(objective_of("Llama"))
    objective = objective_of("Llama")
    own = objective.model.base_model.forward

    def cut(input_ids, position_ids=None, **kwargs):  # each document by itself, whatever the mask says
        jump = 0 if position_ids is None else int((position_ids[0].diff() != 1).nonzero().sum())
        if not jump:
            return own(input_ids=input_ids, position_ids=position_ids, **kwargs)
        kwargs.pop("attention_mask", None)
        parts = slice(0, jump + 1), slice(jump + 1, None)
        outs = [own(input_ids=input_ids[:, p], position_ids=position_ids[:, p], **kwargs) for p in parts]
        outs[0].last_hidden_state = torch.cat([out[0] for out in outs], dim=1)
        return outs[0]

    monkeypatch.setattr(objective.model.base_model, "forward", cut)
    with pytest.raises(ValueError, match="tokens after a jump of the positions do not see those before it"):
        parity.check_forward(objective)


def test_the_check_leaves_model_and_numbers_as_they_were():
    objective = objective_of("Llama", "shifted")
    objective.model.train()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    parity.check_forward(objective)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert objective.model.training and objective.model.config._attn_implementation == registered_name("shifted")
    assert all(parameter.grad is None for parameter in objective.model.parameters())


def with_scale(scale):
    """Every stock attention but eager, its logits multiplied."""
    from transformers import AttentionInterface

    right = AttentionInterface._global_mapping["sdpa"]

    def attend(module, q, k, v, mask=None, **kwargs):
        return right(module, q, k, v, mask, **(kwargs | {"scaling": scale * kwargs["scaling"]}))

    return lambda patch: patch.setitem(AttentionInterface._global_mapping, "sdpa", attend)


def with_turned_rows(patch):
    right = length_rope.RowsAlone.forward

    def turned(self, x, position_ids):
        return right(self, x, position_ids + position_ids // 2)

    patch.setattr(length_rope.RowsAlone, "forward", turned)


def scaled(kind):
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32} | (
        {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, with_scale(2.0)),
        ({"rope_parameters": scaled("dynamic")}, with_turned_rows),
        ({"rope_parameters": scaled("longrope")}, with_turned_rows),
    ],
)
def test_a_fault_of_a_loaded_model_is_found_by_every_command_that_loads_one(tmp_path, changes, fault):
    """`load_model` is the lab's and verify's, `Complete` that of `score`; the dtypes are those they load in."""
    from analysis.config import VerifyConfig
    from analysis.scene import load
    from benchmarks.lab import predict
    from benchmarks.scoring.hf import Complete

    directory = tmp_path / "model"
    random_model("Llama", "sdpa", **changes).save_pretrained(directory)
    loads = [
        lambda: models.load_model(directory),
        lambda: models.load_model(directory, dtype="bfloat16"),
        lambda: load(str(directory), VerifyConfig(str(directory))),
        lambda: Complete.from_pretrained(str(directory), attn_implementation="sdpa"),
    ]
    for attempt in loads:
        model = attempt()
        parity.check_loaded(model, predict.loss_sum)
        with pytest.raises(ValueError, match=r"does not compute what transformers does: the last logits differ"):
            parity.check_loaded(model, lambda model, ids: 1.2 * predict.loss_sum(model, ids))
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        for attempt in loads:
            with pytest.raises(ValueError, match=r"llama: .* attention sdpa, does not compute what transformers does"):
                attempt()


def test_weights_that_are_zero_are_called_so(extend_config, tmp_path):
    path = make_checkpoint(tmp_path / "m")
    zeros = {name: torch.zeros_like(weight) for name, weight in load_file(path / "model.safetensors").items()}
    save_file(zeros, path / "model.safetensors", {"format": "pt"})
    for load in (models.load_model, lambda path: train.extend(extend_config(model=str(path)))):
        with pytest.raises(ValueError, match=r"all logits .* the same number.*: weights of the checkpoint are zero"):
            load(path)


def test_a_config_with_which_the_family_s_code_does_not_run_is_one_line(tmp_path):
    path = make_checkpoint(tmp_path / "m")
    settings = json.loads((path / "config.json").read_text())
    settings["rope_parameters"] |= {
        "rope_type": "linear",
        "factor": 2.0,
        "partial_rotary_factor": 0.5,
    }  # which Llama's code has no place for
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^llama: the model's forward pass of a short row fails: .*size of tensor"):
        models.load_model(path)


def test_another_checkpoint_of_the_same_config_is_compared_too(tmp_path):
    for name, weight in (("sound", 0.0), ("broken", float("nan"))):
        model = random_model("Llama", "sdpa")
        with torch.no_grad():
            model.model.norm.weight[0] += weight
        model.save_pretrained(tmp_path / name)
    models.load_model(tmp_path / "sound")
    with pytest.raises(ValueError, match="llama: the logits of a short row are not finite numbers"):
        models.load_model(tmp_path / "broken")


def test_training_s_forward_is_compared_before_the_data_are_read(extend_config, monkeypatch):
    from endprompt.train import run, start

    config = extend_config(attention="eager")
    monkeypatch.setitem(models.ATTENTIONS, "eager", models.ATTENTIONS["shifted"])
    monkeypatch.setattr(start, "load_documents", lambda *args: pytest.fail("the data are read"))
    with pytest.raises(ValueError, match=r"llama: training .* does not compute what transformers does"):
        run.extend(config)
    with pytest.raises(ValueError, match=r"the data file must exist: data='nowhere.txt'"):
        run.extend(extend_config(data=["nowhere.txt"]))
