"""Shards of tokens that training maps into memory: written by `prepare`, sealed, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt.config import PrepareConfig, check_prepare_config, mixture
from endprompt.data.documents import HUB, Document, Documents, Joined, document_of, read_documents, tokenize, tokenized
from endprompt.data.duplicates import Duplicates
from endprompt.distributed import say
from endprompt.files import aside, file_sha256, read_object, sha256_of, sole_use, sync_tree, write_text
from endprompt.model import load_tokenizer
from endprompt.text import Reader, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_SCHEMA = 1

SHARD_FILES = ("tokens.bin", "weights.bin", "offsets.npy", "completions.npy")


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides token ids: the fast tokenizer's own serialisation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sha256_of(backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True))


def write_shard(documents: Documents, directory: str | Path, tokenizer_hash: str, **about: Any) -> None:
    """tokens.bin (uint16 or uint32), offsets.npy, completions.npy, weights.bin (uint8, if any), last manifest.json."""
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
    """A shard, tokens memory-mapped. ValueError: no manifest (unfinished), another tokenizer, or a changed file."""
    directory = Path(directory)
    path = directory / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"a token shard must have a manifest.json (an unfinished one has none): data={str(directory)!r}"
        )
    manifest = read_object(path)
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
    if missing := {"schema", *kinds} - set(manifest):
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


def load_documents(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    chat_loss: str = "assistant",
) -> Documents:
    """All documents of files and shards, in order. ValueError: none, or a shard prepared for another chat_loss."""
    if not paths:
        raise ValueError("data must name at least one file or shard: data=[]")
    parts: list[Documents] = []
    for path in paths:
        if Path(path).is_dir():
            parts.append(read_shard(path, tokenizer_sha256(tokenizer)))
            known = read_object(Path(path) / "manifest.json").get("chat_loss", chat_loss)
            if known != chat_loss:
                raise ValueError(f"the shard was prepared for another chat_loss, {known}: {chat_loss=} data={path!r}")
        else:
            parts.append(tokenize(read_documents(path), tokenizer, append_eos=append_eos, chat_loss=chat_loss))
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


def prepare(config: PrepareConfig) -> Path:
    """Write one shard; returns its directory. Raises ValueError naming key, value and rule."""
    check_prepare_config(config)
    mixed = mixture(config.data)
    with sole_use(config.output):
        check_first_records(config, [source.path for source in mixed or ()] or config.data)
        return write_mixture(config) if mixed else write(config)


def check_first_records(config: PrepareConfig, sources: Sequence[str]) -> None:
    """Read each source's first document, so that a source that is missing, or whose conversations the template cannot
    mark, is said before the others are written. Raises as `documents` and `tokenized`.
    """
    firsts = [next(documents(dataclasses.replace(config, data=[source])), None) for source in sources]
    if chats := [first for first in firsts if first is not None and first.messages is not None]:
        list(tokenized(chats, load_tokenizer(config.tokenizer), chat_loss=config.chat_loss))


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A folder that takes the output's place once it is whole."""
    work = aside(output)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        sync_tree(work)
        if output.exists():
            shutil.rmtree(output)
        os.replace(work, output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_mixture(config: PrepareConfig) -> Path:
    """A shard for each source, and a manifest that holds their weights."""
    output, made, before = Path(config.output), [], Duplicates(config.duplicates, config.near_threshold)
    with replacing(output) as work:
        for place, source in enumerate(mixture(config.data)):
            shard = f"{place:02d}"
            write(dataclasses.replace(config, data=[source.path], output=str(work / shard)), before, place)
            made.append({"shard": shard, "source": source.path, "weight": source.weight})
        write_text(work / "manifest.json", json.dumps({"mixture": made}, indent=2) + "\n")
    return output


#: What becomes of documents that are not kept as they are: as the manifest counts them and their tokens, and in words.
FATES = {
    "dropped": "dropped below {} tokens", "longer": "dropped above max_tokens", "duplicate": "dropped as duplicates",
    "duplicate_elsewhere": "dropped as duplicates of other sources", "cut": "cut",
}  # fmt: skip


def write(config: PrepareConfig, before: Duplicates | None = None, source: int = 0) -> Path:
    """One shard. before: the documents of a mixture's earlier sources; source: the number of this one."""
    output = Path(config.output)
    tokenizer = load_tokenizer(config.tokenizer)
    for note in Reader(tokenizer).notes(config.append_eos):
        say(note)
    dtype = np.dtype(np.uint16 if vocabulary(tokenizer) <= 2**16 else np.uint32)
    lengths: list[int] = []
    completions: list[int] = []
    marks: list[tuple[int, np.ndarray]] = []
    counts = {f"{what}_{fate}": 0 for fate in FATES for what in ("documents", "tokens")}
    before = before or Duplicates(config.duplicates, config.near_threshold)
    shown = time.monotonic()

    def count(fate: str, tokens: int) -> None:
        counts[f"documents_{fate}"] += 1
        counts[f"tokens_{fate}"] += tokens

    with replacing(output) as work:
        with open(work / "tokens.bin", "wb") as file:
            read = tokenized(documents(config), tokenizer, append_eos=config.append_eos, chat_loss=config.chat_loss)
            for ids, completion, own in read:
                over = len(ids) - (config.max_tokens or len(ids))
                if len(ids) < config.min_tokens:
                    count("dropped", len(ids))
                elif over > 0 and config.longer == "drop":
                    count("longer", len(ids))
                elif (of := before.seen(ids, source)) is not None:
                    count("duplicate" if of == source else "duplicate_elsewhere", len(ids))
                else:
                    if over > 0:
                        count("cut", over)
                        ids, completion = ids[:-over], max(0, completion - over)
                    np.asarray(ids, dtype=dtype).tofile(file)
                    if own is not None:
                        marks.append((len(lengths), own[: len(ids)]))
                    lengths.append(len(ids))
                    completions.append(completion)
                    if time.monotonic() - shown > 5:
                        shown = time.monotonic()
                        say(f"{', '.join(config.data)}: {len(lengths):,} documents, {sum(lengths):,} tokens so far")
        if not lengths:
            rules = f"min_tokens={config.min_tokens}"
            rules += f" max_tokens={config.max_tokens}" if counts["documents_longer"] else ""
            elsewhere = counts["documents_duplicate_elsewhere"]
            rules += f" duplicates={config.duplicates} in other sources" if elsewhere else ""
            left_out = sum(counts[f"documents_{fate}"] for fate in [*FATES][:-1])
            raise ValueError(f"no document is left of {left_out} ({rules}): data={config.data}")
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = offsets[1:] - np.asarray(completions, dtype=np.int64)
        about: dict[str, Any] = {"data": config.data, "append_eos": config.append_eos, **counts}
        if marks:
            about["chat_loss"] = config.chat_loss
            weights = np.ones(offsets[-1], dtype=np.uint8)
            for document, own in marks:
                weights[offsets[document] : offsets[document + 1]] = own
            weights.tofile(work / "weights.bin")
        manifest = seal_shard(work, offsets, starts, dtype.name, tokenizer_sha256(tokenizer), **about)
    fates = [
        f"; {what.format(config.min_tokens)}: {counts[f'documents_{fate}']:,} ({counts[f'tokens_{fate}']:,} tokens)"
        for fate, what in FATES.items()
        if counts[f"documents_{fate}"]
    ]
    kept = f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({dtype.name})"
    say("".join([f"{', '.join(config.data)}: {kept}", *(fates or ["; nothing dropped"])]))
    return output


def documents(config: PrepareConfig) -> Iterator[Document]:
    """All documents in the order given, `max_documents` at most."""
    left = config.max_documents
    for source in config.data:
        for document in hub_documents(source[len(HUB) :], config) if source.startswith(HUB) else read_documents(source):
            if left == 0:
                return
            yield document
            left = None if left is None else left - 1


def hub_documents(name: str, config: PrepareConfig) -> Iterator[Document]:
    """Documents of a data set of the hub, streamed. Raises ValueError if it cannot be had."""
    import datasets

    try:
        rows = datasets.load_dataset(name, config.hub_name, split=config.hub_split, streaming=True)
        for number, record in enumerate(rows, 1):
            yield document_of(record, f"hub:{name}, row {number}")
    except (OSError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if "scripts are no longer supported" in str(error):
            error = ValueError(f"it needs Python code of its own, which is not run ({str(error).split()[-1]})")
        raise ValueError(f"hub:{name}: the data set cannot be read (split={config.hub_split!r}): {error}") from error
