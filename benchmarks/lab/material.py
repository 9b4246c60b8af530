"""What the cells of a run share: training documents and RULER samples, made once and kept in a cache folder.

Each file is a task of its own, named by a hash of all that it depends on, written whole or not at all, so that several
processes make them at the same time and several runs can share a folder.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.matrix import Cell
from endprompt.files import sha256_of

#: Half text, half questions in RULER's manner.
MIXTURE: Mapping[str, float] = {
    "text": 4.0,
    "niah_single_1": 1.0,
    "niah_single_2": 1.0,
    "niah_multikey_1": 1.0,
    "vt": 1.0,
}
#: Tokens of one file of documents: a few seconds' work.
PART_TOKENS = 500_000
#: Apart from the training seeds, so that no sample is drawn by a generator that drew documents.
SAMPLE_SEED = 1000


@dataclass(frozen=True)
class Part:
    """One file of `count` training documents of `tokens` tokens each, for all arms of a base, row length and seed."""

    model: str
    count: int
    tokens: int
    longest: int
    seed: int
    number: int

    def path(self, folder: Path) -> Path:
        about = [tokenizer_sha256(self.model), self.count, self.tokens, self.longest, self.seed, self.number]
        name = sha256_of(json.dumps([*about, dict(MIXTURE), "documents-1"]))[:12]
        return folder / "documents" / f"{self.tokens}-seed{self.seed}-{self.number}-{name}"

    def make(self, folder: Path) -> None:
        """Write the documents as a token shard."""
        from benchmarks.base import documents
        from endprompt.config import PrepareConfig
        from endprompt.data import prepare

        path = self.path(folder)
        with locked(path):
            if path.exists():
                return
            with tempfile.TemporaryDirectory(dir=path.parent) as aside:
                text, tokenizer = Path(aside) / "documents.jsonl", tokenizer_of(self.model)
                seed = 1 + 1000 * self.seed + self.number
                documents.write_documents(
                    text,
                    self.count,
                    tokenizer,
                    seed,
                    self.tokens,
                    MIXTURE,
                    prose=training_prose(self.model),
                    longest=self.longest,
                )
                prepare(PrepareConfig(data=[str(text)], output=str(Path(aside) / "shard"), tokenizer=self.model))
                os.replace(Path(aside) / "shard", path)


@dataclass(frozen=True)
class Samples:
    """One file of RULER samples: task and length with the options for small windows."""

    model: str
    task: str
    length: int
    count: int
    seed: int
    max_new_tokens: int | None
    shots: int
    hops: int
    edition: str = "lab-2026"

    def path(self, folder: Path) -> Path:
        from benchmarks.ruler import tasks

        about = [tokenizer_sha256(self.model), *vars(self).values(), tasks.GENERATOR, "samples-1"]
        about.remove(self.model)
        name = sha256_of(json.dumps(about))[:12]
        return folder / "samples" / f"{self.task}-{self.length}-seed{self.seed}-{name}.npz"

    def make(self, folder: Path) -> None:
        """Write the prompts' tokens, the answers, and the hash of the texts."""
        from benchmarks import ruler
        from benchmarks.lab import predict
        from benchmarks.ruler.cell import samples_sha256

        path = self.path(folder)
        with locked(path):
            if path.exists():
                return
            tokenizer = tokenizer_of(self.model)
            options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "shots": self.shots, "hops": self.hops}
            options["edition"] = self.edition
            made = ruler.build_samples(self.task, self.length, tokenizer, self.count, self.seed, **options)
            ids = predict.prompt_ids(tokenizer, made)
            about = {
                "sha256": samples_sha256(made),
                "haystack": made[0]["haystack"],
                "haystack_sha256": made[0]["haystack_sha256"],
                "fill": round(sum(sample["fill"] for sample in made) / len(made), 5),
                "samples": [{key: sample[key] for key in ("outputs", "max_new_tokens", "depth")} for sample in made],
            }
            aside = path.with_name(path.name + ".partial.npz")
            np.savez(
                aside,
                ids=np.concatenate([np.asarray(one, dtype=np.int32) for one in ids]),
                lengths=np.array([len(one) for one in ids]),
                about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            )
            os.replace(aside, path)

    def read(self, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(samples with input_ids, outputs, max_new_tokens and depth; what they have in common)."""
        path = self.path(folder)
        try:
            with np.load(path) as file:
                about = json.loads(file["about"].tobytes())
                ids = np.split(file["ids"], np.cumsum(file["lengths"])[:-1])
            samples = [
                {**sample, "task": self.task, "input_ids": one}
                for sample, one in zip(about.pop("samples"), ids, strict=True)
            ]
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: this file of the cache was changed after it was written; delete it") from error
        return samples, about


Material = Part | Samples


def parts(cell: Cell) -> list[Part]:
    """The files of documents that a cell trains on."""
    if not cell.trained:
        return []
    each = min(cell.documents, max(1, PART_TOKENS // cell.row_tokens))
    numbers = range(-(-cell.documents // each))
    return [Part(cell.model, each, cell.row_tokens, cell.longest, cell.seed, number) for number in numbers]


def samples(cell: Cell) -> list[Samples]:
    """The files of samples that a cell is scored on."""
    scoring = cell.scoring
    options = (scoring.max_new_tokens, scoring.shots, scoring.hops, scoring.edition)
    return [
        Samples(cell.model, task, length, scoring.samples, SAMPLE_SEED + cell.seed, *options)
        for length in cell.lengths
        for task in scoring.tasks
    ]


def needed(cells: Sequence[Cell]) -> list[Material]:
    """All files of the cells, each once, in the order in which cells need them."""
    found: dict[Material, None] = {}
    for cell in cells:
        found |= dict.fromkeys(parts(cell))
        found |= dict.fromkeys(samples(cell))
    return list(found)


def make(item: Material, folder: Path) -> None:
    item.make(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Kept by a process


@cache
def tokenizer_of(model: str) -> Any:
    from endprompt.model import load_tokenizer

    return load_tokenizer(model)


@cache
def tokenizer_sha256(model: str) -> str:
    return sha256_of((Path(model) / "tokenizer.json").read_bytes())


@cache
def training_prose(model: str) -> Any:
    """The sample text's first half, tokenised."""
    from benchmarks.base import documents

    return documents.Prose.from_sentences(documents.sample_training_sentences(), tokenizer_of(model))


def locked(path: Path) -> Any:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")
