"""Scores of a model in memory, without lm-eval: RULER's samples, and the loss on held-out text.

For many small models on one GPU. The predictions are those of `endprompt score` with the same weights and dtype: the
same tokens go in, the generation is the same (`benchmarks.scoring.generate`), and the text ends at the same places.
With float32 weights they differ only where two tokens tie, with bfloat16 now and then, as between two batch sizes.

Legend: B rows, T tokens, N = B (T - 1), D width, V vocabulary
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.scoring import generate
from benchmarks.scoring.settled import end_of
from endprompt.model.attention import PREFIX, kernels_first
from endprompt.model.length_rope import rows_alone
from endprompt.model.parity import plain_head
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 2**19  # a batch's places in the cache: about 7 GiB of memory for a model of 8 million parameters
LOGITS = 2**26  # logits that the loss holds at once

Sample = Mapping[str, Any]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_batch_tokens: int = BATCH_TOKENS,
    whole: bool = True,
    found: generate.Way | None = None,
) -> list[str]:
    """The model's text after each sample's prompt, greedy, in the samples' order. samples: as `benchmarks.ruler.cell`
    makes them; those with `input_ids` are not tokenized again. whole: answers go on when their score is settled. found:
    `generate.way(model)` if it is known. Raises ValueError if the model's frequencies are not float32."""
    check_precision(model)
    stops = generate.stop_tokens(model, tokenizer)
    jobs = []
    for sample, ids in zip(samples, prompt_ids(tokenizer, samples)):
        end = generate.never if whole else end_of(tokenizer, sample, sample.get("input", ""))
        jobs.append(generate.Job(ids, int(sample["max_new_tokens"]), end))
    texts = [""] * len(jobs)
    with scoring(model):
        for batch in generate.run(model, jobs, stops=stops, places=max_batch_tokens, found=found):
            for i, tokens in batch:
                kept = [token for token in tokens if token not in stops]
                texts[i] = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def losses(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    length: int,
    *,
    rows: int | None = None,
    max_batch_tokens: int = BATCH_TOKENS,
) -> float:
    """Mean next-token loss, nats a token, over windows of `length` tokens at positions 0 .. length - 1. Each text, as
    tokens, gives its windows one after the other, without overlap; what is left over, and shorter texts, give none.
    rows: windows at most, taken from the front. Raises ValueError if no text is long enough."""
    every = (text[start : start + length] for text in texts for start in range(0, len(text) - length + 1, length))
    windows = list(itertools.islice(every, rows))
    if not windows:
        raise ValueError(f"no held-out text has {length} tokens: {length=}, {len(texts)} texts")
    return float(position_losses(model, np.stack(windows), max_batch_tokens=max_batch_tokens).mean())


@torch.inference_mode()
def position_losses(model: PreTrainedModel, ids_BT: np.ndarray, *, max_batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Next-token loss at each position, nats, mean over the rows: float64 (T - 1,)."""
    check_precision(model)
    rows, length = ids_BT.shape
    total_T = torch.zeros(length - 1, dtype=torch.float64, device=model.device)
    head = model.get_output_embeddings() if plain_head(model) else None
    count = max(1, max_batch_tokens // length)
    with scoring(model), kernels_first(model.device):
        for start in range(0, rows, count):
            ids = torch.from_numpy(ids_BT[start : start + count].astype(np.int64)).to(model.device)
            for one_T in ids if head is None else ():
                logits_TV = model(input_ids=one_T[None], use_cache=False).logits[0, :-1]
                total_T += F.cross_entropy(logits_TV.float(), one_T[1:], reduction="none")
            if head is None:
                continue
            hidden_BTD = model.base_model(input_ids=ids, use_cache=False)[0][:, :-1]
            chunk = max(1, LOGITS // head.weight.shape[0])
            for hidden_TD, labels_T in zip(hidden_BTD, ids[:, 1:]):
                parts = zip(hidden_TD.split(chunk), labels_T.split(chunk))
                total_T += torch.cat([F.cross_entropy(head(h).float(), l, reduction="none") for h, l in parts])
    return (total_T / rows).cpu().numpy()


def loss_sum(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Sum of next-token losses, float64 scalar: what a loaded model is held to transformers' own by."""
    return torch.tensor(len(ids_BT) * position_losses(model, ids_BT.cpu().numpy()).sum())


def prompt_ids(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[Sequence[int]]:
    """Tokens of the prompts, as `benchmarks.scoring.hf` makes them."""
    if all("input_ids" in sample for sample in samples):
        return [sample["input_ids"] for sample in samples]
    return [*Reader(tokenizer).prompts([sample["input"] for sample in samples])]


def check_precision(model: PreTrainedModel) -> None:
    """Raises ValueError if the frequencies are rounded: `model.to(bfloat16)` does that, loading in bfloat16 not."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise ValueError(f"RoPE frequencies must be float32: {name} is {buffer.dtype}; load the model in its dtype")


@contextlib.contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode and with stock attention, as the model was afterwards; each row's frequencies are its own."""
    rows_alone(model)
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention.startswith(PREFIX):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if attention.startswith(PREFIX):
            model.set_attn_implementation(attention)
        model.train(training)
