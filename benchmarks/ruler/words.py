"""Common and frequent words: the tasks cwe and fwe."""

from __future__ import annotations

import bisect
import functools
import math
import operator
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.ruler import texts
from benchmarks.ruler.source import Draft, Source, frozen
from benchmarks.ruler.tasks import reserve
from endprompt.files import remembered_sha256

CWE_COMMON = 10

FWE_ALPHA = 2.0

FWE_LETTERS = 6


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
        low += bisect.bisect_right(range(low + 1, high), room, key=lambda total: self.tokens(total) - bare)
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
