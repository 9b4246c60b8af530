"""Needles in noise, essays and other needles: the tasks niah_*."""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.ruler import texts
from benchmarks.ruler.source import Draft, Source, draw_value, draw_values, frozen
from benchmarks.ruler.tasks import Spec

# RULER's needle depths in an essay haystack, percent.
DEPTHS = tuple(int(d) for d in np.round(np.linspace(0, 100, num=40)))

# Words kept on each side of a needle when the inside of an essay is summed and not tokenized.
RIM = 8


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
