"""What a task's samples are drawn from, and random numbers that depend on the sample alone."""

import functools
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from benchmarks.ruler import fit, texts
from benchmarks.ruler.tasks import GENERATOR, SPECS, Options, Spec
from benchmarks.ruler.tokens import Costs, assembler, counter


class Draft:
    """One sample before its haystack has a size. `empty`: state (JSON) of the smallest haystack."""

    outputs: list[str]
    empty: Any

    def fill(self, room: int) -> tuple[Any, int]:
        """State (JSON) of the largest haystack of at most `room` tokens above the empty one, and its tokens."""
        raise NotImplementedError

    def render(self, state: Any) -> tuple[str, ...]:
        """(prompt up to the end of the question, answer prefix); an example with its answer may stand in front."""
        raise NotImplementedError

    def answers(self, state: Any) -> list[str]:
        return list(self.outputs)

    def depth(self, state: Any) -> list[float]:
        """Percent of the context in front of the needle of each output, where there are needles."""
        return []

    def cut(self, state: Any) -> tuple[tuple[str, ...] | None, int]:
        """(the prompt less the haystack's inner parts, or None for the smallest haystack's, the tokens left out)."""
        raise NotImplementedError

    def core(self) -> tuple[tuple[str, ...], int]:
        """(a prompt, tokens to add): together the size of the smallest haystack's prompt."""
        return self.render(self.empty), 0


def stream(*key: Any) -> random.Random:
    """A generator that depends on nothing but the key (Python's own hash seed plays no part)."""
    return random.Random("/".join(str(part) for part in (GENERATOR, *key)))


FROZEN = np.random.RandomState(0)


def frozen(rng: random.Random) -> np.random.RandomState:
    """NumPy's legacy generator, whose streams are the same in every version: for large permutations. There is one,
    seeded anew by every call (to make one takes ten times as long): draw from it before the next call.
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
    _number_sums: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64), init=False)
    draft: ClassVar[Callable[..., Draft]]  # of (this source, the sample's generator)

    @property
    def questions(self) -> dict[str, Any] | None:
        """Of question answering: how many questions the set has, and whether it is the published one, whole."""
        return None

    def fitted(self, drafts: Sequence[Draft], kept: int) -> list[tuple[Any, int]]:
        """(state, prompt tokens) of each draft, with `kept` tokens for generation."""
        assemble = assembler(self.tokenizer, self.options)
        return fit.fit(self.length, self, drafts, kept, counter(self.tokenizer), assemble)

    @property
    def spec(self) -> Spec:
        return SPECS[self.task]

    @functools.cached_property
    def costs(self) -> Costs:
        return Costs(self.tokenizer)

    def rng(self, index: int | str) -> random.Random:
        return stream(self.task, self.length, self.seed, index)

    def draw(self, index: int) -> Draft:
        return self.draft(self, self.rng(index))

    def number_costs(self, numbers: range) -> np.ndarray:
        """int64: tokens of numbers from 1 on as they stand in the haystack's list."""
        raise NotImplementedError

    def number_sums(self, count: int) -> np.ndarray:
        """int64 [k]: tokens of the first k numbers of a list; k to `count` at least."""
        while len(self._number_sums) <= count:
            known = len(self._number_sums) - 1
            sums = np.cumsum(self.number_costs(range(known + 1, 2 * known + 1025)))
            self._number_sums = np.append(self._number_sums, self._number_sums[-1] + sums)
        return self._number_sums

    def prepare(self, drafts: Sequence[Draft], room: int) -> None:
        """Measures together what the drafts will ask for one by one, where that saves time."""
