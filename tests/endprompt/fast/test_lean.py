"""The lean optimizer against torch's AdamW, its rounding against its expectation, and the layers that feed its sums."""

import copy

import numpy as np
import pytest
import torch

from endprompt import distributed
from endprompt.fast import LeanAdamW, linears
from endprompt.fast import lean as optim
from endprompt.fast.lean import decode, encode, random_bits, round_to_bfloat16
from endprompt.model import new_model, training_attention
from endprompt.shapes import model_config
from endprompt.train.loss import linear_cross_entropy
from endprompt.train.optimizers import clip_gradients, make_optimizer
from tests.support.processes import several


def learning_rows(rows, tokens, vocabulary, seed):
    """Rows that can be learnt, int64 [rows, tokens]: a walk with 4 ways on from a token, then its copy."""
    ways = np.random.default_rng(0).integers(0, vocabulary, (vocabulary, 4))
    rng = np.random.default_rng([1, seed])
    half = [rng.integers(0, vocabulary, rows)]
    while len(half) < tokens // 2:
        half.append(ways[half[-1], rng.integers(0, 4, rows)])
    return np.stack(half * 2, axis=1)


def losses_of(lean, steps, rows, lr):
    """Losses of a tiny model trained from scratch, by the lean optimizer or with float32 weights by torch's AdamW."""
    config = model_config("tiny")
    model = new_model(config, seed=0, dtype="float32", attention=training_attention("sdpa"), device="cpu").train()
    if lean:
        model.to(torch.bfloat16)
    optimizer = make_optimizer("lean" if lean else "adamw", model, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    if lean:
        linears.convert(model)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (0.3 * steps))
        ids = torch.from_numpy(learning_rows(rows, config.max_position_embeddings, config.vocab_size, step))
        labels = ids[:, 1:].flatten()
        with torch.autocast("cpu", torch.bfloat16, enabled=not lean):
            hidden = model.model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
            weights = torch.full(labels.shape, 1 / labels.numel())
            loss = linear_cross_entropy(hidden, model.lm_head.weight, labels, weights)
        loss.backward()
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        linears.after_step(model)
        losses.append(loss.item())
    return losses


def bits(n, seed=3):
    return random_bits(torch.arange(n, dtype=torch.int32), torch.tensor(seed, dtype=torch.int32))


def test_random_bits_are_uniform_and_differ_by_seed():
    first, second = bits(1 << 16, 1), bits(1 << 16, 2)
    for shift in range(32):
        share = ((first >> shift) & 1).double().mean()
        assert abs(share - 0.5) < 4 * 0.5 / 256  # four standard errors of a fair coin thrown 2^16 times
    assert (first == second).double().mean() < 1e-3


@pytest.mark.parametrize("value", [1.00123, -1.00123, 3.3e-5, -70001.0])
def test_rounding_to_bfloat16_is_right_on_average(value):
    rounded = round_to_bfloat16(torch.full((1 << 18,), value), bits(1 << 18)).float()
    spacing = 2.0 ** (torch.tensor(abs(value)).log2().floor() - 7)
    assert rounded.unique().numel() == 2
    assert abs(rounded.double().mean() - value) < 4 * 0.5 * spacing / 512


@pytest.mark.parametrize("value", [1.0, 0.37, 2.0**-9, 2.0**-15.5, 1e-6, 0.0])
def test_codes_are_right_on_average(value):
    uniform = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))
    got = decode(encode(torch.full((1 << 18,), value), 255, 16.0, uniform), 255, 16.0)
    assert got.unique().numel() <= 2
    assert abs(got.double().mean() - value) <= 4 * float(got.double().std()) / 512 + 1e-7 * value


def test_the_first_step_is_adamw_s_own():
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(300, 7))  # 2100 elements: the last block is not full
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    lean, exact = LeanAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    target = torch.randn(300, 7)
    for parameter, optimizer in ((ours, lean), (theirs, exact)):
        (parameter - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.grad is None


def test_updates_far_below_a_bfloat16_step_add_up():
    """At lr 1e-5 a weight of 1 moves by 1/390 of its spacing: nearest rounding never moves, the expectation does."""
    lean_weight, plain_weight = (torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2))
    lean = LeanAdamW([lean_weight], lr=1e-5)
    plain = torch.optim.AdamW([plain_weight], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(200):
        for weight, optimizer in ((lean_weight, lean), (plain_weight, plain)):
            optimizer.zero_grad()
            weight.float().sum().backward()
            optimizer.step()
    assert float(plain_weight.float().mean()) == 1.0
    moved = 1 - float(lean_weight.double().mean())
    assert moved == pytest.approx(200e-5, rel=0.1)


def test_sums_over_micro_batches_and_clipping_equal_torch_s():
    torch.manual_seed(1)
    ours = torch.nn.Parameter(torch.randn(512))
    theirs = torch.nn.Parameter(ours.detach().clone())
    lean, exact = LeanAdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0)
    for factor in (1.0, 2.5):
        for parameter in (ours, theirs):
            (factor * parameter.square()).sum().backward()
    assert float(clip_gradients(lean, 1.0)) == pytest.approx(float(clip_gradients(exact, 1.0)), rel=1e-6)
    lean.step(), exact.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    lean.zero_grad()
    assert float(ours.main_grad.abs().max()) == 0


def test_pieces_of_any_size_draw_the_same_bits(monkeypatch):
    """A GPU takes a parameter whole, a CPU in pieces; the weights must not tell."""
    ends = []
    for piece in (1 << 24, 512, 1024):
        monkeypatch.setattr(optim, "CHUNK", piece)
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(size).bfloat16()) for size in (3000, 700, 2048)]
        optimizer = LeanAdamW(weights, lr=0.01, weight_decay=0.1, seed=3)
        for _ in range(3):
            optimizer.zero_grad()
            sum(weight.float().square().sum() for weight in weights).backward()
            optimizer.step()
        ends.append(torch.cat([weight.detach() for weight in weights]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_parameters_and_steps_draw_other_bits():
    """The same weights with the same gradients move apart, and a step's rounding is not the last one's again."""
    start = torch.full((4096,), 1.0)
    weights = [torch.nn.Parameter(start.bfloat16()) for _ in range(2)]
    optimizer = LeanAdamW(weights, lr=1e-3)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        for weight in weights:
            weight.main_grad.fill_(1.0)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        moved.append([weight.detach() != old for weight, old in zip(weights, before)])
    for one, other in ((moved[0][0], moved[0][1]), (moved[0][0], moved[1][0])):
        both, product = float((one & other).double().mean()), float(one.double().mean() * other.double().mean())
        assert 0.05 < product < 0.95 and abs(both - product) < 4 * 0.5 / 64  # as of independent throws


def test_a_copied_state_goes_on_bit_by_bit():
    def run(parameter, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (parameter.float() - 1).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(1000).bfloat16())
    optimizer = LeanAdamW([whole], lr=0.01, seed=5)
    run(whole, optimizer, 3)
    resumed = torch.nn.Parameter(whole.detach().clone())
    other = LeanAdamW([resumed], lr=0.01, seed=5)
    other.state[resumed] = copy.deepcopy(dict(optimizer.state[whole]))
    run(whole, optimizer, 4), run(resumed, other, 4)
    assert torch.equal(whole, resumed)


def sharded_steps(output):
    """Steps of the lean optimizer on parameters that all processes share; the whole weights go to a file."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    here = distributed.world("cpu")
    mesh = init_device_mesh("cpu", (here.size,))
    take_steps(output if here.main else None, lambda x: distribute_tensor(x, mesh, [Shard(0)]))


def take_steps(output, share=lambda x: x):
    torch.manual_seed(0)
    # rows of whole blocks, of parts of one, fewer rows than processes, a block that several processes hold
    shapes = [(8, 256), (7, 96), (3,), (512,), (5, 512), (1000,), (3, 300), (700,)]
    starts = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, [torch.bfloat16, torch.float32] * 4)]
    weights = [torch.nn.Parameter(share(start)) for start in starts]
    optimizer = LeanAdamW(weights, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for weight in weights:
            weight.main_grad.copy_(distributed.local(share(torch.randn(weight.shape))))
        optimizer.step()
    whole = [distributed.whole(weight.detach()) for weight in weights]
    if output:
        torch.save(whole, output)


def test_the_number_of_processes_changes_no_bit_of_a_step(tmp_path):
    """Blocks, their scales and random bits are those of the whole parameter, wherever the shards cut it."""
    take_steps(tmp_path / "1")
    alone = torch.load(tmp_path / "1")
    for count in (2, 3, 4):
        codes, said = several(count, sharded_steps, tmp_path / str(count))
        assert codes == [0] * count, said[-2000:]
        for ours, theirs in zip(torch.load(tmp_path / str(count)), alone, strict=True):
            assert torch.equal(ours, theirs), (count, tuple(ours.shape))


def test_what_it_refuses():
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"beta2=0\.999"):
        LeanAdamW([parameter], betas=(0.9, 0.999))
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        make_optimizer("sgd", torch.nn.Linear(2, 2), lr=1, betas=(0, 0), weight_decay=0)
    with pytest.raises(ValueError, match="optimizer=lean"):
        linears.convert(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False)])}))


def small_model(dtype="float32"):
    config = model_config("tiny")
    config.use_cache = False
    return new_model(config, seed=0, dtype=dtype, attention=training_attention("sdpa"), device="cpu").train()


def gradients_of(model, head_sum=None):
    ids = torch.from_numpy(learning_rows(2, 32, 256, 0))
    hidden = model.model(input_ids=ids, use_cache=False)[0]
    weights = torch.full((64,), 1 / 64)
    linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, ids.flatten(), weights, 24, head_sum).backward()


def test_converted_layers_sum_the_same_gradients():
    reference, model = small_model(), small_model()
    gradients_of(reference)
    LeanAdamW(model.parameters())
    assert linears.convert(model) == 14
    for _ in range(2):
        gradients_of(model, model.lm_head.weight.main_grad)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
        assert ours.grad is None
        torch.testing.assert_close(ours.main_grad, 2 * theirs.grad, rtol=1e-4, atol=1e-7, msg=name)
    state, before = model.state_dict(), reference.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_step_reaches_float8_weights():
    model = small_model("bfloat16")
    optimizer = LeanAdamW(model.parameters(), lr=0.01)
    linears.convert(model, "exact")
    linear = model.model.layers[0].mlp.gate_proj
    before = linear.weight8_NK.float().clone()
    gradients_of(model)
    optimizer.step()
    linears.after_step(model)
    assert torch.equal(linear.weight8_KN.float(), linear.weight8_NK.float().t())
    assert not torch.equal(linear.weight8_NK.float(), before)
    # e4m3 has 3 bits after the point: half a step is 1/16 of a number, of the largest one at most 1/28
    restored = linear.weight8_NK.float() * linear.weight_scale
    assert float((restored - linear.weight.float()).abs().max()) <= float(linear.weight.float().abs().max()) / 27.999


def test_float8_layers_are_near_exact_ones():
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(64, 48, bias=False)])})
    linear = layer["layers"][0]
    x, grad = torch.randn(32, 64, requires_grad=True), torch.randn(32, 48)
    linear(x).backward(grad)
    expected = (linear(x).detach(), x.grad.clone(), linear.weight.grad.clone())
    linear.weight.grad = x.grad = None
    LeanAdamW(layer.parameters())
    linears.convert(layer, "fast")
    out = linear(x)
    out.backward(grad)
    # relative errors add in squares: 2.6% for each e4m3 operand (uniform in a step of 1/8 to 1/16), 5% for e5m2
    for got, want, limit in zip((out, x.grad, linear.weight.main_grad), expected, (0.05, 0.08, 0.08)):
        assert float((got - want).norm() / want.norm()) < limit


@pytest.mark.slow
def test_the_lean_losses_stay_with_the_exact_ones():
    exact, lean = (losses_of(lean, 150, 16, 5e-3)[9::10] for lean in (False, True))
    assert exact[-1] < 0.75 * exact[0]  # it does learn
    assert lean == pytest.approx(exact, rel=0.03)


@pytest.mark.gpu
def test_on_the_gpu_a_step_is_the_cpu_s():
    torch.manual_seed(0)
    start, gradients = torch.randn(3000), [torch.randn(3000) for _ in range(3)]
    ends = []
    for device in ("cpu", "cuda"):
        weight = torch.nn.Parameter(start.to(device, torch.bfloat16))
        optimizer = LeanAdamW([weight], lr=0.01, weight_decay=0.1)
        for gradient in gradients:
            optimizer.zero_grad()
            (weight.float() * gradient.to(device)).sum().backward()
            optimizer.step()
        ends.append(weight.detach().cpu().float())
    # the same random bits: only results on the edge between two roundings may differ
    assert float((ends[0] != ends[1]).double().mean()) < 0.01
    torch.testing.assert_close(*ends, rtol=2**-6, atol=1e-3)


@pytest.mark.gpu
def test_on_the_gpu_the_product_adds_in_float32():
    from endprompt.fast.linears import _adds_in_float32, add_product

    torch.manual_seed(0)
    a, b = torch.randn(512, 256).cuda().bfloat16(), torch.randn(512, 128).cuda().bfloat16()
    total = torch.randn(256, 128).cuda()
    expected = total.double() + a.double().t() @ b.double()
    add_product(total, a, b)
    assert _adds_in_float32()
    assert float((total - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("float8", ["none", "exact", "fast"])
def test_on_the_gpu_converted_layers_sum_the_cpu_s_gradients(float8):
    # of the same weights: those that are made in bfloat16 are drawn anew, not rounded
    reference, model = small_model(), small_model().to("cuda", torch.bfloat16)
    gradients_of(reference)
    LeanAdamW(model.parameters())
    linears.convert(model, float8)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    ids = torch.from_numpy(learning_rows(2, 32, 256, 0)).cuda()
    hidden = model.model(input_ids=ids, use_cache=False)[0]
    weights = torch.full((64,), 1 / 64, device="cuda")
    linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, ids.flatten(), weights).backward()
    limit = 0.03 if float8 == "none" else 0.25
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
        assert float((ours.main_grad.cpu() - theirs.grad).norm() / theirs.grad.norm()) < limit, name
