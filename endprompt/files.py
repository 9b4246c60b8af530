"""Files that are whole or not there: JSON and its lines, caches, hashes, one user at a time."""

import contextlib
import ctypes
import errno
import functools
import gzip
import hashlib
import io
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any


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


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of fsspec's addresses: s3://, hf://, memory:// and so on."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file, or an address that fsspec knows, for reading; decompressed if its name ends in .gz or .zst."""
    import fsspec

    name = os.fspath(path)
    with contextlib.ExitStack() as stack:
        reader: Any = fsspec.open if is_address(name) else open
        raw: Any = stack.enter_context(reader(name, "rb"))
        if name.endswith(".zst"):
            import pyarrow

            raw = io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
        if name.endswith(".gz"):
            raw = stack.enter_context(gzip.open(raw))
        yield raw


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line. Raises ValueError naming file and line if one is not an object."""
    name = os.fspath(path)
    with opened(path) as file:
        try:
            yield from json_lines(file, name)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None
        except OSError as error:
            kind = "not a whole zstd file" if name.endswith(".zst") else "cannot be read"
            raise ValueError(f"{path}: {kind}: {error}") from None


def json_lines(file: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_json_lines`, of a file that is open: its lines end at newlines alone, since texts hold other ends."""
    for number, raw in enumerate(file, 1):
        where = f"{name}, line {number}"
        if line := decode(raw, where).strip():
            yield number, parse_object(line, where)


def read_parquet(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, record) of each row. Raises ValueError naming the file if it is not a whole one."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with opened(path) as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole Parquet file: {error}") from None


def sound_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """(line number, line, its object, or None if it is damaged) of each line that is not empty."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            found = None
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(line)
            if line.strip():
                yield number, line.decode(errors="replace").rstrip("\n"), found if isinstance(found, dict) else None


MARK = "\ufeff"  # some editors put this byte order mark in front of a text; it is no part of it


def decode(data: bytes, where: str) -> str:
    """UTF-8 to text, without a byte order mark. Raises ValueError that starts with `where`."""
    try:
        return data.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file that came from outside, line ends as newlines. Raises ValueError naming the file and the byte."""
    with opened(path) as file:
        return decode(file.read(), str(path)).replace("\r\n", "\n").replace("\r", "\n")


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


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """As `parse_json`, for what must be an object."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes. Raises ValueError naming it if it is a folder or a link to nothing, or cannot be read."""
    try:
        check_fetched(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


def check_fetched(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if the file is a Git LFS pointer: a clone without LFS has it in place of the data."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(
            f"{path}: must hold the data, and is a Git LFS pointer to them ({os.path.getsize(path)} bytes): "
            "run `git lfs pull` where it was cloned"
        )


def read_object(path: str | os.PathLike[str], *, optional: bool = False) -> dict[str, Any]:
    """The JSON object of a file from outside, {} if it is optional and not there. Raises ValueError naming the file."""
    if optional and not os.path.lexists(path):
        return {}
    return parse_object(read_whole(path), os.fspath(path))


def kept(directory: str | os.PathLike[str], name: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """The JSON value of a cache that was made from `key`, which holds everything that it depends on; one process makes
    it under a lock, the others wait. Raises ValueError if the file is not what was written.
    """
    from filelock import FileLock

    path = kept_path(directory, name, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            head, _, body = path.read_bytes().partition(b"\n")
            with contextlib.suppress(ValueError, RecursionError):
                about = json.loads(head)
                if isinstance(about, dict) and about.get("sha256") == sha256_of(body) and about.get("key") == key:
                    return json.loads(body)
            raise ValueError(f"{path}: this file of the cache was changed after it was written; delete it")
        value = make()
        text = json.dumps(value, sort_keys=True)
        write_text(path, json.dumps({"sha256": sha256_of(text), "key": key}, sort_keys=True) + "\n" + text)
        return value


def kept_path(directory: str | os.PathLike[str], name: str, key: Mapping[str, Any]) -> Path:
    """The file of `kept`."""
    return Path(directory) / f"{name}-{sha256_of(json.dumps(key, sort_keys=True))[:24]}.json"


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


_held: set[int] = set()  # this process's locks


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)

PR_SET_PDEATHSIG = 1  # Linux's prctl option: the signal that a process gets when its parent ends


def end_with_parent() -> None:
    """Kill this process when the one that started it ends, also when that is killed (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def sole_use(output: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an output for this run alone, by a kernel's lock on `OUTPUT.lock`, which is gone afterwards: a killed
    process lets go of it, also where processes that it forked live on. Where the file system knows no locks nothing is
    held. Raises ValueError at once if another run holds it.
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
    _held.add(descriptor)
    try:
        if held:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            os.close(descriptor)


def aside(path: str | os.PathLike[str]) -> Path:
    """Where a file or an output stands until it is whole."""
    path = Path(path)
    return path.with_name(path.name + ".partial")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file complete or not at all: written aside, flushed, renamed."""
    with open(aside(path), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside(path), path)


def sync_tree(directory: Path) -> None:
    """Flush every file of a directory, and the directory itself, to the disk."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
