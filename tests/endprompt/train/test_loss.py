"""The fused weighted loss against torch's cross-entropy, gradients included."""

import pytest
import torch

from endprompt.shapes import tokens_at_a_time
from endprompt.train.loss import linear_cross_entropy, logits_cross_entropy, next_tokens

TOKENS, HIDDEN, VOCABULARY = 37, 16, 50


def problem(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    weights = torch.tensor([0.0, 0.1, 1.0])[torch.randint(3, (TOKENS,), generator=draw)]  # masked, prompt, context
    return hidden, head, labels, weights


def reference(hidden, head, labels, weights):
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    losses = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none")
    total = (losses * weights.double()).sum()
    total.backward()
    return total.detach(), hidden.grad, head.grad


@pytest.mark.parametrize("chunk", [1, 5, 37, 4096, None])
def test_loss_and_gradients_equal_torchs(chunk):
    hidden, head, labels, weights = problem(torch.float32)
    expected, grad_hidden, grad_head = reference(hidden, head, labels, weights)
    loss = linear_cross_entropy(hidden, head, labels, weights, chunk)
    loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(loss.detach().double(), expected, **close)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, **close)
    torch.testing.assert_close(head.grad.double(), grad_head, **close)


def test_loss_of_bfloat16_is_near_the_exact_one():
    hidden, head, labels, weights = problem(torch.bfloat16)
    expected, grad_hidden, grad_head = reference(hidden, head, labels, weights)
    loss = linear_cross_entropy(hidden, head, labels, weights, 8)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=2e-2, atol=0)
    for got, exact in [(hidden.grad, grad_hidden), (head.grad, grad_head)]:
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() < 1e-2 * exact.norm()


def test_loss_under_autocast_takes_products_in_bfloat16_and_keeps_float32_gradients():
    hidden, head, labels, weights = problem(torch.float32)
    expected, _, grad_head = reference(hidden, head, labels, weights)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, head, labels, weights, 8)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=2e-2, atol=0)
    assert head.grad.dtype == torch.float32
    assert 0 < (head.grad.double() - grad_head).norm() < 1e-2 * grad_head.norm()


def test_loss_scales_with_what_comes_after_it():
    hidden, head, labels, weights = problem(torch.float32)
    (linear_cross_entropy(hidden, head, labels, weights) / 7).backward()
    _, grad_hidden, _ = reference(hidden, head, labels, weights)
    torch.testing.assert_close(hidden.grad.double() * 7, grad_hidden, rtol=1e-5, atol=1e-5)


def test_loss_of_nothing_is_zero_with_zero_gradients():
    hidden, head, labels, weights = problem(torch.float32)
    loss = linear_cross_entropy(hidden, head, labels, weights * 0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden.grad.any() and not head.grad.any()


def test_loss_from_whole_logits_is_the_same():
    hidden, head, labels, weights = problem(torch.float32)
    torch.testing.assert_close(
        logits_cross_entropy(hidden @ head.T, labels, weights),
        linear_cross_entropy(hidden, head, labels, weights),
        rtol=1e-5,
        atol=1e-5,
    )


def test_next_tokens_are_those_of_the_rows():
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    weights = torch.tensor([[9.0, 0.1, 0.2, 0.3], [9.0, 0.4, 0.5, 0.6]])
    labels, found = next_tokens(ids, weights)
    hidden = torch.randn(2, 4, 8)
    head = torch.randn(10, 8)
    whole = linear_cross_entropy(hidden.flatten(0, 1), head, labels, found, every_token=True)
    apart = torch.nn.functional.cross_entropy(
        (hidden[:, :-1] @ head.T).flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    assert float(whole) == pytest.approx(float((apart * weights[:, 1:].flatten()).sum()), rel=1e-5)
    assert found.view(2, 4)[:, -1].tolist() == [0, 0]


@pytest.mark.parametrize(("vocabulary", "tokens"), [(128256, 8192), (32000, 33536), (2**23, 128), (2**31, 1)])
def test_a_gpu_takes_whole_tiles_of_tokens(vocabulary, tokens):
    found = tokens_at_a_time(vocabulary)
    assert found == tokens and (found % 256 == 0 or found < 256)
    assert found * vocabulary <= 2**30 or found == 1


def test_a_cpu_takes_few_tokens():
    assert tokens_at_a_time(128256, "cpu") == 65 and tokens_at_a_time(2**30, "cpu") == 1
