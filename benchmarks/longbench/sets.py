"""LongBench's 21 sets and LongBench-E's 13: what they are, and their documents, read from the user's folder.

Bai et al. 2023, arXiv:2308.14508. A task is named by its set, `qasper`, or with `_e` in LongBench-E, `qasper_e`.
Every file that was read is known by its sha256.
"""

import csv
import difflib
import hashlib
import io
import itertools
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks import originals
from endprompt.files import check_fetched, json_lines, read_json_lines, read_parquet, remembered_sha256

OPTION = "--data-dir"

CATEGORIES = ("single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "synthetic", "code")
BUCKETS = ("0-4k", "4-8k", "8k+")


@dataclass(frozen=True)
class Dataset:
    """One of the 21 sets. `extended` says that LongBench-E has it too, with other documents."""

    name: str
    category: str
    language: str  # en, zh or code; the published English figures include code, and so do the Chinese category means
    metric: str
    max_new_tokens: int
    extended: bool
    prompt_sha256: str  # of the benchmark's prompt in UTF-8, with {context} and {input} as places

    @property
    def chat(self) -> bool:
        """Whether a chat model's template wraps the prompt: not where the prompt is a text to be continued."""
        return self.category not in ("few_shot", "code")

    @property
    def first_line(self) -> bool:
        """Whether the answer is the first line of what is generated, newlines before it passed over."""
        return self.category == "few_shot"


def read_sets() -> dict[str, Dataset]:
    """The sets by name, in the benchmark's order."""
    with open(Path(__file__).with_name("sets.csv"), encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    numbers = ({"max_new_tokens": int(row["max_new_tokens"]), "extended": row["extended"] == "1"} for row in rows)
    return {row["name"]: Dataset(**row | own) for row, own in zip(rows, numbers)}


DATASETS = read_sets()
TASKS: tuple[str, ...] = tuple(DATASETS)
TASKS_E: tuple[str, ...] = tuple(f"{name}_e" for name, dataset in DATASETS.items() if dataset.extended)

WITHOUT_QUESTION = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")  # their prompts have no {input}


def dataset_of(task: str) -> Dataset:
    """The set that a task is of. Raises ValueError with the nearest names if there is no such task."""
    if task in TASKS_E:
        return DATASETS[task.removesuffix("_e")]
    if task not in DATASETS:
        names = TASKS + TASKS_E
        near = difflib.get_close_matches(task, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"tasks: {', '.join(names)}"
        raise ValueError(f"unknown LongBench task {task!r}; {hint}")
    return DATASETS[task]


def bucket(length: int) -> str:
    """LongBench-E's interval of a document's own length (words, or characters of Chinese), as published: 0-4k ..."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


@dataclass(frozen=True)
class Documents:
    """A task's documents and the sha256 of every file that they were read from."""

    task: str
    items: list[dict[str, Any]]
    sha256: dict[str, str]


def load_documents(task: str, data_dir: str | Path | None) -> Documents:
    """The documents of a task from the user's folder (or `data.zip` itself). Nothing is fetched.

    Looked for, in this order: `TASK.jsonl` and `data/TASK.jsonl`; the same inside `data.zip` as it is downloaded;
    Parquet files `TASK/test-*.parquet`, `data/TASK/test-*.parquet`, `TASK.parquet` (where `question` stands for
    `input`, as in Xnhyacinth/LongBench). Raises FileNotFoundError that says what is missing and what brings it,
    ValueError with file and line for a corrupt document or archive.
    """
    dataset_of(task)
    if data_dir is None:
        raise FileNotFoundError(f"LongBench's data are needed for {task}: {brought(None)}")
    folder = Path(data_dir)
    if not folder.exists():
        raise FileNotFoundError(f"no such folder given by {OPTION}: {folder}; {brought(folder)}")
    found = find_jsonl(task, folder) or find_in_archive(task, folder) or find_parquet(task, folder)
    if found is None:
        raise FileNotFoundError(
            f"LongBench's {task} is missing in {folder}: neither {task}.jsonl, nor data.zip with data/{task}.jsonl, "
            f"nor {task}/test-*.parquet; {brought(folder)}"
        )
    records, sha256 = found
    items = [check_document(task, record, where) for where, record in records]
    if not items:
        raise ValueError(f"{next(iter(sha256))}: holds no document of {task}")
    return Documents(task, items, sha256)


def brought(folder: Path | None) -> str:
    return f"{originals.command('longbench', folder)} brings LongBench's data.zip, and {OPTION} names its folder"


# What zipfile raises for a damaged archive; a password is a RuntimeError.
UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, OSError, ValueError)
LARGEST = 2**31  # bytes of a set: a small archive must not fill the memory
Found = tuple[Iterable[tuple[str, Any]], dict[str, str]] | None


def find_jsonl(task: str, folder: Path) -> Found:
    for path in (folder / f"{task}.jsonl", folder / "data" / f"{task}.jsonl"):
        if path.is_file():
            check_fetched(path)
            return placed(path, "line", read_json_lines(path)), {path.name: remembered_sha256(path)}
    return None


def find_in_archive(task: str, folder: Path) -> Found:
    path = folder if folder.is_file() else folder / "data.zip"
    if not path.is_file():
        return None
    check_fetched(path)
    originals.say_version("longbench", path)
    members = archive_members(path)
    names = [name for name in (f"{task}.jsonl", f"data/{task}.jsonl") if name in members]
    if not names:
        return None
    if len(names) > 1 or members.count(names[0]) > 1:
        raise ValueError(f"{path}: holds {task}.jsonl twice ({', '.join(names)})")
    try:
        with zipfile.ZipFile(path) as archive:
            if (size := archive.getinfo(names[0]).file_size) > LARGEST:
                raise ValueError(f"it unpacks to {size} bytes, more than any of LongBench's sets")
            data = archive.read(names[0])
    except UNREADABLE as error:
        raise ValueError(f"{path}, {names[0]}: cannot be read ({error}); download it again") from None
    sha256 = {path.name: remembered_sha256(path), f"{path.name}:{names[0]}": hashlib.sha256(data).hexdigest()}
    name = f"{path}:{names[0]}"
    return placed(name, "line", json_lines(io.BytesIO(data), name)), sha256


def archive_members(path: Path) -> list[str]:
    """Names in the archive. It is read in place, yet one whose paths lead out of its folder is not to be trusted."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except UNREADABLE as error:
        message = f"{path}: not a whole zip archive ({error}); move it away, and {brought(path.parent)}"
        raise ValueError(message) from None
    for name in names:
        if name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path}: the path of a member must stay inside the archive: {name!r}")
    return names


def find_parquet(task: str, folder: Path) -> Found:
    for pattern in (f"{task}/test*.parquet", f"data/{task}/test*.parquet", f"{task}.parquet"):
        if paths := sorted(folder.glob(pattern)):
            for path in paths:
                check_fetched(path)
            records = itertools.chain.from_iterable(placed(path, "row", read_parquet(path)) for path in paths)
            return records, {str(path.relative_to(folder)): remembered_sha256(path) for path in paths}
    return None


def placed(path: Path | str, kind: str, records: Iterable[tuple[int, Any]]) -> Iterator[tuple[str, Any]]:
    """(place, record) of numbered ones."""
    return ((f"{path}, {kind} {number}", record) for number, record in records)


def check_document(task: str, record: dict[str, Any], where: str) -> dict[str, Any]:
    """The document with LongBench's own field names. Raises ValueError naming the place, the key and the rule."""
    document = dict(record)
    if "input" not in document and "question" in document:
        document["input"] = document.pop("question")
    if document.get("input") is None and dataset_of(task).name in WITHOUT_QUESTION:
        document["input"] = ""
    if task in TASKS:
        document.setdefault("length", None)  # needed for LongBench-E's buckets alone
    wanted = {"input": str, "context": str, "answers": list, "length": int if task in TASKS_E else int | None}
    for key, kind in wanted.items():
        value = document.get(key)
        if not isinstance(value, kind):
            raise ValueError(f"{where}: {key} must be {getattr(kind, '__name__', kind)}, got {type(value).__name__}")
    for key in ("input", "context"):
        if not is_unicode(document[key]):
            raise ValueError(f"{where}: {key} holds half of a surrogate pair, which no tokenizer takes")
    document["answers"] = [str(answer) for answer in document["answers"]]
    if not document["answers"]:
        raise ValueError(f"{where}: answers must not be empty")
    if dataset_of(task).metric == "classification" and not document.get("all_classes"):
        raise ValueError(f"{where}: all_classes must list the labels of {task}")
    named = document.get("dataset")
    if named in TASKS + TASKS_E and named.removesuffix("_e") != task.removesuffix("_e"):
        raise ValueError(f"{where}: a document of {named}, in a file of {task}")
    return document


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
