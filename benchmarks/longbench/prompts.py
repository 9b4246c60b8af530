"""LongBench's prompts: read from lm-eval's task files, corrected, and cut to the window."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.longbench.sets import dataset_of
from benchmarks.ruler.texts import package_folder
from endprompt.text import Reader, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GENERATOR = "longbench-1"  # goes into every row: a change of what models are given changes it


# What lm-eval's task files leave out: the last character, and one of the newlines before the question.
CORRECTIONS: dict[str, Callable[[str], str]] = {
    "passage_count": lambda prompt: prompt + " ",
    "passage_retrieval_en": lambda prompt: prompt + " ",
    "lcc": lambda prompt: prompt + "\n",
    "repobench-p": lambda prompt: prompt + "\n",
    "triviaqa": lambda prompt: prompt.replace("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": lambda prompt: prompt.replace("{context}\n{input}", "{context}\n\n{input}"),
}


@cache
def prompt_template(dataset: str) -> str:
    """The set's published prompt with {context} and {input} as places, for `str.format`. Read from the installed
    lm-eval package's task file and corrected; "asconcisely" in NarrativeQA's is as published. Raises ImportError or
    OSError if the package or the file is missing, ValueError if the text is another one.
    """
    import yaml

    published = dataset_of(dataset)
    dataset = published.name
    path = lm_eval_folder() / "tasks" / "longbench" / f"{dataset}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"LongBench's prompt of {dataset} is read from lm-eval's task file, missing: {path}")

    class Loader(yaml.SafeLoader):
        """Reads a task file without importing the functions that it names."""

    Loader.add_constructor("!function", lambda loader, node: None)
    text = yaml.load(path.read_text(encoding="utf-8"), Loader)["doc_to_text"]
    prompt = text.replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    # The correction is not applied to a later lm-eval that has made it itself.
    for candidate in (prompt, CORRECTIONS.get(dataset, str)(prompt)):
        if hashlib.sha256(candidate.encode()).hexdigest() == published.prompt_sha256:
            return candidate
    raise ValueError(
        f"the prompt of {dataset} in lm-eval {version('lm_eval')} is not the published one, nor the one that is known "
        f"to differ: {path}"
    )


def lm_eval_folder() -> Path:
    """Folder of the lm-eval package. Raises ImportError if it is not installed."""
    said = "LongBench's prompts are read from the lm-eval package: pip install 'lm-eval>=0.4.13'"
    return package_folder("lm_eval", said)


def prompt_text(task: str, document: Mapping[str, Any]) -> str:
    """The whole prompt of a document, before truncation and chat template."""
    template = prompt_template(dataset_of(task).name)
    return template.format(context=document["context"], input=document["input"])


@dataclass(frozen=True)
class Fit:
    """A prompt that fits: its text before any chat wrapping, tokens of what the model is given, whether it was cut."""

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Prompter:
    """Makes one task's prompts for one model.

    window: the model's, tokens: no input is longer than `window` less the tokens to generate. prompt_length: cut
    prompts above this many tokens, before chat wrapping, as published tables do (3500 for a window of 4k, 31500 for
    32k); by default what the window leaves. chat_template: messages → text, called with add_generation_prompt=True;
    wraps the sets that are asked as questions and leaves alone the six that are texts to be continued. system: a system
    message for it. add_special_tokens: passed to the tokenizer; None for its own default. max_new_tokens: instead of
    the set's own.
    """

    task: str
    tokenizer: PreTrainedTokenizerBase
    window: int
    prompt_length: int | None = None
    chat_template: Callable[..., str] | None = None
    system: str | None = None
    add_special_tokens: bool | None = None
    max_new_tokens: int | None = None

    @property
    def chats(self) -> bool:
        """Whether a chat template wraps the prompts."""
        return dataset_of(self.task).chat

    @property
    def prompt_sha256(self) -> str:
        return dataset_of(self.task).prompt_sha256

    def text(self, item: Mapping[str, Any]) -> str:
        """The whole prompt of a document, before truncation and chat template."""
        return prompt_text(self.task, item)

    def cut(self, tokens: Sequence[int], limit: int) -> str:
        return cut_middle(self.tokenizer, tokens, limit)

    @property
    def new_tokens(self) -> int:
        return dataset_of(self.task).max_new_tokens if self.max_new_tokens is None else self.max_new_tokens

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the model is given them: with what the tokenizer puts in front by default, nothing behind."""
        return self.reader.ids(texts) if self.add_special_tokens is False else self.reader.prompts(texts)

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.tokenizer)

    def wrap(self, prompt: str) -> str:
        """The prompt in the chat template, if its set is wrapped, without the BOS that the tokenizer will add.
        Templates write BOS themselves; lm-eval's backend looks for it at the start of a batch's first text only, and
        wrapped and unwrapped prompts share batches, so that some of them would get two or none.
        """
        if self.chat_template is None or not self.chats:
            return prompt
        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*head, {"role": "user", "content": prompt}]
        text = render(self.chat_template, self.reader.name, messages, add_generation_prompt=True)
        begin = [] if self.add_special_tokens is False else self.reader.begin
        added = begin[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(str(self.tokenizer.bos_token)) if added else text

    def fit(self, items: Sequence[Mapping[str, Any]]) -> list[Fit]:
        """The documents' prompts, the middle cut out where they are too long."""
        room = self.window - self.new_tokens
        overhead = len(self.encode([self.wrap("")])[0]) - len(self.encode([""])[0])
        if room - overhead < 2:
            least = self.new_tokens + overhead + 2
            raise ValueError(
                f"{self.task}: the window must be at least {least}, the tokens to generate ({self.new_tokens}), the "
                f"chat template ({overhead}) and a prompt: {self.window}"
            )
        limit = room - overhead if self.prompt_length is None else self.prompt_length
        if not 2 <= limit <= room - overhead:
            raise ValueError(
                f"{self.task}: prompt_length must be from 2 to {room - overhead}, what a window of {self.window} "
                f"leaves beside the chat template and the answer: {limit}"
            )
        prompts = [self.text(item) for item in items]
        fits: list[Fit] = []
        for start in range(0, len(prompts), 64):  # enough for the tokenizer's threads, little enough for the memory
            fits += self.fit_batch(prompts[start : start + 64], limit, room)
        return fits

    def fit_batch(self, prompts: list[str], limit: int, room: int) -> list[Fit]:
        """`limit` and `room`: the most tokens of a prompt before it is wrapped, and of what the model is given."""
        texts, found = list(prompts), self.encode(prompts)
        lengths = [len(tokens) for tokens in found]
        # The benchmark's halves are those of all special tokens, also of those behind the text.
        end = [] if self.add_special_tokens is False else self.reader.end
        ids = [tokens + end for tokens in found]
        keeps = [min(len(tokens), limit) for tokens in ids]
        changed = [i for i, text in enumerate(texts) if keeps[i] < len(ids[i]) or self.wrap(text) != text]
        while changed:
            for i in changed:
                if keeps[i] < len(ids[i]):
                    texts[i] = self.cut(ids[i], keeps[i])
            # Decoded halves need not have the tokens they came from: count again, and cut more where it is too much.
            for i, tokens in zip(changed, self.encode([self.wrap(texts[i]) for i in changed]), strict=True):
                lengths[i] = len(tokens)
            changed = [i for i in changed if lengths[i] > room]
            for i in changed:
                keeps[i] -= lengths[i] - room
        cut = [keep < len(tokens) for keep, tokens in zip(keeps, ids, strict=True)]
        return [Fit(*found) for found in zip(texts, lengths, cut, strict=True)]

    def samples(self, items: Sequence[Mapping[str, Any]], fits: Sequence[Fit]) -> list[dict[str, Any]]:
        return [
            {
                "input": self.wrap(fit.text),
                "outputs": item["answers"],
                "all_classes": item.get("all_classes") or None,
                "length": fit.tokens,
                "max_new_tokens": self.new_tokens,
                "truncated": fit.truncated,
                "words": item["length"],
                "index": index,
                "id": str(item.get("_id", index)),
            }
            for index, (item, fit) in enumerate(zip(items, fits, strict=True))
        ]


def cut_middle(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], limit: int) -> str:
    """Text of the first and the last `limit // 2` tokens: instructions stand at both ends of a prompt."""
    half = limit // 2
    if half < 1:
        raise ValueError(f"a prompt cannot be cut to fewer than 2 tokens: {limit=}")
    ends = (tokens[:half], tokens[-half:])
    return "".join(
        str(tokenizer.decode(list(end), skip_special_tokens=True, clean_up_tokenization_spaces=False)) for end in ends
    )
