"""Fused layers against plain ones in float64, their kernels against torch, and what they keep for the backward pass."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers

from endprompt import fast
from endprompt.fast import LeanAdamW, linears
from endprompt.fast import layers as fused
from endprompt.model import new_model, training_attention
from endprompt.train import extend
from endprompt.train.recompute import checkpoint_layers, memory_budget
from tests.support.checkpoints import make_checkpoint
from tests.support.runs import losses_of, weights_of

SIZES = {
    "vocab_size": 64, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 72, "head_dim": 12, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip


def small_model(family="Llama", dtype="float32", **changes):
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = new_model(config, seed=0, dtype=dtype, attention=training_attention("sdpa"), device="cpu").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a weight that is left out
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            elif name.endswith("bias"):
                parameter.add_(0.1)
    return model


def lean(model, keep=False, fuse=True):
    """The model as the lean optimizer trains it; how many layers were fused."""
    model.optimizer = LeanAdamW(model.parameters())
    linears.convert(model)
    return fast.fuse(model, keep) if fuse else 0


def output_and_gradients(model, sums=True):
    """Of one pass over 2 rows of 17 tokens; each name's gradient, or the sum where the lean optimizer has it."""
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(12), torch.arange(50, 55)]).expand(2, -1)
    out = model.model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.to(direction.dtype) * direction).sum().backward()
    named = {name: p.main_grad if sums else p.grad for name, p in model.named_parameters() if "lm_head" not in name}
    return out.detach(), named


def exact(model_of):
    """What a plain model gives in float64."""
    return output_and_gradients(model_of().double(), sums=False)


def distance(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


def assert_close(found, expected, limit):
    assert distance(found[0], expected[0]) < limit
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert distance(found[1][name], gradient) < limit, name


@pytest.mark.parametrize("summing", [True, False])
@pytest.mark.parametrize(("rows", "size", "outs"), [(7, 48, (5, 9, 3)), (1, 20, (6,)), (64, 33, (8, 8))])
def test_norm_and_linears_are_those_of_float64(rows, size, outs, summing):
    torch.manual_seed(0)
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(size, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    layers = torch.nn.ModuleList(torch.nn.Linear(size, out, bias=False) for out in outs)
    whole = torch.nn.ModuleDict({"norm": norm, "layers": layers})
    x, added = (torch.randn(1, rows, size, requires_grad=True) for _ in range(2))
    grads = [torch.randn(1, rows, out) for out in (size, *outs)]

    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in whole.named_parameters()}
    x64, added64 = x.detach().double().requires_grad_(), added.detach().double().requires_grad_()
    stream = x64 + added64
    unit = stream / (stream.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    results = [stream, *(unit * wide["norm.weight"] @ wide[f"layers.{i}.weight"].t() for i in range(len(outs)))]
    expected = torch.autograd.grad(results, [x64, added64, *wide.values()], [grad.double() for grad in grads])

    if summing:
        LeanAdamW([layer.weight for layer in layers])
        linears.convert(whole)
    found = fused.norm_linears(x, added, norm, list(layers))
    torch.autograd.backward(found, grads)
    for ours, theirs in zip(found, results):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    ours = [layer.weight.main_grad if summing else layer.weight.grad for layer in layers]
    for one, other in zip((x.grad, added.grad, norm.weight.grad, *ours), expected):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)


def test_a_norm_is_fused_with_three_linear_layers_at_most():
    layers = [torch.nn.Linear(4, 4, bias=False)] * 4
    with pytest.raises(ValueError, match="3 linear layers at most: 4"):
        fused.norm_linears(torch.randn(1, 2, 4), None, torch.nn.Module(), layers)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_swiglu_and_its_linear_layer_are_those_of_float64(keep, trains):
    torch.manual_seed(0)
    linear = torch.nn.Linear(23, 6, bias=False).requires_grad_(trains)
    gate, up = (torch.randn(2, 5, 23, requires_grad=True) for _ in range(2))
    residual, grad = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    parts = [part.detach().double().requires_grad_() for part in (gate, up, linear.weight, residual)]
    expected = parts[3] + F.silu(parts[0]) * parts[1] @ parts[2].t()
    expected.backward(grad.double())
    found = fused.swiglu_linear(residual, [gate, up], linear, keep)
    found.backward(grad)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip((gate, up, linear.weight, residual), parts):
        if one.requires_grad:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-6)
    assert trains or linear.weight.grad is None


def test_the_norm_rounds_as_llama_does():
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(96).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x, added = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(fused.rms_norm(x, norm.weight, norm.variance_epsilon)[0], norm(x))
    total, out, _ = fused.add_rms_norm(x, added, norm.weight, norm.variance_epsilon)
    assert torch.equal(total, x + added) and torch.equal(out, norm(x + added))


def test_operators_keep_torchs_rules():
    x, y, weight, scale = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8), torch.rand(6)
    rules = ("test_schema", "test_faketensor")
    for name, arguments in {
        "swiglu": (x, y),
        "swiglu_backward": (x, y, x, True),
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, y, weight, 1e-5),
        "rms_norm_backward": (x, scale, weight, y, [x, y]),
    }.items():
        torch.library.opcheck(getattr(torch.ops.endprompt, name).default, arguments, test_utils=rules)
    torch.library.opcheck(torch.ops.endprompt.swiglu_backward.default, (x, y, x, False), test_utils=rules)


@pytest.mark.parametrize("family", fused.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_model_has_the_gradients_of_float64(family, dtype):
    model = small_model(family, dtype)
    names = list(model.state_dict())
    assert lean(model) == 2
    assert all(layer.fused_attention == (family != "Qwen2") for layer in model.model.layers)  # its q, k, v have biases
    expected = exact(lambda: small_model(family, dtype))
    found = output_and_gradients(model)
    assert list(model.state_dict()) == names
    plain = small_model(family, dtype)
    lean(plain, fuse=False)
    as_plain = output_and_gradients(plain)
    limit = 1e-5 if dtype == "float32" else 0.06
    assert_close(found, expected, limit)
    if dtype == "bfloat16":  # roundings are fewer, so on the whole it is no further off than a plain one
        sizes = [sum(distance(one[1][n], expected[1][n]) for n in expected[1]) for one in (found, as_plain)]
        assert sizes[0] < 1.1 * sizes[1]


@pytest.mark.parametrize(("kind", "keep"), [("selective", True), ("full", False)])
def test_with_checkpointing_the_gradients_are_the_same(kind, keep):
    model = small_model()
    lean(model, keep)
    expected = output_and_gradients(model)
    other = small_model()
    lean(other, keep)
    checkpoint_layers(other.model.layers, kind)
    assert_close(output_and_gradients(other), expected, 1e-5)


@pytest.mark.parametrize(("family", "keep"), [("Llama", True), ("Qwen2", False), ("Qwen3", True)])
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(family, keep):
    torch._dynamo.reset()
    expected = exact(lambda: small_model(family, num_hidden_layers=1))
    model = small_model(family, num_hidden_layers=1)
    lean(model, keep)
    model.model.layers[0].compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    assert_close(output_and_gradients(model), expected, 1e-5)


def kept_bytes(family, fuse):
    """Bytes that a compiled layer keeps for the backward pass beside its inputs, and the backward graph's operators."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    torch._dynamo.reset()
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "head_dim": 32}
    model = small_model(family, "bfloat16", num_hidden_layers=1, max_position_embeddings=512, **sizes)
    count = lean(model, fuse=fuse)
    kept, calls = 0, []

    def forward(graph, inputs):
        nonlocal kept
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0][1:]
        seen = set()
        for node in outputs:
            while node.op == "call_function" and getattr(node.target, "is_view", False):
                node = node.args[0]
            if node.op == "call_function" and node not in seen:
                value = node.meta["val"]
                kept += value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
            seen.add(node)
        return lambda *values: graph(*values)

    def backward(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *values: graph(*values)

    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition)
    with torch._functorch.config.patch(activation_memory_budget=memory_budget("none", bool(count))):
        model.model.layers[0].compile(backend=backend, dynamic=False, fullgraph=True)
        model.model(input_ids=torch.randint(64, (1, 512)), use_cache=False)[0].sum().backward()
    return kept, calls


def test_the_backward_pass_repeats_no_product_and_no_attention_and_keeps_no_more():
    plain, plain_calls = kept_bytes("Llama", False)
    kept, calls = kept_bytes("Llama", True)
    assert kept <= 1.01 * plain
    for some in (plain_calls, calls):
        assert some.count("aten.mm.default") == 7  # input gradients; weight gradients are operators of their own
        assert not [call for call in some if "flash_attention" in call and "backward" not in call]
    ours = [call for call in calls if "swiglu" in call or "rms_norm" in call]
    assert sorted(ours) == ["endprompt.rms_norm_backward.default"] * 2 + ["endprompt.swiglu_backward.default"]


def test_keep_is_the_product_of_gate_and_up_more():
    found = []
    for keep in (False, True):
        model, saved = small_model(dtype="bfloat16", num_hidden_layers=1), {}
        lean(model, keep)

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.model(input_ids=torch.arange(17)[None], use_cache=False)[0]
        found.append(sum(saved.values()))
        out.sum().backward()  # until here nothing that was saved is gone
    assert found[1] - found[0] == 17 * SIZES["intermediate_size"] * 2


def test_what_cannot_be_fused_is_left_alone():
    for family, changes in (("Gemma", {}), ("Llama", {"mlp_bias": True}), ("Llama", {"hidden_act": "gelu"})):
        model = small_model(family, **changes)
        before = [type(layer) for layer in model.model.layers]
        assert fast.fuse(model) == 0 and before == [type(layer) for layer in model.model.layers]
    model = small_model(hidden_size=48, intermediate_size=80, head_dim=16)
    model.optimizer = LeanAdamW(model.parameters())
    linears.convert(model, "fast")
    assert fast.fuse(model) == 0


def test_out_of_training_a_layer_runs_its_own_forward_pass():
    model, plain = small_model().eval(), small_model().eval()
    lean(model)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=ids).logits, plain.train()(input_ids=ids).logits)


def test_without_triton_a_gpu_keeps_its_layers(monkeypatch):
    monkeypatch.setattr(fused, "kernels_module", lambda: None)
    model = small_model()
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert fast.fuse(model) == 0


def check_kernels(device, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.check_kernels", device],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this triton's interpreter does not know this numpy")
    assert done.returncode == 0 and "checked" in done.stdout, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, whose interpreter runs on a CPU")
def test_the_kernels_do_what_torch_does():
    check_kernels("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which compiles without a GPU")
def test_the_kernels_compile_for_a_gpu_in_float32_and_16_bytes_at_a_time():
    """A constant below what float32 holds would make a kernel float64; rows of unknown size would make loads narrow."""
    program = [sys.executable, "-m", "tests.support.compile_kernels"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr


@pytest.mark.gpu
def test_on_the_gpu_the_kernels_do_what_torch_does():
    check_kernels("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [True, False])
def test_on_the_gpu_compiled_fused_layers_sum_the_cpu_s_gradients(keep):
    torch._dynamo.reset()
    sizes = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64}
    expected = exact(lambda: small_model(dtype="bfloat16", **sizes))
    model = small_model(dtype="bfloat16", **sizes).cuda()
    lean(model, keep)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False)
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.cat([torch.arange(12), torch.arange(50, 55)]).expand(2, -1).cuda()
    out = model.model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cuda()
    (out * direction).sum().backward()
    found = {name: p.main_grad.cpu() for name, p in model.named_parameters() if "lm_head" not in name}
    assert_close((out.detach().cpu(), found), expected, 0.06)


def test_extend_fuses_unless_told_otherwise_and_says_where_it_cannot(extend_config, tmp_path, capsys):
    lean = {"optimizer": "lean", "dtype": "bfloat16", "checkpointing": "selective"}
    losses = {}
    for name, changes in {"plain": {"fused": False}, "fused": {}, "float8": {"float8": "fast"}}.items():
        output = tmp_path / name
        extend(extend_config(**lean, **changes, output=str(output)))
        losses[name] = losses_of(output)
        assert "no layer of this model can be" not in capsys.readouterr().err
        model = transformers.AutoModelForCausalLM.from_pretrained(output)
        assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert len(losses["plain"]) == 4 and losses["fused"] != losses["plain"]
    assert losses["fused"] == pytest.approx(losses["plain"], rel=0.01)
    assert losses["plain"][0] != losses["float8"][0] == pytest.approx(losses["plain"][0], rel=0.01)
    gemma = make_checkpoint(tmp_path / "gemma", "Gemma")
    extend(extend_config(**lean, model=str(gemma), steps=1, output=str(tmp_path / "unfused")))
    assert "fused: no layer of this model can be" in capsys.readouterr().err


def test_a_fused_run_exports_each_weight(extend_config, tmp_path):
    source = make_checkpoint(tmp_path / "model", "Mistral")
    output = extend(extend_config(model=str(source), optimizer="lean", dtype="bfloat16", lr=0.01))
    before, after = weights_of(source), weights_of(output)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert weight.shape == before[name].shape and not torch.equal(weight, before[name].to(weight.dtype)), name
    sizes = sum(weight.numel() * weight.element_size() for weight in after.values())
    assert (output / "model.safetensors").stat().st_size < sizes + 20000
