"""RULER's samples as its own generator makes them: its random draws in their order, its steps, its sizes.

One generator of Python's and one of NumPy's, seeded with 42 (+ seed, as RULER seeds its chunks), serve a whole cell, so
a sample depends on those before it; kept of it are the generators' state in front of it and the size of its haystack.
Editions: "2024" (the paper's tables, f36197b: the haystack grows in steps until it is too long) and "2025-ruler"
(c3f5e3b: a binary search). Lengths are counted as RULER counts them, without BOS and, in fwe of 2024, without room for
the answer: such a prompt may be longer than the window.
"""

import base64
import functools
import itertools
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ruler import chains, needles, tasks, texts
from benchmarks.ruler import questions as ruler_questions
from benchmarks.ruler import words as ruler_words
from benchmarks.ruler.source import Draft, Source, draw_value
from benchmarks.ruler.tokens import assembler, counter
from endprompt.files import remembered_sha256

SEED = 42
# Draws of one sample that may be too long, one after the other: RULER itself goes on for ever.
TRIES = 200
EXAMPLE_VALUE = "12345"  # of the worked example of vt before it is redrawn
ESTIMATE_WORDS = 4096  # from which RULER estimates the size of common-word lists

State = list[Any]  # [size of the haystack, Python's generator, NumPy's or None, how often the documents were shuffled]


@dataclass
class Made:
    """One sample: `parts` as `Draft.render` gives them; the answers as RULER lists them."""

    parts: tuple[str, ...]
    outputs: list[str]
    depth: list[float] = field(default_factory=list)


def grown(
    make: Callable[[int], Made],
    measure: Callable[[Made], int],
    length: int,
    step: int,
    most: int | None = None,
    looks_first: bool = False,
) -> int:
    """Size of the haystack that edition 2024 comes to, `most` at most; looks_first: looked at before the next step."""
    size, total = step, 0
    while total < length:
        total = measure(make(size))
        if total > length:
            return size - step
        if looks_first and most is not None and size > most:
            return most
        size += step
        if not looks_first and most is not None and size > most:
            return most
    return size


def searched(make: Callable[[int], Any], measure: Callable[[Any], int], length: int, low: int, high: int) -> int:
    """Size of the haystack that the binary search of the later edition comes to."""
    best = low
    while low <= high:
        middle = (low + high) // 2
        if measure(make(middle)) <= length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def most_expected(length: int, step: int, tokens: int) -> int:
    """Three times the size that a haystack of `step`, whose prompt has so many tokens, lets expect."""
    return max(int(length / (tokens / step) * 3), 2 * step)


@dataclass
class ReplaySource(Source):
    """The generators, and what the tasks have in common."""

    step: int = 10  # by which the haystack grows, and shrinks where a sample is too long

    def __post_init__(self) -> None:
        self.python, self.numpy = random.Random(SEED + self.seed), np.random.RandomState(SEED + self.seed)
        self.assemble = assembler(self.tokenizer, self.options)

    @property
    def old(self) -> bool:
        return self.options.edition == "2024"

    @property
    def kept(self) -> int:
        return tasks.reserve(self.task, self.options)

    def make(self, size: int, index: int = 0) -> Made:
        """Sample `index` with a haystack of `size`, from the generators as they are. May raise ValueError."""
        raise NotImplementedError

    def shuffled(self, items: list[Any]) -> list[Any]:
        """In the order in which RULER puts every list of this size."""
        random.Random(SEED + self.seed).shuffle(items)
        return items

    def tokens(self, text: str) -> int:
        """As RULER counts: nothing is added."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def measured(self, made: Made) -> int:
        """Tokens of a prompt and of its answer's room."""
        return self.tokens(self.assemble(*made.parts)) + self.kept

    def answered(self, made: Made) -> int:
        """`measured` with the answers behind the prompt, as edition 2024 sizes its haystacks."""
        return self.tokens(self.assemble(*made.parts) + self.behind(made)) + self.kept

    def behind(self, made: Made) -> str:
        return f" {made.outputs}"

    def size(self, make: Callable[[int], Made] | None = None, more: int = 0) -> int:
        """Size of the cell's haystacks. more: tokens in front of what `make` makes."""
        make = make or self.make
        if self.old:
            return grown(make, lambda made: self.answered(made) + more, self.length, self.step, self.most)
        high = self.highest(make)
        return searched(make, lambda made: self.measured(made) + more, self.length, self.step, high)

    def highest(self, make: Callable[[int], Made]) -> int:
        """The largest size that the search looks at: three times what a first sample lets expect."""
        return most_expected(self.length, self.step, self.tokens(self.assemble(*make(self.step).parts)))

    @property
    def most(self) -> int | None:
        """Size at which edition 2024 stops to grow."""
        return None

    def draw(self, index: int) -> Draft:
        return ReplayDraft(self, index)

    def fitted(self, drafts: Sequence[Draft], kept: int) -> list[tuple[Any, int]]:
        """(state, prompt tokens as a model receives them) of each draft. Raises ValueError if one does not fit."""
        states = self.states(len(drafts))
        count = counter(self.tokenizer)
        return [(state, count([self.assemble(*draft.render(state))])[0]) for draft, state in zip(drafts, states)]

    def states(self, n: int) -> list[State]:
        size = self.size()
        return [self.placed(index, size, self.step, self.make, self.fits) for index in range(n)]

    def fits(self, made: Made) -> bool:
        return self.measured(made) <= self.length

    def placed(
        self, index: int, size: int, step: int, make: Callable[[int, int], Made], fits: Callable[[Made], bool]
    ) -> State:
        """State of a sample; one that is too long is drawn again, with a haystack smaller by a step if it has more."""
        for _ in range(TRIES):
            state = self.snapshot(size)
            try:
                if fits(make(size, index)):
                    return state
            except ValueError:
                pass
            if size > step:
                size -= step
        raise self.too_short()

    def too_short(self) -> ValueError:
        return ValueError(
            f"length is too short for task {self.task} of edition {self.options.edition}, whose own generator does not "
            f"end with it: {self.length} with this tokenizer and {self.kept} tokens kept for generation"
        )

    def snapshot(self, size: int) -> State:
        return [size, _text_of(self.python.getstate()[1]), None, 0]

    def restored(self, state: State, index: int) -> Made:
        """The sample of a state."""
        self.python.setstate((3, tuple(_numbers_of(state[1])), None))
        return self.make(state[0], index)


def _text_of(numbers: Sequence[int]) -> str:
    return base64.b64encode(np.asarray(numbers, dtype="<u4").tobytes()).decode()


def _numbers_of(text: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), dtype="<u4").tolist()


class ReplayDraft(Draft):
    """Only its state tells size and answers, which depend on the samples before it. Sizes are RULER's own."""

    def __init__(self, made: ReplaySource, index: int):
        self.made, self.index = made, index
        self.outputs: list[str] = []
        self.empty: State = []
        self._last: tuple[State, Made] | None = None

    def at(self, state: State) -> Made:
        if self._last is None or self._last[0] != state:
            self._last = (state, self.made.restored(state, self.index))
        return self._last[1]

    def render(self, state: State) -> tuple[str, ...]:
        return self.at(state).parts

    def answers(self, state: State) -> list[str]:
        return list(dict.fromkeys(self.at(state).outputs))

    def depth(self, state: State) -> list[float]:
        return self.at(state).depth


def source(
    task: str, length: int, tokenizer: Any, seed: int, options: tasks.Options, data_dir: str | Path | None
) -> ReplaySource:
    """The task's source. Raises ValueError if its data are missing."""
    spec, common = tasks.SPECS[task], (task, length, tokenizer, seed, options)
    if spec.family == "qa":
        library = texts.library(spec.dataset, data_dir, task)
        return ReplayDocuments(*common, library.name, library.sha256, library=library)
    if spec.haystack == "essay":
        essay = texts.essay(options.haystack_text, data_dir, task)
        name = essay.name if texts.has_punkt() else f"{essay.name}, sentences by punctuation"
        return ReplayNeedles(*common, name, essay.sha256, step=500, essay=essay)
    if spec.family == "cwe":
        return ReplayCommonWords(*common, "words", data_dir=data_dir)
    if spec.family == "fwe":
        return ReplayFrequentWords(*common, "coded words")
    if spec.family == "vt":
        return ReplayChains(*common, "noise", step=5 if length < 4096 and options.edition != "2024" else 10)
    return ReplayNeedles(*common, spec.haystack, step=5 if length < 4096 else 25)


@dataclass
class ReplayNeedles(ReplaySource):
    essay: texts.Essay | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sentences = functools.lru_cache(maxsize=4)(self._sentences)

    def behind(self, made: Made) -> str:
        return " ".join(made.outputs)

    def size(self, make: Callable[[int], Made] | None = None, more: int = 0) -> int:
        if self.old and self.essay is not None:
            return grown(self.make, self.answered, self.length, self.step, len(self.words), looks_first=True)
        return super().size(make, more)

    @functools.cached_property
    def words(self) -> list[str]:
        """The essays as RULER splits them: white space at their ends gives an empty word."""
        assert self.essay is not None
        first, last = ([""] if edge else [] for edge in self.essay.edges)
        return [*first, *self.essay.words, *last]

    def _sentences(self, size: int) -> list[str]:
        """Of the first `size` words; the later edition repeats the text, the earlier one ends with it."""
        words = self.words
        if size > len(words) and not self.old:
            words = words * -(-size // len(words))
        return texts.sentences(" ".join(words[:size]).strip())

    def value(self, kind: str) -> str:
        if kind == "words":
            return texts.sorted_key_word(self.python.randrange(texts.sorted_key_words()))
        return draw_value(kind, self.python)

    def make(self, size: int, index: int = 0) -> Made:
        spec, python = self.spec, self.python
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(spec.keys):
            keys.append(self.value(spec.key))
            values.append([self.value(spec.value) for _ in range(spec.values)])
        pairs = self.shuffled([(key, value) for key, own in zip(keys, values) for value in own])
        if self.essay is not None:
            lines = self.sentences(size)
            depths = sorted(int(depth) for depth in python.sample(needles.DEPTHS, len(pairs)))
            at = [int(len(lines) * (depth / 100)) for depth in depths]
            place = [float(depth) for depth in depths]
        else:
            lines = ["".join(texts.noise())] * size
            if spec.haystack == "needle":
                lines = [texts.needle_of(spec.value, self.value(spec.key), self.value(spec.value)) for _ in range(size)]
            at = sorted(python.sample(range(size), len(pairs)))
            pairs = pairs[::-1]  # the first one is put in the hindmost place
            place = [round(100 * i / size, 2) for i in at]
        sentences = [texts.needle_of(spec.value, key, value) for key, value in pairs]
        if self.essay is not None:
            first, *others = [" ".join(lines[a:b]) for a, b in zip([0, *at], [*at, len(lines)])]  # some may be empty
            context = " ".join([first, *itertools.chain.from_iterable(zip(sentences, others))])
        else:
            context = "\n".join(needles.weave(lines, sentences, at))
        asked = python.sample(range(spec.keys), spec.queries)
        outputs = [(keys[i], value) for i in asked for value in values[i]]
        question, prefix = needles.needle_question(spec, [keys[i] for i in asked])
        return Made(
            (question.replace("{context}", context), prefix),
            [value for _, value in outputs],
            [place[pairs.index(pair)] for pair in outputs],
        )


@dataclass
class ReplayChains(ReplaySource):
    """A worked example is made first, by the same way to a length of 500 tokens, and put in front of all samples."""

    def snapshot(self, size: int) -> State:
        drawn: Any = self.numpy.get_state(legacy=True)
        words, place = drawn[1:3]
        return [*super().snapshot(size)[:2], _text_of([*words.tolist(), place]), 0]

    def restored(self, state: State, index: int) -> Made:
        example = self.example  # drawn before the generators are set
        *words, place = _numbers_of(state[2])
        self.numpy.set_state(("MT19937", np.array(words, dtype=np.uint32), place, 0, 0.0))
        made = super().restored(state, index)
        return self.shown(made, example) if self.old else made

    def number(self) -> str:
        return str(self.numpy.randint(10000, 99999))

    def chain(self, letters: int, value: str | None = None) -> chains.Chain:
        count = self.options.hops + 1

        names: list[str] = []
        while len(set(names)) < count:
            names.append("".join(self.python.choices(string.ascii_uppercase, k=letters)))
        made = chains.Chain(names, value or self.number())
        if len(names) > count:  # two had the same name: RULER begins a second chain, and fails for lack of names
            if value is None:
                self.number()
            raise ValueError("two variables have one name")
        return made

    def woven(self, chain: chains.Chain, size: int) -> tuple[str, list[float]]:
        """(noise with the assignments in it, depth of each)."""
        line = "".join(texts.noise())
        if self.old:
            lines = [line + "\n"] * size
            if size <= len(chain.names):
                parts = [part for one in lines for part in one.split(".")]
                lines = [part + "." if part.strip() else part for part in parts]
        else:
            lines = [line] * size
        at = sorted(self.python.sample(range(len(lines)), len(chain.names)))
        context = (" " if self.old else "\n").join(needles.weave(lines, chain.lines, at))
        return context.replace(". \n", ".\n"), [round(100 * i / len(lines), 2) for i in at]

    def first_example(self, size: int, index: int = 0) -> Made:
        """The worked example before its names are drawn again. That of 2024 lost line ends and its last word."""
        chain = self.chain(3, None if self.old else EXAMPLE_VALUE)
        context, _ = self.woven(chain, size)
        body = texts.wording("vt", self.options.edition).template
        if self.old:
            turn = self.assemble(body, "")
            body = " ".join(turn[turn.index(body[:20]) :].split()[:-1])
        question = body.replace("{context}", context).replace("{query}", chain.value)
        return Made((question, chain.asked("", self.options.edition)[1]), chain.names)

    @functools.cached_property
    def example(self) -> tuple[str, list[str]]:
        """(text, names) of the worked example."""
        limit, step, make = chains.VT_EXAMPLE_TOKENS, 5, self.first_example
        found: list[Made] = []

        def measure(made: Made, behind: str = "") -> int:
            return self.tokens("".join(made.parts) + behind) + (self.kept if self.old else 0)

        if self.old:
            size = grown(make, lambda made: measure(made, self.behind(made)), limit, step)
        else:
            size = searched(make, measure, limit, step, most_expected(limit, step, measure(make(step))))

        def fits(made: Made) -> bool:
            found[:] = [made]
            return measure(made) <= limit

        # In 2024 the example's haystack does not shrink.
        self.placed(0, size, size if self.old else step, make, fits)
        made = found[0]
        end = "\n\n" if self.old else "\n"
        return f"{''.join(made.parts)} {' '.join(made.outputs)}{end}", made.outputs

    def shown(self, made: Made, example: tuple[str, list[str]]) -> Made:
        """The sample with the worked example in front."""
        question, prefix = made.parts
        text, names = example
        if self.old:
            text = f" {text}\n"
        else:  # names are redrawn one after the other, wherever they stand by then
            for name in names:
                text = text.replace(name, "".join(self.python.choices(string.ascii_uppercase, k=len(name))))
            text = text.replace(EXAMPLE_VALUE, self.number())
        return Made((f"{text}\n{question}", prefix), made.outputs, made.depth)

    def bare(self, size: int, index: int = 0) -> Made:
        chain = self.chain(5)
        context, depth = self.woven(chain, size)
        return Made(chain.asked(context, self.options.edition), chain.names, depth)

    def make(self, size: int, index: int = 0) -> Made:
        """In 2024 the example is put in front of a sample that was found to fit, hence not here."""
        made = self.bare(size)
        return made if self.old else self.shown(made, self.example)

    def states(self, n: int) -> list[State]:
        more = self.tokens(self.example[0])
        size, front = self.size(self.bare, more), more if self.old else 0

        def fits(made: Made) -> bool:
            return self.measured(made) + front <= self.length

        step = size if self.old else self.step
        return [self.placed(index, size, step, self.make, fits) for index in range(n)]


@dataclass
class ReplayCommonWords(ReplaySource):
    data_dir: str | Path | None = None

    @functools.cached_property
    def words(self) -> list[str]:
        return self.shuffled(list(texts.common_words()))

    @functools.cached_property
    def long_words(self) -> tuple[str, ...]:
        path = texts.data_file("words", self.data_dir, f"cwe at length {self.length}")
        self.haystack, self.haystack_sha256 = path.name, remembered_sha256(path)
        return texts.more_words(path)

    @property
    def most(self) -> int | None:
        return len(self.words)

    def behind(self, made: Made) -> str:
        return " " + ruler_words.numbered(made.outputs)

    def highest(self, make: Callable[[int], Made]) -> int:
        each = self.tokens(self.assemble(*make(ESTIMATE_WORDS).parts)) / ESTIMATE_WORDS
        return max(int(self.length // each) * 2, 2 * self.step)

    def listed(self, size: int, common: int, other: int) -> tuple[str, list[str]]:
        """(numbered list, its common words) of `size` words."""
        words = self.words if size <= len(self.words) or self.old else self.long_words
        chosen = self.python.sample(words, size)
        often, seldom = chosen[: ruler_words.CWE_COMMON], chosen[ruler_words.CWE_COMMON :]
        return ruler_words.numbered(self.shuffled(often * common + seldom * other)), often

    def make(self, size: int, index: int = 0) -> Made:
        shown, answer = self.listed(*ruler_words.worked_example(self.length))
        listed, outputs = self.listed(size, *ruler_words.repeats(self.length))
        example, prefix = texts.question("cwe", context=shown)
        question, _ = texts.question("cwe", context=listed)
        gap = "" if self.old else " "
        return Made((example, f"{prefix}{gap}{ruler_words.numbered(answer)}\n", question, prefix), outputs)


@dataclass
class ReplayFrequentWords(ReplaySource):
    @property
    def limit(self) -> int:
        """Tokens of the prompt; 2024 keeps none for the answer."""
        return self.length if self.old else self.length - self.kept

    def vocabulary(self) -> list[str]:
        """Coded words by their rank; the first is noise."""
        size = self.limit // 50

        words: set[str] = set()
        while len(words) < size:
            words.add("".join(self.python.choices(string.ascii_lowercase, k=ruler_words.FWE_LETTERS)))
        return ["...", *self.shuffled(sorted(words))[1:]]

    def text(self, words: Sequence[str], total: int) -> Made:
        counts = ruler_words.word_counts(total, len(words)).tolist()
        listed = [word for word, count in zip(words, counts) for _ in range(count)]
        return Made(texts.question("fwe", context=" ".join(self.shuffled(listed))), list(words[1:4]))

    def make(self, size: int, index: int = 0) -> Made:
        return self.text(self.vocabulary(), size)

    def states(self, n: int) -> list[State]:
        if self.limit // 50 < 4:
            raise self.too_short()
        words, step = self.vocabulary(), self.limit // 32
        total = self.limit // ruler_words.FWE_LETTERS
        while self.tokens(self.assemble(*self.text(words, total).parts)) < self.limit:
            total += step
        states = []
        for _ in range(n):
            size, state = total - step, self.snapshot(0)
            words = self.vocabulary()
            while size > 0 and self.tokens(self.assemble(*self.text(words, size).parts)) > self.limit:
                size -= step
            if size <= 0:
                raise self.too_short()
            states.append([size, *state[1:]])
        return states


@dataclass
class ReplayDocuments(ReplaySource):
    library: texts.Library = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.put(0)

    def put(self, shuffles: int) -> None:
        """The documents' order after so many shuffles of the whole library."""
        self.order, self.shuffles = list(range(len(self.library.documents))), shuffles
        for _ in range(shuffles):
            self.shuffled(self.order)

    @property
    def questions(self) -> dict[str, Any]:
        return {"count": len(self.library.questions), "whole": self.library.whole}

    @property
    def most(self) -> int | None:
        return len(self.library.documents)

    def states(self, n: int) -> list[State]:
        ruler_questions.question_of(self.library, n - 1, self.task)
        return super().states(n)

    def snapshot(self, size: int) -> State:
        return [*super().snapshot(size)[:3], self.shuffles]

    def restored(self, state: State, index: int) -> Made:
        if self.shuffles != state[3]:
            self.put(state[3])
        return super().restored(state, index)

    def make(self, size: int, index: int = 0) -> Made:
        question = ruler_questions.question_of(self.library, index, self.task)
        documents, own, related = self.library.documents, list(question.context), list(question.related)
        if size < len(documents):
            missing = size - len(own) - len(related)
            if missing > 0:
                known = {*own, *related}
                others = [i for i in range(len(documents)) if i not in known]
                own += related + self.python.sample(others, missing)
            else:
                own += self.python.sample(related, size - len(own))
            chosen = [self.order[i] for i in self.shuffled(own)]
        elif self.old:  # all documents, and their order is kept for the samples that follow
            chosen = self.shuffled(self.order)
            self.shuffles += 1
        else:
            chosen = self.shuffled((self.order * -(-size // len(documents)))[:size])
        context = ruler_questions.document_context([documents[i] for i in chosen])
        asked, needle = texts.question("qa", query=question.text, context=context), question.context[0]
        depth = 100 * chosen.index(needle) / max(1, len(chosen) - 1) if needle in chosen else 0
        return Made(asked, list(question.given), [round(depth, 2)] * len(question.answers))
