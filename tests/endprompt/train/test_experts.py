"""Experts: the loss that balances them against transformers' own, frozen routers, and tokens an expert by hand."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from endprompt import model as models
from endprompt import train
from endprompt.config import ExtendConfig
from endprompt.train import Objective, experts
from endprompt.train.objective import optimizer_step
from tests.support.checkpoints import checkpoint_of_experts
from tests.support.families import SMALL
from tests.support.runs import log_of

SIZES = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                                     "num_key_value_heads", "max_position_embeddings", "pad_token_id")}  # fmt: skip
OWN = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "head_dim": 16, "output_router_logits": True}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "sliding_window": None, "router_aux_loss_coef": 0.3},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.3},
    "GptOss": {"num_local_experts": 4, "sliding_window": 64, "router_aux_loss_coef": 0.3,
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip


def made(family, **changes):
    config = getattr(transformers, f"{family}Config")(**SIZES, **(OWN | FAMILIES[family] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=models.training_attention("sdpa"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class Gradients(torch.optim.SGD):
    """Keeps what a step is given."""

    def step(self, closure=None):
        self.given = [p.grad.clone() for p in self.param_groups[0]["params"]]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_transformers_for_a_row_and_its_mean_for_rows(family, checkpointing):
    """Value and gradients, in one micro-batch of two rows and in two of one."""
    ids = torch.randint(1, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    places = torch.arange(24).expand(2, -1).contiguous()
    weights = torch.ones(2, 24)
    weights[:, 0] = 0
    stock = made(family)
    stock.set_attn_implementation("eager")
    expected = sum(stock(input_ids=row[None], labels=row[None]).loss for row in ids) / 2
    plain = sum(stock(input_ids=row[None], labels=row[None], output_router_logits=False).loss for row in ids) / 2
    assert float(expected - plain) > 0.1
    expected.backward()
    for micro in (1, 2):
        model = made(family).train()
        objective = Objective(model, autocast=False)
        objective.balance = experts.balance_weight(ExtendConfig(model="m", data=[], output="o"), model)
        train.loop.make_fast(model, ExtendConfig(model="m", data=[], output="o", checkpointing=checkpointing),
                             torch.device("cpu"), True)  # fmt: skip
        optimizer = Gradients(model.parameters(), lr=0.0)
        loss, _ = optimizer_step(objective, optimizer, micro, 1e9, 1, ids, places, weights)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        for (name, theirs), ours in zip(stock.named_parameters(), optimizer.given):
            assert torch.allclose(ours, theirs.grad, rtol=1e-3, atol=1e-5), name


def test_the_weight_is_the_config_s_unless_it_is_given():
    def weight(model, **changes):
        return experts.balance_weight(ExtendConfig(model="m", data=[], output="o", **changes), model)

    assert weight(made("Mixtral")) == 0.3
    assert weight(made("Mixtral", output_router_logits=False)) == 0.0
    assert weight(made("Mixtral", output_router_logits=False), router_loss=0.02) == 0.02
    assert weight(made("Mixtral"), router_loss=0.0) == 0.0
    sizes = SIZES | {"num_hidden_layers": 1}
    llama = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
    assert weight(llama) == 0.0
    with pytest.raises(ValueError, match=r"llama has no loss of its own that balances experts: router_loss=0.02"):
        weight(llama, router_loss=0.02)
    with pytest.raises(ValueError, match="freeze_router needs a model with experts: LlamaForCausalLM has no router"):
        experts.freeze_routers(llama)


def test_a_run_counts_tokens_an_expert_and_leaves_frozen_routers(extend_config, tmp_path):
    """Counts of the log against the choices that the exported routers' logits give by hand on the last step's row."""
    source = checkpoint_of_experts(tmp_path / "m")
    out = train.extend(extend_config(model=str(source), steps=2, freeze_router=True, output=str(tmp_path / "out")))
    before, after = (AutoModelForCausalLM.from_pretrained(one) for one in (source, out))
    routers = [[r.weight for _, r in experts.layers_of_experts(one)] for one in (before, after)]
    assert len(routers[0]) == 2 and all(torch.equal(a, b) for a, b in zip(*routers))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    for line in log_of(out):
        assert len(line["expert_tokens"]) == 4
        assert sum(line["expert_tokens"]) == 2 * 2 * 32  # layers, experts of a token, tokens
    ids = torch.randint(1, 320, (1, 16), generator=torch.Generator().manual_seed(4))
    chosen = []
    for _, router in experts.layers_of_experts(after):
        router.register_forward_hook(lambda module, args, out: chosen.append(out[0].topk(2).indices))
    objective = Objective(after.eval(), autocast=False)
    counts = experts.tokens_an_expert(objective, ids, torch.arange(16)[None])
    assert counts == torch.bincount(torch.cat(chosen).flatten(), minlength=4).tolist()
