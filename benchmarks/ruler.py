"""RULER's 13 tasks at any length: prompts that fit a token budget exactly, seeded per task, length and sample.

Hsieh et al. 2024, arXiv:2404.06654. A sample is drawn (keys, values, order) without regard to the tokenizer, then its
haystack is grown to the largest size at which prompt + generation fits the budget. Sizes follow from token counts of
the haystack's units, and the tokens around it from those of words, all measured once in their surroundings. Whether
counts add up is checked on whole prompts; where they do not, every prompt is tokenized and the size searched for. Where
prompts are few and short, the result is tokenized for every one. A prompt never exceeds its budget.

    budget (length) = BOS + chat template + prompt + answer prefix + tokens kept for generation

Importing this module loads none of lm_eval, datasets, wonderwords, torch.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import hashlib
import itertools
import math
import operator
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import chat
from benchmarks import haystack as texts
from endprompt.rows import remembered_sha256
from endprompt.text import Reader

# Part of every random stream and cache key: a change of generated text changes it.
GENERATOR = "ruler-1"
# RULER's needle depths in an essay haystack, percent.
DEPTHS = tuple(int(d) for d in np.round(np.linspace(0, 100, num=40)))
VT_HOPS = 4
VT_EXAMPLE_TOKENS = 500  # RULER's size of the worked example of variable tracking
CWE_COMMON = 10
FWE_ALPHA = 2.0
FWE_LETTERS = 6
# Every prompt of a cell of at most this many tokens is tokenized whole; a larger one relies on sums that were checked
# on this many whole prompts, on more prompts with the smallest haystack, and on documents of a library.
EXACT_TOKENS = 1_000_000
CHECKED_SAMPLES = 4
CHECKED_PROMPTS = 64
CHECKED_DOCUMENTS = 512
# Texts that are split at once: their words are as many objects.
TEXTS_AT_ONCE = 256
SEARCH_STEPS = 20
# Words kept on each side of a needle when the inside of an essay is summed and not tokenized.
RIM = 8


@dataclass(frozen=True)
class Spec:
    """One of RULER's tasks. `metric` is "all" (share of the answers found) or "any" (1 if one is found)."""

    family: str
    haystack: str = ""
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    dataset: str = ""
    metric: str = "all"


SPECS = {
    "niah_single_1": Spec("niah", "noise"),
    "niah_single_2": Spec("niah", "essay"),
    "niah_single_3": Spec("niah", "essay", value="uuids"),
    "niah_multikey_1": Spec("niah", "essay", keys=4),
    "niah_multikey_2": Spec("niah", "needle"),
    "niah_multikey_3": Spec("niah", "needle", key="uuids", value="uuids"),
    "niah_multivalue": Spec("niah", "essay", values=4),
    "niah_multiquery": Spec("niah", "essay", keys=4, queries=4),
    "vt": Spec("vt", "noise"),
    "cwe": Spec("cwe", "words"),
    "fwe": Spec("fwe", "coded words"),
    "qa_1": Spec("qa", "documents", dataset="squad", metric="any"),
    "qa_2": Spec("qa", "documents", dataset="hotpotqa", metric="any"),
}
TASKS = tuple(SPECS)


@dataclass(frozen=True)
class Options:
    """What may be set beyond RULER's own values; each is part of the cache key and of the result row.

    Args:
        max_new_tokens: tokens kept for generation; RULER's own number if None.
        haystack_text: text file for the essay haystack, instead of RULER's essays or the project's sample.
        chat: wrap the prompt in the tokenizer's chat template (the answer prefix follows it).
        shots: worked examples in front of vt and cwe, 0 or 1 (RULER: 1).
        hops: assignments after the first one in a chain of vt (RULER: 4).
        date: day that a chat template which reads one is given, YYYY-MM-DD; today if None.
        template_args: further arguments of the chat template, NAME=VALUE,NAME=VALUE.
        edition: state of RULER's tasks, one of `haystack.EDITIONS`.
        chat_layout: of chats: "one-turn" (the worked example and the question in one turn, no space in front of the
            answer prefix) or "ruler" (its own scripts': cwe's example is a turn of its own, the space is kept); the
            edition's if None.
    """

    max_new_tokens: int | None = None
    haystack_text: str | None = None
    chat: bool = False
    shots: int = 1
    hops: int = VT_HOPS
    date: str | None = None
    template_args: str = ""
    edition: str = texts.DEFAULT_EDITION
    chat_layout: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1: {self.max_new_tokens}")
        if self.shots not in (0, 1):
            raise ValueError(f"shots must be 0 or 1: {self.shots}")
        if self.hops < 1:
            raise ValueError(f"hops must be at least 1: {self.hops}")
        if self.date is not None:
            chat.parse_day(self.date)
        if self.template_args and not self.chat:
            raise ValueError(f"template_args are for a chat template: they need chat: {self.template_args!r}")
        chat.parse_arguments(self.template_args)

    def dated(self, tokenizer: Any) -> Options:
        """With the day that prompts are made for: None where no template reads it."""
        day = None
        if self.chat:
            day = chat.day_read(tokenizer, self.date, self.template_args, lambda: chat.today(tokenizer))
        return dataclasses.replace(self, date=day)
        if self.edition not in texts.EDITIONS:
            raise ValueError(f"edition must be one of {', '.join(texts.EDITIONS)}: {self.edition!r}")
        if self.chat_layout not in (None, *LAYOUTS):
            raise ValueError(f"chat_layout must be one of {', '.join(LAYOUTS)}: {self.chat_layout!r}")
        if self.rules.replayed and not self.shots:
            raise ValueError(
                f"shots must be 1 with edition {self.edition}, whose samples are RULER's own: {self.shots}"
            )

    @property
    def rules(self) -> texts.Edition:
        return texts.EDITIONS[self.edition]

    @property
    def layout(self) -> str | None:
        """The chat layout in use; None without a chat template."""
        return (self.chat_layout or self.rules.layout) if self.chat else None


LAYOUTS = ("one-turn", "ruler")
DEFAULTS = Options()


def check_task(task: str) -> None:
    if task not in SPECS:
        near = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"tasks: {', '.join(TASKS)}"
        raise ValueError(f"unknown RULER task {task!r}; {hint}")


def reserve(task: str, options: Options = DEFAULTS) -> int:
    """Tokens kept for generation."""
    return options.max_new_tokens or texts.wording(SPECS[task].family).reserve


# ---------------------------------------------------------------------------------------------------------- samples


def build_samples(
    task: str,
    length: int,
    tokenizer: Any,
    n: int = 500,
    seed: int = 0,
    data_dir: str | Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """n samples of a RULER task whose prompt and generation fill `length` tokens, never more.

    Keys of a sample: `input` (all that the model is given, the answer prefix included), `outputs`, `length` (tokens of
    the input as the model receives it, BOS included), `max_new_tokens`, `budget` (the length asked for), `fill` (share
    of the budget used), `depth` (percent of the context in front of each answer's needle; empty where there is no
    needle), `haystack`, `haystack_sha256`, `task`, `index`, `seed`. `options` are those of `Options`.

    Raises ValueError for an unknown task, a length too short for it (naming the shortest), missing data.
    """
    return list(Cell.build(task, length, tokenizer, n, seed, data_dir, Options(**options)))


class Draft(Protocol):
    """One sample before its haystack has a size."""

    outputs: list[str]

    def fill(self, room: int) -> tuple[Any, int]:
        """State (JSON) of the largest haystack of at most `room` tokens above the empty one, and its tokens."""

    def render(self, state: Any) -> tuple[str, ...]:
        """(prompt up to the end of the question, answer prefix); an example with its answer may stand in front."""

    def answers(self, state: Any) -> list[str]:
        return list(self.outputs)

    def depth(self, state: Any) -> list[float]:
        """Percent of the context in front of the needle of each output."""

    def cut(self, state: Any) -> tuple[tuple[str, ...] | None, int]:
        """(the rendered prompt less the inner parts of the haystack, their tokens).

        None for the prompt: the smallest haystack's, to which the tokens that `fill` gave are added.
        """

    def core(self) -> tuple[tuple[str, ...], int]:
        """(a prompt, tokens to add): together the size of the smallest haystack's prompt."""
        return self.render(self.empty), 0

    empty: Any  # state of the smallest haystack


class Cell(Sequence[dict[str, Any]]):
    """The samples of one (task, length, seed), rendered when they are read: a cell of 500 x 128K tokens stays small."""

    def __init__(self, recipe: dict[str, Any], tokenizer: Any, data_dir: str | Path | None):
        self.recipe = recipe
        self.options = Options(**recipe["options"])
        self._tokenizer, self._data_dir = tokenizer, data_dir
        self._assemble = assembler(tokenizer, self.options)
        self._drafts: list[Draft] = []  # of a cell that was just built

    @functools.cached_property
    def _source(self) -> Source:
        """Its data are read when the first sample is."""
        recipe = self.recipe
        return source(recipe["task"], recipe["length"], self._tokenizer, recipe["seed"], self._data_dir, self.options)

    @classmethod
    def build(
        cls,
        task: str,
        length: int,
        tokenizer: Any,
        n: int,
        seed: int,
        data_dir: str | Path | None = None,
        options: Options = DEFAULTS,
    ) -> Cell:
        check_task(task)
        if n < 1:
            raise ValueError(f"samples must be at least 1: {n}")
        options, kept = options.dated(tokenizer), reserve(task, options)
        with texts.no_collection():
            made = source(task, length, tokenizer, seed, data_dir, options)
            drafts = [made.draw(i) for i in range(n)]
            states = made.fitted(drafts, kept)
        recipe = {
            "generator": GENERATOR,
            "task": task,
            "length": length,
            "seed": seed,
            "options": dataclasses.asdict(options),
            "max_new_tokens": kept,
            "haystack": made.haystack,
            "haystack_sha256": made.haystack_sha256,
            "questions": made.questions,
            "samples": states,
        }
        built = cls(recipe, tokenizer, data_dir)
        built._drafts = drafts
        return built

    def __len__(self) -> int:
        return len(self.recipe["samples"])

    def describe(self) -> None:
        """Adds to the recipe what takes all prompts to know: their characters, their hashes, one hash of all."""
        digest, characters, prompts = hashlib.sha256(), 0, []
        with texts.no_collection():
            for sample in self:
                characters += len(sample["input"])
                prompts.append(text_sha256(sample["input"]))
                digest_sample(digest, sample)
        self._drafts = []  # a cell that is kept stays small
        self.recipe |= {"characters": characters, "samples_sha256": digest.hexdigest(), "prompts": prompts}

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.sample(index, whole=True)

    def sample(self, index: int, whole: bool) -> dict[str, Any]:
        """A sample; without its `input`, which takes the most time to make, if it is not wanted whole."""
        state, tokens = self.recipe["samples"][index]
        recipe = self.recipe
        index %= len(self)
        draft = self._drafts[index] if self._drafts else self._source.draw(index)
        kept, length = recipe["max_new_tokens"], recipe["length"]
        return {
            "task": recipe["task"],
            "index": index,
            "seed": recipe["seed"],
            **({"input": self._assemble(*draft.render(state))} if whole else {}),
            "outputs": draft.answers(state),
            "length": tokens,
            "max_new_tokens": kept,
            "budget": length,
            "fill": (tokens + kept) / length,
            "depth": draft.depth(state),
            "haystack": recipe["haystack"],
            "haystack_sha256": recipe["haystack_sha256"],
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def samples_sha256(samples: Sequence[dict[str, Any]]) -> str:
    """One hash over every prompt and its answers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest_sample(digest, sample)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_sample(digest: Any, sample: dict[str, Any]) -> None:
    for text in (sample["input"], *sample["outputs"]):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)


# ---------------------------------------------------------------------------------------------------- token counting

Count = Callable[[Sequence[str]], list[int]]
Assemble = Callable[..., str]


def counter(tokenizer: Any) -> Count:
    """Token counts of texts as a model receives them: BOS once, even where the chat template writes it."""
    reader = Reader(tokenizer)  # also resets a truncation that tokenizer.json may carry
    backend = getattr(tokenizer, "backend_tokenizer", None)
    probe = "One of the words: 1234."
    if backend is not None and backend.encode(probe, add_special_tokens=False).ids != reader.ids([probe])[0]:
        backend = None

    def count(batch: Sequence[str]) -> list[int]:
        if backend is None:
            return [len(ids) for ids in reader.prompts(batch)]
        encoded = backend.encode_batch_fast(list(batch), add_special_tokens=False)
        if not reader.begin:
            return [len(item) for item in encoded]
        return [len(item) + len(reader.lead(item.ids)) for item in encoded]

    return count


def assembler(tokenizer: Any, options: Options = DEFAULTS) -> Assemble:
    """Joins what a draft renders: questions and the text behind each, of which the last is the answer prefix.

    Chat layout "one-turn" puts all but the prefix into one turn of the user's, and the prefix starts the assistant's;
    "ruler" makes a turn of each question and keeps the prefix's leading space.
    """
    if not options.chat:
        return lambda *parts: "".join(parts)
    render = chat.renderer(tokenizer, options.date, options.template_args)
    bos = getattr(tokenizer, "bos_token", None) or ""

    def wrap(question: str) -> str:
        return render([{"role": "user", "content": question}], add_generation_prompt=True)

    if options.layout == "one-turn":
        return lambda *parts: wrap("".join(parts[:-1])) + parts[-1].lstrip()

    def turns(*parts: str) -> str:
        first, *others = [wrap(question) + answer for question, answer in zip(parts[::2], parts[1::2])]
        return first + "".join(other.removeprefix(bos) for other in others)

    return turns


class Costs:
    """Tokens that a piece adds between its neighbours: count(left + piece + right) - count(left + right)."""

    def __init__(self, tokenizer: Any):
        self.count = counter(tokenizer)
        self._words = measured_words(tokenizer, len(tokenizer))

    def of(self, pieces: Sequence[str], left: str, right: str) -> np.ndarray:
        """int64 [pieces]"""
        if not pieces:
            return np.zeros(0, dtype=np.int64)
        bare, *whole = self.count([left + right, *(left + piece + right for piece in pieces)])
        return np.array(whole, dtype=np.int64) - bare

    def words(self, words: Sequence[str]) -> list[int]:
        """Tokens of each word with the space in front of it, in running text; a word is measured once."""
        known = self._words
        new = list(set(words).difference(known))
        known.update(zip(new, self.of([" " + word for word in new], "a", " a").tolist()))
        return list(map(known.__getitem__, words))

    def texts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of texts as a model receives them, as sums over their words where they fall into words."""
        parts = [self._texts(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
        return list(itertools.chain.from_iterable(parts))

    def _texts(self, texts: Sequence[str]) -> list[int]:
        split = [spaced(text) for text in texts]
        inner = iter(self.words(list(itertools.chain.from_iterable(words[1:-1] for words in split))))
        sums = [sum(itertools.islice(inner, len(words) - 2)) if words else 0 for words in split]
        # What is left of a text is its first and last word, and for most texts of a task they are the same.
        ends = [f"{words[0]} {words[-1]}" if words else text for words, text in zip(split, texts)]
        distinct = list(dict.fromkeys(ends))
        tokens = dict(zip(distinct, self.count(distinct)))
        return [total + tokens[end] for total, end in zip(sums, ends)]


@functools.lru_cache(maxsize=4)
def measured_words(tokenizer: Any, entries: int) -> dict[str, int]:
    """Place of the tokens of words, shared by all cells of a tokenizer; one that has grown starts anew."""
    return {}


def spaced(text: str) -> list[str]:
    """The words of a text between its spaces, three at least; none if white space stands in front of a space."""
    words = text.split(" ") if "  " not in text and "\n " not in text else []
    return words if len(words) > 2 else []


def word_counter(costs: Costs, count: Count, prompts: Sequence[str]) -> Count:
    """Counts by words if that is right for CHECKED_PROMPTS of the prompts, spread evenly; else `count`."""
    some = prompts[:: max(1, len(prompts) // CHECKED_PROMPTS)]
    return costs.texts if costs.texts(some) == count(some) else count


def fit(
    length: int, made: Source, drafts: Sequence[Draft], kept: int, count: Count, assemble: Assemble
) -> list[tuple[Any, int]]:
    """(state, prompt tokens) of the fullest haystack of each sample within length - kept tokens.

    Raises ValueError naming the shortest possible length if the smallest haystack does not fit.
    """

    def measure(drafts: Sequence[Draft], states: Sequence[Any]) -> list[int]:
        return count([assemble(*draft.render(state)) for draft, state in zip(drafts, states)])

    room, n = length - kept, len(drafts)
    exact = n * length <= EXACT_TOKENS
    if room > 0:
        made.prepare(drafts, room)
    first = drafts if exact else drafts[:CHECKED_SAMPLES]
    smallest = measure(first, [draft.empty for draft in first])
    if max(smallest) > room:
        raise too_short(made, n, kept, max(smallest) + kept, measure)
    cores = [draft.core() for draft in drafts]
    prompts = [assemble(*prompt) for prompt, _ in cores]
    by_words = word_counter(made.costs, count, prompts)
    bare = [tokens + left for tokens, (_, left) in zip(by_words(prompts), cores)]
    sums = functools.partial(summed, count=by_words, assemble=assemble)
    checked, errors = foretold(first, smallest, bare[: len(first)], room, measure, sums)
    if exact:
        return checked
    if len(errors) > 1:
        smallest = measure(drafts, [draft.empty for draft in drafts])
        if max(smallest) > room:
            raise too_short(made, n, kept, max(smallest) + kept, measure)
        return search(drafts, smallest, room, measure)
    # On every checked prompt the sums are right, or off by the same constant: trust them.
    fitted = arithmetic(drafts[CHECKED_SAMPLES:], bare[CHECKED_SAMPLES:], room, errors.pop(), sums)
    if (most := max((tokens for _, tokens in fitted), default=0)) > room:
        raise too_short(made, n, kept, most + kept, measure)
    return checked + fitted


def too_short(made: Source, n: int, kept: int, candidate: int, measure: Callable[..., list[int]]) -> ValueError:
    return ValueError(
        f"length is too short for task {made.task}: {made.length}; the shortest possible is "
        f"{shortest(made, n, kept, candidate, measure)} with this tokenizer and {kept} tokens kept for generation"
    )


def shortest(made: Source, n: int, kept: int, candidate: int, measure: Callable[..., list[int]]) -> int:
    """A length at which every sample fits, close above the smallest haystack (samples differ from length to length)."""
    while True:
        source = dataclasses.replace(made, length=candidate)
        drafts = [source.draw(i) for i in range(n)]
        needed = max(measure(drafts, [draft.empty for draft in drafts])) + kept
        if needed <= candidate:
            return candidate
        candidate = needed


Sums = Callable[[Sequence["Draft"], Sequence[int], Sequence[Any]], list[int]]


def summed(
    drafts: Sequence[Draft], bare: Sequence[int], states: Sequence[Any], count: Count, assemble: Assemble
) -> list[int]:
    """Prompt tokens by arithmetic: of the prompt with the inner parts of its haystack cut out, plus theirs.

    `bare` are the tokens of each draft's smallest prompt.
    """
    cut = [draft.cut(state) for draft, state in zip(drafts, states)]
    measured = iter(count([assemble(*prompt) for prompt, _ in cut if prompt is not None]))
    return [removed + (empty if prompt is None else next(measured)) for (prompt, removed), empty in zip(cut, bare)]


def foretold(
    drafts: Sequence[Draft],
    smallest: Sequence[int],
    bare: Sequence[int],
    room: int,
    measure: Callable[..., list[int]],
    sums: Sums,
) -> tuple[list[tuple[Any, int]], set[int]]:
    """What `search` finds, and by how much the sums are below the truth there.

    The search goes by sums, and only its results are tokenized. If all sums were off by the same number, it is repeated
    with that added; else with the tokenizer at every step. `smallest` are the tokens of the smallest prompts, `bare`
    their sums.
    """
    bare_of, shift = {id(draft): tokens for draft, tokens in zip(drafts, bare)}, 0

    def told(some: Sequence[Draft], states: Sequence[Any]) -> list[int]:
        return [tokens + shift for tokens in sums(some, [bare_of[id(draft)] for draft in some], states)]

    for _ in range(2):
        found = search(drafts, smallest, room, told)
        states = [state for state, _ in found]
        true = measure(drafts, states)
        errors = {tokens - guess for tokens, guess in zip(true, told(drafts, states))}
        if errors == {0}:
            return list(zip(states, true)), {shift}
        if len(errors) > 1:
            break
        shift += errors.pop()
    found = search(drafts, smallest, room, measure)
    total = sums(drafts, bare, [state for state, _ in found])
    return found, {tokens - guess for (_, tokens), guess in zip(found, total)}


def arithmetic(
    drafts: Sequence[Draft], bare: Sequence[int], room: int, shift: int, sums: Sums
) -> list[tuple[Any, int]]:
    """(state, tokens) of each draft with sums that were found to be `shift` below the truth."""
    targets = [room - tokens - shift for tokens in bare]
    fitted: list[Any] = [None] * len(drafts)
    open_ = list(range(len(drafts)))
    while open_:
        states = [drafts[i].fill(max(0, targets[i]))[0] for i in open_]
        late = []
        for i, state, tokens in zip(open_, states, sums([drafts[i] for i in open_], [bare[i] for i in open_], states)):
            if tokens + shift <= room or targets[i] <= 0:
                fitted[i] = (state, tokens + shift)
            else:
                targets[i] -= tokens + shift - room
                late.append(i)
        open_ = late
    return fitted


def search(
    drafts: Sequence[Draft], bare: Sequence[int], room: int, measure: Callable[..., list[int]]
) -> list[tuple[Any, int]]:
    """(state, tokens) of the fullest prompts, found by tokenizing whole prompts.

    The target given to the arithmetic is moved between the largest that fits and the smallest that does not, by
    interpolation, so even sums that are far off lead to a full prompt.
    """
    best: list[tuple[Any, int]] = [(draft.empty, tokens) for draft, tokens in zip(drafts, bare)]
    targets = [room - tokens for tokens in bare[: len(drafts)]]
    below = [(0, tokens) for tokens in bare]  # (target, prompt tokens)
    above: list[tuple[int, int] | None] = [None for _ in drafts]
    seen: list[dict[str, int]] = [{} for _ in drafts]
    open_ = list(range(len(drafts)))
    for step in range(SEARCH_STEPS):
        states = {i: drafts[i].fill(targets[i])[0] for i in open_}
        new = [i for i in open_ if repr(states[i]) not in seen[i]]
        for i, tokens in zip(new, measure([drafts[i] for i in new], [states[i] for i in new])):
            seen[i][repr(states[i])] = tokens
        still = []
        for i in open_:
            tokens = seen[i][repr(states[i])]
            if tokens <= room:
                below[i] = (targets[i], tokens)
                if tokens >= best[i][1]:
                    best[i] = (states[i], tokens)
            else:
                above[i] = (targets[i], tokens)
            last, target = targets[i], between(below[i], above[i], bare[i], room, halve=step % 4 == 3)
            targets[i] = target
            # Sums that were right have found the fullest prompt once a larger target changes nothing.
            closed = above[i] is not None and target >= above[i][0]  # type: ignore[index]
            if target != last and not closed and (i in new or tokens > room):
                still.append(i)
        open_ = still
        if not open_:
            break
    return best


def between(below: tuple[int, int], above: tuple[int, int] | None, bare: int, room: int, halve: bool) -> int:
    """The next target to try, from the (target, tokens) that fit and those that do not."""
    low, tokens = below
    if above is None:
        rate = max((tokens - bare) / low, 0.05) if low > 0 else 1.0
        return low + max(1, int((room - tokens) / rate))
    high, over = above
    share = 0.5 if halve else (room - tokens) / max(1, over - tokens)
    return min(max(low + 1, low + int((high - low) * share)), high - 1) if high - low > 1 else high


# ---------------------------------------------------------------------------------------------------- random streams


def stream(*key: Any) -> random.Random:
    """A generator that depends on nothing but the key (Python's own hash seed plays no part)."""
    return random.Random("/".join(str(part) for part in (GENERATOR, *key)))


FROZEN = np.random.RandomState(0)


def frozen(rng: random.Random) -> np.random.RandomState:
    """NumPy's legacy generator, whose streams are the same in every version: for large permutations.

    There is one, seeded anew by every call (to make one takes ten times as long): draw from it before the next call.
    """
    FROZEN.seed([rng.getrandbits(32) for _ in range(4)])
    return FROZEN


def draw_value(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return texts.key_word(rng.randrange(texts.key_words()))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_values(kind: str, n: int, rng: random.Random, taken: set[str]) -> list[str]:
    """n values, none twice and none in `taken`, which grows by them."""
    values: list[str] = []
    while len(values) < n:
        value = draw_value(kind, rng)
        if value not in taken:
            taken.add(value)
            values.append(value)
    return values


# ------------------------------------------------------------------------------------------------------------ tasks


@dataclass
class Source:
    """What the samples of one cell share: wording, haystack, measured token costs."""

    task: str
    length: int
    tokenizer: Any
    seed: int
    options: Options
    haystack: str
    haystack_sha256: str | None = None

    @property
    def questions(self) -> dict[str, Any] | None:
        """Of question answering: how many questions the set has, and whether it is the published one, whole."""
        return None

    def fitted(self, drafts: Sequence[Draft], kept: int) -> list[tuple[Any, int]]:
        """(state, prompt tokens) of each draft, with `kept` tokens for generation."""
        assemble = assembler(self.tokenizer, self.options)
        return fit(self.length, self, drafts, kept, counter(self.tokenizer), assemble)

    @property
    def spec(self) -> Spec:
        return SPECS[self.task]

    @functools.cached_property
    def costs(self) -> Costs:
        return Costs(self.tokenizer)

    def rng(self, index: int | str) -> random.Random:
        return stream(self.task, self.length, self.seed, index)

    def draw(self, index: int) -> Draft:
        raise NotImplementedError

    def prepare(self, drafts: Sequence[Draft], room: int) -> None:
        """Measures together what the drafts will ask for one by one, where that saves time."""


def source(task: str, length: int, tokenizer: Any, seed: int, data_dir: str | Path | None, options: Options) -> Source:
    """The task's source. Raises ValueError if its data are missing."""
    spec = SPECS[task]
    common = (task, length, tokenizer, seed, options)
    if options.rules.replayed:
        from benchmarks import replay

        return replay.source(*common, data_dir)
    if spec.family == "qa":
        library = texts.library(spec.dataset, data_dir, task)
        return DocumentSource(*common, library.name, library.sha256, library)
    if spec.haystack == "essay":
        essay = texts.essay(options.haystack_text, data_dir, task)
        return EssaySource(*common, essay.name, essay.sha256, essay)
    if spec.family == "vt":
        return ChainSource(*common, "noise")
    if spec.family == "cwe":
        return CommonWordSource(*common, "words", None, data_dir)
    if spec.family == "fwe":
        return FrequentWordSource(*common, "coded words")
    return (NoiseSource if spec.haystack == "noise" else NeedleSource)(*common, spec.haystack)


# --------------------------------------------------------------------------------------------- needles in a haystack


@dataclass
class Needles:
    """Keys, values and the question of one needle-in-a-haystack sample. `sentences` are in order of their depth."""

    sentences: list[str]
    outputs: list[str]
    places: list[int]  # index into `sentences` of each output
    question: str  # with "{context}" still open
    prefix: str

    @classmethod
    def draw(cls, spec: Spec, rng: random.Random) -> Needles:
        needle = texts.needle()
        taken: set[str] = set()
        keys = draw_values(spec.key, spec.keys, rng, taken)
        values = [draw_values(spec.value, spec.values, rng, taken) for _ in keys]
        pairs = [(key, value) for key, own in zip(keys, values) for value in own]
        rng.shuffle(pairs)
        asked = rng.sample(range(spec.keys), spec.queries)
        outputs = [(keys[i], value) for i in asked for value in values[i]]
        return cls(
            [needle.format(type_needle_v=spec.value, key=key, value=value) for key, value in pairs],
            [value for _, value in outputs],
            [pairs.index(pair) for pair in outputs],
            *needle_question(spec, [keys[i] for i in asked]),
        )


def needle_question(spec: Spec, keys: Sequence[str]) -> tuple[str, str]:
    """(prompt with "{context}" still open, answer prefix) that asks for these keys."""
    wording = texts.wording("niah")
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    template, prefix, kind = wording.template, wording.prefix, spec.value
    if spec.queries * spec.values == 1:  # RULER's own way to the singular
        template, prefix = (
            text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (template, prefix)
        )
        kind = kind[:-1]
    return (
        template.format(type_needle_v=kind, query=query, context="{context}"),
        prefix.format(type_needle_v=kind, query=query),
    )


@dataclass
class NoiseSource(Source):
    """Lines of RULER's five noise sentences; in some editions the last may be cut to fill the budget."""

    def draw(self, index: int) -> Draft:
        rng = self.rng(index)
        return NoiseDraft(self, Needles.draw(self.spec, rng), rng)

    @functools.cached_property
    def steps(self) -> list[int]:
        """Tokens of the first k sentences of a line, k = 0..5, between noise lines, where nearly all of them stand."""
        sentences = texts.noise()
        line = "\n" + "".join(sentences)
        cut = ["\n" + "".join(sentences[:k]) for k in range(1, len(sentences) + 1)]
        return [0, *self.costs.of(cut, line, line).tolist()]

    def added(self, count: int) -> int:
        """Tokens of `count` noise sentences."""
        lines, rest = divmod(count, len(self.steps) - 1)
        return lines * self.steps[-1] + self.steps[rest]

    def most(self, room: int) -> int:
        """The most noise sentences of at most `room` tokens."""
        lines, rest = divmod(room, max(1, self.steps[-1]))
        cut = bisect.bisect_right(self.steps[:-1], rest) - 1 if self.options.rules.cut_lines else 0
        return lines * (len(self.steps) - 1) + cut

    def lines(self, count: int) -> list[str]:
        sentences = texts.noise()
        full, rest = divmod(count, len(sentences))
        return ["".join(sentences)] * full + (["".join(sentences[:rest])] if rest else [])


def places(lines: int, needles: int, rng: random.Random) -> list[int]:
    """Sorted line numbers in front of which needles stand; distinct where there are lines enough."""
    if lines >= needles:
        return sorted(rng.sample(range(lines), needles))
    return sorted(rng.choices(range(lines + 1), k=needles))


def weave(lines: list[str], needles: Sequence[str], at: Sequence[int]) -> list[str]:
    """Lines with each needle put in front of line `at`."""
    woven, last = [], 0
    for needle, place in zip(needles, at):
        woven += lines[last:place]
        woven.append(needle)
        last = place
    return woven + lines[last:]


class NoiseDraft(Draft):
    empty = 0

    def __init__(self, made: NoiseSource, needles: Needles, rng: random.Random):
        self.made, self.needles, self.outputs = made, needles, needles.outputs
        self._key = rng.getrandbits(64)

    def fill(self, room: int) -> tuple[int, int]:
        count = self.made.most(room)
        return count, self.made.added(count)

    def places(self, count: int) -> list[int]:
        return places(len(self.made.lines(count)), len(self.needles.sentences), random.Random(self._key))

    def render(self, count: int) -> tuple[str, str]:
        context = "\n".join(weave(self.made.lines(count), self.needles.sentences, self.places(count)))
        return self.needles.question.replace("{context}", context), self.needles.prefix

    def cut(self, count: int) -> tuple[None, int]:
        return None, self.made.added(count)

    def depth(self, count: int) -> list[float]:
        at, lines = self.places(count), max(1, len(self.made.lines(count)))
        return [round(100 * at[i] / lines, 2) for i in self.needles.places]


@dataclass
class EssaySource(Source):
    essay: texts.Essay = None  # type: ignore[assignment]

    def draw(self, index: int) -> Draft:
        rng = self.rng(index)
        return EssayDraft(self, Needles.draw(self.spec, rng), rng)

    _sums: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def added(self, room: int) -> np.ndarray:
        """int64 [k]: tokens that the first k words add, up to more than `room`; copies of the text follow on."""
        while self._sums[-1] <= room:
            known, words = len(self._sums) - 1, self.essay.words
            further = [words[i % len(words)] for i in range(known, 2 * known + 256)]
            sums = np.cumsum(np.maximum(self.costs.words(further), 0))
            self._sums = np.concatenate(
                [self._sums, self._sums[-1] + np.maximum(sums, np.arange(1, len(sums) + 1) // 64)]
            )
        return self._sums


class EssayDraft(Draft):
    empty = 0

    def __init__(self, made: EssaySource, needles: Needles, rng: random.Random):
        self.made, self.needles, self.outputs = made, needles, needles.outputs
        self.depths = sorted(rng.sample(DEPTHS, len(needles.sentences)))

    def fill(self, room: int) -> tuple[int, int]:
        sums = self.made.added(room)
        count = int(np.searchsorted(sums, room, side="right")) - 1
        return count, int(sums[count])

    def places(self, count: int) -> list[int]:
        """Words in front of each needle: the end of the sentence at its depth."""
        essay = self.made.essay
        total = essay.sentences(count)
        return [essay.sentence_end(total * depth // 100, count) for depth in self.depths]

    def prompt(self, segments: Sequence[str]) -> tuple[str, str]:
        """The prompt with the needles between segments of the essay (one more than needles; some may be empty)."""
        pieces = [piece for pair in zip(segments, [*self.needles.sentences, ""]) for piece in pair if piece]
        return self.needles.question.replace("{context}", " ".join(pieces)), self.needles.prefix

    def render(self, count: int) -> tuple[str, str]:
        ends = [0, *self.places(count), count]
        return self.prompt([self.made.essay.text(a, b) for a, b in itertools.pairwise(ends)])

    def cut(self, count: int) -> tuple[tuple[str, str], int]:
        essay, sums, segments, removed = self.made.essay, self.made.added(0), [], 0
        ends = [0, *self.places(count), count]
        for a, b in itertools.pairwise(ends):
            if b - a <= 2 * RIM:
                segments.append(essay.text(a, b))
            else:
                segments.append(f"{essay.text(a, a + RIM)} {essay.text(b - RIM, b)}")
                removed += int(sums[b - RIM] - sums[a + RIM])
        return self.prompt(segments), removed

    def depth(self, count: int) -> list[float]:
        return [float(self.depths[i]) for i in self.needles.places]


@dataclass
class NeedleSource(Source):
    """A haystack of needles with other keys. Distractors come from a pool of the cell's seed, measured once."""

    def draw(self, index: int) -> Draft:
        rng = self.rng(index)
        return NeedleDraft(self, Needles.draw(self.spec, rng), rng)

    @functools.cached_property
    def least_tokens(self) -> int:
        """Tokens of about the shortest needle there is."""
        rng, needle = self.rng("shortest"), texts.needle()
        some = [
            needle.format(
                type_needle_v=self.spec.value,
                key=draw_value(self.spec.key, rng),
                value=draw_value(self.spec.value, rng),
            )
            for _ in range(64)
        ]
        return max(4, int(self.costs.of(["\n" + one for one in some], "\n" + some[0], "\n" + some[0]).min()))

    @functools.cached_property
    def pool(self) -> list[str]:
        rng, needle = self.rng("pool"), texts.needle()
        # Twice what the longest prompt can hold.
        size = max(512, 2 * self.length // self.least_tokens)
        taken: set[str] = set()
        keys = draw_values(self.spec.key, size, rng, taken)
        values = draw_values(self.spec.value, size, rng, taken)
        return [needle.format(type_needle_v=self.spec.value, key=k, value=v) for k, v in zip(keys, values)]

    @functools.cached_property
    def pool_costs(self) -> np.ndarray:
        end, start = self.pool[0][-1], self.pool[0].split(" ")[0]
        return self.costs.of(["\n" + sentence for sentence in self.pool], end, "\n" + start)


class NeedleDraft(Draft):
    empty = ()

    def __init__(self, made: NeedleSource, needles: Needles, rng: random.Random):
        self.made, self.needles, self.outputs = made, needles, needles.outputs
        self._key = rng.getrandbits(64)

    @functools.cached_property
    def order(self) -> np.ndarray:
        return frozen(random.Random(self._key)).permutation(len(self.made.pool))

    def fill(self, room: int) -> tuple[list[int], int]:
        """State: number of distractors, then pairs (place in the order taken out, place put in).

        Once no further one fits, short ones are exchanged for longer ones while that fills the budget better.
        """
        costs = self.made.pool_costs[self.order]
        sums = np.cumsum(costs)
        count = int(np.searchsorted(sums, room, side="right"))
        total = int(sums[count - 1]) if count else 0
        state = [count]
        inside = np.argsort(costs[:count], kind="stable")[:16].tolist()
        outside = count + np.argsort(costs[count:], kind="stable")
        for out in inside:
            limit = costs[out] + room - total
            pick = int(np.searchsorted(costs[outside], limit, side="right")) - 1
            if pick < 0 or costs[outside[pick]] <= costs[out]:
                break
            total += int(costs[outside[pick]] - costs[out])
            state += [out, int(outside[pick])]
            outside = np.delete(outside, pick)
        return state, total

    def chosen(self, state: Sequence[int]) -> list[int]:
        """Distractors of the pool, in the order of the prompt."""
        if not state:
            return []
        chosen = self.order[: state[0]].tolist()
        for out, put in zip(state[1::2], state[2::2]):
            chosen[out] = int(self.order[put])
        return chosen

    def tokens(self, state: Sequence[int]) -> int:
        return int(self.made.pool_costs[self.chosen(state)].sum())

    def lines(self, state: Sequence[int]) -> list[str]:
        return list(map(self.made.pool.__getitem__, self.chosen(state)))

    def places(self, state: Sequence[int]) -> list[int]:
        return places(state[0] if state else 0, len(self.needles.sentences), random.Random(self._key ^ 1))

    def render(self, state: Sequence[int]) -> tuple[str, str]:
        context = "\n".join(weave(self.lines(state), self.needles.sentences, self.places(state)))
        return self.needles.question.replace("{context}", context), self.needles.prefix

    def cut(self, state: Sequence[int]) -> tuple[None, int]:
        return None, self.tokens(state)

    def depth(self, state: Sequence[int]) -> list[float]:
        at, lines = self.places(state), max(1, state[0] if state else 0)
        return [round(100 * at[i] / lines, 2) for i in self.needles.places]


# ------------------------------------------------------------------------------------------------- variable tracking


@dataclass
class ChainSource(NoiseSource):
    """Variable tracking: one chain of assignments in noise, after a worked example with names and value of its own."""

    def draw(self, index: int) -> Draft:
        return ChainDraft(self, self.rng(index))

    @functools.cached_property
    def example_lines(self) -> int:
        """Noise lines of the worked example: RULER's 500 tokens, in windows under 1,024 at most a quarter of them.

        The edition of the lab counts without the answer prefix and takes a quarter of any window.
        """
        lab = self.options.rules.bare_end
        limit = min(VT_EXAMPLE_TOKENS, self.length // 4) if lab or self.length < 1024 else VT_EXAMPLE_TOKENS
        rng = self.rng("example size")
        key = rng.getrandbits(64)
        chain = Chain.draw(self.options.hops, 3, rng)
        lines = 0

        def shown(lines: int) -> str:
            question, prefix = chain.text(self.lines(5 * lines), key, self.options.edition)
            return question if lab else question + prefix

        while self.costs.count([shown(lines + 1)])[0] <= limit:
            lines += 1
        return lines


@dataclass
class Chain:
    names: list[str]
    value: str

    @classmethod
    def draw(cls, hops: int, letters: int, rng: random.Random) -> Chain:
        names: list[str] = []
        while len(names) < hops + 1:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        return cls(names, str(rng.randint(10000, 99999)))

    @property
    def lines(self) -> list[str]:
        first = f"VAR {self.names[0]} = {self.value}"
        return [first, *(f"VAR {new} = VAR {old} " for old, new in zip(self.names, self.names[1:]))]

    def text(self, noise: list[str], key: int, edition: str) -> tuple[str, str]:
        """(prompt, answer prefix); places of the assignments follow from `key` and the number of noise lines."""
        at = places(len(noise), len(self.names), random.Random(key))
        return self.asked("\n".join(weave(noise, self.lines, at)), edition)

    def asked(self, context: str, edition: str) -> tuple[str, str]:
        """(prompt, answer prefix) with a context that has the assignments."""
        wording = texts.wording("vt", edition)
        return (
            wording.template.format(context=context, query=self.value),
            wording.prefix.format(num_v=len(self.names), query=self.value),
        )


class ChainDraft(Draft):
    empty = 0

    def __init__(self, made: ChainSource, rng: random.Random):
        self.made = made
        self.example = ""
        if made.options.shots:
            shown = Chain.draw(made.options.hops, 3, rng)
            noise = made.lines(5 * made.example_lines)
            question, prefix = shown.text(noise, rng.getrandbits(64), made.options.edition)
            self.example = f"{question}{prefix} {' '.join(shown.names)}\n\n"
        self.chain = Chain.draw(made.options.hops, 5, rng)
        while made.options.shots and any(name in self.example for name in (*self.chain.names, self.chain.value)):
            self.chain = Chain.draw(made.options.hops, 5, rng)
        self.outputs = self.chain.names
        self._key = rng.getrandbits(64)

    def fill(self, room: int) -> tuple[int, int]:
        count = self.made.most(room)
        return count, self.made.added(count)

    def cut(self, count: int) -> tuple[None, int]:
        return None, self.made.added(count)

    def render(self, count: int) -> tuple[str, str]:
        question, prefix = self.chain.text(self.made.lines(count), self._key, self.made.options.edition)
        return self.example + question, prefix

    def depth(self, count: int) -> list[float]:
        lines = len(self.made.lines(count))
        at = places(lines, len(self.outputs), random.Random(self._key))
        return [round(100 * place / max(1, lines), 2) for place in at]


# ------------------------------------------------------------------------------------------------------- word counts


@dataclass
class CommonWordSource(Source):
    """Common words: ten words many times, others seldom, in one numbered list, after one worked example."""

    data_dir: str | Path | None = None
    _number_sums: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @property
    def repeats(self) -> tuple[int, int]:
        """Times that a common and another word stand in the list."""
        return (6, 1) if self.length < 4096 else (30, 3)

    def draw(self, index: int) -> Draft:
        return CommonWordDraft(self, self.rng(index))

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        return texts.common_words()

    @functools.cached_property
    def long_words(self) -> tuple[str, ...]:
        """RULER's longer list, for samples that need more words than `words` has; of these they have none."""
        path = texts.data_file("words", self.data_dir, f"cwe at length {self.length}")
        self.haystack, self.haystack_sha256 = path.name, remembered_sha256(path)
        return tuple(sorted({word.strip() for word in texts.more_words(path)} - {""}))

    @functools.cached_property
    def word_costs(self) -> np.ndarray:
        return self.costs.of([" " + word for word in self.words], "a 1.", " 2.")

    @functools.cached_property
    def long_word_costs(self) -> np.ndarray:
        return self.costs.of([" " + word for word in self.long_words], "a 1.", " 2.")

    def number_sums(self, entries: int) -> np.ndarray:
        """int64 [k]: tokens of the first k numbers with their dots; k to `entries` at least."""
        while len(self._number_sums) <= entries:
            known = len(self._number_sums) - 1
            numbers = [f" {i}." for i in range(known + 1, 2 * known + 1025)]
            sums = np.cumsum(self.costs.of(numbers, " a", " a"))
            self._number_sums = np.append(self._number_sums, self._number_sums[-1] + sums)
        return self._number_sums

    @property
    def most_entries(self) -> int:
        """An entry takes at least two tokens."""
        return self.length // 2 + 1


def common_question(listed: str) -> tuple[str, str]:
    """(prompt, answer prefix)."""
    wording = texts.wording("cwe")
    return wording.template.format(context=listed), wording.prefix


class CommonWordDraft(Draft):
    empty = CWE_COMMON

    def __init__(self, made: CommonWordSource, rng: random.Random):
        self.made = made
        numpy_rng = frozen(rng)
        self.example: tuple[str, ...] = ()  # question, answer
        self.example_entries: list[tuple[np.ndarray, int]] = []  # words and how often each stands in its list
        if made.options.shots:
            total, common, other = (20, 3, 1) if made.length < 4096 else (40, 10, 3)
            shown = numpy_rng.choice(len(made.words), total, replace=False)
            listed = self.listed(made.words, shown, common, other, numpy_rng)
            answer = numbered([made.words[i] for i in shown[:CWE_COMMON]])
            question, prefix = common_question(listed)
            self.example = (question, f"{prefix} {answer}\n")
            self.example_entries = [(shown[:CWE_COMMON], common), (shown[CWE_COMMON:], other)]
        self.order = numpy_rng.permutation(len(made.words))[: self.most].copy()
        self._key = rng.getrandbits(64)
        self.outputs = [made.words[i] for i in self.order[:CWE_COMMON]]

    @property
    def most(self) -> int:
        """As many words as can be listed at two tokens an entry: the longer list times all samples is a gigabyte."""
        return CWE_COMMON + self.made.length // (2 * self.made.repeats[1])

    @functools.cached_property
    def long_order(self) -> np.ndarray:
        return frozen(random.Random(self._key ^ 1)).permutation(len(self.made.long_words))[: self.most].copy()

    def is_long(self, count: int) -> bool:
        """Whether a sample of `count` words is made of the longer list."""
        return count > len(self.made.words)

    @staticmethod
    def listed(words: Sequence[str], chosen: np.ndarray, common: int, other: int, rng: np.random.RandomState) -> str:
        entries = np.concatenate([np.tile(chosen[:CWE_COMMON], common), np.tile(chosen[CWE_COMMON:], other)])
        return numbered(list(map(words.__getitem__, rng.permutation(entries).tolist())))

    def sums(self, room: int, costs: np.ndarray) -> np.ndarray:
        """int64 [k]: tokens that the first k words besides the common ones add, up to more than `room` if it can be.

        costs: of the words in their order, the common ones left out.
        """
        common, other = self.made.repeats
        least, numbers = CWE_COMMON * common, self.made.number_sums(CWE_COMMON * common)
        while numbers[-1] - numbers[least] <= room and len(numbers) <= self.made.most_entries:
            numbers = self.made.number_sums(len(numbers))
        entries = np.arange(least, min(len(numbers), self.made.most_entries + 1), other)[: len(costs) + 1]
        return np.append(0, np.cumsum(costs[: len(entries) - 1]) * other) + numbers[entries] - numbers[least]

    def fill(self, room: int) -> tuple[int, int]:
        made, other = self.made, self.made.repeats[1]
        sums = self.sums(room, made.word_costs[self.order[CWE_COMMON:]])
        count = int(np.searchsorted(sums, room, side="right")) - 1
        if CWE_COMMON + count == len(made.words):
            entries = CWE_COMMON * made.repeats[0] + count * other
            numbers = made.number_sums(entries + other)
            if sums[count] + int(numbers[entries + other] - numbers[entries]) + other <= room:  # words of a token
                extra = self.long_extra()
                longer = self.sums(room - extra, made.long_word_costs[self.long_order[CWE_COMMON:]])
                more = int(np.searchsorted(longer, room - extra, side="right")) - 1
                if self.is_long(CWE_COMMON + more):
                    return CWE_COMMON + more, int(longer[more]) + extra
        return CWE_COMMON + count, int(sums[count])

    def long_extra(self) -> int:
        """Tokens that the common words of the longer list take more than those of the shorter one."""
        long, short = self.long_order[:CWE_COMMON], self.order[:CWE_COMMON]
        more = int(self.made.long_word_costs[long].sum()) - int(self.made.word_costs[short].sum())
        return more * self.made.repeats[0]

    def cut(self, count: int) -> tuple[None, int]:
        common, other = self.made.repeats
        least, more = CWE_COMMON * common, count - CWE_COMMON
        numbers = self.made.number_sums(least + more * other)
        if self.is_long(count):
            words, extra = self.made.long_word_costs[self.long_order[CWE_COMMON:count]], self.long_extra()
        else:
            words, extra = self.made.word_costs[self.order[CWE_COMMON:count]], 0
        return None, int(words.sum()) * other + extra + int(numbers[least + more * other] - numbers[least])

    def core(self) -> tuple[tuple[str, ...], int]:
        made, first = self.made, self.made.words[self.order[0]]
        template, prefix = common_question(numbered([first]))
        # Both lists are one entry long here; their other entries are summed.
        prompt = (template, self.example[1], template, prefix) if self.example else (template, prefix)
        lists = [*self.example_entries, (self.order[:CWE_COMMON], made.repeats[0])]
        entries = sum(len(words) * times for words, times in lists[-1:])
        left = self.entry_tokens(lists[-1:], entries)
        if self.example:
            shown = lists[:-1]
            left += self.entry_tokens(shown, sum(len(words) * times for words, times in shown))
        return prompt, left

    def entry_tokens(self, words: Sequence[tuple[np.ndarray, int]], entries: int) -> int:
        """Tokens of a numbered list less its first entry, which stands for the sample's first word."""
        costs = self.made.word_costs
        total = sum(int(costs[chosen].sum()) * times for chosen, times in words)
        numbers = self.made.number_sums(entries)
        return total + int(numbers[entries] - numbers[1] - costs[self.order[0]])

    def chosen(self, count: int) -> tuple[Sequence[str], np.ndarray]:
        """(word list, places in it) of a sample of `count` words."""
        words, order = (self.made.long_words, self.long_order) if self.is_long(count) else (self.made.words, self.order)
        return words, order[:count]

    def render(self, count: int) -> tuple[str, ...]:
        rng = frozen(random.Random(self._key))
        return *self.example, *common_question(self.listed(*self.chosen(count), *self.made.repeats, rng))

    def answers(self, count: int) -> list[str]:
        words, order = self.chosen(count)
        return [words[i] for i in order[:CWE_COMMON]]

    def depth(self, count: int) -> list[float]:
        return []


NUMBERS: list[str] = []  # " 1. ", " 2. " and so on, as many as were asked for


def numbered(words: Sequence[str]) -> str:
    NUMBERS.extend(f" {i}. " for i in range(len(NUMBERS) + 1, len(words) + 1))
    return "".join(map(operator.add, NUMBERS, words))[1:]


@dataclass
class FrequentWordSource(Source):
    """Frequent coded words: word of rank k stands N * k^-2 / zeta(2) times; rank 1 is noise ("...")."""

    def draw(self, index: int) -> Draft:
        return FrequentWordDraft(self, self.rng(index))

    @property
    def vocabulary(self) -> int:
        kept = 0 if self.options.rules.answers_in_vocabulary else reserve(self.task, self.options)
        return max(5, (self.length - kept) // 50)

    @functools.cached_property
    def pool(self) -> list[str]:
        """Coded words of the cell, from which each sample takes its own."""
        rng, size = self.rng("pool"), max(4096, 4 * self.vocabulary)
        words: dict[str, None] = {}
        while len(words) < size:
            words["".join(rng.choices(string.ascii_lowercase, k=FWE_LETTERS))] = None
        return list(words)

    @functools.cached_property
    def pool_costs(self) -> np.ndarray:
        return self.costs.of([" " + word for word in self.pool], " a", " a")

    @functools.cached_property
    def pool_bytes(self) -> np.ndarray:
        """The pool's words with a space in front, as bytes of one size."""
        return np.array([f" {word}" for word in self.pool], dtype=np.bytes_)

    @functools.cached_property
    def dots_cost(self) -> int:
        return int(self.costs.of([" ..."], " a", " a")[0])

    def counts(self, total: int) -> np.ndarray:
        """int64 [vocabulary]: times that each rank stands in a text of `total` words."""
        ranks = np.arange(1, self.vocabulary + 1, dtype=np.float64)
        return (total * ranks**-FWE_ALPHA / (math.pi**2 / 6)).astype(np.int64)

    @functools.cached_property
    def smallest(self) -> int:
        """Fewest words at which the three asked for are told apart: counts of ranks 2 to 5 fall strictly."""
        total = 1
        while not np.all(np.diff(self.counts(total)[1:5]) < 0):
            total += 1
        return total


def frequent_question(context: str) -> tuple[str, str]:
    """(prompt, answer prefix)."""
    wording = texts.wording("fwe")
    return wording.template.format(context=context), wording.prefix


class FrequentWordDraft(Draft):
    def __init__(self, made: FrequentWordSource, rng: random.Random):
        self.made = made
        self.chosen = frozen(rng).permutation(len(made.pool))[: made.vocabulary]
        self._key = rng.getrandbits(64)
        self.outputs = [made.pool[i] for i in self.chosen[1:4]]
        self.empty = made.smallest

    def tokens(self, total: int) -> int:
        costs = self.made.pool_costs[self.chosen].copy()
        costs[0] = self.made.dots_cost
        return int(self.made.counts(total) @ costs)

    def fill(self, room: int) -> tuple[int, int]:
        low, bare = self.empty, self.tokens(self.empty)
        high = low + room + 1  # a word has a token or more, up to the counts cut off; widened below
        while self.tokens(high) - bare <= room:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if self.tokens(middle) - bare <= room:
                low = middle
            else:
                high = middle
        return low, self.tokens(low) - bare

    def cut(self, total: int) -> tuple[None, int]:
        return None, self.tokens(total) - self.tokens(self.empty)

    def render(self, total: int) -> tuple[str, str]:
        entries = np.repeat(np.arange(self.made.vocabulary), self.made.counts(total))
        words = self.made.pool_bytes[self.chosen]
        words[0] = b" ..."
        context = words[frozen(random.Random(self._key)).permutation(entries)].tobytes().translate(None, b"\0")
        return frequent_question(context[1:].decode())

    def depth(self, total: int) -> list[float]:
        return []


# ------------------------------------------------------------------------------------------------ question answering


@dataclass
class DocumentSource(Source):
    library: texts.Library = None  # type: ignore[assignment]
    _number_sums: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @property
    def questions(self) -> dict[str, Any]:
        return {"count": len(self.library.questions), "whole": self.library.whole}

    def draw(self, index: int) -> Draft:
        return DocumentDraft(self, question_of(self.library, index, self.task), self.rng(index))

    @functools.cached_property
    def document_costs(self) -> DocumentCosts:
        known = kept_costs(self.tokenizer, len(self.tokenizer), self.library.sha256)
        if not known:
            known.append(DocumentCosts(self.tokenizer, self.library.documents))
        return known[0]

    @property
    def most_documents(self) -> int:
        """A document takes 8 tokens at least."""
        return self.length // 8 + 15

    def number_sums(self, documents: int) -> np.ndarray:
        """int64 [k]: tokens that the numbers of k documents take more than as many 1s; k to `documents` at least."""
        while len(self._number_sums) <= documents:
            known = len(self._number_sums) - 1
            heads = [document_block(i, "a") + "\n\n" for i in (1, *range(known + 1, 2 * known + 65))]
            costs = self.costs.of(heads, "a\n\n", "Document")
            self._number_sums = np.append(self._number_sums, self._number_sums[-1] + np.cumsum(costs[1:] - costs[0]))
        return self._number_sums

    def prepare(self, drafts: Sequence[Draft], room: int) -> None:
        known, own = self.document_costs, [draft for draft in drafts if isinstance(draft, DocumentDraft)]
        needed = known.of(np.concatenate([draft.empty for draft in own]))
        left, size = max(0, room - int(needed.sum()) // len(own)), batch_size(room)
        # About as many as a sample tries, in whole batches.
        count = size * math.ceil((left / needed.mean() + DocumentDraft.TRIES) / size)
        known.of(np.concatenate([draft.candidates(count) for draft in own]))


def question_of(library: texts.Library, index: int, task: str) -> texts.Question:
    """The question of sample `index`. Raises ValueError if there are not so many."""
    if index >= len(library.questions):
        raise ValueError(
            f"samples of {task} must be at most the questions of {library.name}: "
            f"{len(library.questions)}, got index {index}"
        )
    return library.questions[index]


def asked(question: str, context: str) -> tuple[str, str]:
    """(prompt, answer prefix) of question answering."""
    wording = texts.wording("qa")
    return wording.template.format(context=context, query=question), wording.prefix


def document_context(documents: Sequence[str]) -> str:
    """Numbered documents as they stand in the prompt."""
    return "\n\n".join(document_block(number, document) for number, document in enumerate(documents, 1))


def batch_size(room: int) -> int:
    """Documents that are tried together."""
    return max(16, room // 256)


def document_block(number: int, document: str) -> str:
    head, middle, tail = document_frame()
    return f"{head}{number}{middle}{document}{tail}"


@functools.cache
def document_frame() -> tuple[str, str, str]:
    """What stands in front of a document's number, between number and text, and after the text."""
    head, rest = texts.document_prompt().split("{i}")
    middle, tail = rest.split("{document}")
    return head, middle, tail


class DocumentCosts:
    """Tokens of a library's documents as "Document 1", measured when first asked for, the same at every length.

    A document costs as much as its words, if that is so for all of CHECKED_DOCUMENTS; one with other white space than
    single spaces is tokenized whole.
    """

    def __init__(self, tokenizer: Any, documents: Sequence[str]):
        self.costs, self.documents = Costs(tokenizer), documents
        self._known = np.full(len(documents), -1, dtype=np.int64)

    def of(self, wanted: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [documents]: tokens of each of the documents."""
        places = np.asarray(wanted, dtype=np.int64)
        new = np.unique(places[self._known[places] < 0]).tolist()
        if new:
            blocks = [self.block(self.documents[i]) for i in new]
            self._known[new] = (self.costs.texts if self.words_add_up else self.costs.count)(blocks)
            self._known[new] -= self.bare
        return self._known[places]

    @staticmethod
    def block(document: str) -> str:
        return f"a\n\n{document_block(1, document)}\n\nDocument 1"

    @functools.cached_property
    def bare(self) -> int:
        return self.costs.count(["a\n\nDocument 1"])[0]

    @functools.cached_property
    def shortest(self) -> int:
        """Tokens of a document of one letter."""
        return self.costs.count([self.block("a")])[0] - self.bare

    @functools.cached_property
    def words_add_up(self) -> bool:
        if len(self.documents) <= CHECKED_DOCUMENTS:
            return False
        places = np.linspace(0, len(self.documents) - 1, CHECKED_DOCUMENTS).astype(int)
        some = [self.block(self.documents[i]) for i in places]
        return self.costs.texts(some) == self.costs.count(some)


@functools.lru_cache(maxsize=4)
def kept_costs(tokenizer: Any, entries: int, library_sha256: str) -> list[DocumentCosts]:
    """Place of the costs of one library, for all lengths (the library itself would be slow to hash)."""
    return []


class DocumentDraft(Draft):
    """State: document indices in the order of the prompt's list before the final shuffle."""

    TRIES = 12  # further documents tried once one did not fit

    def __init__(self, made: DocumentSource, question: texts.Question, rng: random.Random):
        self.made, self.question = made, question
        self.outputs = list(question.answers)
        self.empty = list(question.context)
        self._key = rng.getrandbits(64)
        self._candidates = np.zeros(0, dtype=np.int64)

    def candidates(self, count: int) -> np.ndarray:
        """int64 [count]: documents of the same article, then others, then all again: in random order."""
        if len(self._candidates) < count:
            self._candidates = self.drawn(count)
        return self._candidates[:count]

    def drawn(self, count: int) -> np.ndarray:
        rng = random.Random(self._key)
        related = list(self.question.related)
        rng.shuffle(related)
        total = len(self.made.library.documents)
        first = np.array([*self.question.context, *related], dtype=np.int64)
        others = frozen(rng).permutation(total)[: count + len(first)]
        blocks = [first[len(self.question.context) :], others[~np.isin(others, first)]]
        while sum(map(len, blocks)) < count:
            blocks.append(frozen(rng).permutation(total))
        return np.concatenate(blocks)[:count]

    def fill(self, room: int) -> tuple[list[int], int]:
        chosen, total = list(self.empty), 0
        size, seen, misses = batch_size(room), 0, 0
        base = self.made.number_sums(len(chosen))[len(chosen)]
        while misses < self.TRIES and len(chosen) + 64 <= self.made.most_documents:
            seen += size
            if seen > len(self._candidates):
                self.candidates(2 * seen)
            batch = self.candidates(seen)[-size:]
            numbers = self.made.number_sums(len(chosen) + size)
            costs = self.made.document_costs.of(batch)
            sums = total + np.cumsum(costs) + numbers[len(chosen) + 1 : len(chosen) + size + 1]
            fitting = int(np.searchsorted(sums, room + base, side="right"))
            chosen += batch[:fitting].tolist()
            total += int(costs[:fitting].sum())
            for i, cost in zip(batch[fitting:].tolist(), costs[fitting:].tolist()):
                if total + cost + numbers[len(chosen) + 1] - base <= room:
                    chosen.append(i)
                    total += cost
                else:
                    misses += 1
        return chosen, total + int(self.made.number_sums(len(chosen))[len(chosen)] - base)

    def core(self) -> tuple[tuple[str, str], int]:
        """With one document, which stands for all: their tokens are known."""
        numbers, costs = self.made.number_sums(len(self.empty)), self.made.document_costs
        left = int(costs.of(self.empty).sum() + numbers[len(self.empty)]) - costs.shortest
        return asked(self.question.text, document_context(["a"])), left

    def cut(self, state: Sequence[int]) -> tuple[None, int]:
        numbers, least = self.made.number_sums(len(state)), len(self.empty)
        return None, int(self.made.document_costs.of(state[least:]).sum() + numbers[len(state)] - numbers[least])

    def shuffled(self, state: Sequence[int]) -> list[int]:
        """Order of the documents in the prompt: places in `state`."""
        order = list(range(len(state)))
        random.Random(self._key ^ 1).shuffle(order)
        return order

    def render(self, state: Sequence[int]) -> tuple[str, str]:
        documents = self.made.library.documents
        return asked(self.question.text, document_context([documents[state[i]] for i in self.shuffled(state)]))

    def depth(self, state: Sequence[int]) -> list[float]:
        order = self.shuffled(state)
        return [round(100 * order.index(0) / max(1, len(state) - 1), 2)] * len(self.outputs)


# ---------------------------------------------------------------------------------------------------------- metrics


def score(task: str, prediction: str, outputs: Sequence[str]) -> float:
    """RULER's score of one prediction, in [0, 1]: share of the answers in it, or for QA whether any is."""
    check_task(task)
    found = [answer.lower() in clean(prediction).lower() for answer in outputs]
    return float(any(found)) if SPECS[task].metric == "any" else sum(found) / len(found)


def clean(prediction: str) -> str:
    """RULER's post-processing: control characters become newlines."""
    return "".join("\n" if ord(c) < 32 else c for c in prediction.strip()).strip()
