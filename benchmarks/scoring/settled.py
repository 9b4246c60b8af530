"""Whether nothing that follows in an answer can change its score: RULER's metrics ask whether the answers occur in it.

An answer may end there, and most of the tokens that RULER allows need not be made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import ruler

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def settled_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The part of the tokens' text that no further token changes. Not in it: tokens that stand for single bytes, which
    are decoded together with the bytes after them, and a character that is not whole. Answers are decoded without
    tidying of spaces."""
    end, special = len(tokens), set(tokenizer.all_special_ids)
    while end and (tokens[end - 1] in special or BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(tokens[end - 1])))):
        end -= 1
    made = tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(made).rstrip("\ufffd")


def settled(sample: Mapping[str, Any], prompt: str, text: str) -> bool:
    """Whether the score of every text that goes on from this one is 1, as RULER counts it. sample: its task and
    outputs. The prompt matters since a model's echo of it is taken off before the text is scored."""
    if prompt.startswith(text):
        return False  # this may become an echo
    if "\u03a3" in text:  # the one letter whose lower case depends on what follows
        return False
    return ruler.score(sample["task"], text.removeprefix(prompt), sample["outputs"]) == 1.0


def end_of(tokenizer: Any, sample: Mapping[str, Any], prompt: str) -> Callable[[list[int]], bool]:
    """Whether tokens end the answer to a sample: nothing after them changes its score."""
    return lambda tokens: settled(sample, prompt, settled_text(tokenizer, tokens))
