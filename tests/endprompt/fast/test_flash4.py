"""flash-attn-4's operators around a stand-in for its kernels, against torch's own attention."""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F

from endprompt.fast import flash4
from endprompt.model import ATTENTIONS, new_model, training_attention
from endprompt.model.attention import _flash_function
from endprompt.shapes import model_config


def reference(query, key, value, scaling):
    """Attention from the definition, B T H D; with the log-sum-exp B H T."""
    group, tokens = query.shape[2] // key.shape[2], query.shape[1]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * scaling
    logits = logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value), logits.logsumexp(-1)


@pytest.fixture
def kernels(monkeypatch):
    """The package's module with the signatures of its 4.0.0b36; counts its calls."""
    module, calls = types.ModuleType(flash4.MODULE), {"forward": 0, "backward": 0}

    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, return_lse=False):
        assert causal is True and return_lse is True and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        calls["forward"] += 1
        return reference(q, k, v, softmax_scale)

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0):
        assert causal is True and dout.is_contiguous()
        calls["backward"] += 1
        torch.testing.assert_close((out, lse), reference(q, k, v, softmax_scale))
        group = q.shape[2] // k.shape[2]
        keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, keys) * softmax_scale
        share = (logits - lse[..., None]).exp().tril()
        along = torch.einsum("bqhd,bkhd->bhqk", dout, values)
        slope = share * (along - (dout * out).sum(-1).transpose(1, 2)[..., None]) * softmax_scale
        dq = torch.einsum("bhqk,bkhd->bqhd", slope, keys)
        dk, dv = torch.einsum("bhqk,bqhd->bkhd", slope, q), torch.einsum("bhqk,bqhd->bkhd", share, dout)
        return dq, dk.unflatten(2, (-1, group)).sum(3), dv.unflatten(2, (-1, group)).sum(3)

    _flash_attn_bwd.compile_cache = {}
    module.flash_attn_func, module._flash_attn_bwd = flash_attn_func, _flash_attn_bwd
    parent, package = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    parent.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)  # transformers looks for it
    monkeypatch.setitem(sys.modules, "flash_attn", parent)
    package.flash_attn_func, package.interface = flash_attn_func, module
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    monkeypatch.setitem(sys.modules, flash4.MODULE, module)
    return calls


def inputs(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, heads, 24, 16, requires_grad=True) for heads in (4, 2, 2)]


def gradients(attention, parts):
    out = attention(*parts)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out, *torch.autograd.grad(out, parts, grad)


def attention(query, key, value):
    return ATTENTIONS["flash_attention_4"](torch.nn.Module(), query, key, value, scaling=0.3)[0]


def torchs(query, key, value):
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    return out.transpose(1, 2)


def test_output_and_gradients_are_torchs(kernels):
    parts = inputs()
    torch.testing.assert_close(gradients(attention, parts), gradients(torchs, parts), rtol=1e-4, atol=1e-5)
    assert kernels == {"forward": 1, "backward": 1}
    assert callable(_flash_function("flash_attention_4"))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_of_transformers_runs_on_them_at_jumped_positions(kernels, rows):
    ids = torch.randint(0, 256, (rows, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(24), torch.arange(504, 512)]).expand(rows, -1)
    logits = {}
    for name in ("eager", "flash_attention_4"):
        model = new_model(
            model_config("tiny"), seed=0, dtype="float32", attention=training_attention(name), device="cpu"
        )
        logits[name] = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits["flash_attention_4"], logits["eager"], rtol=1e-4, atol=1e-5)
    assert kernels["forward"] == 2  # layers


def test_compiled_in_one_piece_and_not_run_twice_at_a_small_memory_budget(kernels):
    """Under a budget torch runs again what its count of FLOPs calls cheap; attention must not be that."""

    def layer(query, key, value):
        return attention(query.cos(), key.sin(), value).relu() * 2

    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    parts = inputs()
    expected = gradients(lambda *x: torchs(x[0].cos(), x[1].sin(), x[2]).relu() * 2, parts)
    with functorch_config.patch(activation_memory_budget=0.9):
        torch.testing.assert_close(gradients(compiled, parts), expected, rtol=1e-4, atol=1e-5)
    assert kernels == {"forward": 1, "backward": 1}


def test_operators_keep_torchs_rules(kernels):
    query, key, value = (torch.randn(1, 8, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    torch.library.opcheck(torch.ops.endprompt.flash4.default, (query, key, value, 0.25))


def test_flops_are_those_of_causal_attention(kernels):
    from torch.utils.flop_counter import FlopCounterMode

    parts = inputs()
    with FlopCounterMode(display=False) as counted:
        attention(*parts).sum().backward()
    assert counted.get_total_flops() == (2 + 5) * 2 * 4 * 24 * 24 * 16  # batch, heads, T, T, D
