"""Documents to token shards, once: training then reads memory-mapped tokens with no Python work per token."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from endprompt.checkpoint import sync_tree
from endprompt.config import PrepareConfig, check_prepare_config
from endprompt.data import HUB, Document, document_of, read_documents, seal_shard, tokenized, tokenizer_sha256
from endprompt.model import load_tokenizer
from endprompt.progress import say
from endprompt.rows import sole_use
from endprompt.text import Reader, vocabulary


def prepare(config: PrepareConfig) -> Path:
    """Write one shard; returns its directory. Raises ValueError naming key, value and rule."""
    check_prepare_config(config)
    with sole_use(config.output):
        return write(config)


def write(config: PrepareConfig) -> Path:
    output = Path(config.output)
    work = output.with_name(output.name + ".partial")
    tokenizer = load_tokenizer(config.tokenizer)
    for note in Reader(tokenizer).notes(config.append_eos):
        say(note)
    dtype = np.dtype(np.uint16 if vocabulary(tokenizer) <= 2**16 else np.uint32)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lengths: list[int] = []
    completions: list[int] = []
    dropped = dropped_tokens = cut = cut_tokens = 0
    shown = time.monotonic()
    try:
        with open(work / "tokens.bin", "wb") as file:
            for ids, completion in tokenized(documents(config), tokenizer, append_eos=config.append_eos):
                if len(ids) < config.min_tokens:
                    dropped, dropped_tokens = dropped + 1, dropped_tokens + len(ids)
                    continue
                over = len(ids) - (config.max_tokens or len(ids))
                if over > 0:
                    cut, cut_tokens = cut + 1, cut_tokens + over
                    ids, completion = ids[:-over], max(0, completion - over)
                np.asarray(ids, dtype=dtype).tofile(file)
                lengths.append(len(ids))
                completions.append(completion)
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    say(f"{len(lengths):,} documents, {sum(lengths):,} tokens")
        if not lengths:
            raise ValueError(f"no document is left of {dropped} (min_tokens={config.min_tokens}): data={config.data}")
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = offsets[1:] - np.asarray(completions, dtype=np.int64)
        counts = {
            "documents_dropped": dropped,
            "tokens_dropped": dropped_tokens,
            "documents_cut": cut,
            "tokens_cut": cut_tokens,
        }
        about = {"data": config.data, "append_eos": config.append_eos, **counts}
        manifest = seal_shard(work, offsets, starts, dtype.name, tokenizer_sha256(tokenizer), **about)
        sync_tree(work)
        if output.exists():
            shutil.rmtree(output)
        os.replace(work, output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    say(
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({dtype.name}); dropped {dropped:,} "
        f"documents below {config.min_tokens} tokens ({dropped_tokens:,} tokens); cut {cut:,} documents "
        f"({cut_tokens:,} tokens)"
    )
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
    except (OSError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"hub:{name}: the data set cannot be read (split={config.hub_split!r}): {error}") from error
