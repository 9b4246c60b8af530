"""Token counts of prompts and of the pieces they are made of."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import chat
from benchmarks.ruler.tasks import DEFAULTS, Options
from endprompt.text import Reader

CHECKED_PROMPTS = 64

# Texts that are split at once: their words are as many objects.
TEXTS_AT_ONCE = 256


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
    """Joins what a draft renders: questions and the text behind each, of which the last is the answer prefix. Chat
    layout "one-turn" puts all but the prefix into one turn of the user's, and the prefix starts the assistant's;
    "ruler" makes a turn of each question and keeps the prefix's leading space, "no-prefix" leaves the prefix out.
    """
    if not options.chat:
        return lambda *parts: "".join(parts)
    render = chat.renderer(tokenizer, options.date, options.template_args, options.system)
    bos = getattr(tokenizer, "bos_token", None) or ""

    def wrap(question: str) -> str:
        return render([{"role": "user", "content": question}], add_generation_prompt=True)

    if options.layout == "no-prefix":
        return lambda *parts: wrap("".join(parts[:-1]))
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
