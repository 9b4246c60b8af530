"""`endprompt fetch` against a server of this machine that breaks off, lies, refuses, sends pages and redirects."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.server
import io
import json
import os
import threading
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet
import pytest

from benchmarks import originals
from benchmarks.longbench import sets, v2
from benchmarks.originals import SUMS, Original
from benchmarks.ruler import cache, tasks, texts
from benchmarks.scoring.suites import lm_eval
from endprompt.cli import main

DATA = json.dumps({"text": "All work and no play. " * 500}).encode()
SHA256 = hashlib.sha256(DATA).hexdigest()
PAGE = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"


class Host(http.server.BaseHTTPRequestHandler):
    """Each path has the answers that it gives, one a request; the last one is given from then on."""

    answers: ClassVar[dict[str, list[dict]]] = {}
    asked: ClassVar[list[tuple[str, str | None]]] = []  # (path, Range)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        queue = self.answers.get(self.path, [{"status": 404, "body": PAGE}])
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        body, status, headers = answer.get("body", DATA), answer.get("status", 200), dict(answer.get("headers", {}))
        tag = answer.get("tag")
        if tag:
            headers["ETag"] = tag
        if wanted and answer.get("ranges", True) and status == 200 and self.headers.get("If-Range") in (None, tag):
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status, whole = (206, len(body)) if begin < len(body) else (416, len(body))
            headers["Content-Range"] = f"bytes {begin + answer.get('shift', 0)}-{whole - 1}/{whole}"
            body = body[begin:]
        self.send_response(status)
        for key, value in {"Content-Length": str(answer.get("length", len(body))), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: answer.get("sent", len(body))])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch):
    """The server's address; what it is asked is in `Host.asked`."""
    Host.answers, Host.asked = {}, []
    monkeypatch.setattr(originals, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(host, monkeypatch, tmp_path, capsys):
    """`fetch(answers of /a, of /b ..., sha256)`: (whether all is there, the folder, what was said)."""

    def run(*answers: list[dict], sha256: str | None = SHA256, name: str = "essays.json"):
        paths = dict(zip(("/a", "/b", "/c"), answers))
        Host.answers |= paths
        one = Original([name, "other.json"], "essays", "CC0", {host + path: sha256 for path in paths})
        monkeypatch.setattr(originals, "originals", lambda suite: {"essays": one})
        code = main(["fetch", "ruler", "--data-dir", str(tmp_path / "data")])
        return code == 0, tmp_path / "data", "".join(capsys.readouterr())

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_checked_noted_and_not_asked_for_again(fetch, capsys):
    whole, folder, said = fetch([{}])
    assert whole and (folder / "essays.json").read_bytes() == DATA
    assert (folder / SUMS).read_text() == f"{SHA256}  essays.json\n"
    assert names(folder) == [SUMS, "essays.json"]
    assert "essays.json: essays. Licence: CC0" in said and said.startswith(str(folder / "essays.json"))
    whole, folder, said = fetch([{}])
    assert whole and len(Host.asked) == 1 and f"is there already, sha256 {SHA256}" in said


HALF = {"sent": 4000}
LATE = email.utils.formatdate(time.time() - 60)


@pytest.mark.parametrize(
    ("answers", "sha256", "ranges"),
    [
        ([HALF, {}], SHA256, [None, "bytes=4000-"]),
        ([HALF, {"sent": 3000}, {}], SHA256, [None, "bytes=4000-", "bytes=7000-"]),
        ([HALF | {"tag": '"1"'}, {"tag": '"1"'}], None, [None, "bytes=4000-"]),
        # another version, a weak tag or no tag: nothing is put together that may not belong together
        ([HALF | {"tag": '"1"', "body": b"x" * 9000}, {"tag": '"2"'}], None, [None, "bytes=4000-"]),
        ([HALF | {"tag": 'W/"1"'}, {}], None, [None, None]),
        ([HALF, {}], None, [None, None]),
        # a server that knows no ranges, one that sends others than asked for, one with other bytes at first
        ([HALF, {"ranges": False}], SHA256, [None, "bytes=4000-"]),
        ([HALF, {"shift": 5}, {}], SHA256, [None, "bytes=4000-", None]),
        ([{"body": b"x" * 9000, "sent": 4000}, {}], SHA256, [None, "bytes=4000-", None]),
        # it states more than there is
        ([{"length": len(DATA) + 5, "ranges": False}], SHA256, [None] + [f"bytes={len(DATA)}-"] * 5),
        ([{"status": 503, "headers": {"Retry-After": "0"}}, {"status": 429}, {}], SHA256, [None] * 3),
        ([{"status": 503, "headers": {"Retry-After": LATE}}, {}], SHA256, [None] * 2),
        ([{"status": 302, "headers": {"Location": "/moved"}}], SHA256, [None] * 2),
        ([{"headers": {"Content-Length": "many"}}], SHA256, [None]),
    ],
)  # fmt: skip
def test_what_breaks_off_or_is_not_ready_ends_as_the_original(fetch, answers, sha256, ranges):
    Host.answers["/moved"] = [{}]
    whole, folder, said = fetch(answers, sha256=sha256)
    assert whole, said
    assert (folder / "essays.json").read_bytes() == DATA and names(folder) == [SUMS, "essays.json"]
    assert [wanted for _, wanted in Host.asked] == ranges


@pytest.mark.parametrize(
    ("answer", "sha256", "reason"),
    [
        ({"status": 404, "body": PAGE}, SHA256, "answers 404 Not Found"),
        ({"status": 403}, SHA256, "answers 403 Forbidden"),
        ({"body": PAGE, "headers": {"Content-Type": "text/html"}}, SHA256, "sends a page (text/html) in place of the"),
        ({"body": PAGE, "headers": {"Content-Type": "application/json"}}, None, "sends a page (application/json)"),
        ({"body": b"\xef\xbb\xbf" + PAGE}, SHA256, "sends a page (of no stated type)"),
        ({"status": 503, "headers": {"Retry-After": "3600"}}, SHA256, "503 Service Unavailable and asks to wait 3600"),
        ({"status": 503}, SHA256, "answers 503 Service Unavailable, again and again"),
        ({"length": 4000}, SHA256, "sends other data: sha256 "),  # it states less than there is
        ({"length": 4000}, None, "sends no whole file: essays.json: not valid JSON"),
        ({"length": len(DATA) + 5}, None, f"breaks off after {len(DATA):,} bytes (Connection broken: IncompleteRead("),
        ({"body": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, None, "is a Git LFS pointer"),
        ({"body": b""}, SHA256, "sends other data: sha256 e3b0c442"),
        ({"status": 302, "headers": {"Location": "/a"}}, SHA256, "leads nowhere (Exceeded 30 redirects"),
        ({"status": 302, "headers": {"Location": "ftp://x/y"}}, SHA256, "leads nowhere (No connection adapters"),
    ],
)
def test_an_address_without_the_data_is_said_in_a_line_and_the_next_one_is_asked(fetch, host, answer, sha256, reason):
    whole, folder, said = fetch([answer], sha256=sha256)
    (line,) = [line for line in said.splitlines() if line.startswith("endprompt:")]
    assert not whole and line.startswith(f"endprompt: {folder / 'essays.json'}: cannot be fetched: {host}/a ")
    assert reason in line and not (folder / "essays.json").exists() and not (folder / SUMS).exists()
    whole, folder, _ = fetch([answer], [{}], sha256=sha256)
    assert whole and (folder / "essays.json").read_bytes() == DATA


def test_a_part_of_another_start_goes_on_at_any_copy_of_the_same_hash(fetch, monkeypatch):
    monkeypatch.setattr(originals, "ATTEMPTS", 1)
    whole, folder, _ = fetch([HALF, {"status": 404}])
    assert not whole and (folder / "essays.json.partial").stat().st_size == 4000
    whole, folder, _ = fetch([{"status": 404}], [{}])
    assert whole and Host.asked[-1] == ("/b", "bytes=4000-") and (folder / "essays.json").read_bytes() == DATA


@pytest.mark.parametrize("name", ["essays.json", "other.json"])
def test_a_file_that_is_there_is_never_overwritten(fetch, tmp_path, name):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(b'{"text": "mine"}')
    whole, _, said = fetch([{}])
    assert not whole and path.read_bytes() == b'{"text": "mine"}' and Host.asked == []
    assert f"{path}: is there, and is not the original (essays)" in said and SHA256 in said


def test_a_hash_that_was_not_known_is_noted_and_held_to(fetch):
    whole, folder, _ = fetch([{}], sha256=None)
    assert whole and (folder / SUMS).read_text() == f"{SHA256}  essays.json\n"
    os.truncate(folder / "essays.json", 100)
    whole, _, said = fetch([{}], sha256=None)
    assert not whole and "is not the original" in said and SHA256 in said


def packed() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("data/qasper.jsonl", "x" * 5000)
    return file.getvalue()


def table() -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"input": ["Mary went home."] * 9}), file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "whole"),
    [("data.zip", packed()), ("4k/qa1.parquet", table()), ("sets/passkey.jsonl", DATA + b"\n" + DATA)],
)
def test_a_file_without_a_known_hash_must_be_whole(fetch, name, whole):
    """Nothing that a server sends in its place stays, so that a later fetch brings it."""
    damaged = whole[:200] + bytes([whole[200] ^ 0xFF]) + whole[201:]
    for body in (b"", whole[:-20], DATA[:-3], damaged if name == "data.zip" else whole[: len(whole) // 2 - 9]):
        there, folder, said = fetch([{"body": body}], sha256=None, name=name)
        (line,) = [line for line in said.splitlines() if line.startswith("endprompt:")]
        assert not there and f"{folder / name}: cannot be fetched" in line, (body[:20], line)
        assert [path for path in folder.rglob("*") if path.is_file()] == []
    there, folder, _ = fetch([{"body": whole}], sha256=None, name=name)
    assert there and (folder / name).read_bytes() == whole
    assert ((folder / name).parent / SUMS).read_text().endswith(f"  {Path(name).name}\n")
    there, folder, said = fetch([{"body": b""}], sha256=None, name=name)
    assert there and "is there already" in said


def test_some_files_of_a_suite_alone(host, monkeypatch, tmp_path, capsys):
    Host.answers["/a"] = [{}]
    known = {
        kind: Original([f"{kind}.json"], kind, "CC0", {host + "/a": SHA256}) for kind in ("4k/qa1", "4k/qa2", "64k/qa1")
    }
    monkeypatch.setattr(originals, "originals", lambda suite: known)
    assert main(["fetch", "babilong", "--data-dir", str(tmp_path), "--only", "4k/qa1,4k/qa2"]) == 0
    assert sorted(path.name for path in (tmp_path / "4k").glob("*.json")) == ["qa1.json", "qa2.json"]
    assert not (tmp_path / "64k").exists() and len(Host.asked) == 2
    capsys.readouterr()
    assert main(["fetch", "babilong", "--data-dir", str(tmp_path), "--only", "8k"]) == 1
    said = "endprompt: no file of babilong is called so; there are 4k/qa1, 4k/qa2, 64k/qa1: only=['8k']\n"
    assert capsys.readouterr().err == said


def test_the_hub_may_be_another_one(host, monkeypatch, tmp_path, capsys):
    Host.answers["/datasets/x/data.json"] = [{}]
    one = Original(["data.json"], "data", "CC0", {"https://huggingface.co/datasets/x/data.json": SHA256})
    monkeypatch.setattr(originals, "originals", lambda suite: {"data": one})
    monkeypatch.setenv("HF_ENDPOINT", host)
    assert originals.fetch(["x"], tmp_path)


def test_every_original_has_licence_and_pinned_or_own_addresses():
    for suite in ("ruler", "longbench", "longbench-v2", "ruler-v2", "mrcr", "babilong", "infinitebench"):
        for one in originals.originals(suite).values():
            assert one.licence and one.what and one.copies
            for url, sha256 in one.copies.items():
                assert sha256 is None or (len(sha256) == 64 and int(sha256, 16))
                assert url.startswith("https://") or sha256  # what is not encrypted is known by its hash


def test_an_unknown_suite_is_named(tmp_path, capsys):
    assert main(["fetch", "rulr", "--data-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "endprompt: no originals of 'rulr' are known; did you mean ruler?\n"


def test_a_folder_that_cannot_be_written_is_a_line(fetch, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "essays.json.partial"))

    monkeypatch.setattr(originals.files, "write_text", full)
    whole, _, said = fetch([{}])
    assert not whole and f"endprompt: {tmp_path / 'essays.json.partial'}: No space left on device\n" in said


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        ("ruler", "squad.json"),
        ("ruler", "english_words.json"),
        ("longbench", "data.zip"),
        ("longbench-v2", "data.json"),
        ("babilong", "babilong-1k-samples/4k/qa1-00000-of-00001.parquet"),
        ("infinitebench", "InfiniteBench/passkey.jsonl"),
    ],
)
def test_a_published_name_with_other_bytes_is_said_once_where_it_is_read(suite, name, tmp_path, monkeypatch, capsys):
    """By the code that reads it, whatever becomes of the bytes; what lies beside it unread is not spoken of."""
    for one in ("hotpotqa.json", "dev-v2.0.json", name):
        (tmp_path / one).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / one).write_bytes(DATA)
    known = {
        kind: Original([one], "the set", "free", {f"https://host/{one}": "0" * 64})
        for kind, one in (("it", name), ("hotpotqa", "hotpotqa.json"), ("elsewhere", f"8k/{Path(name).name}"))
    }
    monkeypatch.setattr(originals, "originals", lambda asked: known if asked == suite else {})
    reads = {
        "squad.json": lambda: texts.library("squad", tmp_path, "qa_1"),
        "english_words.json": lambda: cache.text_versions("cwe", 4096, tmp_path, tasks.Options()),
        "data.zip": lambda: sets.load_documents("qasper", tmp_path),
        "data.json": lambda: v2.load_documents(tmp_path),
        "qa1-00000-of-00001.parquet": lambda: lm_eval.local_copy(tmp_path, "RMT/babilong-1k-samples", "4k", {}),
        "passkey.jsonl": lambda: lm_eval.local_copy(tmp_path, "x/InfiniteBench", None, {"split": "passkey"}),
    }
    for _ in range(2):
        with contextlib.suppress(ValueError):
            reads[Path(name).name]()
    said = f"{tmp_path / name}: of another version: its sha256 is {SHA256}, that of the set is {'0' * 64}"
    said += ": scores of it may differ from published ones\n"
    assert capsys.readouterr().err == said
    originals.say_version.cache_clear()
    known["it"].copies[f"https://host/{name}"] = SHA256  # its own bytes
    with contextlib.suppress(ValueError):
        reads[Path(name).name]()
    assert capsys.readouterr().err == ""
