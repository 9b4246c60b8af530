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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.ruler import tasks, texts
from benchmarks.ruler.cell import Cell
from endprompt import files
from endprompt.runs import installed

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
    """The cells of (task, length) pairs, in order; what the cache lacks is built, by several processes where it pays.
    Raises ValueError if a file in the cache was changed, and as `ruler.build_samples`.
    """
    directory, options = Path(directory or default_directory()), options.dated(tokenizer)
    cache = Cache(directory, tokenizer, tokenizer_sha256(tokenizer), n, seed, data_dir, options)
    missing = [pair for pair in wanted if not files.kept_path(*cache.place(*pair)).is_file()]
    workers = min(len(missing), processes())
    if workers > 1 and n * sum(length for _, length in missing) > PARALLEL_TOKENS:
        # The longest first, and question answering before the rest, so that no process is left alone with it.
        missing.sort(key=lambda pair: (-pair[1], tasks.SPECS[pair[0]].family != "qa"))
        # threads of tokenizers do not survive a fork
        with mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"):
            pool = multiprocessing.get_context("fork").Pool(workers, keep, (cache,))
        with pool:
            for _ in pool.imap_unordered(build_kept, missing):
                pass
    return [cache.cell(*pair) for pair in wanted]


def processes() -> int:
    """Processes that may build: one a core, on Linux, in the first process of a run."""
    if sys.platform != "linux" or int(os.environ.get("RANK", "0")) > 0:
        return 1
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


_cache: Cache  # in a building process


def keep(cache: Cache) -> None:
    global _cache
    _cache = cache
    files.end_with_parent()


def build_kept(pair: tuple[str, int]) -> None:
    _cache.cell(*pair)


@dataclass(frozen=True)
class Cache:
    """What cells that are asked for together share."""

    directory: Path
    tokenizer: Any
    tokenizer_hash: str
    n: int
    seed: int
    data_dir: str | Path | None
    options: tasks.Options

    def cell(self, task: str, length: int) -> Cell:
        def make() -> dict[str, Any]:
            built = Cell.build(task, length, self.tokenizer, self.n, self.seed, self.data_dir, self.options)
            built.describe()
            return built.recipe

        recipe = files.kept(*self.place(task, length), make)
        recipe["options"]["haystack_text"] = self.options.haystack_text
        return Cell(recipe, self.tokenizer, self.data_dir)

    def place(self, task: str, length: int) -> tuple[Path, str, dict[str, Any]]:
        """Folder, name, and as key all that a cell depends on. Raises ValueError for an unknown task, missing data."""
        tasks.check_task(task)
        key = {
            "layout": LAYOUT,
            "generator": tasks.GENERATOR,
            "task": task,
            "length": length,
            "n": self.n,
            "seed": self.seed,
            "options": {k: v for k, v in dataclasses.asdict(self.options).items() if k != "haystack_text"},
            "max_new_tokens": tasks.reserve(task, self.options),
            "tokenizer": self.tokenizer_hash,
            "texts": text_versions(task, length, self.data_dir, self.options),
        }
        return self.directory, f"{task}-{length}", key


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
        found["wonderwords"] = installed("wonderwords") or "unknown"
    if spec.family == "cwe" and (path := texts.found_file("words", data_dir)) is not None:
        found["words"] = files.remembered_sha256(path)
    return found
