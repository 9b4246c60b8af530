"""Documents to training rows.

A document is a text, or a text with a completion that must be kept to its end. Documents become one flat token array
(`Documents`); a row is a window of it, with positions, end prompt and a loss weight per token. What row `index` of a
run holds is a pure function of (seed, index): resume is exact, and workers do not matter.
"""

from __future__ import annotations

import gzip
import itertools
import json
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt.positions import (
    BY_SENTENCE,
    PIECES,
    RELAYS,
    SCHEMES,
    WITH_PROMPT,
    anchor_ends,
    check_sizes,
    layout,
    sample_rng,
    stratum,
)
from endprompt.prompts import Cues, PromptKind, Question, Recall
from endprompt.rows import file_sha256, parse_object, read_json_lines, read_text, sha256_of, write_text
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
HUB = "hub:"
SHARD_SCHEMA = 1
SHARD_FILES = ("tokens.bin", "weights.bin", "offsets.npy", "completions.npy")


# ---------------------------------------------------------------------------------------------------------------------
# Documents


@dataclass
class Document:
    """text and completion as words, or input_ids already tokenised. where: file and line it is from, for messages."""

    text: str = ""
    completion: str = ""
    input_ids: Sequence[int] | None = None
    where: str = field(default="a document", compare=False)


def read_documents(path: str | Path) -> Iterator[Document]:
    """Documents of a JSONL, JSONL.gz, Parquet or plain-text file; `text` (and `completion`) or `input_ids` a record.

    A plain-text file is one document. Raises ValueError naming file and line if a record is broken.
    """
    if str(path).startswith(HUB):
        raise ValueError(f"a data set of the hub becomes a shard first, by endprompt prepare: data={str(path)!r}")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the data file must exist: data={str(path)!r}")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, record in _json_lines(path):
            yield document_of(record, f"{path}, line {number}")
    elif path.suffix == ".parquet":
        for number, record in _parquet(path):
            yield document_of(record, f"{path}, row {number}")
    elif path.suffix == ".txt":
        yield Document(read_text(path))
    else:
        raise ValueError(f"a data file must end in one of {', '.join(SUFFIXES)}: data={str(path)!r}")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix != ".gz":
        yield from read_json_lines(path)
        return
    with gzip.open(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_object(line.strip(), f"{path}, line {number}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole Parquet file: {error}") from None


def document_of(record: Any, where: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a document must be an object, got {type(record).__name__}")
    ids = record.get("input_ids")
    if ids is not None:
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError(f"{where}: input_ids must be a list of integers >= 0")
        return Document(input_ids=ids, where=where)
    text, completion = record.get("text"), record.get("completion")
    completion = "" if completion is None else completion  # as Parquet has what a row leaves out
    if not isinstance(text, str) or not isinstance(completion, str):
        raise ValueError(f"{where}: a document must have `text` (and may have `completion`) as strings, or `input_ids`")
    try:
        (text + completion).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: `text` holds half of a surrogate pair, which no tokenizer takes") from None
    return Document(text, completion, where=where)


@dataclass(frozen=True)
class Documents:
    """Tokenised documents.

    tokens: integer (total,), all documents one after the other; may be memory-mapped, several of them joined.
    offsets: int64 (documents + 1,), where each one starts.
    completions: int64 (documents,), where its completion starts (its end if it has none).
    weights: uint8 (total,), a loss weight for each token as a target, or None where all are alike.
    """

    tokens: np.ndarray | Joined
    offsets: np.ndarray
    completions: np.ndarray
    weights: np.ndarray | Joined | None = None

    def target_weights(self, places: np.ndarray, ends: np.ndarray, completion_weight: float) -> np.ndarray:
        """float32 loss weights of the tokens at `places`; a completion starts at `ends` (which broadcasts)."""
        weights = np.where(places >= ends, completion_weight, 1.0).astype(np.float32)
        return weights if self.weights is None else weights * self.weights[places]

    def fingerprint(self) -> str:
        """Hash of the documents' lengths and of a sample of their tokens, to notice that data have changed."""
        step = max(1, len(self.tokens) // 65_536)
        sample = np.asarray(self.tokens[::step], dtype=np.uint32)
        return sha256_of(self.offsets.tobytes(), self.completions.tobytes(), sample.tobytes())

    def __len__(self) -> int:
        return len(self.completions)

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
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True, batch: int = 512
) -> Iterator[tuple[list[int], int]]:
    """(token ids, how many of them are the completion) of each document, in order.

    Text and completion as `Reader.pairs` reads them. append_eos: end each document with the tokenizer's EOS token, if
    it has one and the document lacks it. Raises ValueError for ids beyond the vocabulary.
    """
    eos = tokenizer.eos_token_id if append_eos else None
    reader = Reader(tokenizer)
    documents = iter(documents)
    while group := list(itertools.islice(documents, batch)):
        encoded = reader.pairs([(document.text, document.completion) for document in group])
        for document, (ids, completion) in zip(group, encoded):
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
            yield ids, completion


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True
) -> Documents:
    """All documents in memory; arguments and errors as of `tokenized`."""
    pieces: list[np.ndarray] = []
    completions: list[int] = []
    for ids, completion in tokenized(documents, tokenizer, append_eos=append_eos):
        pieces.append(np.asarray(ids, dtype=np.uint32))
        completions.append(completion)
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint32)
    return Documents(tokens, offsets, offsets[1:] - np.asarray(completions, dtype=np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Token shards


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides token ids: the fast tokenizer's own serialisation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sha256_of(backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True))


def write_shard(documents: Documents, directory: str | Path, tokenizer_hash: str, **about: Any) -> None:
    """tokens.bin (uint16 or uint32), offsets.npy, completions.npy, weights.bin if there are weights (uint8), and last
    manifest.json: without it, no shard.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokens = documents.tokens[:]
    small = not len(tokens) or int(tokens.max()) < 2**16
    np.ascontiguousarray(tokens, dtype=np.uint16 if small else np.uint32).tofile(directory / "tokens.bin")
    if documents.weights is not None:
        np.ascontiguousarray(documents.weights[:], dtype=np.uint8).tofile(directory / "weights.bin")
    seal_shard(
        directory, documents.offsets, documents.completions, "uint16" if small else "uint32", tokenizer_hash, **about
    )


def seal_shard(
    directory: Path, offsets: np.ndarray, completions: np.ndarray, dtype: str, tokenizer_hash: str, **about: Any
) -> dict[str, Any]:
    """Finish a shard whose tokens.bin (and weights.bin) stand already; returns the manifest."""
    np.save(directory / "offsets.npy", offsets)
    np.save(directory / "completions.npy", completions)
    names = [name for name in SHARD_FILES if (directory / name).is_file()]
    manifest = {
        "schema": SHARD_SCHEMA,
        "tokenizer_sha256": tokenizer_hash,
        "dtype": dtype,
        "tokens": int(offsets[-1]),
        "documents": len(completions),
        "sha256": {name: file_sha256(directory / name) for name in names},
        **about,
    }
    write_text(directory / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_shard(directory: str | Path, tokenizer_hash: str | None = None, *, verify: bool = True) -> Documents:
    """A prepared shard, tokens memory-mapped.

    Raises ValueError if it has no manifest (unfinished), if its tokenizer is another one, or if a file was changed.
    """
    directory = Path(directory)
    path = directory / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"a token shard must have a manifest.json (an unfinished one has none): data={str(directory)!r}"
        )
    manifest = parse_object(path.read_bytes(), str(path))
    check_manifest(manifest, path)
    if tokenizer_hash is not None and manifest["tokenizer_sha256"] != tokenizer_hash:
        raise ValueError(
            f"{path}: the shard was made with another tokenizer: {manifest['tokenizer_sha256'][:12]} in the manifest, "
            f"{tokenizer_hash[:12]} is the model's"
        )
    if verify:
        for name, wanted in manifest["sha256"].items():
            if not (directory / name).is_file() or file_sha256(directory / name) != wanted:
                raise ValueError(f"{directory / name}: missing or changed since the shard was made (sha256 differs)")
    if not manifest["tokens"]:
        raise ValueError(f"{path}: the shard holds no tokens")
    tokens = np.memmap(directory / "tokens.bin", dtype=manifest["dtype"], mode="r")
    weighted = "weights.bin" in manifest["sha256"]
    weights = np.memmap(directory / "weights.bin", dtype=np.uint8, mode="r") if weighted else None
    return Documents(tokens, np.load(directory / "offsets.npy"), np.load(directory / "completions.npy"), weights)


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raises ValueError naming the file and the rule if a shard's manifest is not one."""
    kinds: dict[str, type] = {"tokenizer_sha256": str, "dtype": str, "tokens": int, "sha256": dict}
    missing = {"schema", *kinds} - set(manifest)
    if missing:
        raise ValueError(f"{path}: a manifest must have {', '.join(sorted(missing))}")
    if manifest["schema"] != SHARD_SCHEMA:
        raise ValueError(f"{path}: schema must be {SHARD_SCHEMA}, is {manifest['schema']}")
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{path}: {key} must be {kind.__name__}, is {type(manifest[key]).__name__}")
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{path}: dtype must be uint16 or uint32, is {manifest['dtype']!r}")
    needed = [name for name in SHARD_FILES if name != "weights.bin"]
    if not set(needed) <= set(manifest["sha256"]) <= set(SHARD_FILES):
        raise ValueError(f"{path}: sha256 must name {', '.join(needed)}, names {', '.join(manifest['sha256'])}")


def load_documents(paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True) -> Documents:
    """All documents of data files and shards, in the order given. Raises ValueError if there is nothing to read."""
    if not paths:
        raise ValueError("data must name at least one file or shard: data=[]")
    parts: list[Documents] = []
    for path in paths:
        if Path(path).is_dir():
            parts.append(read_shard(path, tokenizer_sha256(tokenizer)))
        else:
            parts.append(tokenize(read_documents(path), tokenizer, append_eos=append_eos))
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    weights = None
    if any(part.weights is not None for part in parts):
        alike = [np.broadcast_to(np.uint8(1), len(part.tokens)) for part in parts]
        weights = Joined([one if part.weights is None else part.weights for part, one in zip(parts, alike)])
    return Documents(
        Joined([part.tokens for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts))]).astype(np.int64),
        np.concatenate([part.completions + start for part, start in zip(parts, starts)]),
        weights,
    )


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


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class RowSpec:
    """How documents become rows.

    row_tokens: physical tokens n of a row, context and end prompt together. target: the window L.
    scheme: of endprompt.positions. prompt: the end prompt, needed by the schemes that place one.
    weights: of context tokens 1, of a completion's, of the end prompt's scored tokens.
    bos: id or ids put in front of every context, None for none; a context that has them already gets no others.
    short: what happens to documents shorter than a context: `drop` (counted), or `pack`, one after the other.
    long: what happens to longer ones: `split` into as many rows as have room, or `truncate` to the first row (counted).
    pieces: of a context cut at ends of sentences (schemes BY_SENTENCE), at most.
    line_ends: ids of the tokens that end a line (prompt `question`, schemes BY_SENTENCE).
    sentence_ends: ids of those that end a sentence (schemes BY_SENTENCE).
    """

    row_tokens: int
    target: int
    scheme: str
    prompt: PromptKind | None = None
    anchors: int = 4
    completion_weight: float = 1.0
    prompt_weight: float = 0.1
    bos: int | tuple[int, ...] | None = None
    short: str = "drop"
    long: str = "split"
    seed: int = 0
    pieces: int = PIECES
    line_ends: frozenset[int] = frozenset()
    sentence_ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}: scheme={self.scheme!r}")
        if (self.prompt is not None) != (self.scheme in WITH_PROMPT):
            rule = "needs an end prompt" if self.scheme in WITH_PROMPT else "takes no end prompt (prompt=none)"
            raise ValueError(f"scheme {self.scheme!r} {rule}")
        if self.short not in ("drop", "pack"):
            raise ValueError(f"short_documents must be drop or pack: short_documents={self.short!r}")
        if self.long not in ("split", "truncate"):
            raise ValueError(f"long_documents must be split or truncate: long_documents={self.long!r}")
        longest = self.prompt.longest if self.prompt else 0
        if longest and longest * 2 > self.row_tokens:
            raise ValueError(
                f"the end prompt does not fit: it has {longest} tokens and must be at most half of a row of "
                f"row_tokens={self.row_tokens}"
            )
        check_sizes(self.row_tokens - longest, longest, self.target)
        if self.scheme == "anchors":
            anchor_ends(self.row_tokens - longest, longest, self.target, self.anchors)
        if self.scheme == "relay" or self.scheme in BY_SENTENCE:
            stratum(RELAYS if self.scheme == "relay" else self.pieces - 1, self.target - self.row_tokens, self.scheme)
        if isinstance(self.prompt, Recall) and self.row_tokens - longest - len(self.lead) < self.prompt.span:
            raise ValueError(
                f"recall copies a span of the context, which must be as long: recall_span={self.prompt.span} "
                f"context={self.row_tokens - longest}"
            )
        if self.pieces < 2:
            raise ValueError(f"a context is cut into at least 2 pieces: pieces={self.pieces}")
        for name in ("completion_weight", "prompt_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"a loss weight must not be negative: {name}={getattr(self, name)}")

    @property
    def lead(self) -> tuple[int, ...]:
        """Ids that stand in front of every context."""
        if self.bos is None:
            return ()
        return self.bos if isinstance(self.bos, tuple) else (self.bos,)

    @property
    def needed(self) -> int:
        """Tokens that a document must have to make a row."""
        shortest = 0
        if isinstance(self.prompt, Cues):
            shortest = min(len(tokens) for tokens in self.prompt.token_lists)
        elif self.prompt is not None:
            shortest = self.prompt.longest
        return self.row_tokens - shortest - len(self.lead)


@dataclass(frozen=True)
class Batch:
    """input_ids, position_ids: int64 (B, T). weights: float32 (B, T), weight of predicting the token at that place."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    weights: np.ndarray


@dataclass
class Rows:
    """Row `index` of a run, for any index >= 0; each pass over the units is a new permutation of them.

    A unit is a stretch of a document with room for one row: a long document has several, one with a completion has one,
    which is cut at its front if need be. dropped: documents too short to make a row, and their tokens.
    truncated: tokens of other documents that no row can hold.
    """

    documents: Documents
    spec: RowSpec
    dropped: int = field(init=False)
    dropped_tokens: int = field(init=False)
    truncated_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        spec, needed = self.spec, self.spec.needed
        if spec.short == "pack":
            self._refuse_packed_completions()
            self.documents = pack(self.documents, needed)
        self._starts = behind_lead(self.documents, spec.lead)
        lengths = self.documents.offsets[1:] - self._starts
        has_completion = self.documents.completions < self.documents.offsets[1:]
        least = np.full(len(lengths), needed)
        if isinstance(spec.prompt, Question):  # the end prompt is part of these documents
            least[has_completion] = spec.row_tokens - len(spec.lead)
        single = has_completion | (spec.long == "truncate")
        units = np.where(single, np.minimum(lengths // least, 1), lengths // least)
        self.dropped = int(np.count_nonzero(units == 0))
        self.dropped_tokens = int(lengths[units == 0].sum())
        self.truncated_tokens = int((lengths - least)[single & (units == 1)].sum())
        self._document = np.repeat(np.arange(len(units)), units)
        # as arrays once, since every row looks for them
        self._line_ends = np.array(sorted(spec.line_ends), dtype=np.int64)
        self._all_ends = np.array(sorted(spec.line_ends | spec.sentence_ends), dtype=np.int64)
        first = np.repeat(np.cumsum(units) - units, units)
        self._stretch = np.arange(len(self._document)) - first
        self._permutations: dict[int, np.ndarray] = {}

    def _refuse_packed_completions(self) -> None:
        with_completion = self.documents.completions < self.documents.offsets[1:]
        lost = int(np.count_nonzero(with_completion & (self.documents.lengths < self.spec.needed)))
        if lost and self.spec.completion_weight != 1.0:
            raise ValueError(
                f"packing joins documents and loses where a completion starts, so completion_weight must be 1: "
                f"completion_weight={self.spec.completion_weight}, {lost} short documents have a completion"
            )

    def __len__(self) -> int:
        """Number of units: rows of one pass."""
        return len(self._document)

    def unit(self, index: int) -> int:
        epoch, place = divmod(index, len(self))
        if epoch not in self._permutations:
            order = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.spec.seed, epoch, 1])))
            self._permutations = {epoch: order.permutation(len(self)), **dict(list(self._permutations.items())[:1])}
        return int(self._permutations[epoch][place])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids int64 (T,), position_ids int64 (T,), weights float32 (T,)) of one row."""
        spec, rng = self.spec, sample_rng(self.spec.seed, index)
        unit = self.unit(index)
        question = self._question(unit) if isinstance(spec.prompt, Question) else 0
        choice = spec.prompt.choose(rng) if spec.prompt else 0
        b = question or (spec.prompt.length(choice) if spec.prompt else 0)
        a = spec.row_tokens - b
        if spec.scheme in BY_SENTENCE:
            context, weights = self._context(unit, a + question, None, rng)
            last = a if question else a - self._question(unit)  # a question in the context stays in one piece
            starts = self._sentence_starts(context[:a], last, rng)
            placed = layout(spec.scheme, a, b, spec.target, rng, starts=starts)
        else:
            options = {"count": spec.anchors} if spec.scheme == "anchors" else {}
            placed = layout(spec.scheme, a, b, spec.target, rng, **options)
            context, weights = self._context(unit, a + question, placed.split, rng)
        weights[0] = 0.0  # nothing predicts the first token
        if spec.prompt is not None and not question:
            prompt = spec.prompt.build(choice, context, rng)
            context = np.concatenate([context, prompt.tokens])
            weights = np.concatenate([weights, prompt.scored.astype(np.float32) * spec.prompt_weight])
        return context, placed.position_ids, weights

    def _question(self, unit: int) -> int:
        """Tokens of the document's last line before its completion, and of the completion; 0 without a completion.

        At most half a row: a longer line is cut at its front.
        """
        _, hi = self._span(unit)
        completion = int(self.documents.completions[self._document[unit]])
        if completion == hi:
            return 0
        most = self.spec.row_tokens // 2
        before = np.asarray(self.documents.tokens[max(hi - most, 0) : completion])
        ends = np.flatnonzero(np.isin(before, self._line_ends))
        return min(most, hi - completion + len(before) - (int(ends[-1]) + 1 if len(ends) else 0))

    def _sentence_starts(self, context: np.ndarray, last: int, rng: np.random.Generator) -> list[int]:
        """0 and some places behind ends of sentences and lines, up to `last`; all of them if there are few."""
        ends = np.isin(context[:-1], self._all_ends)
        places = np.flatnonzero(ends) + 1
        places = places[places <= last]
        return [0, *np.sort(rng.choice(places, min(self.spec.pieces - 1, len(places)), replace=False)).tolist()]

    def batch(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1."""
        if self.spec.scheme == "contiguous" and not self.spec.lead:
            return self._contiguous_batch(first, count)
        rows = [self.row(index) for index in range(first, first + count)]
        ids, positions, weights = (np.stack(parts) for parts in zip(*rows))
        return Batch(ids, positions, weights)

    def _contiguous_batch(self, first: int, count: int) -> Batch:
        """The same rows without a Python loop over them where a document is exactly one row long."""
        n = self.spec.row_tokens
        starts = np.array([self._start(self.unit(i), n, i) for i in range(first, first + count)])
        places = starts[:, None] + np.arange(n)
        documents = self._document[[self.unit(i) for i in range(first, first + count)]]
        ends = self.documents.completions[documents][:, None]
        weights = self.documents.target_weights(places, ends, self.spec.completion_weight)
        weights[:, 0] = 0.0
        ids = np.asarray(self.documents.tokens[places], dtype=np.int64)
        return Batch(ids, np.broadcast_to(np.arange(n, dtype=np.int64), ids.shape), weights)

    def _start(self, unit: int, need: int, index: int) -> int:
        lo, hi = self._span(unit)
        if hi - lo <= need:
            return hi - need
        return self._draw_start(unit, lo, hi, need, sample_rng(self.spec.seed, index))

    def _span(self, unit: int) -> tuple[int, int]:
        document = int(self._document[unit])
        return int(self._starts[document]), int(self.documents.offsets[document + 1])

    def _draw_start(self, unit: int, lo: int, hi: int, need: int, rng: np.random.Generator) -> int:
        """Start of a window of `need` tokens: to the end of a completion, else anywhere in the unit's stretch."""
        if self.documents.completions[self._document[unit]] < hi:
            return hi - need
        if self.spec.long == "truncate":
            return lo
        stretch = self.spec.needed
        return lo + min(int(self._stretch[unit]) * stretch + int(rng.integers(stretch)), hi - lo - need)

    def _context(self, unit: int, a: int, split: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64 (a,), loss weights float32 (a,)). With a split, the second chunk is from further on."""
        lo, hi = self._span(unit)
        lead = np.asarray(self.spec.lead, dtype=np.int64)
        need = a - len(lead)
        if split is None:
            start = self._draw_start(unit, lo, hi, need, rng)
            places = np.arange(start, start + need)
        else:
            # PoSE: the first chunk from the start of the stretch, the second from anywhere after it in the document;
            # how much text is skipped is drawn apart from how far the positions jump.
            head = max(split - len(lead), 0)
            lo += min(int(self._stretch[unit]) * self.spec.needed, hi - lo - need)
            skip = int(rng.integers(hi - lo - need, endpoint=True))
            if self.documents.completions[self._document[unit]] < hi:
                lo = hi - need - skip  # a completion is kept to its end
            first = np.arange(lo, lo + head)
            second = np.arange(lo + head + skip, lo + skip + need)
            places = np.concatenate([first, second])
        tokens = np.asarray(self.documents.tokens[places], dtype=np.int64)
        if len(lead) and np.array_equal(tokens[: len(lead)], lead):  # of documents that were joined before
            if places[-1] + len(lead) < hi:
                places = places + len(lead)
            else:
                places, lead = np.concatenate([places[0] - len(lead) + np.arange(len(lead)), places]), lead[:0]
            tokens = np.asarray(self.documents.tokens[places], dtype=np.int64)
        end = self.documents.completions[self._document[unit]]
        weights = self.documents.target_weights(places, end, self.spec.completion_weight)
        if len(lead):
            tokens = np.concatenate([lead, tokens])
            weights = np.concatenate([np.zeros(len(lead), dtype=np.float32), weights])
        return tokens, weights


def behind_lead(documents: Documents, lead: Sequence[int]) -> np.ndarray:
    """int64 (documents,): where each one starts, behind such ids in front as every context gets anyway."""
    starts, wanted = documents.offsets[:-1].copy(), np.asarray(lead, dtype=np.int64)
    open_ = np.arange(len(starts)) if len(lead) else np.zeros(0, dtype=np.int64)
    while len(open_):
        open_ = open_[starts[open_] + len(lead) <= documents.offsets[1:][open_]]
        open_ = open_[(documents.tokens[starts[open_][:, None] + np.arange(len(lead))] == wanted).all(1)]
        starts[open_] += len(lead)
    return starts


def pack(documents: Documents, needed: int) -> Documents:
    """The documents shorter than `needed` joined in their order into one, after all others."""
    short = documents.lengths < needed
    order = np.concatenate([np.flatnonzero(~short), np.flatnonzero(short)])
    spans = [slice(documents.offsets[i], documents.offsets[i + 1]) for i in order]
    lengths = [*documents.lengths[~short], documents.lengths[short].sum()] if short.any() else documents.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    completions = (documents.offsets[1:] - documents.completions)[~short]
    if short.any():
        completions = np.append(completions, 0)
    tokens, weights = (
        None if values is None else np.concatenate([values[:0], *(values[span] for span in spans)])
        for values in (documents.tokens, documents.weights)
    )
    assert tokens is not None
    return Documents(tokens, offsets, offsets[1:] - completions, weights)


def prefetch(make: Callable[[int], Any], steps: Iterable[int], ahead: int = 4) -> Generator[Any]:
    """`make(step)` for each step, made in a thread of its own while the device works; errors come through."""
    queue: Queue[tuple[Any, BaseException | None]] = Queue(ahead)
    stop = threading.Event()

    def work() -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                queue.put((make(step), None))
            queue.put((None, StopIteration()))
        except BaseException as error:
            queue.put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(0.01)
