"""Needles in noise, essays and other needles: the tasks niah_*."""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from benchmarks.ruler import texts
from benchmarks.ruler.source import Draft, Source, draw_value, draw_values, frozen
from benchmarks.ruler.tasks import Spec

# RULER's needle depths in an essay haystack, percent.
DEPTHS = tuple(int(d) for d in np.round(np.linspace(0, 100, num=40)))

# Words kept on each side of a needle when the inside of an essay is summed and not tokenized.
RIM = 8


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
        taken: set[str] = set()
        keys = draw_values(spec.key, spec.keys, rng, taken)
        values = [draw_values(spec.value, spec.values, rng, taken) for _ in keys]
        pairs = [(key, value) for key, own in zip(keys, values) for value in own]
        rng.shuffle(pairs)
        asked = rng.sample(range(spec.keys), spec.queries)
        outputs = [(keys[i], value) for i in asked for value in values[i]]
        return cls(
            [texts.needle_of(spec.value, key, value) for key, value in pairs],
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


def places(lines: int, needles: int, rng: random.Random) -> list[int]:
    """Sorted line numbers in front of which needles stand; distinct where there are lines enough."""
    if lines >= needles:
        return sorted(rng.sample(range(lines), needles))
    return sorted(rng.choices(range(lines + 1), k=needles))


def weave(lines: list[str], needles: Sequence[str], at: Sequence[int]) -> list[str]:
    """Lines with each needle put in front of line `at`."""
    ends = [0, *at, len(lines)]
    segments = [lines[a:b] for a, b in itertools.pairwise(ends)]
    for needle, behind in zip(needles, segments[1:]):
        behind.insert(0, needle)
    return list(itertools.chain.from_iterable(segments))


class LineDraft(Draft):
    """Needles between lines. asked: place among the needles of each output."""

    def __init__(self, made: Source, rng: random.Random):
        self.made, self.needles = made, Needles.draw(made.spec, rng)
        self.sentences, self.asked, self.outputs = self.needles.sentences, self.needles.places, self.needles.outputs
        self._key = self._place_key = rng.getrandbits(64)

    def lines(self, state: Any) -> list[str]:
        raise NotImplementedError

    def places(self, lines: int) -> list[int]:
        return places(lines, len(self.sentences), random.Random(self._place_key))

    def render(self, state: Any) -> tuple[str, str]:
        lines = self.lines(state)
        context = "\n".join(weave(lines, self.sentences, self.places(len(lines))))
        return self.needles.question.replace("{context}", context), self.needles.prefix

    def depth(self, state: Any) -> list[float]:
        lines = len(self.lines(state))
        at = self.places(lines)
        return [round(100 * at[i] / max(1, lines), 2) for i in self.asked]


class NoiseDraft(LineDraft):
    made: NoiseSource
    empty = 0

    def lines(self, state: int) -> list[str]:
        return self.made.lines(state)

    def fill(self, room: int) -> tuple[int, int]:
        count = self.made.most(room)
        return count, self.made.added(count)

    def cut(self, count: int) -> tuple[None, int]:
        return None, self.made.added(count)


@dataclass
class NoiseSource(Source):
    """Lines of RULER's five noise sentences; in some editions the last may be cut to fill the budget."""

    draft: ClassVar[Callable[..., Draft]] = NoiseDraft

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


class EssayDraft(Draft):
    empty = 0

    def __init__(self, made: EssaySource, rng: random.Random):
        self.made, self.needles = made, Needles.draw(made.spec, rng)
        self.outputs = self.needles.outputs
        self.depths = sorted(rng.sample(DEPTHS, len(self.needles.sentences)))

    def fill(self, room: int) -> tuple[int, int]:
        sums = self.made.added(room)
        count = int(np.searchsorted(sums, room, side="right")) - 1
        return count, int(sums[count])

    def places(self, count: int) -> list[int]:
        """Words in front of each needle: the end of the sentence at its depth."""
        essay, plain = self.made.essay, self.made.options.rules.plain_places
        total = essay.sentences(count)
        sentences = [total * depth // 100 if plain else int(total * (depth / 100)) for depth in self.depths]
        return [essay.sentence_end(number, count) for number in sentences]

    def prompt(self, segments: Sequence[str]) -> tuple[str, str]:
        """The prompt with the needles between segments of the essay (one more than needles; some may be empty)."""
        pieces = [piece for pair in zip(segments, [*self.needles.sentences, ""]) for piece in pair][:-1]
        if self.made.options.rules.plain_places:
            pieces = [piece for piece in pieces if piece]
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
class EssaySource(Source):
    essay: texts.Essay = None  # type: ignore[assignment]
    draft = EssayDraft
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


class NeedleDraft(LineDraft):
    made: NeedleSource
    empty = ()

    def __init__(self, made: NeedleSource, rng: random.Random):
        super().__init__(made, rng)
        self._place_key = self._key ^ 1

    @functools.cached_property
    def order(self) -> np.ndarray:
        return frozen(random.Random(self._key)).permutation(len(self.made.pool))

    def fill(self, room: int) -> tuple[list[int], int]:
        """State: number of distractors, then pairs (place in the order taken out, place put in): once no further one
        fits, short ones are exchanged for longer ones while that fills the budget better.
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

    def lines(self, state: Sequence[int]) -> list[str]:
        return list(map(self.made.pool.__getitem__, self.chosen(state)))

    def cut(self, state: Sequence[int]) -> tuple[None, int]:
        return None, int(self.made.pool_costs[self.chosen(state)].sum())


@dataclass
class NeedleSource(Source):
    """A haystack of needles with other keys. Distractors come from a pool of the cell's seed, measured once."""

    draft = NeedleDraft

    @functools.cached_property
    def least_tokens(self) -> int:
        """Tokens of about the shortest needle there is."""
        rng, spec = self.rng("shortest"), self.spec
        some = [texts.needle_of(spec.value, draw_value(spec.key, rng), draw_value(spec.value, rng)) for _ in range(64)]
        return max(4, int(self.costs.of(["\n" + one for one in some], "\n" + some[0], "\n" + some[0]).min()))

    @functools.cached_property
    def pool(self) -> list[str]:
        rng, taken = self.rng("pool"), set[str]()
        size = max(512, 2 * self.length // self.least_tokens)  # twice what the longest prompt can hold
        keys = draw_values(self.spec.key, size, rng, taken)
        values = draw_values(self.spec.value, size, rng, taken)
        return [texts.needle_of(self.spec.value, key, value) for key, value in zip(keys, values)]

    @functools.cached_property
    def pool_costs(self) -> np.ndarray:
        end, start = self.pool[0][-1], self.pool[0].split(" ")[0]
        return self.costs.of(["\n" + sentence for sentence in self.pool], end, "\n" + start)
