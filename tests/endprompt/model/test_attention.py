"""Causal-only attention by every backend: the same logits as an explicit triangle, whatever the positions say."""

import math

import pytest
import torch

from endprompt.model import ATTENTIONS, new_model, training_attention
from endprompt.model.attention import FLASH_PACKAGES, causal_only_cudnn, causal_only_eager, causal_only_shifted
from endprompt.shapes import model_config


@pytest.mark.parametrize("name", FLASH_PACKAGES)
def test_a_missing_package_is_named_with_the_line_that_installs_it(name, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr("endprompt.model.attention.importlib.import_module", missing)
    with pytest.raises(ValueError, match=rf"attention={name} .*pip install"):
        training_attention(name)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])  # 4: endprompt/fast/test_flash4.py
def test_the_kernel_gets_plain_causal_rows_and_no_positions(name, monkeypatch):
    """A stand-in kernel with flash-attn's own signature and layout: [B, T, H, D], fewer key heads than query heads."""
    seen = {}

    class Package:
        @staticmethod
        def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
            seen.update(shapes=[tuple(x.shape) for x in (q, k, v)], causal=causal, scale=softmax_scale)
            group = q.shape[2] // k.shape[2]
            q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
            return out.transpose(1, 2), None  # with the log-sum-exp beside it, as some versions do

    monkeypatch.setattr("endprompt.model.attention.importlib.import_module", lambda module: Package)
    q, k, v = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
    out, _ = ATTENTIONS[name](torch.nn.Module(), q, k, v, None, scaling=0.3, position_ids=torch.arange(16))
    expected, _ = ATTENTIONS["eager"](torch.nn.Module(), q, k, v, scaling=0.3)
    assert seen == {"shapes": [(2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8)], "causal": True, "scale": 0.3}
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_cudnn_by_name_is_for_cuda_alone():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="attention=cudnn needs a CUDA device"):
        causal_only_cudnn(torch.nn.Module(), x, x, x)


@pytest.mark.parametrize(
    ("heads", "key_heads", "plain_heads"), [(4, 2, 2), (4, 4, 2), (3, 3, 1), (5, 5, 2), (6, 3, 3), (3, 1, 1), (2, 1, 1)]
)
def test_shifted_attention_sees_its_groups_and_nothing_else(heads, key_heads, plain_heads):
    """Against a softmax with masks typed out for 16 tokens: groups of 4, the second half of the heads moved by 2."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, 16, 8), torch.randn(2, key_heads, 16, 8), torch.randn(2, key_heads, 16, 8)
    plain = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    moved = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    out, _ = causal_only_shifted(torch.nn.Module(), q, k, v, scaling=8**-0.5)
    for head in range(heads):
        group = torch.tensor(plain if head < plain_heads else moved)
        allowed = (group[:, None] == group[None, :]) & torch.ones(16, 16).tril().bool()
        own_k, own_v = k[:, head * key_heads // heads], v[:, head * key_heads // heads]
        logits = (q[:, head] @ own_k.transpose(1, 2) * 8**-0.5).masked_fill(~allowed, -math.inf)
        torch.testing.assert_close(out[:, :, head], logits.softmax(-1) @ own_v, rtol=1e-5, atol=1e-6)


def test_shifted_attention_refuses_rows_that_do_not_divide():
    x = torch.randn(1, 2, 12, 8)
    with pytest.raises(ValueError, match="tokens=12"):
        causal_only_shifted(torch.nn.Module(), x, x, x)
    alone = torch.randn(1, 1, 16, 8)
    with pytest.raises(ValueError, match="heads=1"):
        causal_only_shifted(torch.nn.Module(), alone, alone, alone)


def test_eager_takes_soft_caps_and_sinks():
    """One query of two keys by hand, then a random row against transformers' own GPT-OSS."""
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [3.0]]]])
    v = torch.tensor([[[[0.0], [1.0]]]])
    out, _ = causal_only_eager(torch.nn.Module(), q, k, v, scaling=1.0, softcap=2.0)
    capped = math.exp(2 * math.tanh(1.5))
    assert float(out[0, 1, 0, 0]) == pytest.approx(capped / (1 + capped))
    out, _ = causal_only_eager(torch.nn.Module(), q, k, v, scaling=1.0, s_aux=torch.tensor([1.0]))
    assert float(out[0, 1, 0, 0]) == pytest.approx(math.exp(3) / (1 + math.exp(3) + math.e))

    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = torch.nn.Parameter(torch.randn(4)), 2
    mask = torch.full((8, 8), -math.inf).triu(1)
    expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.25)
    out, _ = causal_only_eager(torch.nn.Module(), q, k, v, scaling=0.25, s_aux=module.sinks)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), module.sinks)
    (expected,) = torch.autograd.grad(
        eager_attention_forward(module, q, k, v, mask, scaling=0.25)[0].sum(), module.sinks
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex", "shifted"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"softcap": 30.0}, r"no soft-capping of attention scores \(softcap=30.0\): attention=eager or flex has"),
        ({"s_aux": torch.zeros(2)}, r"no attention sinks \(s_aux\): attention=sdpa, eager or flex has"),
        ({"is_causal": False}, "gives its attention: is_causal=False"),
        ({"indices": torch.zeros(1)}, "gives its attention: indices"),
        ({"position_bias": torch.zeros(1)}, "gives its attention: position_bias"),
        ({"seq_idx": torch.zeros(1, 8)}, "gives its attention: seq_idx"),
        ({"output_attentions": True}, "gives its attention: output_attentions=True"),
        ({"attention_mask": torch.zeros(1, 1, 8, 8)}, "takes no mask"),
    ],
)
def test_what_an_attention_does_not_know_is_refused_by_name(name, given, said):
    x = torch.randn(1, 2, 8, 8)
    has = {"eager": {"softcap", "s_aux"}, "flex": {"softcap", "s_aux"}, "sdpa": {"s_aux"}}
    if set(given) <= has.get(name, set()):
        return
    with pytest.raises(ValueError, match=said):
        ATTENTIONS[name](torch.nn.Module(), x, x, x, **given)


def test_arguments_that_change_nothing_are_taken():
    x = torch.randn(1, 2, 8, 8)
    given = {"is_causal": True, "use_cache": True, "output_attentions": False, "s_aux": None, "cu_seq_lens_q": None}
    given |= {"position_ids": torch.arange(8)[None], "cache_position": torch.arange(8), "sliding_window": 8}
    plain, _ = ATTENTIONS["sdpa"](torch.nn.Module(), x, x, x)
    out, _ = ATTENTIONS["sdpa"](torch.nn.Module(), x, x, x, None, **given)
    assert torch.equal(out, plain)


def available(name):
    try:
        return bool(training_attention(name))
    except ValueError:
        return False


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name not in ("eager", "shifted") and available(name)])
def test_on_the_gpu_every_backend_gives_the_eager_logits_at_jumped_positions(name, rows):
    ids = torch.randint(0, 1024, (rows, 256), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.cat([torch.arange(236), torch.arange(2028, 2048)]).expand(rows, -1).contiguous().cuda()
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 1024
    logits = {}
    for attention in ("eager", name):
        model = new_model(
            model_config("small"), seed=0, dtype="bfloat16", attention=training_attention(attention), device="cuda"
        )
        with torch.no_grad():
            logits[attention], other = (
                model(input_ids=x, position_ids=positions, use_cache=False).logits.float() for x in (ids, changed)
            )
        # the end prompt sees the context: its last logit depends on the first token
        assert float((logits[attention][:, -1] - other[:, -1]).abs().max()) > 0
    error = (logits[name] - logits["eager"]).norm() / logits["eager"].norm()
    assert float(error) < 0.02  # bfloat16 rounds by 0.4%, some six layers of it
