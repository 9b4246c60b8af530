"""LongBench's prompts on disk: where each was cut, not its text, so that a run that goes on tokenizes nothing again.

The key holds everything that a prompt depends on.
"""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.longbench.prompts import GENERATOR, Fit, Prompter
from benchmarks.longbench.sets import Documents
from endprompt.files import kept, sha256_of


def cached_fits(
    prompter: Prompter, documents: Documents, n: int | None, tokenizer_sha256: str, directory: str | Path
) -> list[Fit]:
    """`prompter.fit` of the first `n` documents, cached. Raises ValueError if the file was changed, and as `fit`."""
    items = documents.items[:n]
    key = {
        "generator": GENERATOR,
        "task": prompter.task,
        "prompt": prompter.prompt_sha256,
        "documents": documents.sha256,
        "n": len(items),
        "tokenizer": tokenizer_sha256,
        "wrapped": sha256_of(prompter.wrap("prompt")),  # template, system message and BOS
        "window": prompter.window,
        "new_tokens": prompter.new_tokens,
        "prompt_length": prompter.prompt_length,
        "add_special_tokens": prompter.add_special_tokens,
    }

    def make() -> list[dict[str, Any]]:
        return [shorten(prompter.text(item), fit) for item, fit in zip(items, prompter.fit(items), strict=True)]

    cuts = kept(directory, f"longbench-{prompter.task}-{prompter.window}", key, make)
    return [restore(prompter.text(item), cut) for item, cut in zip(items, cuts, strict=True)]


def shorten(prompt: str, fit: Fit) -> dict[str, Any]:
    """What it takes to make the prompt again: the characters kept at its ends, or its text where they are not kept."""
    about: dict[str, Any] = {"tokens": fit.tokens}
    if fit.truncated:
        head = common_start(prompt, fit.text)
        tail = len(fit.text) - head
        kept = prompt.endswith(fit.text[head:]) and head + tail <= len(prompt)
        about |= {"ends": [head, tail]} if kept else {"text": fit.text}
    return about


def restore(prompt: str, about: Mapping[str, Any]) -> Fit:
    if "text" in about:
        return Fit(about["text"], about["tokens"], truncated=True)
    if "ends" not in about:
        return Fit(prompt, about["tokens"], truncated=False)
    head, tail = about["ends"]
    return Fit(prompt[:head] + prompt[len(prompt) - tail :], about["tokens"], truncated=True)


def common_start(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common start, by bisection."""
    return bisect.bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])
