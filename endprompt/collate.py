"""The position schemes in another trainer: a collator that lays rows out, and a model that attends over them.

    model = prepare_model(AutoModelForCausalLM.from_pretrained(base), scaling="yarn", target=65536)
    collator = PositionalCollator(tokenizer, scheme="endprompt", target=65536, prompt="EP_1")
    Trainer(model, args, data_collator=collator, train_dataset=dataset)     # transformers, TRL's SFTTrainer, a loop

transformers takes a jump in the positions for the border of a packed document: without a mask, tokens behind the jump
do not see those in front of it, and nothing says so. `prepare_model` gives the model an attention that is causal by the
order of the row alone, and refuses what it would get wrong; the collator's mask does for torch's stock attentions.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from endprompt.config import ExtendConfig, check_apart_scaling, check_values
from endprompt.data import Documents, Rows, RowSpec, row_spec
from endprompt.data.rows import row_alone
from endprompt.model import extended_config, length_rope, training_attention
from endprompt.model.attention import attention_for, mask_by_position
from endprompt.model.geometry import check_frequencies, window_of
from endprompt.model.packed import apart_attention
from endprompt.model.parity import check_forward
from endprompt.positions import sample_rng
from endprompt.train.loss import logits_cross_entropy
from endprompt.train.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # label of a token that carries no loss, in transformers and torch


class PositionalCollator:
    """Samples to a batch whose rows have a scheme's positions and its end prompt.

    A sample is a mapping with `input_ids`, and may have `labels` (-100 for what carries no loss, else the ids) and
    `index`. Its row is what `endprompt extend` makes of the document with the same seed and row index, a pure function
    of the two: the context, cut to a window of it if the document is longer than a row, and the end prompt. Shorter
    documents stay whole; rows are padded on the right to the longest of the batch. Without an `index` it is drawn from
    torch's own generator, as a Trainer's shuffling is. A sample may be several documents, as its `seq_lengths` (TRL's
    `pack_dataset`) or `position_ids` that begin anew at 0 say: each is laid out by itself with an end prompt of its
    own, as by `short_documents=apart`, for a model of prepare_model(packed=True).

    tokenizer: its ids, its BOS in front of a row, and what pads (its own pad token, else EOS). scheme, target (tokens),
    prompt, and options (anchors, recall_span, recall_given, seed): as of `endprompt extend`. row_tokens: most tokens of
    a row, the end prompt included; default the length of each document with its prompt. prompt_weight: loss weight of
    the end prompt's scored tokens. weights: give `loss_weights`, float32 (B, T), for which a transformers Trainer needs
    `WeightedSteps` and which TRL's SFTTrainer, with a loss of its own, does not take; without them labels say the
    weights 0 and 1 alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        scheme: str,
        target: int,
        prompt: str | list[str] | None = None,
        row_tokens: int | None = None,
        prompt_weight: float = 1.0,
        weights: bool = False,
        **options: Any,
    ):
        """Raises ValueError naming key, value and rule for what no row could be made by."""
        if unknown := sorted(set(options) - {"anchors", "recall_span", "recall_given", "seed"}):
            raise ValueError(f"PositionalCollator has no setting {unknown[0]!r}")
        if not weights and prompt_weight not in (0, 1):
            raise ValueError(
                f"labels alone have no weights, so prompt_weight must be 0 or 1, or weights=True: {prompt_weight=}"
            )
        config = ExtendConfig(
            target=target, scheme=scheme, prompt=prompt, row_tokens=row_tokens, prompt_weight=prompt_weight, **options
        )
        check_values(config)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self.pad is None:
            raise ValueError("the tokenizer has neither a pad token nor EOS, one of which pads rows: pad_token=None")
        self.row_tokens, self.weights = row_tokens, weights
        self.spec: RowSpec = row_spec(config, None, tokenizer)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, position_ids, labels, attention_mask: int64 (B, T); with `weights` also loss_weights: float32.
        labels are not shifted; loss_weights[b, t] is the weight of predicting token t, as labels[b, t] is. Raises
        ValueError for a sample that makes no row.
        """
        rows = [self.row(sample) for sample in samples]
        longest = max(len(ids) for ids, _, _ in rows)
        parts: list[list[np.ndarray]] = [[], [], [], []]
        for ids, positions, weights in rows:
            more = (0, longest - len(ids))
            real = np.pad(np.ones(len(ids), dtype=np.int64), more)
            parts[0].append(np.pad(ids, more, constant_values=self.pad))
            parts[1].append(np.pad(positions, more, mode="edge"))  # none that the row itself does not reach
            parts[2].append(np.pad(weights, more))
            parts[3].append(real)
        ids_BT, positions_BT, weights_BT, real_BT = (torch.from_numpy(np.stack(part)) for part in parts)
        if not bool(weights_BT.any()):
            raise ValueError("no token of this batch carries loss: all labels are -100, and prompt_weight is 0")
        batch = {
            "input_ids": ids_BT,
            "position_ids": positions_BT,
            "labels": ids_BT.masked_fill(weights_BT == 0, IGNORED),
            "attention_mask": real_BT,
        }
        return batch | ({"loss_weights": weights_BT} if self.weights else {})

    def row(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids int64 (T,), position_ids int64 (T,), weights float32 (T,)) of one sample's row."""
        document, index = self._document(sample), sample.get("index")
        name = "a sample" if index is None else f"sample {index}"
        index = int(torch.randint(2**62, ())) if index is None else int(index)
        rng, spec = sample_rng(self.spec.seed, index), self.spec
        length = len(document.tokens)
        try:
            if len(document) > 1:
                parts = [
                    row_alone(document.one(i), spec, rng, self.row_tokens or spec.target) for i in range(len(document))
                ]
                ids, positions, weights = (np.concatenate(part) for part in zip(*parts))
                if self.row_tokens is not None and len(ids) > self.row_tokens:
                    raise ValueError(
                        f"its documents and their end prompts take {len(ids)}: row_tokens={self.row_tokens}"
                    )
                return ids, positions, weights
            if self.row_tokens is None or length < spec.needed:
                return row_alone(document, spec, rng, self.row_tokens or spec.target)
            rows = Rows(document, spec)
            unit = int(sample_rng(spec.seed, index).spawn(1)[0].integers(len(rows)))
            return rows.row_of(unit, rng)
        except ValueError as error:
            packed = f", {len(document)} documents packed," if len(document) > 1 else ""
            raise ValueError(
                f"{name} of {length} tokens{packed} makes no row of scheme {spec.scheme!r}: {error}"
            ) from None

    def _document(self, sample: Mapping[str, Any]) -> Documents:
        if "input_ids" not in sample:
            raise ValueError(f"a sample must have input_ids, it has {', '.join(sample) or 'nothing'}")
        tokens = np.asarray(sample["input_ids"], dtype=np.int64)
        if tokens.ndim != 1:
            raise ValueError(f"a sample's input_ids must be a list of ids: shape={tokens.shape}")
        if (mask := sample.get("attention_mask")) is not None and not np.asarray(mask).all():
            raise ValueError("a sample must not be padded, the collator pads rows: its attention_mask has zeros")
        offsets, weights = _borders(sample, len(tokens), self.spec.scheme), None
        completions = offsets[1:].copy()
        if (labels := sample.get("labels")) is not None:
            labels = np.asarray(labels, dtype=np.int64)
            scored = labels != IGNORED
            if len(labels) != len(tokens) or not np.array_equal(labels[scored], tokens[scored]):
                raise ValueError("labels must be the sample's input_ids, or -100 where no loss is wanted")
            weights = scored.astype(np.uint8)
            for document, (first, end) in enumerate(itertools.pairwise(offsets)):
                marks = scored[first:end]  # what is scored last is kept to its end, as a completion is
                if marks.any() and not marks.all() and not marks[: (last := int(np.flatnonzero(marks)[-1])) + 1].all():
                    completions[document] = first + last - int(np.argmin(marks[last::-1])) + 1
        return Documents(tokens, offsets, completions, weights)


def _borders(sample: Mapping[str, Any], length: int, scheme: str) -> np.ndarray:
    """Where each document of a sample begins, and the end of the last."""
    lengths, positions = sample.get("seq_lengths"), sample.get("position_ids")
    if sample.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "a sample says how it is packed by seq_lengths, not by cu_seq_lens_q (padding_free must be off)"
        )
    starts = np.cumsum([0, *([length] if lengths is None else lengths)])[:-1]
    if positions is not None and lengths is None:
        starts = np.flatnonzero(np.asarray(positions) == 0)
    sizes = np.diff([*starts, length])
    whole = len(starts) > 0 and starts[0] == 0 and (sizes > 0).all() and (lengths is None or sum(lengths) == length)
    if not whole and length:
        raise ValueError(
            f"seq_lengths must be above 0 and add up to the sample's {length} tokens: seq_lengths={lengths}"
        )
    if positions is not None and not np.array_equal(positions, np.arange(length) - np.repeat(starts, sizes)):
        raise ValueError(
            f"scheme {scheme!r} gives a row's tokens their positions, so a sample brings none of its own: its "
            "position_ids must count up from 0 in each document"
        )
    return np.array([*starts, length])


class WeightedSteps:
    """Put before a transformers Trainer, which then takes `loss_weights`: class MyTrainer(WeightedSteps, Trainer).

    A step's loss is then the sum of weighted losses by the total weight of the whole step, over micro-batches and
    processes, as in `endprompt extend`; the Trainer alone would divide by the number of labels.
    """

    def get_batch_samples(self: Any, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if batches and "loss_weights" in batches[0]:
            total = sum(batch["loss_weights"][:, 1:].sum() for batch in batches).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total).sum()
            for batch in batches:
                batch["weight_total"] = total
        return batches, count


def prepare_model(
    model: PreTrainedModel,
    scaling: str,
    target: int,
    *,
    factor: float | None = None,
    window: int | None = None,
    attention: str = "sdpa",
    rope_options: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> PreTrainedModel:
    """Set a loaded model, in place, to train at positions up to `target`; returns it. Call it before the Trainer, or
    PEFT, wraps the model.

    Its config gets the new window and the whole `rope_parameters`, its RoPE modules the frequencies, its attention is
    causal by the order of the row whatever the positions are, and its loss takes `loss_weights`. `save_pretrained` then
    writes a standard checkpoint with stock attention, which `endprompt score` and `verify` take.

    scaling, target, factor, window, attention, rope_options: as of `endprompt extend`. packed: a row may be of several
    documents, which begin at position 0 and attend within themselves, by attentions and scalings that
    `short_documents=apart` takes. Raises ValueError for what `endprompt extend` refuses; a batch that the attention
    would get wrong (padding on the left, packed rows, weights that no loss reads) is refused as it comes.
    """
    if getattr(model, "peft_config", None):
        raise ValueError("prepare_model takes the plain model: call it before get_peft_model")
    before = model.config
    now = window_of(before, window).window
    config = extended_config(before, scaling, target, factor, window=now, **(rope_options or {}))
    if packed:
        check_apart_scaling(scaling, "packed=True")
    name = attention_for(config, apart_attention(attention) if packed else training_attention(attention))
    _rebuild(model, config)
    model.set_attn_implementation(name)
    mask_by_position(model)
    check_frequencies(model)
    length_rope.rows_alone(model)
    check_forward(Objective(model, autocast=False))
    model.loss_function = weighted_loss
    model.base_model.register_forward_pre_hook(
        functools.partial(_check_batch, packed), with_kwargs=True, prepend=True
    )  # sees the batch's own mask
    model.base_model.register_forward_hook(_expect_weights, with_kwargs=True)
    return model


def _rebuild(model: PreTrainedModel, config: Any) -> None:
    """Give the model, in place, the RoPE modules, numbers and names that transformers builds of `config`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=model.dtype)
    if type(fresh) is not type(model):
        raise ValueError(f"prepare_model takes a causal language model of transformers: {type(model).__name__}")
    vars(model.config).update(vars(config))
    new = dict(fresh.named_modules())
    for path, module in list(model.named_modules()):
        if any(key.endswith("inv_freq") for key, _ in module.named_buffers(recurse=False)):
            made = new[path].to(next(model.parameters()).device)
            made.config = model.config
            model.set_submodule(path, made)
            continue
        for key, value in vars(new[path]).items():
            if isinstance(value, (bool, int, float, str)) and key != "training" and not key.startswith("_"):
                setattr(module, key, value)


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    loss_weights: torch.Tensor | None = None,
    weight_total: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' loss; with `loss_weights` (B, T) weighted, by weight_total (of a whole step) or this batch's."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if loss_weights is None:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **kwargs)
    if weight_total is None and num_items_in_batch is not None:
        raise ValueError(
            "a Trainer divides by the number of labels, where loss_weights need their total: put "
            "endprompt.collate.WeightedSteps before it (class MyTrainer(WeightedSteps, Trainer))"
        )
    loss_weights._read = True  # type: ignore[attr-defined]
    weights = loss_weights[:, 1:].to(logits.device)
    total = weights.sum() if weight_total is None else weight_total.to(logits.device)
    return logits_cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten(), weights.flatten()
    ) / (total)


def _check_batch(
    packed: bool, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Refuse what a causal-only attention would get wrong without a word. It is given no mask, and no cache to fill."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
            raise ValueError("the rows are padded on the left; this attention takes padding on the right only")
        kwargs = kwargs | {"attention_mask": None}
    if positions is not None and positions.ndim == 2:
        back = (positions.diff(dim=-1) < 0) & ((positions[:, 1:] != 0) | (not packed))
        if bool(back.any()):
            raise ValueError(
                "position_ids go back, as in rows packed of several documents, and this attention would not keep these "
                "apart: turn packing off, or prepare_model(packed=True), for which each document begins at position 0"
            )
    return args, kwargs | ({"use_cache": False} if module.training else {})


def _expect_weights(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Weights that no loss has read by the backward pass were left out by a trainer with a loss of its own."""
    weights, hidden = kwargs.get("loss_weights"), out[0]
    if weights is not None and hidden.requires_grad:
        weights._read = False
        hidden.register_hook(functools.partial(_check_read, weights))


def _check_read(weights: torch.Tensor, gradient: torch.Tensor) -> None:
    if not getattr(weights, "_read", False):
        raise ValueError(
            "this trainer's loss does not read loss_weights (TRL's SFTTrainer has a loss of its own): make the "
            "collator with weights=False"
        )
