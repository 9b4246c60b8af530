"""Training documents in RULER's manner: a question about something hidden in the text, and its answer.

The wording is that of RULER (Hsieh et al. 2024, arXiv:2404.06654, Apache-2.0), so that a model that learned these
documents meets the same prompt when it is scored. A document is `text`, the prompt up to and including RULER's answer
prefix, and `completion`, the answer followed by the tokenizer's end-of-sequence token. Lengths are in tokens and exact:
the haystack fills most of a document, and plain text in front of the prompt the rest.

Kinds: `niah_single_1` (needle in noise), `niah_single_2` (needle in text), `niah_multikey_1` (needles of 2 to 4 keys in
text, one asked for), `vt` (chains of 2 to 4 hops in noise) and `text` (no question).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt.files import aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RETRIEVAL_KINDS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "vt")
KINDS = (*RETRIEVAL_KINDS, "text")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
NIAH = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned in the provided text?"
    " The special magic number for {key} mentioned in the provided text is"
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are {assigned} "
    "the value {value}, they are:"
)
# Both spellings are in circulation: RULER's first release and lm-eval print the second one.
ASSIGNED = ("assigned", "assgined")
LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
SAMPLE_PATH = Path(__file__).resolve().parents[2] / "endprompt" / "data" / "sample.txt"


def sentences(text: str) -> list[str]:
    """Sentences of running text, white space collapsed to single spaces."""
    return [s for s in re.split(r"(?<=[.!?]) (?=[A-Z\"'(])", " ".join(text.split())) if s]


@dataclass(frozen=True)
class Words:
    """Adjectives and nouns; a needle's key is `adjective-noun`, as in RULER."""

    adjectives: Sequence[str]
    nouns: Sequence[str]

    @classmethod
    @cache
    def installed(cls) -> Words:
        """The lists of the installed wonderwords package, those that RULER draws its keys from."""
        from wonderwords import RandomWord

        categories = RandomWord()._categories
        return cls(tuple(categories["adjectives"]), tuple(categories["nouns"]))

    def keys(self, count: int, rng: np.random.Generator) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            adjective = self.adjectives[int(rng.integers(len(self.adjectives)))]
            found[f"{adjective}-{self.nouns[int(rng.integers(len(self.nouns)))]}"] = None
        return list(found)


@dataclass(frozen=True)
class Prose:
    """Tokenised sentences in reading order, each with the space in front of it. `ids` (tokens,) uint16; sentence i is
    ids[offsets[i]:offsets[i + 1]]; `starts` (tokens,) bool marks the tokens that begin a word, where text may be cut
    without changing how the rest is tokenised."""

    ids: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_sentences(cls, parts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Prose:
        encodings = tokenizer.backend_tokenizer.encode_batch([f" {part}" for part in parts], add_special_tokens=False)
        ids = np.concatenate([np.asarray(e.ids, dtype=np.uint16) for e in encodings])
        words = [np.asarray(e.word_ids) for e in encodings]
        starts = np.concatenate([np.concatenate([[True], w[1:] != w[:-1]]) for w in words])
        return cls(ids, np.cumsum([0, *(len(w) for w in words)]), starts)

    def tail(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Exactly `count` tokens of running text, from the beginning of a word to the end of a sentence."""
        first = int(np.searchsorted(self.offsets, count))
        if first == len(self.offsets):
            raise ValueError(f"the text must be longer than the piece asked for: {count=} tokens={len(self.ids)}")
        for _ in range(1000):
            end = int(self.offsets[rng.integers(first, len(self.offsets))])
            if count == 0 or self.starts[end - count]:
                return self.ids[end - count : end]
        raise ValueError(f"no piece of the text begins with a word: {count=}")

    def run(self, budget: int, rng: np.random.Generator) -> tuple[int, int]:
        """Range of whole consecutive sentences, from a random one on, of at most `budget` tokens together."""
        first = int(rng.integers(max(1, int(np.searchsorted(self.offsets, self.offsets[-1] - budget)))))
        last = int(np.searchsorted(self.offsets, self.offsets[first] + budget, side="right")) - 1
        return first, max(first, last)

    def text(self, first: int, last: int, tokenizer: PreTrainedTokenizerFast) -> str:
        """Sentences [first, last) as text, without the leading space."""
        ids = self.ids[self.offsets[first] : self.offsets[last]].tolist()
        return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)[1:] if ids else ""


def _count(text: str, tokenizer: PreTrainedTokenizerFast) -> int:
    return len(encode(text, tokenizer))


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids, nothing added. The backend is called directly: it is several times faster than the wrapper."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@cache
def _noise_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    return _count(NOISE + "\n", tokenizer)


def _digits(low: int, high: int, rng: np.random.Generator) -> str:
    return str(int(rng.integers(low, high)))


def _needle_in_noise(length: int, tokenizer: Any, rng: np.random.Generator, words: Words, prose: Prose) -> tuple:
    (key,), value = words.keys(1, rng), _digits(10**6, 10**7, rng)
    needle = NEEDLE.format(key=key, value=value)
    completion = f" {value}."
    fixed = _count(NIAH.format(context=needle + "\n", key=key) + completion, tokenizer) + 1
    lines = [NOISE] * max(1, (length - fixed) // _noise_tokens(tokenizer))
    lines.insert(int(rng.integers(len(lines))), needle)
    return NIAH.format(context="\n".join(lines), key=key), completion


def _needles_in_text(
    length: int, tokenizer: Any, rng: np.random.Generator, words: Words, prose: Prose, count: int = 1
) -> tuple:
    keys = words.keys(count, rng)
    values = [_digits(10**6, 10**7, rng) for _ in keys]
    needles = [NEEDLE.format(key=key, value=value) for key, value in zip(keys, values)]
    asked = int(rng.integers(count))
    completion = f" {values[asked]}."
    fixed = _count(NIAH.format(context=" ".join(needles), key=keys[asked]) + completion, tokenizer) + 1
    first, last = prose.run(max(0, length - fixed), rng)
    cuts = sorted(rng.integers(first, last + 1, size=count).tolist())
    parts = []
    for needle, start, stop in zip([*needles, ""], [first, *cuts], [*cuts, last]):
        parts += [prose.text(start, stop, tokenizer), needle]
    return NIAH.format(context=" ".join(part for part in parts if part), key=keys[asked]), completion


def _needle_among_keys(length: int, tokenizer: Any, rng: np.random.Generator, words: Words, prose: Prose) -> tuple:
    # Four keys as in RULER where they leave room, fewer in short documents.
    most = int(np.clip((length - 90) // 30, 2, 4))
    return _needles_in_text(length, tokenizer, rng, words, prose, count=int(rng.integers(2, most + 1)))


def _variable_chain(length: int, tokenizer: Any, rng: np.random.Generator, words: Words, prose: Prose) -> tuple:
    hops = int(rng.integers(2, int(np.clip((length - 80) // 20, 2, 4)) + 1))
    size = 3 if rng.random() < 0.2 else 5
    names: dict[str, None] = {}
    while len(names) <= hops:
        names["".join(rng.choice(LETTERS, size=size))] = None
    variables, value = list(names), _digits(10**4, 10**5 - 1, rng)
    chain = [f"VAR {variables[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    fields = {"value": value, "count": hops + 1, "assigned": ASSIGNED[rng.random() < 0.5]}
    completion = f" {' '.join(variables)}."
    fixed = _count(VT.format(context="\n".join(chain), **fields) + completion, tokenizer) + hops + 2
    spaced = rng.random() < 0.25
    noise = NOISE + "\n" if spaced else NOISE
    lines = [noise] * max(0, (length - fixed) // (_noise_tokens(tokenizer) + spaced))
    if len(lines) <= len(chain) and rng.random() < 0.5:
        # Little noise: in single sentences, as RULER has it then; whole lines are what long prompts consist of.
        lines = [s for line in lines for s in re.findall(r"[^.]+\.", line.strip().replace(". ", "."))]
    for gap, line in reversed(list(zip(sorted(rng.integers(0, max(1, len(lines)), size=len(chain)).tolist()), chain))):
        lines.insert(gap, line)
    # Lines joined by newlines are RULER's; joined by spaces, with a newline in the noise, lm-eval's.
    context = (" " if spaced else "\n").join(lines if spaced or rng.random() < 0.5 else map(str.rstrip, lines))
    return VT.format(context=context, **fields), completion


_MAKERS = {
    "niah_single_1": _needle_in_noise,
    "niah_single_2": _needles_in_text,
    "niah_multikey_1": _needle_among_keys,
    "vt": _variable_chain,
}


def _prompt(
    kind: str, most: int, least: int, tokenizer: Any, rng: np.random.Generator, words: Words, prose: Prose
) -> tuple[str, str, list[int]]:
    """Text, completion with its end, and the ids of both: at most `most` tokens."""
    end = tokenizer.eos_token
    budget = int(rng.integers(min(least, most), most + 1)) - 1
    for _ in range(20):
        text, completion = _MAKERS[kind](budget, tokenizer, rng, words, prose)
        text_ids, completion_ids = encode(text, tokenizer), encode(completion + end, tokenizer)
        if len(text_ids) + len(completion_ids) <= most:
            return text, completion + end, text_ids + completion_ids
        budget -= 8
    raise ValueError(f"a document of this kind does not fit: {kind=} tokens={most}")


def document(
    kind: str,
    tokens: int,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    prose: Prose,
    words: Words | None = None,
    shortest: int = 128,
    longest: int | None = None,
) -> dict[str, str]:
    """One document of exactly `tokens` tokens: {"text": ..., "completion": ...}. The prompt's own length is uniform
    between `shortest` (or what the kind needs) and `longest` (default `tokens`); text from `prose` is put in front of
    it. `text` and `completion` tokenise to the concatenation of their tokens. Raises ValueError if the kind is unknown
    or does not fit into `tokens`."""
    if kind == "text":
        ids = [*prose.tail(tokens - 1, rng).tolist(), tokenizer.eos_token_id]
        text, completion = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False), ""
    elif kind in _MAKERS:
        most = tokens if longest is None else min(longest, tokens)
        text, completion, ids = _prompt(kind, most, shortest, tokenizer, rng, words or Words.installed(), prose)
        front = tokens - len(ids)
        if front:
            gap = encode("\n\n" if front > 1 else "\n", tokenizer)
            ids = [*prose.tail(front - len(gap), rng).tolist(), *gap, *ids]
            text = tokenizer.backend_tokenizer.decode(ids[:front], skip_special_tokens=False) + text
    else:
        raise ValueError(f"unknown kind of document: {kind=}, one of {', '.join(KINDS)}")
    if encode(text, tokenizer) + encode(completion, tokenizer) != ids or encode(text + completion, tokenizer) != ids:
        raise ValueError(f"the tokenizer does not split between text and completion: {kind=} {text[-40:]=}")
    return {"text": text, "completion": completion}


def _sample_half(second: bool) -> list[str]:
    paragraphs = SAMPLE_PATH.read_text(encoding="utf-8").split("\n\n")
    middle = len(paragraphs) // 2
    return [s for p in (paragraphs[middle:] if second else paragraphs[:middle]) for s in sentences(p)]


def sample_training_sentences() -> list[str]:
    """Sentences of the shipped sample's first half: text for training documents."""
    return _sample_half(second=False)


def sample_haystack_sentences() -> list[str]:
    """Sentences of the shipped sample's second half: the haystack of the tasks, never trained on."""
    return _sample_half(second=True)


EQUAL_MIXTURE: Mapping[str, float] = dict.fromkeys(KINDS, 1.0)


def write_documents(
    path_jsonl: str | Path,
    n: int,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    window: int,
    mixture: Mapping[str, float] = EQUAL_MIXTURE,
    *,
    prose: Prose | None = None,
    words: Words | None = None,
    shortest: int = 128,
    longest: int | None = None,
) -> Path:
    """Write n documents of exactly `window` tokens, one JSON object a line; kinds drawn by the mixture's weights. Text
    comes from the first half of the shipped sample unless `prose` is given. The same arguments write the same bytes."""
    rng = np.random.default_rng(seed)
    prose = prose or Prose.from_sentences(sample_training_sentences(), tokenizer)
    weights = np.array(list(mixture.values()), dtype=float)
    kinds = rng.choice(list(mixture), size=n, p=weights / weights.sum())
    path = Path(path_jsonl)
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path).open("w", encoding="utf-8") as file:
        for kind in kinds:
            made = document(
                str(kind), window, tokenizer, rng, prose=prose, words=words, shortest=shortest, longest=longest
            )
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
    aside(path).replace(path)
    return path
