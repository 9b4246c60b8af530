"""RULER's 13 tasks at any length: prompts that fit a token budget exactly, seeded per task, length and sample.

Hsieh et al. 2024, arXiv:2404.06654. A sample is drawn (keys, values, order) without regard to the tokenizer, then its
haystack is grown to the largest size at which BOS + chat template + prompt + answer prefix + tokens kept for generation
fit the budget, its length. Sizes follow from token counts of the haystack's units and of words, measured once in their
surroundings; whether counts add up is checked on whole prompts, and where they do not, every prompt is tokenized and
the size searched for. A prompt never exceeds its budget. Importing this loads none of lm_eval, datasets, wonderwords,
torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ruler import texts
from benchmarks.ruler.chains import ChainSource
from benchmarks.ruler.needles import EssaySource, NeedleSource, NoiseSource
from benchmarks.ruler.questions import DocumentSource
from benchmarks.ruler.source import Draft, Source
from benchmarks.ruler.tasks import DEFAULTS, GENERATOR, SPECS, Options, check_task, reserve
from benchmarks.ruler.tokens import assembler
from benchmarks.ruler.words import CommonWordSource, FrequentWordSource


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
    needle), `haystack`, `haystack_sha256`, `task`, `index`, `seed`. `options` are those of `Options`. Raises ValueError
    for an unknown task, a length too short for it (naming the shortest), missing data.
    """
    return list(Cell.build(task, length, tokenizer, n, seed, data_dir, Options(**options)))


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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def sample(self, index: int, whole: bool) -> dict[str, Any]:
        """A sample; without its `input`, which takes the most time to make, if it is not wanted whole."""
        recipe, index = self.recipe, range(len(self))[index]
        state, tokens = recipe["samples"][index]
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


def samples_sha256(samples: Iterable[Mapping[str, Any]]) -> str:
    """One hash over every prompt and its answers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest_sample(digest, sample)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_sample(digest: Any, sample: Mapping[str, Any]) -> None:
    for text in (sample["input"], *sample["outputs"]):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)


def source(task: str, length: int, tokenizer: Any, seed: int, data_dir: str | Path | None, options: Options) -> Source:
    """The task's source. Raises ValueError if its data are missing."""
    spec = SPECS[task]
    common = (task, length, tokenizer, seed, options)
    if options.rules.replayed:
        from benchmarks.ruler import replay

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
