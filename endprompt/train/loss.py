"""The loss: next-token cross-entropy with a weight per token, without ever holding all logits.

    loss = sum_i w_i (logsumexp(z_i) - z_i[y_i]) / W,    z_i = E h_i

W is the weight total of the whole step, over all micro-batches and ranks, so k micro-batches equal one batch exactly.

Legend: N tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch

from endprompt.fast.available import triton_kernels
from endprompt.fast.linears import add_product
from endprompt.shapes import tokens_at_a_time


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies; gradients are made chunk by chunk in the forward pass and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
        chunk: int,
        head_sum_VD: torch.Tensor | None,
        fuse: bool,
    ) -> torch.Tensor:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        head = head_VD.to(dtype)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        grad_head = head_sum_VD
        if needs_head and grad_head is None:
            grad_head = torch.zeros(head_VD.shape, dtype=torch.float32, device=head_VD.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        with torch.autocast(device, enabled=False):
            for rows in torch.arange(len(labels_N)).split(chunk):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                hidden = hidden_ND[part].to(dtype)
                chunk_of = _chunk if fuse else _chunk_eager
                loss, grad_logits = chunk_of(hidden @ head.T, labels_N[part], weights_N[part])
                total += loss
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_logits @ head).to(grad_hidden.dtype)
                if grad_head is not None:
                    add_product(grad_head, grad_logits, hidden)
        ctx.save_for_backward(grad_hidden, grad_head if head_sum_VD is None else None)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            # in place: it is as large as the head, and this is where a step has most memory
            None if grad_head is None else grad_head.mul_(grad_total).to(ctx.head_dtype),
            *(None,) * 5,
        )


def _chunk_eager(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted loss sum in float32, its gradient by the logits in their dtype)."""
    logits = logits_NV.float()
    lse_N = torch.logsumexp(logits, dim=-1)
    loss = (weights_N * (lse_N - logits.gather(1, labels_N[:, None])[:, 0])).sum()
    column = torch.arange(logits.shape[1], device=logits.device)
    grad = (logits - lse_N[:, None]).exp() - (column[None, :] == labels_N[:, None]).to(logits.dtype)
    return loss, (grad * weights_N[:, None]).to(logits_NV.dtype)


def _chunk(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by one kernel, if it can run, which overwrites the logits by their gradient; as written where runs must
    repeat, so that what was trained before there was a kernel is trained so again.
    """
    kernels = None if torch.are_deterministic_algorithms_enabled() else triton_kernels(logits)
    if kernels is None:
        return _chunk_eager(logits, labels, weights)
    logits = logits.contiguous()  # products are; what is not would be read across its rows
    return kernels.cross_entropy(logits, labels, weights).sum(), logits


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    chunk: int | None = None,
    head_sum_VD: torch.Tensor | None = None,
    every_token: bool = False,
    fuse: bool = True,
) -> torch.Tensor:
    """Weighted sum of cross-entropies of `hidden @ head.T` against the labels, float32 scalar; not divided by anything.

    hidden_ND: float; head_VD: float; labels_N: int64 in [0, V); weights_N: float32, >= 0. Tokens of weight 0 are left
    out before any work is done; every_token: they are not, so that no shape depends on the weights. The extra memory is
    one chunk (tokens at a time, default `shapes.tokens_at_a_time`) of logits and the gradient of the head in float32.
    head_sum_VD: the gradient of the head is added to this tensor at once, as of the sum itself, and not passed back.
    fuse: losses and their gradient in one kernel on CUDA, where triton is there.
    """
    if chunk is None:
        chunk = tokens_at_a_time(head_VD.shape[0], hidden_ND.device.type)
    if not every_token:
        keep = weights_N > 0
        if not bool(keep.all()):
            hidden_ND, labels_N, weights_N = hidden_ND[keep], labels_N[keep], weights_N[keep]
    if not len(labels_N):
        return (hidden_ND.sum() + head_VD.sum()).float() * 0.0  # both keep a gradient, of zeros
    return _LinearCrossEntropy.apply(hidden_ND, head_VD, labels_N, weights_N.float(), chunk, head_sum_VD, fuse)


def next_tokens(ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, weights), int64 and float32 [B T]: each token's next one; a row's last token has weight 0. weights_BT[:,
    t] is the weight of predicting token t. For `every_token`: B T tokens are whole tiles of a matrix product where B (T
    - 1) are not.
    """
    last = torch.zeros_like(weights_BT[:, :1])
    return ids_BT.roll(-1, dims=1).flatten(), torch.cat([weights_BT[:, 1:], last], dim=1).flatten()


def logits_cross_entropy(logits_ND: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """The same sum from whole logits [N, V]: for models whose head is not a plain matrix product."""
    losses = torch.nn.functional.cross_entropy(logits_ND.float(), labels_N, reduction="none")
    return (losses * weights_N).sum()
