"""Conversations to tokens: the checkpoint's own chat template, and which tokens the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_messages(messages: Any, where: str) -> None:
    """Raises ValueError naming file and line if a record's messages are no conversation with an assistant's turn."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{where}: messages must be a list of at least one turn")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{where}: turn {number} of messages must be an object with a role")
        content = turn.get("content")
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise ValueError(f"{where}: turn {number} of messages must have its content as text")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise ValueError(f"{where}: messages must have a turn of the assistant, which is what is learned")


def conversation(
    messages: Sequence[Mapping[str, Any]], reader: Reader, loss: str, where: str, tools: Any = None
) -> tuple[list[int], int, np.ndarray]:
    """(token ids, how many of them are the completion, uint8 which of them the assistant wrote) of a conversation, by
    the tokenizer's chat template. loss: `assistant` scores all of the assistant's turns, by the template's own {%
    generation %} marks; `completion` the last turn alone. Raises ValueError naming the record for a template that fails
    or has no marks, and a last turn that is not the assistant's.
    """
    tokenizer = reader.tokenizer
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ValueError(f"{where}: a record with messages needs a tokenizer with a chat template: {error}") from None
    if loss == "assistant":
        if not MARK.search(template):
            raise ValueError(
                f"{where}: the tokenizer's chat template has no {{% generation %}} mark, which says what the assistant "
                f"wrote; chat_loss=completion scores the last turn without it: chat_loss={loss!r}"
            )
        made = _applied(tokenizer, messages, where, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        scored = np.asarray(made["assistant_masks"], dtype=np.uint8)
        if not scored.any():
            raise ValueError(f"{where}: the chat template marks nothing of this conversation as the assistant's")
        return list(made["input_ids"]), 0, scored
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: the last turn of messages must be the assistant's: role={messages[-1]['role']!r} "
            f"chat_loss={loss!r}"
        )
    whole = _applied(tokenizer, messages, where, tools=tools, tokenize=False)
    front = _applied(tokenizer, messages[:-1], where, tools=tools, tokenize=False, add_generation_prompt=True)
    if not whole.startswith(front) or whole == front:
        raise ValueError(f"{where}: the chat template does not write the last turn behind its own opening of a turn")
    ((ids, completion),) = reader.pairs([(front, whole[len(front) :])])
    scored = np.zeros(len(ids), dtype=np.uint8)
    scored[len(ids) - completion :] = 1
    return ids, completion, scored


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(turn) for turn in messages], **options)
    except Exception as error:  # a template is code of the checkpoint and raises what it likes
        said = " ".join(str(error).split())
        raise ValueError(f"{where}: the chat template fails: {said} ({type(error).__name__})") from error
