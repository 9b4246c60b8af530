"""Scores of a model in memory, without lm-eval: RULER's samples, and the loss on held-out text.

For many small models on one GPU. The predictions are those of `endprompt score` with the same weights: the same
tokens go in, decoding is greedy, and the text ends at the same places. Prompts of about one length run together; on
CUDA a step of the decoding is recorded once a batch as a CUDA graph, since a small model is bound by kernel launches.
The model computes in the dtype that it was loaded in, as with `endprompt score --dtype`. Of those batches and kernels
the last digits of the logits depend: with float32 weights predictions differ only where two tokens tie, with bfloat16
weights now and then, as they do between two batch sizes of lm-eval.

Legend: B prompts, T tokens of the longest, S places in the key/value cache, H key/value heads, D head dim, V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from benchmarks import generate, ruler
from endprompt.graph import Replayed
from endprompt.length_rope import rows_alone
from endprompt.model import PREFIX
from endprompt.train import plain_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 2**19  # a batch's places in the cache: about 7 GiB of memory for a model of 8 million parameters
LOGITS = 2**26  # logits that the loss holds at once
ROUND = 64  # prompts are padded to a multiple, so that few shapes occur and kernels are set up once
SHORTEST = 0.8  # of a batch's longest prompt: the padding costs at most a fourth
LOOK = 4  # steps between looks at whether all rows have ended

Sample = Mapping[str, Any]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_batch_tokens: int = BATCH_TOKENS,
    new_tokens: int | None = None,
) -> list[str]:
    """The model's text after each sample's prompt, greedy, in the samples' order.

    samples: as `benchmarks.ruler` makes them; `encoded` ones are not tokenized again. new_tokens: default each sample's
    own `max_new_tokens`. Raises ValueError if the model's frequencies are not float32.
    """
    check_precision(model)
    jobs = [
        (ids, int(sample["max_new_tokens"] if new_tokens is None else new_tokens))
        for sample, ids in zip(samples, prompt_ids(tokenizer, samples))
    ]
    stops = stop_tokens(model, tokenizer)
    texts = [""] * len(jobs)
    static = fixed_steps(model)
    with scoring(model):
        for batch in batches(jobs, max_batch_tokens, ragged=static):
            prompts, longest = [jobs[i][0] for i in batch], max(jobs[i][1] for i in batch)
            if static:
                generated = greedy(model, prompts, longest, stops)
            else:
                generated = generate.greedy(model, prompts, longest, lambda tokens: tokens[-1] in stops)
            for i, tokens in zip(batch, generated):
                kept = [token for token in tokens[: jobs[i][1]] if token not in stops]
                texts[i] = str(tokenizer.decode(kept, skip_special_tokens=True))
    return texts


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    task: str | None = None,
    *,
    max_batch_tokens: int = BATCH_TOKENS,
    new_tokens: int | None = None,
) -> list[float]:
    """Percent of each sample's answers that the model gave. task: default each sample's own, so tasks can be mixed."""
    texts = predict(model, tokenizer, samples, max_batch_tokens=max_batch_tokens, new_tokens=new_tokens)
    return [
        100 * ruler.score(task or sample["task"], text.removeprefix(sample["input"]), sample["outputs"])
        for sample, text in zip(samples, texts)
    ]


@torch.inference_mode()
def losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts_or_ids: Sequence[str] | Sequence[Sequence[int]],
    length: int,
    *,
    rows: int | None = None,
    max_batch_tokens: int = BATCH_TOKENS,
) -> float:
    """Mean next-token loss, nats a token, over windows of `length` tokens at positions 0 .. length - 1.

    Each text gives its windows one after the other, without overlap; what is left over, and shorter texts, give none.
    rows: windows at most, taken from the front. Raises ValueError if no text is long enough.
    """
    check_precision(model)
    windows: list[np.ndarray] = []
    for text in texts_or_ids:
        if rows is not None and len(windows) >= rows:
            break
        ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text)
        windows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    windows = windows[:rows]
    if not windows:
        raise ValueError(f"no held-out text has {length} tokens: {length=}, {len(texts_or_ids)} texts")
    count = max(1, max_batch_tokens // length)
    total = 0.0
    with scoring(model), generate.attention_kernels(model.device):
        for start in range(0, len(windows), count):
            ids_BT = torch.from_numpy(np.stack(windows[start : start + count]).astype(np.int64)).to(model.device)
            total += float(loss_sum(model, ids_BT))
    return total / (len(windows) * (length - 1))


def loss_sum(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Sum of next-token losses, float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=ids_BT.device)
    labels_N = ids_BT[:, 1:].reshape(-1)
    if not plain_head(model):
        logits_NV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        return total + F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
    hidden_ND = model.base_model(input_ids=ids_BT, use_cache=False)[0][:, :-1].flatten(0, 1)
    head = model.get_output_embeddings()
    chunk = max(1, LOGITS // head.weight.shape[0])
    for hidden, labels in zip(hidden_ND.split(chunk), labels_N.split(chunk)):
        total += F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    return total


# -------------------------------------------------------------------------------------------------------------- tokens


def encoded(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The samples with their prompts' tokens as `input_ids`: for samples that several models answer."""
    return [
        {**sample, "input_ids": np.asarray(ids, dtype=np.int32)}
        for sample, ids in zip(samples, prompt_ids(tokenizer, samples))
    ]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[Sequence[int]]:
    """Tokens of the prompts, as lm-eval makes them: a prompt that starts with BOS does not get a second one."""
    if all("input_ids" in sample for sample in samples):
        return [sample["input_ids"] for sample in samples]
    bos = tokenizer.bos_token
    made: list[Sequence[int]] = [()] * len(samples)
    for special in (True, False):
        places = [i for i, s in enumerate(samples) if special != bool(bos and s["input"].startswith(bos))]
        if places:
            texts = [samples[i]["input"] for i in places]
            ids = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
            for i, tokens in zip(places, ids):
                made[i] = tokens
    return made


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends an answer: the generation config's EOS tokens and the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    tokens = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return frozenset(token for token in tokens if token is not None)


def batches(
    jobs: Sequence[tuple[Sequence[int], int]], max_batch_tokens: int, ragged: bool = True
) -> Iterator[list[int]]:
    """Indices of the (prompt, new tokens) that run together, falling length; one prompt may be over the limit.

    ragged: prompts of about one length share a batch, else only those of exactly one.
    """
    batch: list[int] = []
    most = 0
    for i in sorted(range(len(jobs)), key=lambda i: -len(jobs[i][0])):
        length, new = len(jobs[i][0]), jobs[i][1]
        if batch:
            longest = len(jobs[batch[0]][0])
            full = (len(batch) + 1) * (longest + max(most, new) + ROUND) > max_batch_tokens
            if full or length < (SHORTEST * longest if ragged else longest):
                yield batch
                batch, most = [], 0
        batch.append(i)
        most = max(most, new)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------- generation


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer in S places: the prompt's in the first ones, then one token at a time at `slot_1`.

    The slot is a tensor, so a recorded step writes where it points at that time.
    """

    is_sliding = False

    def __init__(self, places: int, slot_1: torch.Tensor):
        super().__init__()
        self.places, self.slot_1 = places, slot_1
        self.keys_BHSD: torch.Tensor | None = None
        self.values_BHSD: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros: places that are still empty are masked, and must not hold NaN."""
        batch, heads, _, width = key_states.shape
        self.keys_BHSD = key_states.new_zeros(batch, heads, self.places, width)
        self.values_BHSD = value_states.new_zeros(batch, heads, self.places, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys_BHSD is None or self.values_BHSD is None:
            self.lazy_initialization(key_states, value_states)
            assert self.keys_BHSD is not None and self.values_BHSD is not None
            self.keys_BHSD[:, :, : key_states.shape[2]] = key_states
            self.values_BHSD[:, :, : key_states.shape[2]] = value_states
            return key_states, value_states  # a prompt attends to itself alone
        self.keys_BHSD.index_copy_(2, self.slot_1, key_states)
        self.values_BHSD.index_copy_(2, self.slot_1, value_states)
        return self.keys_BHSD, self.values_BHSD

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked for the prompt only: later steps bring their mask

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.places


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    """Generated tokens of each prompt, at most `new_tokens`, up to and with the first that is in `stops`.

    The prompts are padded on the right: a causal prompt is not touched by what follows it. Generated tokens come after
    the padding, which a mask hides from them, at the positions that they would have without it.
    """
    device, count = model.device, len(prompts)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    longest = -(-int(lengths_B.max()) // ROUND) * ROUND
    ids_BT = np.zeros((count, longest), dtype=np.int64)
    for row, prompt in zip(ids_BT, prompts):
        row[: len(prompt)] = prompt
    places = -(-(longest + new_tokens) // ROUND) * ROUND
    slot_1 = torch.full((1,), longest, device=device)
    cache = Cache(layers=[SlotLayer(places, slot_1) for _ in range(model.config.get_text_config().num_hidden_layers)])
    lengths_B = lengths_B.to(device)
    head = model.get_output_embeddings()
    with generate.attention_kernels(device):
        hidden_BTD = model.base_model(
            input_ids=torch.from_numpy(ids_BT).to(device), past_key_values=cache, use_cache=True
        )[0]
    next_B = head(hidden_BTD[torch.arange(count, device=device), lengths_B - 1]).argmax(-1)
    del hidden_BTD

    stop_V = torch.zeros(head.weight.shape[0], dtype=torch.bool, device=device)
    stop_V[sorted(stops)] = True
    tokens_NB = torch.zeros(new_tokens, count, dtype=torch.long, device=device)
    tokens_NB[0] = next_B
    made_1 = torch.ones(1, dtype=torch.long, device=device)
    done_B = stop_V[next_B]
    positions_B1 = lengths_B[:, None].clone()
    seen_B11S = (torch.arange(places, device=device) < lengths_B[:, None])[:, None, None]

    def step() -> None:
        seen_B11S.index_fill_(3, slot_1, True)
        hidden_B1D = model.base_model(
            input_ids=next_B[:, None],
            position_ids=positions_B1,
            attention_mask=seen_B11S,
            past_key_values=cache,
            use_cache=True,
        )[0]
        next_B.copy_(head(hidden_B1D[:, 0]).argmax(-1))
        tokens_NB.index_copy_(0, made_1, next_B[None])
        done_B.logical_or_(stop_V[next_B])
        for counter in (slot_1, made_1, positions_B1):
            counter.add_(1)

    run = Replayed(step, device, warm=1)
    for made in range(1, new_tokens):
        if made % LOOK == 1 and bool(done_B.all()):
            break
        run()
    answers = []
    for tokens in tokens_NB[: int(made_1)].T.tolist():
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens) - 1)
        answers.append(tokens[: end + 1])
    return answers


def fixed_steps(model: PreTrainedModel) -> bool:
    """Whether every step does the same work on tensors of the same shapes.

    Not with sliding windows, logits that are more than a matrix product, or frequencies chosen by the positions.
    """
    kind = model.config.get_text_config().rope_parameters.get("rope_type")
    return generate.takes_ragged(model.config) and plain_head(model) and kind not in ("dynamic", "longrope")


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
