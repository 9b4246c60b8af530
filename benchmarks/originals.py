"""The originals of a suite: files that are not distributed with this project, brought from their hosts.

A suite's `sources.yaml` has a file's names (with their folder, if it has one), what it is, its licence, and its copies,
an address with the sha256 of what lies there (null: not known in advance). A download goes on where it broke off, and a
file appears when it is whole and is what it is said to be. What came is noted in SHA256SUMS beside it, against which
later fetches check.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import email.utils
import functools
import itertools
import json
import os
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from endprompt import files
from endprompt.cli import one_line

if TYPE_CHECKING:
    import requests

ATTEMPTS = 5  # in a row that bring nothing
PAUSE = 2.0  # seconds before a second attempt, doubled before each further one
LONGEST_PAUSE = 120.0  # that a server may ask for
TIMEOUT = (15.0, 60.0)  # seconds to connect, and between bytes
CHUNK = 1 << 20
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Original:
    """A data file that users bring. names: that it may have in the data folder, the first one if it is fetched."""

    names: list[str]
    what: str
    licence: str
    copies: dict[str, str | None]  # address: sha256
    questions: int = 0  # answerable ones of a whole question set

    @property
    def whole(self) -> set[str | None]:
        """sha256 of its known copies."""
        return {*self.copies.values()} - {None}


@functools.cache
def originals(suite: str) -> dict[str, Original]:
    """The files of a suite by their kind. Raises ValueError with the nearest names if there is no such suite."""
    tables = sorted(Path(__file__).parent.glob("*/sources*.yaml"))  # sources-v2.yaml in longbench: of longbench-v2
    ends = {path: path.stem.removeprefix("sources") for path in tables}  # sources_mrcr.yaml: of mrcr
    known = {end[1:] if end.startswith("_") else path.parent.name + end: path for path, end in ends.items()}
    if suite not in known:
        near = difflib.get_close_matches(suite, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no originals of {suite!r} are known; {hint}")
    table = yaml.safe_load(known[suite].read_text(encoding="utf-8"))
    return {kind: Original(**about) for kind, about in table.items()}


def data_file(suite: str, kind: str, data_dir: str | Path | None) -> Path:
    """A suite's file in the user's folder. Raises ValueError that says what is missing and which command brings it, and
    for a file that is not the one that was fetched, or whose known sha256 is another.
    """
    source = originals(suite)[kind]
    paths = [Path(data_dir) / name for name in source.names] if data_dir is not None else []
    if (path := next(filter(Path.is_file, paths), None)) is None:
        where = "--data-dir is not set" if data_dir is None else f"it is not in --data-dir {data_dir}"
        raise ValueError(
            f"{suite} needs {source.names[0]} ({source.what}) and {where}: {command(suite, data_dir)} brings it"
        )
    files.check_fetched(path)
    if other := other_version(path, source):
        raise ValueError(f"{other}; data of your own need another name ({', '.join(source.names[1:])})")
    return path


def other_version(path: Path, source: Original) -> str | None:
    """What there is to say of a fetched name whose bytes are of another version than its known or noted sha256."""
    first = path.name == Path(source.names[0]).name
    wanted = {noted(path.parent).get(path.name)} - {None} or (source.whole if first else set())
    if not wanted or (found := files.remembered_sha256(path)) in wanted:
        return None
    known = " or ".join(sorted(map(str, wanted)))
    return f"{path}: of another version: its sha256 is {found}, that of {source.what} is {known}"


@functools.cache
def say_version(suite: str, path: Path) -> None:
    """A line, the first time that a run reads a file with a published one's name and other bytes."""
    from endprompt.distributed import say

    for source in originals(suite).values():
        if path.match(source.names[0]) and (other := other_version(path, source)):
            say(f"{other}: scores of it may differ from published ones")


def command(suite: str, data_dir: str | Path | None) -> str:
    """The command that brings a suite's files, for the message that one is missing."""
    return f"`endprompt fetch {suite} --data-dir {shlex.quote(str(data_dir or suite))}`"


def fetch(suites: Sequence[str], data_dir: str | Path, only: Sequence[str] = ()) -> bool:
    """Bring the files of the suites that are not in the folder yet, or those `only` whose kind begins so; returns
    whether all are there. Says each file's licence before it is fetched, and in a line each what could not be had.
    Raises ValueError for a suite, or a kind, that is not known.
    """
    import requests

    known = {kind: one for suite in suites for kind, one in originals(suite).items()}
    wanted = [one for kind, one in known.items() if not only or kind.startswith(tuple(only))]
    if strange := [name for name in only if not any(kind.startswith(name) for kind in known)]:
        raise ValueError(f"no file of {', '.join(suites)} is called so; there are {', '.join(known)}: only={strange}")
    folder = Path(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    whole = True
    with requests.Session() as session:
        session.headers.update({"User-Agent": "endprompt-lab", "Accept-Encoding": "identity"})
        for one in wanted:
            try:
                print(bring(one, folder, session))
            except (ValueError, OSError) as error:
                print(f"endprompt: {one_line(error)}", file=sys.stderr)
                whole = False
    return whole


class Refused(Exception):
    """What is wrong with an address, in words that follow it."""


def bring(original: Original, folder: Path, session: requests.Session) -> Path:
    """The file in the folder, fetched if it was not there. Raises ValueError in one line if it cannot be had."""
    there = [folder / name for name in original.names if os.path.lexists(folder / name)]
    if there:
        check_present(there[0], original)
        return there[0]
    path = folder / original.names[0]
    print(f"{path.name}: {original.what}. Licence: {original.licence}", file=sys.stderr)
    reasons = []
    with files.sole_use(path):
        for url, sha256 in original.copies.items():
            address = url.replace("https://huggingface.co", os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
            try:
                note(path.parent, path.name, download(address, path, sha256, session))
                os.rename(files.aside(path), path)
                source_note(path).unlink()
                return path
            except Refused as reason:
                reasons.append(f"{address} {reason}")
    raise ValueError(f"{path}: cannot be fetched: {'; '.join(reasons)}")


def check_present(path: Path, original: Original) -> None:
    """Raises ValueError for a file that is not the original, which is left as it is."""
    if not path.is_file():
        raise ValueError(f"{path}: must be a file, or nothing yet; it is left as it is")
    sha256 = files.file_sha256(path)
    known = original.whole | {noted(path.parent).get(path.name)} - {None}
    if known and sha256 not in known:
        raise ValueError(
            f"{path}: is there, and is not the original ({original.what}): its sha256 is {sha256}, that of the "
            f"original {' or '.join(sorted(map(str, known)))}; it is left as it is: move it away to fetch the original"
        )
    print(f"{path.name}: is there already, sha256 {sha256}", file=sys.stderr)


def noted(folder: Path) -> dict[str, str]:
    """sha256 of what was fetched, by name."""
    path = folder / SUMS
    lines = files.read_text(path).splitlines() if path.is_file() else []
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def note(folder: Path, name: str, sha256: str) -> None:
    files.write_text(folder / SUMS, "".join(f"{s}  {n}\n" for n, s in {**noted(folder), name: sha256}.items()))


def source_note(path: Path) -> Path:
    """Beside a part: of which address and version it is."""
    return path.with_name(path.name + ".partial.json")


def download(url: str, path: Path, sha256: str | None, session: requests.Session) -> str:
    """Bring all that an address sends beside `path`, beginning where an earlier attempt broke off; its sha256. Raises
    Refused for an address that gives no data, or breaks off again and again without bringing more.
    """
    from requests import exceptions
    from urllib3.exceptions import HTTPError

    part, reason, failures = files.aside(path), "", 0
    most = size_of(part)
    while failures < ATTEMPTS:
        before, pause = size_of(part), PAUSE * 2 ** max(failures - 1, 0)
        try:
            asked = receive(url, path, sha256, session)
            if asked is None:
                return checked(part, path.name, sha256)
            reason, wanted = asked
            if wanted > LONGEST_PAUSE:
                raise Refused(f"{reason} and asks to wait {wanted:.0f} s")
            pause = max(pause, wanted)
        except Refused:
            if not before or part.exists():
                raise
            reason, pause = "sends what does not fit the part that was here", 0.0  # once more, from the start
        except (exceptions.TooManyRedirects, exceptions.InvalidURL, exceptions.InvalidSchema) as error:
            raise Refused(f"leads nowhere ({said(error)})") from None
        except (exceptions.RequestException, HTTPError) as error:
            reason = f"breaks off after {size_of(part):,} bytes ({said(error)})"
            failures += 2 * isinstance(error, exceptions.ConnectTimeout)  # a host that is not there costs much time
        failures = 0 if size_of(part) > most else failures + 1
        most = max(most, size_of(part))
        if failures < ATTEMPTS:
            print(f"{url} {reason}; again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    if sha256 and part.is_file() and files.file_sha256(part) == sha256:  # only the length that it stated was wrong
        return sha256
    raise Refused(f"{reason}, again and again")


def receive(url: str, path: Path, sha256: str | None, session: requests.Session) -> tuple[str, float] | None:
    """Ask once, and write what comes; None if it came to its end, else (why to ask again, seconds to wait)."""
    part, about = files.aside(path), source_note(path)
    held = files.read_object(about, optional=True) if part.is_file() else {}
    version = held.get("version") if held.get("url") == url else None
    # what has neither a version nor a known hash might be put together of two versions
    begun = size_of(part) if version or (sha256 and held.get("sha256") == sha256) else 0
    headers = {"Range": f"bytes={begun}-"} if begun else {}
    if begun and version:
        headers["If-Range"] = version
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        status = f"answers {answer.status_code} {answer.reason or ''}".strip()
        if answer.status_code in TRY_AGAIN:
            return status, retry_after(answer.headers)
        if begun and answer.status_code == 416:  # there are no more bytes than are here already, or fewer
            if sha256 and files.file_sha256(part) == sha256:
                return None
            part.unlink()
            return status, 0.0
        if not answer.ok:
            raise Refused(status)
        if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
            part.unlink()
            return f"sends other bytes than asked for: {answer.headers.get('Content-Range')}", 0.0
        if not sha256 and url.startswith("https:") and not answer.url.startswith("https:"):
            raise Refused(f"leads to {answer.url}, which is not encrypted, and its sha256 is not known in advance")
        # as it comes: requests' own chunks lose what came of the one that breaks off
        chunks = iter(lambda: answer.raw.read1(CHUNK), b"")
        first = next(chunks, b"")
        if answer.status_code != 206:
            if first.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"<":
                kind = answer.headers.get("Content-Type", "of no stated type")
                raise Refused(f"sends a page ({kind}) in place of the data")
            begun, tag = 0, answer.headers.get("ETag") or ""
            version = tag if tag.startswith('"') else answer.headers.get("Last-Modified")  # a weak tag names no bytes
            files.write_text(about, json.dumps({"url": url, "version": version, "sha256": sha256}) + "\n")
        stated = answer.headers.get("Content-Length", "")
        total = begun + (int(stated) if stated.isdecimal() else 0)
        with open(part, "ab" if begun else "wb") as file, progress(path.name, begun, total) as advance:
            for chunk in itertools.chain([first], chunks):
                advance(file.write(chunk))
    return None


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait in its Retry-After: a number, or a date."""
    text = headers.get("Retry-After", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        return 0.0


def said(error: BaseException) -> str:
    """An error's own words, of the innermost one: requests wraps urllib3's, which repeats itself."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    if len(error.args) > 1 and isinstance(error.args[0], str):
        return error.args[0]
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def progress(name: str, begun: int, total: int) -> Iterator[Callable[[int], None]]:
    """`advance(bytes)`: a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=(console := Console(stderr=True)), disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total or None, completed=begun)
        yield lambda count: bar.update(task, advance=count)


def checked(part: Path, name: str, sha256: str | None) -> str:
    """sha256 of what came. Raises Refused, and takes it away, if it is another one than known, or damaged."""
    found, problem = files.file_sha256(part), ""
    if sha256 and found != sha256:
        problem = f"sends other data: sha256 {found}, must be {sha256}"
    elif not sha256:
        try:
            files.check_fetched(part)
            if name.endswith(".zip"):
                with zipfile.ZipFile(part) as archive:
                    problem = f"damaged in {bad}" if (bad := archive.testzip()) else ""
            elif name.endswith(".json"):
                files.parse_json(part.read_bytes(), name)
            else:  # Parquet, or JSON lines: every record is read
                records = files.read_parquet(part) if name.endswith(".parquet") else files.read_json_lines(part)
                problem = "" if sum(1 for _ in records) else "sends no record"
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            problem = f"sends no whole file: {said(error)}"
    if problem:
        part.unlink()
        source_note(part.with_name(name)).unlink(missing_ok=True)
        raise Refused(problem)
    return found
