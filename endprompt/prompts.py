"""End prompts: the short segment after the context that is placed at the far positions.

A cue is a fixed text drawn from a set: a model can learn to predict it without looking at the context. Ours must be
read from it: `recall`, a cue and a span copied from the context, with loss on the span after its first few tokens;
`question`, the last line of a document with a completion, and `recall` for the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: The paper's end prompts, section 4.3. EP_2 is the tokenizer's own end-of-turn token of Llama 3.
CUES = {
    "EP_1": "This is the end of text, please pay attention here",
    "EP_2": "<|eot_id|>",
    "EP_3": "End.",
}
RECALL_CUE = "\nQuote from the text above:"
LITERAL = "text:"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class EndPrompt:
    """tokens: int64 (b,). scored: bool (b,), which of them carry loss."""

    tokens: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Cues:
    """One of several fixed texts, drawn for each sample."""

    token_lists: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        return max(len(tokens) for tokens in self.token_lists)

    def choose(self, rng: np.random.Generator) -> int:
        """Index of this sample's cue (no number is drawn if there is just one)."""
        return int(rng.integers(len(self.token_lists))) if len(self.token_lists) > 1 else 0

    def length(self, choice: int) -> int:
        return len(self.token_lists[choice])

    def build(self, choice: int, context: np.ndarray, rng: np.random.Generator) -> EndPrompt:
        tokens = np.asarray(self.token_lists[choice], dtype=np.int64)
        return EndPrompt(tokens, np.ones(len(tokens), dtype=bool))


@dataclass(frozen=True)
class Recall:
    """A cue and a span of the context; the cue and the span's first `given` tokens carry no loss."""

    cue: tuple[int, ...]
    span: int
    given: int

    def __post_init__(self) -> None:
        if not 0 < self.given < self.span:
            raise ValueError(
                f"recall gives the first tokens of its span and scores the rest, so 0 < given < span: "
                f"recall_given={self.given} recall_span={self.span}"
            )

    @property
    def longest(self) -> int:
        return len(self.cue) + self.span

    def choose(self, rng: np.random.Generator) -> int:
        return 0

    def length(self, choice: int) -> int:
        return self.longest

    def build(self, choice: int, context: np.ndarray, rng: np.random.Generator) -> EndPrompt:
        """`context`: int64 (a,), of at least `span` tokens; the span starts anywhere in it."""
        if len(context) < self.span:
            raise ValueError(f"recall copies {self.span} tokens, the context has only {len(context)}")
        start = int(rng.integers(len(context) - self.span, endpoint=True))
        tokens = np.concatenate([np.asarray(self.cue, dtype=np.int64), context[start : start + self.span]])
        return EndPrompt(tokens, np.arange(len(tokens)) >= len(self.cue) + self.given)


class Question(Recall):
    """The last line of a document with a completion, and the completion: part of the document, weighing as there.
    Documents without one are quoted from, and only the quotation is built here.
    """


PromptKind = Cues | Recall
#: Prompts that must be read from the context; they are scored in full by default, and not mixed with cues.
READ = {"recall": Recall, "question": Question}


def prompt_kind(names: Sequence[str], encode: Encode, *, recall_span: int = 40, recall_given: int = 12) -> PromptKind:
    """The end prompt by name: `recall`, `question`, or a set of `EP_1`, `EP_2`, `EP_3` and `text:...`. encode: text to
    token ids as it stands after other text. Raises ValueError for an unknown name, an empty prompt, or an EP_2 that is
    no single token.
    """
    check_names(names)
    if names[0] in READ:
        return READ[names[0]](tuple(encode(RECALL_CUE)), recall_span, recall_given)
    lists = []
    for name in names:
        text = CUES[name] if name in CUES else name[len(LITERAL) :]
        tokens = tuple(encode(text))
        if not tokens:
            raise ValueError(f"an end prompt must have at least one token: prompt={name!r}")
        if name == "EP_2" and len(tokens) != 1:
            raise ValueError(
                f"EP_2 is the token {text}, which this tokenizer does not have; use EP_1, EP_3 or text:..."
            )
        lists.append(tokens)
    return Cues(tuple(lists))


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for no name, an unknown one, or one that goes with no other."""
    if not names:
        raise ValueError("at least one end prompt must be named: prompt=[]")
    for name in names:
        if name not in READ and name not in CUES and not name.startswith(LITERAL):
            raise ValueError(f"prompt must be {', '.join([*READ, *CUES])} or text:YOUR WORDS: prompt={name!r}")
        if name in READ and len(names) > 1:
            raise ValueError(f"{name} cannot be mixed with other prompts: prompt={list(names)}")
