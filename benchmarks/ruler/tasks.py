"""RULER's tasks: what each asks for and how an answer is scored."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import chat
from benchmarks.ruler import texts
from endprompt.text import Reader

# Part of every random stream and cache key: a change of generated text changes it.
GENERATOR = "ruler-1"

VT_HOPS = 4


@dataclass(frozen=True)
class Spec:
    """One of RULER's tasks. `metric` is "all" (share of the answers found) or "any" (1 if one is found)."""

    family: str
    haystack: str = ""
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    dataset: str = ""
    metric: str = "all"


SPECS = {
    "niah_single_1": Spec("niah", "noise"),
    "niah_single_2": Spec("niah", "essay"),
    "niah_single_3": Spec("niah", "essay", value="uuids"),
    "niah_multikey_1": Spec("niah", "essay", keys=4),
    "niah_multikey_2": Spec("niah", "needle"),
    "niah_multikey_3": Spec("niah", "needle", key="uuids", value="uuids"),
    "niah_multivalue": Spec("niah", "essay", values=4),
    "niah_multiquery": Spec("niah", "essay", keys=4, queries=4),
    "vt": Spec("vt", "noise"),
    "cwe": Spec("cwe", "words"),
    "fwe": Spec("fwe", "coded words"),
    "qa_1": Spec("qa", "documents", dataset="squad", metric="any"),
    "qa_2": Spec("qa", "documents", dataset="hotpotqa", metric="any"),
}

TASKS = tuple(SPECS)


@dataclass(frozen=True)
class Options:
    """What may be set beyond RULER's own values; each is part of the cache key and of the result row.

    max_new_tokens: kept for generation; RULER's own number if None. haystack_text: text file for the essay haystack,
    instead of RULER's essays or the project's sample. chat: wrap the prompt in the tokenizer's chat template (the
    answer prefix follows it). shots: worked examples in front of vt and cwe, 0 or 1 (RULER: 1). hops: assignments after
    the first one in a chain of vt (RULER: 4). date: day that a template which reads one is given, YYYY-MM-DD; today if
    None. template_args: its further arguments, NAME=VALUE,NAME=VALUE. edition: state of RULER's tasks, one of
    `texts.EDITIONS`. chat_layout: "one-turn" (the worked example and the question in one turn, no space in front of the
    answer prefix), "ruler" (its own scripts': cwe's example is a turn of its own, the space is kept) or "no-prefix"
    (one turn, no answer prefix); the edition's if None. system: message in front of a chat.
    """

    max_new_tokens: int | None = None
    haystack_text: str | None = None
    chat: bool = False
    shots: int = 1
    hops: int = VT_HOPS
    date: str | None = None
    template_args: str = ""
    edition: str = texts.DEFAULT_EDITION
    chat_layout: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        for key, holds, rule in (
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            ("shots", self.shots in (0, 1), "0 or 1"),
            ("hops", self.hops >= 1, "at least 1"),
        ):
            if not holds:
                raise ValueError(f"{key} must be {rule}: {getattr(self, key)}")
        if self.date is not None:
            chat.parse_day(self.date)
        if self.template_args and not self.chat:
            raise ValueError(f"template_args are for a chat template: they need chat: {self.template_args!r}")
        chat.parse_arguments(self.template_args)
        if self.edition not in texts.EDITIONS:
            raise ValueError(f"edition must be one of {', '.join(texts.EDITIONS)}: {self.edition!r}")
        if self.chat_layout not in (None, *LAYOUTS):
            raise ValueError(f"chat_layout must be one of {', '.join(LAYOUTS)}: {self.chat_layout!r}")
        if self.rules.replayed and not self.shots:
            raise ValueError(
                f"shots must be 1 with edition {self.edition}, whose samples are RULER's own: {self.shots}"
            )

    def dated(self, tokenizer: Any) -> Options:
        """With the day that prompts are made for: None where no template reads it."""
        day = None
        if self.chat:
            day = chat.day_read(tokenizer, self.date, self.template_args, lambda: chat.today(tokenizer))
        return dataclasses.replace(self, date=day)

    @property
    def rules(self) -> texts.Edition:
        return texts.EDITIONS[self.edition]

    @property
    def layout(self) -> str | None:
        """The chat layout in use; None without a chat template."""
        return (self.chat_layout or self.rules.layout) if self.chat else None


LAYOUTS = ("one-turn", "ruler", "no-prefix")

DEFAULTS = Options()


def check_task(task: str) -> None:
    if task not in SPECS:
        near = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"tasks: {', '.join(TASKS)}"
        raise ValueError(f"unknown RULER task {task!r}; {hint}")


#: Answers as the tasks draw them, by what they are; documents' own answers are of all kinds.
ANSWERS = {
    "numbers": "7364950",
    "uuids": "5a1c0f6e-93bd-4e27-8d40-b1f25c7a6e98",
    "vt": "QKZVD",
    "cwe": "harbor",
    "fwe": "kqzvxw",
}


def check_writable(task: str, reader: Reader) -> None:
    """Raises ValueError if the tokenizer cannot write an answer of the task's kind, so that no model could score."""
    spec = SPECS[task]
    answer = ANSWERS.get(spec.value if spec.family == "niah" else spec.family)
    if answer is not None:
        written = reader.decode(reader.ids([f"It is {answer}."])[0])
        if not score(task, written, [answer]):
            raise ValueError(
                f"{task}: the tokenizer must be able to write the task's answers, and it makes {written!r} of one: "
                f"{answer!r} (name the other tasks in tasks)"
            )


def reserve(task: str, options: Options = DEFAULTS) -> int:
    """Tokens kept for generation."""
    return options.max_new_tokens or texts.wording(SPECS[task].family).reserve


def score(task: str, prediction: str, outputs: Sequence[str]) -> float:
    """RULER's score of one prediction, in [0, 1]: share of the answers in it, or for QA whether any is."""
    check_task(task)
    found = [answer.lower() in clean(prediction).lower() for answer in outputs]
    return float(any(found)) if SPECS[task].metric == "any" else sum(found) / len(found)


def clean(prediction: str) -> str:
    """RULER's post-processing: control characters become newlines."""
    return "".join("\n" if ord(c) < 32 else c for c in prediction.strip()).strip()
