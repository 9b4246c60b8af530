"""Documents: read from JSON Lines, Parquet or text, and tokenized."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt.data.chat import check_messages, conversation
from endprompt.files import is_address, read_json_lines, read_parquet, read_text, sha256_of
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")

HUB = "hub:"


@dataclass
class Document:
    """text and completion as words, or messages, or input_ids already tokenised. where: file and line, for errors."""

    text: str = ""
    completion: str = ""
    input_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Any = None
    where: str = field(default="a document", compare=False)


def read_documents(path: str | Path) -> Iterator[Document]:
    """Documents of a JSONL (.gz, .zst), Parquet or plain-text file; a record has text (and completion), messages or
    ids, a plain-text file is one document. Raises ValueError naming file and line if a record is broken, the file if
    there is none.
    """
    path, number = data_file(path), 0
    if path.endswith(".txt"):
        yield Document(read_text(path), where=path)
        return
    parquet = path.endswith(".parquet")
    for number, record in read_parquet(path) if parquet else read_json_lines(path):
        yield document_of(record, f"{path}, {'row' if parquet else 'line'} {number}")
    if not number:
        raise ValueError(f"{path}: a data file must hold at least one document")


def data_file(path: str | Path) -> str:
    """The file's path, or an address of fsspec's. Raises ValueError if there is none, or its kind is not known."""
    path = os.fspath(path)
    if path.startswith(HUB):
        raise ValueError(f"a data set of the hub becomes a shard first, by endprompt prepare: data={path!r}")
    if is_address(path):
        import fsspec

        try:
            system, inner = fsspec.core.url_to_fs(path)
            there = system.info(inner)["type"] == "file"  # isfile() takes any error for a file that is missing
        except FileNotFoundError:
            there = False
        except Exception as error:  # each kind of address has errors of its own
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the data file cannot be reached: {said}: data={path!r}") from error
    else:
        there = Path(path).is_file()
    if not there:
        raise ValueError(f"the data file must exist: data={path!r}")
    if not path.endswith(SUFFIXES):
        raise ValueError(f"a data file must end in one of {', '.join(SUFFIXES)}: data={path!r}")
    return path


def document_of(record: Any, where: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a document must be an object, got {type(record).__name__}")
    ids = record.get("input_ids")
    if record.get("completion") and (ids is not None or record.get("messages") is not None):
        raise ValueError(f"{where}: completion goes with text, and this document has input_ids or messages")
    if ids is not None:
        if not isinstance(ids, (list, tuple)) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{where}: input_ids must be a list of integers >= 0")
        return Document(input_ids=ids, where=where)
    if (messages := record.get("messages")) is not None:
        check_messages(messages, where)
        return Document(messages=messages, tools=record.get("tools"), where=where)
    text, completion = record.get("text"), record.get("completion")
    completion = "" if completion is None else completion  # as Parquet has what a row leaves out
    if not isinstance(text, str) or not isinstance(completion, str):
        raise ValueError(
            f"{where}: a document must have `text` (and may have `completion`) as strings, `messages`, or `input_ids`"
        )
    try:
        (text + completion).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: `text` holds half of a surrogate pair, which no tokenizer takes") from None
    return Document(text, completion, where=where)


@dataclass(frozen=True)
class Documents:
    """Tokenised documents.

    tokens: integer (total,), all documents one after the other; may be memory-mapped, several of them joined. offsets:
    int64 (documents + 1,), where each one starts. completions: int64 (documents,), where its completion starts (its end
    if it has none). weights: uint8 (total,), a loss weight for each token as a target, 0 for the text of a conversation
    that the assistant did not write; or None where all are alike.
    """

    tokens: np.ndarray | Joined
    offsets: np.ndarray
    completions: np.ndarray
    weights: np.ndarray | Joined | None = None

    def target_weights(
        self, places: np.ndarray, document: int | np.ndarray, completion_weight: float, text_weight: float | None = None
    ) -> np.ndarray:
        """float32 loss weights of the tokens at `places` of a document (or one a row, which broadcasts). text_weight:
        of what stands in front of a completion, default 1, and of what has weight 0, default 0.
        """
        start, end = self.completions[document], self.offsets[np.add(document, 1)]
        text = np.where(start < end, 1.0 if text_weight is None else text_weight, 1.0)
        weights = np.where(places >= start, completion_weight, text).astype(np.float32)
        if self.weights is None:
            return weights
        own = self.weights[places]
        return np.where(own > 0, weights * own, np.float32(text_weight or 0.0)).astype(np.float32)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of all that rows are made of; how many files it came from does not matter."""
        arrays = ((self.tokens, np.uint32), (() if self.weights is None else self.weights, np.uint8))
        blocks = (
            np.asarray(array[start : start + 2**22], dtype=kind).tobytes()
            for array, kind in arrays
            for start in range(0, len(array), 2**22)
        )
        return sha256_of(self.offsets.tobytes(), self.completions.tobytes(), *map(sha256_of, blocks))

    def __len__(self) -> int:
        return len(self.completions)

    def one(self, document: int) -> Documents:
        """A document by itself."""
        start, end = int(self.offsets[document]), int(self.offsets[document + 1])
        weights = None if self.weights is None else self.weights[start:end]
        completion = self.completions[document : document + 1] - start
        return Documents(np.asarray(self.tokens[start:end]), np.array([0, end - start]), completion, weights)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Text to token ids as it stands after other text, with no special tokens added."""
    return Reader(tokenizer).inside


def tokens_ending(tokenizer: PreTrainedTokenizerBase, marks: tuple[str, ...]) -> frozenset[int]:
    """Ids of the tokens whose text ends in one of the marks, spaces after it aside."""
    ids = sorted(set(tokenizer.get_vocab().values()))  # which may have holes
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return frozenset(i for i, text in zip(ids, texts) if text.rstrip(" ").endswith(marks))


def tokenized(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    chat_loss: str = "assistant",
    batch: int = 512,
) -> Iterator[tuple[list[int], int, np.ndarray | None]]:
    """(token ids, how many of them are the completion, weights or None) of each document, in order. append_eos: end
    each with the tokenizer's EOS, if it has one and the document lacks it; not a conversation, whose end its template
    writes. Raises ValueError for ids beyond the vocabulary, and as `conversation`.
    """
    eos = tokenizer.eos_token_id if append_eos else None
    reader = Reader(tokenizer)
    documents = iter(documents)
    while group := list(itertools.islice(documents, batch)):
        encoded = reader.pairs([(document.text, document.completion) for document in group])
        for document, (ids, completion) in zip(group, encoded):
            if document.messages is not None:
                yield conversation(document.messages, reader, chat_loss, document.where, document.tools)
                continue
            if document.input_ids is not None:
                ids, completion = list(document.input_ids), 0
                if ids and max(ids) >= reader.vocabulary:
                    raise ValueError(
                        f"{document.where}: input_ids are of another tokenizer: id {max(ids)} is not below its size "
                        f"{reader.vocabulary} (its largest id + 1)"
                    )
            if eos is not None and (not ids or ids[-1] != eos):
                ids.append(eos)
                completion += completion > 0
            yield ids, completion, None


def tokenize(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    chat_loss: str = "assistant",
) -> Documents:
    """All documents in memory; arguments and errors as of `tokenized`."""
    read = [
        (np.asarray(ids, dtype=np.uint32), completion, weights)
        for ids, completion, weights in tokenized(documents, tokenizer, append_eos=append_eos, chat_loss=chat_loss)
    ]
    pieces, completions, marks = zip(*read) if read else ((), (), ())
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint32)
    found = None
    if any(own is not None for own in marks):
        found = np.concatenate([np.ones(len(ids), np.uint8) if own is None else own for ids, own in zip(pieces, marks)])
    return Documents(tokens, offsets, offsets[1:] - np.asarray(completions, dtype=np.int64), found)


class Joined:
    """Arrays end to end that are read as one, by a slice or an array of places; maps of several shards stay maps."""

    def __init__(self, parts: Sequence[Any]):
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, wanted: slice | np.ndarray) -> np.ndarray:
        places = np.arange(*wanted.indices(len(self))) if isinstance(wanted, slice) else np.asarray(wanted)
        owner = np.searchsorted(self.starts, places, side="right") - 1
        found = np.empty(places.shape, dtype=np.result_type(*self.parts))
        for number in np.unique(owner):
            own = owner == number
            found[own] = self.parts[number][places[own] - self.starts[number]]
        return found
