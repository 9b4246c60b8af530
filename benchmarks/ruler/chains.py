"""Chains of variables: the task vt."""

from __future__ import annotations

import functools
import random
import string
from dataclasses import dataclass

from benchmarks.ruler import texts
from benchmarks.ruler.needles import NoiseDraft, NoiseSource, places, weave

VT_EXAMPLE_TOKENS = 500  # RULER's size of the worked example of variable tracking


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
        return texts.question("vt", edition, context=context, query=self.value, num_v=len(self.names))


class ChainDraft(NoiseDraft):
    made: ChainSource

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
        self.outputs, self.sentences = self.chain.names, self.chain.lines
        self.asked = list(range(len(self.outputs)))
        self._place_key = rng.getrandbits(64)

    def render(self, state: int) -> tuple[str, str]:
        question, prefix = self.chain.text(self.made.lines(state), self._place_key, self.made.options.edition)
        return self.example + question, prefix


@dataclass
class ChainSource(NoiseSource):
    """Variable tracking: one chain of assignments in noise, after a worked example with names and value of its own."""

    draft = ChainDraft

    @functools.cached_property
    def example_lines(self) -> int:
        """Noise lines of the worked example: RULER's 500 tokens, in windows under 1,024 at most a quarter of them. The
        edition of the lab counts without the answer prefix and takes a quarter of any window.
        """
        lab = self.options.rules.bare_end
        limit = min(VT_EXAMPLE_TOKENS, self.length // 4) if lab or self.length < 1024 else VT_EXAMPLE_TOKENS
        rng = self.rng("example size")
        key = rng.getrandbits(64)
        chain = Chain.draw(self.options.hops, 3, rng)
        lines = -1
        tokens = 0
        while tokens <= limit:
            lines += 1
            question, prefix = chain.text(self.lines(5 * (lines + 1)), key, self.options.edition)
            (tokens,) = self.costs.count([question if lab else question + prefix])
        return lines
