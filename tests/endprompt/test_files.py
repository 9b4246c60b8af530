"""Text files as editors and tools write them: byte order marks, and bytes that are no UTF-8, wherever text is read."""

import gzip
import json

import pytest
import yaml

from analysis import scene
from analysis.config import VerifyConfig
from benchmarks.lab import matrix
from benchmarks.ruler import texts
from endprompt import cli, files
from endprompt.data import read_documents

MARK = b"\xef\xbb\xbf"
LINE = json.dumps({"text": "one two"}).encode() + b"\n"


@pytest.fixture
def write(tmp_path):
    def to(name, data: bytes):
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return to


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_a_document(write, name):
    data = b"one two" if name == "a.txt" else LINE
    assert [d.text for d in read_documents(write(name, MARK + data))] == ["one two"]
    # files that were joined by `cat`: each line may have one
    if name != "a.txt":
        assert [d.text for d in read_documents(write(name, MARK + LINE + MARK + LINE))] == ["one two"] * 2


def test_a_mark_inside_a_text_stays(write):
    assert [d.text for d in read_documents(write("a.txt", b"one" + MARK + b"two"))] == ["one\ufefftwo"]
    record = json.dumps({"text": "\ufeffone"}, ensure_ascii=False).encode()
    assert [d.text for d in read_documents(write("a.jsonl", record))] == ["\ufeffone"]  # written down as text


def test_a_byte_order_mark_in_haystacks_json_rows_and_matrices(write, tmp_path):
    for name, data in (("h.txt", b"one  two\r\nthree"), ("h.json", b'{"text": "one two three"}')):
        plain, marked = (texts.essay(str(write(start + name, mark + data)), None, "niah_single_2")
                         for start, mark in (("plain", b""), ("marked", MARK)))  # fmt: skip
        assert marked.words == plain.words == ["one", "two", "three"]
    assert list(files.json_lines([MARK + b'{"a": 1}\n', b'{"a": 2}'], "x")) == [(1, {"a": 1}), (2, {"a": 2})]
    assert list(files.read_json_lines(write("r.jsonl", MARK + b'{"a": 1}\n'))) == [(1, {"a": 1})]
    assert matrix.read_matrix(write("m.yaml", MARK + b"seeds: 2\n")) == {"seeds": 2}


def test_a_byte_order_mark_in_a_configuration(write, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["extend", "--config", str(write("run.yaml", MARK + b"lr: 0.25\n")), "--print_config"])
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["lr"] == 0.25


def test_verify_reads_the_same_tokens_with_and_without_a_mark(llama, write):
    text = ("the grass is green " * 8).encode()
    paths = (write("a.txt", text), write("b.txt", MARK + text))
    config = {"checkpoint": str(llama), "output": "x", "target": 128, "prompt": 4, "pairs": 8}
    plain, marked = (scene.prepare(VerifyConfig(**config, text=str(path))).ids.tolist() for path in paths)
    assert marked == plain


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", MARK + b"ab\xff", r"a\.txt: not UTF-8 \(invalid start byte at byte 5\)"),
        ("a.txt", "one".encode("utf-16"), r"a\.txt: not UTF-8 \(invalid start byte at byte 0\)"),
        ("a.jsonl", LINE + b'{"text": "\xe4"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl.gz", LINE + b'{"text": "\xe4"}\n', r"a\.jsonl\.gz, line 2: not UTF-8"),
        ("a.jsonl", LINE.decode().encode("utf-16"), r"a\.jsonl, line 1: not UTF-8"),
        ("a.jsonl.gz", LINE.decode().encode("utf-16"), r"a\.jsonl\.gz, line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "\xed\xa0\x80"}\n', r"a\.jsonl, line 1: not UTF-8"),  # half of a pair, as bytes
    ],
)
def test_bytes_that_are_no_utf_8_are_named_with_their_place(write, name, data, said):
    with pytest.raises(ValueError, match=said):
        list(read_documents(write(name, data)))


def test_a_haystack_and_a_text_to_verify_that_are_no_utf_8(write, llama):
    path = write("a.txt", b"ab\xe4cd")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 \(invalid continuation byte at byte 2\)"):
        texts.essay(str(path), None, "niah_single_2")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 \(invalid continuation byte at byte 2\)"):
        scene.prepare(VerifyConfig(checkpoint=str(llama), output="x", target=128, prompt=4, text=str(path)))


def test_damaged_lines_are_told_from_sound_ones(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": "\xc3\xa4"}\n\n{"a": "\xff"}\n[1]\n{"a": 2')
    assert [(n, found) for n, _, found in files.sound_lines(path)] == [(1, {"a": "ä"}), (3, None), (4, None), (5, None)]
    assert next(files.sound_lines(path))[1] == '{"a": "ä"}'
