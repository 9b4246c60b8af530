"""Common and frequent words: the tasks cwe and fwe."""

from __future__ import annotations

import bisect
import functools
import math
import operator
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ruler import texts
from benchmarks.ruler.source import Draft, Source, frozen
from benchmarks.ruler.tasks import reserve
from endprompt.files import remembered_sha256

CWE_COMMON = 10
FWE_ALPHA = 2.0
FWE_LETTERS = 6
NUMBERS: list[str] = []  # " 1. ", " 2. " and so on, as many as were asked for


def numbered(words: Sequence[str]) -> str:
    NUMBERS.extend(f" {i}. " for i in range(len(NUMBERS) + 1, len(words) + 1))
    return "".join(map(operator.add, NUMBERS, words))[1:]


def worked_example(length: int) -> tuple[int, int, int]:
    """Words of the example's list, and times that a common and another word stand in it."""
    return (20, 3, 1) if length < 4096 else (40, 10, 3)


def repeats(length: int) -> tuple[int, int]:
    """Times that a common and another word stand in the list."""
    return (6, 1) if length < 4096 else (30, 3)


class CommonWordDraft(Draft):
    empty = CWE_COMMON

    def __init__(self, made: CommonWordSource, rng: random.Random):
        self.made = made
        numpy_rng = frozen(rng)
        self.example: tuple[str, ...] = ()  # question, answer
        self.example_entries: list[tuple[np.ndarray, int]] = []  # words and how often each stands in its list
        if made.options.shots:
            total, common, other = worked_example(made.length)
            shown = numpy_rng.choice(len(made.words), total, replace=False)
            listed = self.listed(made.words, shown, common, other, numpy_rng)
            question, prefix = texts.question("cwe", context=listed)
            self.example = (question, f"{prefix} {numbered([made.words[i] for i in shown[:CWE_COMMON]])}\n")
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

    def fullest(self, room: int, costs: np.ndarray) -> tuple[int, int, int]:
        """(words besides the common ones of at most `room` tokens, their tokens, what is left at least for one more).
        costs: of the words in their order, the common ones left out.
        """
        made, (common, other) = self.made, self.made.repeats
        least, numbers = CWE_COMMON * common, made.number_sums(CWE_COMMON * common)
        while numbers[-1] - numbers[least] <= room and len(numbers) <= made.most_entries:
            numbers = made.number_sums(len(numbers))
        entries = np.arange(least, min(len(numbers), made.most_entries + 1), other)[: len(costs) + 1]
        sums = np.append(0, np.cumsum(costs[: len(entries) - 1]) * other) + numbers[entries] - numbers[least]
        count = int(np.searchsorted(sums, room, side="right")) - 1
        numbers, last = made.number_sums(least + (count + 1) * other), least + count * other
        left = room - int(sums[count]) - int(numbers[last + other] - numbers[last]) - other  # words of a token
        return count, int(sums[count]), left

    def fill(self, room: int) -> tuple[int, int]:
        made = self.made
        count, tokens, left = self.fullest(room, made.word_costs[self.order[CWE_COMMON:]])
        if CWE_COMMON + count == len(made.words) and left >= 0:
            extra = self.long_extra()
            more, longer, _ = self.fullest(room - extra, made.long_word_costs[self.long_order[CWE_COMMON:]])
            if self.is_long(CWE_COMMON + more):
                return CWE_COMMON + more, longer + extra
        return CWE_COMMON + count, tokens

    def long_extra(self) -> int:
        """Tokens that the common words of the longer list take more than those of the shorter one."""
        long, short = self.long_order[:CWE_COMMON], self.order[:CWE_COMMON]
        more = int(self.made.long_word_costs[long].sum()) - int(self.made.word_costs[short].sum())
        return more * self.made.repeats[0]

    def cut(self, count: int) -> tuple[None, int]:
        made, (common, other) = self.made, self.made.repeats
        least, more = CWE_COMMON * common, count - CWE_COMMON
        numbers = made.number_sums(least + more * other)
        if self.is_long(count):
            words, extra = made.long_word_costs[self.long_order[CWE_COMMON:count]], self.long_extra()
        else:
            words, extra = made.word_costs[self.order[CWE_COMMON:count]], 0
        return None, int(words.sum()) * other + extra + int(numbers[least + more * other] - numbers[least])

    def core(self) -> tuple[tuple[str, ...], int]:
        """Lists of one entry, the sample's first word; their other entries are summed."""
        made = self.made
        question, prefix = texts.question("cwe", context=numbered([made.words[self.order[0]]]))
        prompt = (question, self.example[1], question, prefix) if self.example else (question, prefix)
        lists = [self.example_entries, [(self.order[:CWE_COMMON], made.repeats[0])]]
        return prompt, sum(self.entry_tokens(words) for words in lists if words)

    def entry_tokens(self, words: Sequence[tuple[np.ndarray, int]]) -> int:
        """Tokens of a numbered list less its first entry, which stands for the sample's first word."""
        costs, entries = self.made.word_costs, sum(len(chosen) * times for chosen, times in words)
        total = sum(int(costs[chosen].sum()) * times for chosen, times in words)
        numbers = self.made.number_sums(entries)
        return total + int(numbers[entries] - numbers[1] - costs[self.order[0]])

    def chosen(self, count: int) -> tuple[Sequence[str], np.ndarray]:
        """(word list, places in it) of a sample of `count` words."""
        words, order = (self.made.long_words, self.long_order) if self.is_long(count) else (self.made.words, self.order)
        return words, order[:count]

    def render(self, count: int) -> tuple[str, ...]:
        listed = self.listed(*self.chosen(count), *self.made.repeats, frozen(random.Random(self._key)))
        return *self.example, *texts.question("cwe", context=listed)

    def answers(self, count: int) -> list[str]:
        words, order = self.chosen(count)
        return [words[i] for i in order[:CWE_COMMON]]


@dataclass
class CommonWordSource(Source):
    """Common words: ten words many times, others seldom, in one numbered list, after one worked example."""

    data_dir: str | Path | None = None
    draft = CommonWordDraft

    @property
    def repeats(self) -> tuple[int, int]:
        return repeats(self.length)

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

    def number_costs(self, numbers: range) -> np.ndarray:
        return self.costs.of([f" {i}." for i in numbers], " a", " a")

    @property
    def most_entries(self) -> int:
        """An entry takes at least two tokens."""
        return self.length // 2 + 1


class FrequentWordDraft(Draft):
    def __init__(self, made: FrequentWordSource, rng: random.Random):
        self.made = made
        self.chosen = frozen(rng).permutation(len(made.pool))[: made.vocabulary]
        self._key = rng.getrandbits(64)
        self.outputs = [made.pool[i] for i in self.chosen[1:4]]
        self.empty = made.smallest

    def tokens(self, total: int) -> int:
        """Of a text of `total` words; the word of rank 1 is three dots."""
        counts = self.made.counts(total)
        return int(counts[1:] @ self.made.pool_costs[self.chosen[1:]]) + int(counts[0]) * self.made.dots_cost

    def fill(self, room: int) -> tuple[int, int]:
        low, bare = self.empty, self.tokens(self.empty)
        high = low + room + 1  # a word has a token or more, up to the counts cut off; widened below
        while self.tokens(high) - bare <= room:
            high *= 2
        low += bisect.bisect_right(range(low + 1, high), room, key=lambda total: self.tokens(total) - bare)
        return low, self.tokens(low) - bare

    def cut(self, total: int) -> tuple[None, int]:
        return None, self.tokens(total) - self.tokens(self.empty)

    def render(self, total: int) -> tuple[str, str]:
        entries = np.repeat(np.arange(self.made.vocabulary), self.made.counts(total))
        words = self.made.pool_bytes[self.chosen]
        words[0] = b" ..."
        context = words[frozen(random.Random(self._key)).permutation(entries)].tobytes().translate(None, b"\0")
        return texts.question("fwe", context=context[1:].decode())


def word_counts(total: int, ranks: int) -> np.ndarray:
    """int64 [ranks]: times that the word of each rank stands in a text of `total` words, total k^-2 / zeta(2)."""
    return (total * np.arange(1, ranks + 1, dtype=np.float64) ** -FWE_ALPHA / (math.pi**2 / 6)).astype(np.int64)


@dataclass
class FrequentWordSource(Source):
    """Frequent coded words: word of rank k stands N * k^-2 / zeta(2) times; rank 1 is noise ("...")."""

    draft = FrequentWordDraft

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
        return word_counts(total, self.vocabulary)

    @functools.cached_property
    def smallest(self) -> int:
        """Fewest words at which the three asked for are told apart: counts of ranks 2 to 5 fall strictly."""
        total = 1
        while not np.all(np.diff(self.counts(total)[1:5]) < 0):
            total += 1
        return total
