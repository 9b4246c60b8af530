"""Activation checkpointing: the same gradients, and what is computed twice."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from endprompt import model as models
from endprompt.model.load import decoder_layers
from endprompt.train import Objective
from endprompt.train.recompute import checkpoint_layers


class Count(TorchDispatchMode):
    """How often an operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def run(checkpoint, kind):
    model = models.load_model(checkpoint, attention=models.training_attention("sdpa")).train()
    checkpoint_layers(decoder_layers(model), kind)
    ids = torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 16)
    with Count() as counted:
        loss = Objective(model, autocast=False)(ids, torch.arange(16).expand(2, -1), weights)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, counted.calls


@pytest.fixture(scope="module")
def kept(llama):
    return run(llama, "none")


@pytest.mark.parametrize("kind", ["selective", "attention", "full"])
def test_checkpointing_gives_the_same_gradients(llama, kept, kind):
    loss, gradients, _ = run(llama, kind)
    assert torch.equal(loss, kept[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, kept[1][name], rtol=1e-5, atol=1e-7)


def test_full_repeats_matrix_products_and_attention_the_other_kinds_less(llama, kept):
    full, selective, but_attention = (run(llama, kind)[2] for kind in ("full", "selective", "attention"))
    layers, products = 2, 6  # q, k, v, o, gate, up; the last, down, is no input of anything in its layer
    assert kept[2]["mm"] == selective["mm"] == full["mm"] - layers * products
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert (kept[2][attention], selective[attention], full[attention]) == (layers, layers, 2 * layers)
    assert but_attention[attention] == layers and but_attention["mm"] == full["mm"]
    assert selective["silu"] == full["silu"] == 2 * kept[2]["silu"]  # cheap: computed again by both


def test_the_budget_of_compiled_layers_in_float8_repeats_no_product_and_no_attention():
    """Counted in the backward graph of a Llama layer in Llama-3-8B's proportions; fast/test_layers.py has bfloat16."""
    import torch._functorch.config as functorch_config
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    from endprompt.fast import LeanAdamW, linears
    from endprompt.shapes import model_config
    from endprompt.train.recompute import memory_budget

    config = model_config("llama3-8b")
    config.update({"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2})
    config.update({"num_hidden_layers": 1, "vocab_size": 64, "head_dim": 32, "use_cache": False})
    counts = {}

    def count(graph, inputs):
        for node in graph.graph.nodes:
            name = getattr(node.target, "__name__", str(node.target))
            counts[name] = counts.get(name, 0) + 1
        return lambda *values: graph(*values)

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph.forward,
        bw_compiler=count,
        partition_fn=min_cut_rematerialization_partition,
    )
    model = models.new_model(
        config, seed=0, dtype="bfloat16", attention=models.training_attention("sdpa"), device="cpu"
    )
    model.optimizer = LeanAdamW(model.parameters())
    linears.convert(model, "fast")
    with functorch_config.patch(activation_memory_budget=memory_budget("fast")):
        model.model.layers[0].compile(backend=backend, dynamic=False)
        model.model(input_ids=torch.randint(64, (1, 512)), use_cache=False)[0].sum().backward()
    # on a CPU float8's weight gradients are products like the others
    assert counts.get("mm.default", 0) + counts.get("_scaled_mm.default", 0) == 14, counts
    assert "_scaled_dot_product_flash_attention_for_cpu.default" not in counts
