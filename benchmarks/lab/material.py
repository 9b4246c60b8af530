"""What the cells of a run share: training documents, samples of RULER and LongBench; made once, kept in a cache folder.

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
from filelock import FileLock

from benchmarks import longbench, ruler
from benchmarks.base import documents
from benchmarks.lab.config import LabConfig
from benchmarks.lab.inputs import input_path, piece, texts
from benchmarks.lab.matrix import Cell
from benchmarks.longbench.prompts import GENERATOR
from endprompt import origin
from endprompt.files import sha256_of

#: Half text, half questions in RULER's manner.
MIXTURE: Mapping[str, float] = {"text": 4.0} | dict.fromkeys(documents.RETRIEVAL_KINDS, 1.0)
PART_TOKENS = 500_000  # tokens of one file of documents: a few seconds' work
#: Characters of given documents that make one file of tokens, about three million tokens of English.
PIECE_CHARACTERS = 12_000_000
TOKEN_CHARACTERS = 5.0  # fewest characters that a token of text is counted for, to have documents enough
SAMPLE_SEED = 1000  # apart from the training seeds, so that no sample is drawn by a generator that drew documents


class Material:
    """One file of the cache, of what `model` reads."""

    model: str

    def path(self, folder: Path) -> Path:
        raise NotImplementedError

    def named(self, stem: str, *about: Any) -> str:
        """The stem with a hash of the tokenizer and of all else that the file depends on."""
        return f"{stem}-{sha256_of(json.dumps([tokenizer_sha256(self.model), *about]))[:12]}"

    def write(self, made: Path, given: LabConfig) -> None:
        """Write the file. Raises ValueError if what it is made of is not on this machine."""
        raise NotImplementedError

    def make(self, folder: Path, given: LabConfig | None = None) -> None:
        """The file, written aside and moved to its place; one process makes it, others wait."""
        path = self.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return
            with tempfile.TemporaryDirectory(dir=path.parent) as aside:
                made = Path(aside) / path.name
                self.write(made, given or LabConfig())
                os.replace(made, path)


def write_shard(made: Path, text: Path, model: str) -> None:
    from endprompt.config import PrepareConfig
    from endprompt.data import prepare

    prepare(PrepareConfig(data=[str(text)], output=str(made), tokenizer=model))


@dataclass(frozen=True)
class Part(Material):
    """One file of `count` training documents of `tokens` tokens each, for all arms of a base, row length and seed."""

    model: str
    count: int
    tokens: int
    longest: int
    seed: int
    number: int
    questions_only: bool = False

    @property
    def mixture(self) -> dict[str, float]:
        return {kind: share for kind, share in MIXTURE.items() if kind != "text" or not self.questions_only}

    def path(self, folder: Path) -> Path:
        about = (self.count, self.tokens, self.longest, self.seed, self.number, self.mixture, "documents-1")
        return folder / "documents" / self.named(f"{self.tokens}-seed{self.seed}-{self.number}", *about)

    def write(self, made: Path, given: LabConfig) -> None:
        text, tokenizer = made.with_name("documents.jsonl"), tokenizer_of(self.model)
        about = (self.count, tokenizer, 1 + 1000 * self.seed + self.number, self.tokens, self.mixture)
        documents.write_documents(text, *about, prose=training_prose(self.model), longest=self.longest)
        write_shard(made, text, self.model)


@dataclass(frozen=True)
class Piece(Material):
    """One file of the given documents' tokens, as they are: those that begin in its stretch of characters."""

    model: str
    sha256: str
    number: int

    def path(self, folder: Path) -> Path:
        about = (self.sha256, self.number, PIECE_CHARACTERS, "piece-1")
        return folder / "documents" / self.named(f"given-{self.number}", *about)

    def write(self, made: Path, given: LabConfig) -> None:
        source, text = needed_file(given, "documents", made), made.with_name("documents.jsonl")
        lines = (json.dumps({"text": one}) + "\n" for one in piece(source, self.number, PIECE_CHARACTERS))
        text.write_text("".join(lines), encoding="utf-8")
        write_shard(made, text, self.model)


@dataclass(frozen=True)
class HeldOut(Material):
    """The first `tokens` tokens of each of `rows` given texts that are at least so long."""

    model: str
    sha256: str
    tokens: int
    rows: int

    def path(self, folder: Path) -> Path:
        name = self.named(f"held-out-{self.tokens}", self.sha256, self.tokens, self.rows, "held-out-1")
        return folder / "documents" / f"{name}.npy"

    def write(self, made: Path, given: LabConfig) -> None:
        """As an array (rows, tokens). Raises ValueError if there are too few, or no file."""
        backend, found = tokenizer_of(self.model).backend_tokenizer, []
        for text in texts(needed_file(given, "held_out", made)):
            ids = backend.encode(text[: 12 * self.tokens], add_special_tokens=False).ids[: self.tokens]
            found += [ids] if len(ids) == self.tokens else []
            if len(found) == self.rows:
                break
        if len(found) < self.rows:
            raise ValueError(f"held_out has {len(found)} texts of {self.tokens} tokens, {self.rows} are needed")
        np.save(made, np.array(found, dtype=np.uint16 if np.max(found) < 2**16 else np.int32))

    def read(self, folder: Path) -> np.ndarray:
        return np.load(self.path(folder)).astype(np.int64)


class Prompts(Material):
    """One file of prompts as tokens, and what it takes to score their answers. length: tokens of a prompt with its
    answer, at most. KEPT: of each sample. WHOLE: whether an answer must be read to its end."""

    task: str
    KEPT: tuple[str, ...]
    WHOLE: bool

    def pack(self, made: Path, built: list[dict[str, Any]], **columns: Any) -> None:
        """columns: of their row."""
        from benchmarks.lab import predict
        from benchmarks.ruler.cell import samples_sha256

        tokenizer = tokenizer_of(self.model)
        samples = [{key: sample[key] for key in self.KEPT} for sample in built]
        about = {"sha256": samples_sha256(built), **columns, "samples": samples}
        kind = np.uint16 if len(tokenizer) < 2**16 else np.int32
        ids = [np.asarray(one, dtype=kind) for one in predict.prompt_ids(tokenizer, built)]
        packed = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        np.savez(made, ids=np.concatenate(ids), lengths=np.array([*map(len, ids)]), about=packed)

    def read(self, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(samples with input_ids and what is kept of them; sha256 of all, and the columns of their row)."""
        path = self.path(folder)
        try:
            with np.load(path) as file:
                about = json.loads(file["about"].tobytes())
                ids = np.split(file["ids"].astype(np.int32), np.cumsum(file["lengths"])[:-1])
            pairs = zip(about.pop("samples"), ids, strict=True)
            return [{**sample, "task": self.task, "input_ids": one} for sample, one in pairs], about
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: this file of the cache was changed after it was written; delete it") from error


@dataclass(frozen=True)
class Samples(Prompts):
    """RULER samples: task and length with the options for small windows."""

    model: str
    task: str
    length: int
    count: int
    seed: int
    max_new_tokens: int | None
    shots: int
    hops: int
    edition: str = "lab-2026"
    data: tuple[tuple[str, str], ...] = ()

    WHOLE = False
    KEPT = ("outputs", "max_new_tokens", "depth")

    def path(self, folder: Path) -> Path:
        from benchmarks.ruler import tasks

        about = [value for key, value in vars(self).items() if key != "model" and (key != "data" or value)]
        name = self.named(f"{self.task}-{self.length}-seed{self.seed}", *about, tasks.GENERATOR, "samples-1")
        return folder / "samples" / f"{name}.npz"

    def write(self, made: Path, given: LabConfig) -> None:
        options: dict[str, Any] = {key: getattr(self, key) for key in ("max_new_tokens", "shots", "hops", "edition")}
        folder = given.data_dir if self.data else None
        if self.data and folder is None:
            raise ValueError(f"{made.name} is not in the cache, and to make it data_dir must be given")
        tokenizer = tokenizer_of(self.model)
        built = ruler.build_samples(self.task, self.length, tokenizer, self.count, self.seed, folder, **options)
        fill = round(sum(sample["fill"] for sample in built) / len(built), 5)
        self.pack(made, built, **{key: built[0][key] for key in ("haystack", "haystack_sha256")}, fill=fill)

    def scale(self) -> tuple[str, str]:
        return "ruler", f"string_match_{'part' if ruler.SPECS[self.task].metric == 'any' else 'all'}"

    def percent(self, sample: Mapping[str, Any], text: str) -> float:
        return 100 * ruler.score(self.task, text, sample["outputs"])


@dataclass(frozen=True)
class SetSamples(Prompts):
    """The first `count` documents of a LongBench set, their middle cut out where they are too long. sha256: of the
    set's file."""

    model: str
    task: str
    length: int
    count: int
    sha256: str

    seed = 0
    WHOLE = True
    KEPT = ("outputs", "max_new_tokens", "all_classes")

    def scale(self) -> tuple[str, str]:
        suite = "longbench_e" if self.task in longbench.TASKS_E else "longbench"
        return suite, longbench.dataset_of(self.task).metric

    def path(self, folder: Path) -> Path:
        name = self.named(f"{self.task}-{self.length}", self.length, self.count, self.sha256, GENERATOR)
        return folder / "samples" / f"{name}.npz"

    def write(self, made: Path, given: LabConfig) -> None:
        folder, tokenizer = needed_file(given, f"{self.task}.jsonl", made).parent, tokenizer_of(self.model)
        built = longbench.build_samples(self.task, tokenizer, window=self.length, data_dir=folder, n=self.count)
        about = {key: getattr(longbench.dataset_of(self.task), key) for key in ("category", "language")}
        cut = sum(sample["truncated"] for sample in built)
        self.pack(made, built, **about, n_truncated=cut, generator=GENERATOR)

    def percent(self, sample: Mapping[str, Any], text: str) -> float:
        return longbench.score(self.task, text, sample["outputs"], sample["all_classes"])


def parts(cell: Cell) -> list[Part | Piece]:
    if not cell.trained:
        return []
    if "documents" not in cell.sources:
        return [*made_parts(cell, cell.documents)]
    # Of the given documents as many as the cell reads, and questions for its share of rows with one.
    rows = cell.steps * cell.rows
    characters = int(cell.sources["documents_characters"])
    wanted = min(characters, round(rows * cell.row_tokens * TOKEN_CHARACTERS))
    pieces = range(max(1, -(-wanted // PIECE_CHARACTERS)))
    asked = made_parts(cell, max(1, round(cell.retrieval * rows)), questions_only=True) if cell.retrieval else ()
    return [*(Piece(cell.model, cell.sources["documents"], number) for number in pieces), *asked]


def made_parts(cell: Cell, count: int, questions_only: bool = False) -> list[Part]:
    each = min(count, max(1, PART_TOKENS // cell.row_tokens))
    common = (cell.model, each, cell.row_tokens, cell.longest, cell.seed)
    return [Part(*common, number, questions_only) for number in range(-(-count // each))]


def held_out(cell: Cell) -> HeldOut | None:
    """The given held-out text at the target's length, None if the matrix names none."""
    if "held_out" not in cell.sources:
        return None
    return HeldOut(cell.model, cell.sources["held_out"], cell.target, cell.scoring.loss_rows)


def samples(cell: Cell) -> list[Samples | SetSamples]:
    """RULER's at every length; LongBench's cut to the window that the model has."""
    scoring = cell.scoring
    data = tuple((name, digest) for name, digest in sorted(cell.sources.items()) if name.endswith(".json"))
    options = (scoring.max_new_tokens, scoring.shots, scoring.hops, scoring.edition)
    window = cell.target if cell.trained or cell.settings.get("scaling") != "none" else cell.window
    return [
        *(
            Samples(cell.model, task, length, scoring.count(length), SAMPLE_SEED + cell.seed, *options, data)
            for length in cell.lengths
            for task in scoring.tasks
        ),
        *(
            SetSamples(cell.model, name, window, count, cell.sources[f"{name}.jsonl"])
            for name, count in scoring.longbench.items()
        ),
    ]


def needed(cells: Sequence[Cell]) -> list[Material]:
    """All files of the cells, each once, in the order in which cells need them."""
    found: dict[Material, None] = {}
    for cell in cells:
        text = held_out(cell)
        found |= dict.fromkeys([*parts(cell), *samples(cell), *([text] if text else [])])
    return list(found)


def needed_file(given: LabConfig, name: str, made: Path) -> Path:
    path = input_path(given, name)
    if path is None:
        raise ValueError(f"{made.name} is not in the cache, and to make it {name} must be given")
    return path


@cache
def tokenizer_of(model: str) -> Any:
    from endprompt.model import load_tokenizer

    return load_tokenizer(model)


@cache
def tokenizer_sha256(model: str) -> str:
    """Of a checkpoint's tokenizer; of a dequantised one the GGUF file's, however its tokenizer is written."""
    source = origin.about(model).get("sha256")
    return str(source or sha256_of((Path(model) / "tokenizer.json").read_bytes()))


@cache
def training_prose(model: str) -> Any:
    return documents.Prose.from_sentences(documents.sample_training_sentences(), tokenizer_of(model))
