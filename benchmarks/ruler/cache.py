"""RULER samples on disk: what it takes to render them again (sizes, not text), shared by runs and processes.

The key holds everything that a sample depends on, so a file never serves another length, tokenizer or seed.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.ruler import tasks, texts
from benchmarks.ruler.cell import Cell
from endprompt import files

LAYOUT = 3  # of the files
# Cells that are missing are built by several processes if together they have more tokens than this: a second's work.
PARALLEL_TOKENS = 8_000_000
MOST_PROCESSES = 16


def default_directory() -> Path:
    """$XDG_CACHE_HOME/endprompt/ruler, or ~/.cache/endprompt/ruler."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "endprompt" / "ruler"


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of all that decides a tokenizer's counts: its whole definition, chat template, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are settings of the last call, not part of the tokenizer.
        definition = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        definition = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}  # templates may write them all
    about = [definition, getattr(tokenizer, "chat_template", None), special]
    return files.sha256_of(json.dumps(about, sort_keys=True, default=str))


def cells(
    wanted: Sequence[tuple[str, int]],
    tokenizer: Any,
    n: int,
    seed: int,
    data_dir: str | Path | None = None,
    options: tasks.Options = tasks.DEFAULTS,
    directory: str | Path | None = None,
) -> list[Cell]:
    """The cells of (task, length) pairs, in order; the missing ones are built by several processes where it pays."""
    directory, options = directory or default_directory(), options.dated(tokenizer)
    tokenizer_hash = tokenizer_sha256(tokenizer)
    keys = [key_of(*pair, tokenizer, n, seed, data_dir, options, tokenizer_hash) for pair in wanted]
    paths = [files.kept_path(directory, f"{task}-{length}", key) for (task, length), key in zip(wanted, keys)]
    missing = [pair for pair, path in zip(wanted, paths) if not path.is_file()]
    common = (tokenizer, n, seed, data_dir, options, directory, tokenizer_hash)
    workers = min(len(missing), processes())
    if workers > 1 and n * sum(length for _, length in missing) > PARALLEL_TOKENS:
        # The longest first, and question answering before the rest, so that no process is left alone with it.
        missing.sort(key=lambda pair: (-pair[1], tasks.SPECS[pair[0]].family != "qa"))
        # threads of tokenizers do not survive a fork
        with mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"):
            pool = multiprocessing.get_context("fork").Pool(workers, keep, (common,))
        with pool:
            for _ in pool.imap_unordered(build_kept, missing):
                pass
    return [cell(task, length, *common) for task, length in wanted]


def processes() -> int:
    """Processes that may build: one a core, on Linux, in the first process of a run."""
    if sys.platform != "linux" or int(os.environ.get("RANK", "0")) > 0:
        return 1
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


_common: tuple[Any, ...] = ()  # in a building process: what all cells share


def keep(common: tuple[Any, ...]) -> None:
    global _common
    _common = common


def build_kept(pair: tuple[str, int]) -> None:
    cell(*pair, *_common)


def cell(
    task: str,
    length: int,
    tokenizer: Any,
    n: int,
    seed: int,
    data_dir: str | Path | None = None,
    options: tasks.Options = tasks.DEFAULTS,
    directory: str | Path | None = None,
    tokenizer_hash: str | None = None,
) -> Cell:
    """The samples of one cell, from the cache if they are there, else built and kept.

    Raises ValueError if the file in the cache was changed, and as `ruler.build_samples`.
    """
    options = options.dated(tokenizer)
    key = key_of(task, length, tokenizer, n, seed, data_dir, options, tokenizer_hash)

    def make() -> dict[str, Any]:
        built = Cell.build(task, length, tokenizer, n, seed, data_dir, options)
        built.describe()
        return built.recipe

    recipe = files.kept(directory or default_directory(), f"{task}-{length}", key, make)
    recipe["options"]["haystack_text"] = options.haystack_text
    return Cell(recipe, tokenizer, data_dir)


def key_of(
    task: str,
    length: int,
    tokenizer: Any,
    n: int,
    seed: int,
    data_dir: str | Path | None,
    options: tasks.Options,
    tokenizer_hash: str | None,
) -> dict[str, Any]:
    """All that a cell depends on. Raises ValueError for an unknown task and for missing data."""
    tasks.check_task(task)
    return {
        "layout": LAYOUT,
        "generator": tasks.GENERATOR,
        "task": task,
        "length": length,
        "n": n,
        "seed": seed,
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k != "haystack_text"},
        "max_new_tokens": tasks.reserve(task, options),
        "tokenizer": tokenizer_hash or tokenizer_sha256(tokenizer),
        "texts": text_versions(task, length, data_dir, options),
    }


def text_versions(task: str, length: int, data_dir: str | Path | None, options: tasks.Options) -> dict[str, str]:
    """What the task's texts are made of, by version or hash."""
    spec = tasks.SPECS[task]
    found: dict[str, str] = {"wording": files.sha256_of(repr(texts.wording(spec.family, options.edition)))}
    if spec.family == "qa":
        found[spec.dataset] = files.remembered_sha256(texts.data_file(spec.dataset, data_dir, task))
    if spec.haystack == "essay":
        found["essay"] = texts.essay(options.haystack_text, data_dir, task).sha256
        if not options.rules.plain_places:
            found["places"] = "as RULER joins them"
        if options.rules.replayed:
            found["sentences"] = "punkt" if texts.has_punkt() else "punctuation"
    if spec.family == "niah" or spec.family == "cwe":
        try:
            found["wonderwords"] = version("wonderwords")
        except PackageNotFoundError:
            found["wonderwords"] = "unknown"
    if spec.family == "cwe" and data_dir is not None:
        for name in texts.SOURCES["words"].names:
            if (path := Path(data_dir) / name).is_file():
                found["words"] = files.remembered_sha256(path)
    return found
