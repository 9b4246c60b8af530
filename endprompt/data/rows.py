"""Documents to training rows. A row is a window of the flat token array (`Documents`), with positions, end prompt and a
loss weight per token; what row `index` of a run holds is a pure function of (seed, index): resume is exact.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt.config import ExtendConfig, prompt_names
from endprompt.data.documents import Documents, encoder, tokens_ending
from endprompt.positions import (
    BY_SENTENCE,
    PIECES,
    SCHEMES,
    WITH_PROMPT,
    anchor_ends,
    check_sizes,
    layout,
    sample_rng,
    stratum,
)
from endprompt.prompts import READ, Cues, PromptKind, Question, Recall, prompt_kind
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RowSpec:
    """How documents become rows.

    row_tokens: physical tokens n of a row, context and end prompt together. target: the window L. scheme: of
    endprompt.positions. prompt: the end prompt, needed by the schemes that place one. completion_weight, prompt_weight
    (of scored tokens), text_weight: as of `Documents.target_weights`; other context tokens weigh 1. bos: id or ids put
    in front of every context, None for none; a context that has them already gets no others. short: documents shorter
    than a context are dropped (`drop`, counted), joined one after the other as one text (`pack`), or several in a row,
    each with positions from 0 and an end prompt of its own (`apart`). long: longer ones become as many rows as have
    room (`split`), or their first (`truncate`, counted). order: of the units in a pass: `shuffled`, or `long-first`.
    line_ends, sentence_ends: ids of the tokens that end a line (prompt `question`, schemes BY_SENTENCE) or a sentence
    (BY_SENTENCE).
    """

    row_tokens: int
    target: int
    scheme: str
    prompt: PromptKind | None = None
    anchors: int = 4
    completion_weight: float = 1.0
    text_weight: float | None = None
    prompt_weight: float = 0.1
    bos: int | tuple[int, ...] | None = None
    short: str = "drop"
    long: str = "split"
    order: str = "shuffled"
    seed: int = 0
    line_ends: frozenset[int] = frozenset()
    sentence_ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}: scheme={self.scheme!r}")
        if (self.prompt is not None) != (self.scheme in WITH_PROMPT):
            rule = "needs an end prompt" if self.scheme in WITH_PROMPT else "takes no end prompt (prompt=none)"
            raise ValueError(f"scheme {self.scheme!r} {rule}")
        if self.short not in ("drop", "pack", "apart"):
            raise ValueError(f"short_documents must be drop, pack or apart: short_documents={self.short!r}")
        if self.long not in ("split", "truncate"):
            raise ValueError(f"long_documents must be split or truncate: long_documents={self.long!r}")
        longest = self.prompt.longest if self.prompt else 0
        if longest and longest * 2 > self.row_tokens:
            raise ValueError(
                f"the end prompt does not fit: it has {longest} tokens and must be at most half of a row of "
                f"row_tokens={self.row_tokens}"
            )
        check_sizes(self.row_tokens - longest, longest, self.target)
        if self.scheme == "anchors":
            anchor_ends(self.row_tokens - longest, longest, self.target, self.anchors)
        if self.scheme in BY_SENTENCE:
            stratum(PIECES - 1, self.target - self.row_tokens, self.scheme)
        if isinstance(self.prompt, Recall) and self.row_tokens - longest - len(self.lead) < self.prompt.span:
            raise ValueError(
                f"recall copies a span of the context, which must be as long: recall_span={self.prompt.span} "
                f"context={self.row_tokens - longest}"
            )
        for name in ("completion_weight", "prompt_weight", "text_weight"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"a loss weight must not be negative: {name}={getattr(self, name)}")

    @property
    def lead(self) -> tuple[int, ...]:
        """Ids that stand in front of every context."""
        if self.bos is None:
            return ()
        return self.bos if isinstance(self.bos, tuple) else (self.bos,)

    @property
    def least(self) -> int:
        """Tokens that a document must have to make a row of its own length."""
        longest = self.prompt.longest if self.prompt else 0
        span = self.prompt.span if isinstance(self.prompt, Recall) else 0
        return max(2, span, longest - len(self.lead))

    @property
    def needed(self) -> int:
        """Tokens that a document must have to make a row."""
        shortest = 0
        if isinstance(self.prompt, Cues):
            shortest = min(len(tokens) for tokens in self.prompt.token_lists)
        elif self.prompt is not None:
            shortest = self.prompt.longest
        return self.row_tokens - shortest - len(self.lead)


@dataclass(frozen=True)
class Batch:
    """input_ids, position_ids: int64 (B, T). weights: float32 (B, T), weight of predicting the token at that place."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    weights: np.ndarray


def stacked(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    """Rows of one length as a batch."""
    return Batch(*(np.stack(parts) for parts in zip(*rows)))


@dataclass
class Rows:
    """Row `index` of a run, for any index >= 0; each pass over the units is a new permutation of them.

    A unit is a stretch of a document with room for one row: a long document has several, one with a completion has one,
    cut at its front if need be; of `apart` it may also be several short documents. dropped: documents too short to make
    a row, and their tokens. truncated: tokens of other documents that no row can hold. padding: tokens of a pass that
    hold nothing (apart).
    """

    documents: Documents
    spec: RowSpec
    dropped: int = field(init=False)
    dropped_tokens: int = field(init=False)
    truncated_tokens: int = field(init=False)
    padding: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        spec, needed = self.spec, self.spec.needed
        if spec.short == "pack":
            with_completion = self.documents.completions < self.documents.offsets[1:]
            packed = int(np.count_nonzero(with_completion & (self.documents.lengths < needed)))
            if packed and spec.completion_weight != 1.0:
                raise ValueError(
                    f"packing joins documents and loses where a completion starts, so completion_weight must be 1: "
                    f"completion_weight={spec.completion_weight}, {packed} short documents have a completion"
                )
            front_counts = spec.text_weight in (None, 1.0)
            self.documents = pack(self.documents if front_counts else fronts_marked(self.documents), needed)
        self._starts = behind_lead(self.documents, spec.lead)
        lengths = self.documents.offsets[1:] - self._starts
        has_completion = self.documents.completions < self.documents.offsets[1:]
        least = np.full(len(lengths), needed)
        if isinstance(spec.prompt, Question):  # the end prompt is part of these documents
            least[has_completion] = spec.row_tokens - len(spec.lead)
        single = has_completion | (spec.long == "truncate")
        units = np.where(single, np.minimum(lengths // least, 1), lengths // least)
        self._packs: list[list[int]] = []
        lost = units == 0
        if spec.short == "apart":
            sizes = lengths + len(spec.lead) + (spec.prompt.longest if spec.prompt else 0)
            short = np.flatnonzero(lost & (lengths >= spec.least) & (sizes <= spec.row_tokens))
            self._packs = [short[pack].tolist() for pack in best_fit(sizes[short], spec.row_tokens)]
            self.padding = len(self._packs) * spec.row_tokens - int(sizes[short].sum())
            lost[short] = False
        self.dropped, self.dropped_tokens = int(np.count_nonzero(lost)), int(lengths[lost].sum())
        self.truncated_tokens = int((lengths - least)[single & (units == 1)].sum())
        self._document = np.repeat(np.arange(len(units)), units)
        longest = np.array([max(lengths[pack]) for pack in self._packs], dtype=np.int64)
        self._lengths = np.concatenate([lengths[self._document], longest])  # of the units
        # as arrays once, since every row looks for them
        self._line_ends = np.array(sorted(spec.line_ends), dtype=np.int64)
        self._all_ends = np.array(sorted(spec.line_ends | spec.sentence_ends), dtype=np.int64)
        first = np.repeat(np.cumsum(units) - units, units)
        self._stretch = np.arange(len(self._document)) - first
        self._permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of units: rows of one pass."""
        return len(self._document) + len(self._packs)

    @property
    def hint(self) -> str:
        """How documents that were dropped as too short could be kept, for a message."""
        return "; short_documents=pack or apart keeps them" if self.dropped and self.spec.short == "drop" else ""

    @property
    def sha256(self) -> str:
        return self.documents.sha256

    def unit(self, index: int) -> int:
        epoch, place = divmod(index, len(self))
        if epoch not in self._permutations:
            order = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.spec.seed, epoch, 1])))
            permutation = order.permutation(len(self))
            if self.spec.order == "long-first":
                permutation = permutation[np.argsort(-self._lengths[permutation], kind="stable")]
            self._permutations = {epoch: permutation, **dict(list(self._permutations.items())[:1])}
        return int(self._permutations[epoch][place])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids int64 (T,), position_ids int64 (T,), weights float32 (T,)) of one row."""
        return self.row_of(self.unit(index), sample_rng(self.spec.seed, index))

    def row_of(self, unit: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`row` of one unit, with the draws of this generator."""
        if unit >= len(self._document):
            return self._apart(self._packs[unit - len(self._document)], rng)
        spec = self.spec
        question = self._question(unit) if isinstance(spec.prompt, Question) else 0
        choice = spec.prompt.choose(rng) if spec.prompt else 0
        b = question or (spec.prompt.length(choice) if spec.prompt else 0)
        a = spec.row_tokens - b
        if spec.scheme in BY_SENTENCE:
            context, weights = self._context(unit, a + question, None, rng)
            last = a if question else a - self._question(unit)  # a question in the context stays in one piece
            # 0 and some places behind ends of sentences and lines, up to `last`; all of them if there are few
            places = np.flatnonzero(np.isin(context[: a - 1], self._all_ends)) + 1
            places = places[places <= last]
            starts = [0, *np.sort(rng.choice(places, min(PIECES - 1, len(places)), replace=False)).tolist()]
            placed = layout(spec.scheme, a, b, spec.target, rng, starts=starts)
        else:
            options = {"count": spec.anchors} if spec.scheme == "anchors" else {}
            placed = layout(spec.scheme, a, b, spec.target, rng, **options)
            context, weights = self._context(unit, a + question, placed.split, rng)
        weights[0] = 0.0  # nothing predicts the first token
        if spec.prompt is not None and not question:
            prompt = spec.prompt.build(choice, context, rng)
            context = np.concatenate([context, prompt.tokens])
            weights = np.concatenate([weights, prompt.scored.astype(np.float32) * spec.prompt_weight])
        return context, placed.position_ids, weights

    def _apart(self, pack: list[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The row of several short documents; what is left of it is one more, without loss."""
        rows = [row_alone(self.documents.one(document), self.spec, rng, self.spec.row_tokens) for document in pack]
        ids, positions, weights = (np.concatenate(parts) for parts in zip(*rows))
        rest = self.spec.row_tokens - len(ids)
        return np.pad(ids, (0, rest)), np.concatenate([positions, np.arange(rest)]), np.pad(weights, (0, rest))

    def _question(self, unit: int) -> int:
        """Tokens of the last line before a completion, and of that, at most half a row; 0 without a completion."""
        _, hi = self._span(unit)
        completion = int(self.documents.completions[self._document[unit]])
        if completion == hi:
            return 0
        most = self.spec.row_tokens // 2
        before = np.asarray(self.documents.tokens[max(hi - most, 0) : completion])
        ends = np.flatnonzero(np.isin(before, self._line_ends))
        return min(most, hi - completion + len(before) - (int(ends[-1]) + 1 if len(ends) else 0))

    def batch(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1."""
        if self.spec.scheme != "contiguous" or self.spec.lead or self._packs:
            return stacked([self.row(index) for index in range(first, first + count)])
        n = self.spec.row_tokens  # the same rows without a Python loop where a document is exactly one row long
        starts = np.array([self._start(self.unit(i), n, i) for i in range(first, first + count)])
        places = starts[:, None] + np.arange(n)
        documents = self._document[[self.unit(i) for i in range(first, first + count)]]
        loss = self.spec.completion_weight, self.spec.text_weight
        weights = self.documents.target_weights(places, documents[:, None], *loss)
        weights[:, 0] = 0.0
        ids = np.asarray(self.documents.tokens[places], dtype=np.int64)
        return Batch(ids, np.broadcast_to(np.arange(n, dtype=np.int64), ids.shape), weights)

    def _start(self, unit: int, need: int, index: int) -> int:
        lo, hi = self._span(unit)
        if hi - lo <= need:
            return hi - need
        return self._draw_start(unit, lo, hi, need, sample_rng(self.spec.seed, index))

    def _span(self, unit: int) -> tuple[int, int]:
        document = int(self._document[unit])
        return int(self._starts[document]), int(self.documents.offsets[document + 1])

    def _draw_start(self, unit: int, lo: int, hi: int, need: int, rng: np.random.Generator) -> int:
        """Start of a window of `need` tokens: to the end of a completion, else anywhere in the unit's stretch."""
        if self.documents.completions[self._document[unit]] < hi:
            return hi - need
        if self.spec.long == "truncate":
            return lo
        stretch = self.spec.needed
        return lo + min(int(self._stretch[unit]) * stretch + int(rng.integers(stretch)), hi - lo - need)

    def _context(self, unit: int, a: int, split: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64 (a,), loss weights float32 (a,)). With a split, the second chunk is from further on."""
        lo, hi = self._span(unit)
        lead = np.asarray(self.spec.lead, dtype=np.int64)
        need = a - len(lead)
        if split is None:
            start = self._draw_start(unit, lo, hi, need, rng)
            places = np.arange(start, start + need)
        else:
            # PoSE: the first chunk from the start of the stretch, the second from anywhere after it in the document;
            # how much text is skipped is drawn apart from how far the positions jump.
            head = max(split - len(lead), 0)
            lo += min(int(self._stretch[unit]) * self.spec.needed, hi - lo - need)
            skip = int(rng.integers(hi - lo - need, endpoint=True))
            if self.documents.completions[self._document[unit]] < hi:
                lo = hi - need - skip  # a completion is kept to its end
            first = np.arange(lo, lo + head)
            second = np.arange(lo + head + skip, lo + skip + need)
            places = np.concatenate([first, second])
        tokens = np.asarray(self.documents.tokens[places], dtype=np.int64)
        if len(lead) and np.array_equal(tokens[: len(lead)], lead):  # of documents that were joined before
            if places[-1] + len(lead) < hi:
                places = places + len(lead)
            else:
                places, lead = np.concatenate([places[0] - len(lead) + np.arange(len(lead)), places]), lead[:0]
            tokens = np.asarray(self.documents.tokens[places], dtype=np.int64)
        loss = self.spec.completion_weight, self.spec.text_weight
        weights = self.documents.target_weights(places, int(self._document[unit]), *loss)
        if len(lead):
            tokens = np.concatenate([lead, tokens])
            weights = np.concatenate([np.zeros(len(lead), dtype=np.float32), weights])
        return tokens, weights


def behind_lead(documents: Documents, lead: Sequence[int]) -> np.ndarray:
    """int64 (documents,): where each one starts, behind such ids in front as every context gets anyway."""
    starts, wanted = documents.offsets[:-1].copy(), np.asarray(lead, dtype=np.int64)
    open_ = np.arange(len(starts)) if len(lead) else np.zeros(0, dtype=np.int64)
    while len(open_):
        open_ = open_[starts[open_] + len(lead) <= documents.offsets[1:][open_]]
        open_ = open_[(documents.tokens[starts[open_][:, None] + np.arange(len(lead))] == wanted).all(1)]
        starts[open_] += len(lead)
    return starts


def row_alone(
    document: Documents, spec: RowSpec, rng: np.random.Generator, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row of a document that is shorter than a row: as long as it is with its end prompt, at most `most` tokens."""
    b = 0
    if spec.prompt is not None:
        choice = spec.prompt.choose(rng)
        b = spec.prompt.length(choice)
        if isinstance(spec.prompt, Cues):
            spec = dataclasses.replace(spec, prompt=Cues((spec.prompt.token_lists[choice],)))
    length = len(document.tokens) - int(behind_lead(document, spec.lead)[0])
    spec = dataclasses.replace(spec, short="drop", row_tokens=min(length + len(spec.lead) + b, most))
    rows = Rows(document, spec)
    if not len(rows):
        raise ValueError(f"it has {len(document.tokens)} tokens, and a row needs {spec.needed}: {spec.row_tokens=}")
    return rows.row_of(0, rng)


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Indices of the sizes in packs of at most `room`: the largest first, each where it leaves the least."""
    packs: list[list[int]] = []
    left: dict[int, list[int]] = {}  # packs by what is left in them
    some = 0  # bit r: a pack has r left
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = some >> size
        rest = size + (fitting & -fitting).bit_length() - 1 if fitting else room
        if fitting:
            pack = left[rest].pop()
            some &= ~(0 if left[rest] else 1 << rest)
        else:
            pack = len(packs)
            packs.append([])
        packs[pack].append(index)
        left.setdefault(rest - size, []).append(pack)
        some |= 1 << (rest - size)
    return packs


def fronts_marked(documents: Documents) -> Documents:
    """The documents with weight 0 for what stands in front of a completion, which is then told from other text."""
    weights = np.ones(len(documents.tokens), np.uint8) if documents.weights is None else documents.weights[:].copy()
    for document in np.flatnonzero(documents.completions < documents.offsets[1:]):
        weights[documents.offsets[document] : documents.completions[document]] = 0
    return dataclasses.replace(documents, weights=weights)


def pack(documents: Documents, needed: int) -> Documents:
    """The documents shorter than `needed` joined in their order into one, after all others."""
    short = documents.lengths < needed
    order = np.concatenate([np.flatnonzero(~short), np.flatnonzero(short)])
    spans = [slice(documents.offsets[i], documents.offsets[i + 1]) for i in order]
    lengths = [*documents.lengths[~short], documents.lengths[short].sum()] if short.any() else documents.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    completions = (documents.offsets[1:] - documents.completions)[~short]
    if short.any():
        completions = np.append(completions, 0)
    tokens, weights = (
        None if values is None else np.concatenate([values[:0], *(values[span] for span in spans)])
        for values in (documents.tokens, documents.weights)
    )
    assert tokens is not None
    return Documents(tokens, offsets, offsets[1:] - completions, weights)


def prefetch(make: Callable[[int], Any], steps: Iterable[int], ahead: int = 4) -> Generator[Any]:
    """`make(step)` for each step, made in a thread of its own while the device works; errors come through."""
    pool, made = ThreadPoolExecutor(1), deque[Future[Any]]()
    try:
        for step in steps:
            made.append(pool.submit(make, step))
            if len(made) > ahead:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def row_spec(config: ExtendConfig, window: int | None, tokenizer: PreTrainedTokenizerBase) -> RowSpec:
    """The rows that this configuration trains on. window: their tokens by default; None for few that fit the prompt."""
    names = prompt_names(config)
    prompt = None
    if names:
        prompt = prompt_kind(
            names, encoder(tokenizer), recall_span=config.recall_span, recall_given=config.recall_given
        )
    weight = config.prompt_weight
    if weight is None:
        weight = 1.0 if READ.keys() & names else 0.1
    begin = Reader(tokenizer).begin
    by_sentences = config.scheme in BY_SENTENCE
    return RowSpec(
        row_tokens=config.row_tokens or window or 3 * (prompt.longest if prompt else 1) + len(begin),
        target=config.target,
        scheme=config.scheme,
        prompt=prompt,
        anchors=config.anchors,
        completion_weight=config.completion_weight,
        text_weight=config.text_weight,
        prompt_weight=weight,
        bos=begin[0] if len(begin) == 1 else tuple(begin) or None,
        short=config.short_documents,
        long=config.long_documents,
        order=config.order,
        seed=config.seed,
        line_ends=tokens_ending(tokenizer, ("\n",)) if by_sentences or names == ["question"] else frozenset(),
        sentence_ends=tokens_ending(tokenizer, (".", "!", "?")) if by_sentences else frozenset(),
    )


def total_steps(config: ExtendConfig, row_tokens: int) -> int:
    if config.steps is not None:
        return config.steps
    assert config.tokens is not None
    return max(1, round(config.tokens / (config.rows * row_tokens)))
