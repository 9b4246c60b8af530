"""RULER samples on disk: what it takes to render them again (sizes, not text), shared by runs and processes.

The key holds everything that a sample depends on, so a file never serves another length, tokenizer or seed. One process
builds a file under a lock, the others wait for it. A file that was changed is an error, not a result.
"""

from __future__ import annotations

import dataclasses
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import haystack, ruler
from endprompt import rows


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
    about = [definition, getattr(tokenizer, "chat_template", None), tokenizer.bos_token, tokenizer.eos_token]
    return rows.sha256_of(json.dumps(about, sort_keys=True, default=str))


def cell(
    task: str,
    length: int,
    tokenizer: Any,
    n: int,
    seed: int,
    data_dir: str | Path | None = None,
    options: ruler.Options = ruler.DEFAULTS,
    directory: str | Path | None = None,
    tokenizer_hash: str | None = None,
) -> ruler.Cell:
    """The samples of one cell, from the cache if they are there, else built and kept.

    Raises ValueError if the file in the cache was changed, and as `ruler.build_samples`.
    """
    from filelock import FileLock

    ruler.check_task(task)
    key = {
        "generator": ruler.GENERATOR,
        "task": task,
        "length": length,
        "n": n,
        "seed": seed,
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k != "haystack_text"},
        "max_new_tokens": ruler.reserve(task, options),
        "tokenizer": tokenizer_hash or tokenizer_sha256(tokenizer),
        "texts": text_versions(task, length, data_dir, options),
    }
    digest = rows.sha256_of(json.dumps(key, sort_keys=True))
    directory = Path(directory) if directory is not None else default_directory()
    path = directory / f"{task}-{length}-{digest[:24]}.json"
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path) + ".lock"):
        if path.is_file():
            recipe = rows.read_sealed(path, key)
            recipe["options"]["haystack_text"] = options.haystack_text
            return ruler.Cell(recipe, tokenizer, data_dir)
        built = ruler.Cell.build(task, length, tokenizer, n, seed, data_dir, options)
        rows.write_sealed(path, key, built.recipe)
    return built


def text_versions(task: str, length: int, data_dir: str | Path | None, options: ruler.Options) -> dict[str, str]:
    """What the task's texts are made of, by version or hash."""
    spec = ruler.SPECS[task]
    found: dict[str, str] = {"wording": rows.sha256_of(repr(haystack.wording(spec.family)))}
    if spec.family == "qa":
        found[spec.dataset] = haystack.library(spec.dataset, data_dir, task).sha256
    if spec.haystack == "essay":
        found["essay"] = haystack.essay(options.haystack_text, data_dir, task).sha256
    if spec.family == "niah" or spec.family == "cwe":
        try:
            found["wonderwords"] = version("wonderwords")
        except PackageNotFoundError:
            found["wonderwords"] = "unknown"
    if spec.family == "cwe" and data_dir is not None:
        for name in haystack.SOURCES["words"].names:
            if (path := Path(data_dir) / name).is_file():
                found["words"] = rows.remembered_sha256(path)
    return found
