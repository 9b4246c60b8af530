"""What a step does: the model with its loss, and one update of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from endprompt import distributed
from endprompt.config import ExtendConfig
from endprompt.distributed import Context, World, say, shard_starts
from endprompt.model.attention import attention_backends
from endprompt.model.parity import plain_head
from endprompt.train.experts import balance_loss
from endprompt.train.loss import linear_cross_entropy, logits_cross_entropy, next_tokens
from endprompt.train.optimizers import clip_gradients, make_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def in_parts(total: Callable[..., torch.Tensor], parts: int | list[int], *tensors: torch.Tensor) -> torch.Tensor:
    """`total` of the tensors, or [parts] of their parts along the first dimension, which are equal or cut as listed."""
    if parts == 1:
        return total(*tensors)
    return torch.stack([total(*part) for part in zip(*(tensor.tensor_split(parts) for tensor in tensors))])


class Objective(torch.nn.Module):
    """The model with its loss, so that sharded weights are whole for both."""

    def __init__(self, model: PreTrainedModel, autocast: bool, every_token: bool = False, fuse: bool = True):
        """every_token, fuse: as in `linear_cross_entropy`."""
        super().__init__()
        self.model, self.autocast = model, autocast
        self.options: dict[str, Any] = {"every_token": every_token, "fuse": fuse}
        self.plain = plain_head(model)  # tried while the model is whole: sharded it can't be
        self.balance = 0.0  # weight of the experts' loss, which is added to that of a row
        # what a row counts in the sum: the weight of a step's tokens over its rows
        self.row_weight: float | torch.Tensor = 1.0
        self.dense = False  # nearly all tokens count: those that do not are not worth looking for
        self.context: Context | None = None  # the processes that share a row; each computes the loss of its tokens
        self.sharded = False  # by FSDP2, which takes the gradients' mean over the processes

    def forward(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        weights_BT: torch.Tensor,
        hits: bool = False,
        instead: Callable[[], torch.Tensor] | None = None,
        parts: int = 1,
    ) -> torch.Tensor:
        """Weighted sum of next-token losses; weights_BT[:, t] is the weight of predicting token t, 0 for the first.
        parts: a sum for each of so many equal parts of the tokens, in their order. hits: instead the number of rows in
        which each token with a weight is the most likely one. instead: some other work with the model, whose weights
        are whole in here and nowhere else.
        """
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=self.autocast):
            if instead is not None:
                return instead()
            if hits:
                return self.hits(ids_BT, positions_BT, weights_BT)
            plain, options = self.plain, self.options
            dense = self.dense and plain and self.model.training
            every = dense or self.context is not None
            cut: int | list[int] = parts
            if every:
                labels, weights = self.next_tokens(ids_BT, weights_BT)
                options = options | {"every_token": dense or options["every_token"]}
                if self.context and parts > 1:  # of one row
                    sizes = torch.arange(ids_BT.shape[1] - 1).tensor_split(parts)
                    held, start = len(labels), len(labels) * self.context.rank
                    cut = [min(max(int(part[0]) - start, 0), held) for part in sizes[1:]]
            else:
                labels, weights = ids_BT[:, 1:].reshape(-1), weights_BT[:, 1:].reshape(-1)
            given = self.given(ids_BT, positions_BT)
            balance = bool(self.balance) and self.model.training
            if balance or getattr(self.model.config, "output_router_logits", False):
                given["output_router_logits"] = balance
            out = self.model.base_model(**given) if plain else self.model(**given)
            even: Any = 0
            if balance:
                even = balance_loss(self.model, out.router_logits, len(ids_BT)) * self.balance * self.row_weight
            if not plain:
                logits_NV = (out.logits if every else out.logits[:, :-1]).flatten(0, 1)
                return in_parts(logits_cross_entropy, cut, logits_NV, labels, weights) + even
            hidden = out[0]
            head = self.model.get_output_embeddings().weight
            hidden_ND = (hidden if every else hidden[:, :-1]).flatten(0, 1)
            options = options | {"head_sum_VD": self.head_sum()}
            losses = in_parts(
                lambda h, l, w: linear_cross_entropy(h, head, l, w, **options), cut, hidden_ND, labels, weights
            )
            return losses + even if balance else losses

    def head_sum(self) -> torch.Tensor | None:
        """The lean optimizer's sum, to which the head's gradient is added at once; None where it is passed back. It is
        that of the loss as it is given: nothing may scale the loss afterwards.
        """
        if not (self.model.training and torch.is_grad_enabled() and self.plain):
            return None
        head = self.model.get_output_embeddings().weight
        if shard_starts(head) is not None:  # whole for the forward pass it has no sum
            return None
        return getattr(head, "main_grad", None) if head.requires_grad else None

    def given(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> dict[str, Any]:
        """What the model is given of whole rows: this process's tokens."""
        mine = self.context.part if self.context else (lambda x: x)
        return {"input_ids": mine(ids_BT), "position_ids": mine(positions_BT.expand_as(ids_BT)), "use_cache": False}

    def next_tokens(self, ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`next_tokens` of this process's tokens of whole rows."""
        made = next_tokens(ids_BT, weights_BT)
        if self.context is None:
            return made
        labels, weights = (self.context.part(one.view_as(ids_BT)).flatten() for one in made)
        return labels, weights

    def hits(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
        labels_Bt, weights_Bt = (one.view(len(ids_BT), -1) for one in self.next_tokens(ids_BT, weights_BT))
        given, scored_Bt = self.given(ids_BT, positions_BT), weights_Bt > 0
        if self.plain:
            best = self.model.get_output_embeddings()(self.model.base_model(**given)[0][scored_Bt]).argmax(-1)
        else:
            best = self.model(**given).logits[scored_Bt].argmax(-1)
        wrong = torch.zeros(len(ids_BT), device=ids_BT.device)
        wrong.index_add_(0, scored_Bt.nonzero()[:, 0], (best != labels_Bt[scored_Bt]).float())
        if self.context is None:
            return (wrong == 0).float().sum()
        return (self.context.total(wrong) == 0).float().sum() / self.context.size  # each of them says it


def optimizer_of(config: ExtendConfig, model: PreTrainedModel, here: World | None = None) -> torch.optim.Optimizer:
    """The optimizer over all weights that train."""
    name = config.optimizer
    if name == "auto":
        name = "masters" if config.dtype == "bfloat16" else "adamw"
    if name == "adamw" and config.dtype == "bfloat16":
        say("WARNING: adamw on bfloat16 weights rounds to nearest and loses small updates; masters keeps them")
    return make_optimizer(
        name,
        model,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        seed=config.seed,
        recorded=config.compile.startswith("graph"),
        among=(here.rank, here.size) if here and config.shard == "moments" else (0, 1),
    )


def optimizer_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    micro: int,
    clip: float,
    processes: int,
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    weights_BT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, gradient, update of a process's rows, `micro` at once; (its share of the loss, norm before clipping)."""
    total = distributed.total(weights_BT.sum()) / (objective.context.size if objective.context else 1)
    loss = torch.zeros((), device=ids_BT.device)
    share = 1.0 / (len(ids_BT) * processes)
    objective.row_weight = share if objective.head_sum() is not None else total * share
    with attention_backends(ids_BT.device):
        for start in range(0, len(ids_BT), micro):
            part = slice(start, start + micro)
            distributed.hold(objective, more=start + micro < len(ids_BT))
            if objective.head_sum() is None:
                part_loss = objective(ids_BT[part], positions_BT[part], weights_BT[part]) / total
            else:
                part_loss = objective(ids_BT[part], positions_BT[part], weights_BT[part] / total)
            (part_loss * processes if objective.sharded else part_loss).backward()  # we want the sum
            loss += part_loss.detach()
    norm = distributed.whole(clip_gradients(optimizer, clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm
