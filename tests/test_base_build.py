"""The base's training data: what text is taken, what is held out, and that rows repeat."""

import hashlib
import json
from dataclasses import asdict
from email.message import Message

import numpy as np
import pytest

from benchmarks import base
from benchmarks.documents import NIAH, NOISE, SAMPLE_PATH, VT, Prose, Words


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT")], "MIT"),
        ([("License-Expression", "MPL-2.0 AND MIT")], ""),
        ([("License-Expression", "MIT AND LGPL-3.0-or-later")], ""),
        ([("License", "GPLv3")], ""),
        ([("License", "LICENCE.txt")], ""),
        ([], ""),
        ([("Classifier", "License :: OSI Approved :: BSD License")], "BSD License"),
        ([("Classifier", "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"), ("License", "BSD")], ""),
        ([("Classifier", "Programming Language :: Python")], ""),
    ],
)
def test_only_permissive_licences_pass(fields, licence):
    class Package:
        metadata = Message()

    for name, value in fields:
        Package.metadata[name] = value
    assert base.licence_of(Package()) == licence


SOURCE = '''# Copyright of somebody, whose name stands here.
import os

# A comment that goes on for long enough to be taken as a piece of prose, since it has more than one
# hundred characters over both of its lines.
def f(x):
    """Say what this function does in a sentence that is long enough to count as prose for training a model.

        Indented text stays indented.
    """
    return x  # short
'''


def test_prose_and_code_of_a_source_are_told_apart():
    comment, docstring = base.prose_of(SOURCE)
    assert comment.startswith("A comment that goes on") and comment.endswith("both of its lines.")
    assert docstring.splitlines()[0].startswith("Say what") and docstring.endswith("Indented text stays indented.")
    assert base.code_of(SOURCE) == "import os\n\ndef f(x):\n    return x  # short"


def test_text_of_the_sample_and_repeats_are_dropped():
    sample = SAMPLE_PATH.read_text(encoding="utf-8").split("\n\n")
    words = next(p for p in sample if len(p.split()) > 30).split()
    stolen = "Some words in front,\n" + "\n  ".join(words[5:20]).upper() + " and some behind."
    fresh = "A paragraph about turnips, which no help topic of an interpreter has any reason to mention at all."
    keeper = base.Keeper()
    assert keeper.keep(f"{fresh}\n\n{stolen}") == fresh
    assert keeper.keep(f"{fresh}\n\n{stolen}") == ""


def test_sample_is_plain_prose():
    text = SAMPLE_PATH.read_text(encoding="utf-8")
    assert 400_000 <= len(text) <= 600_000 and text.isascii()
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    assert letters > 0.93
    paragraphs = text.strip().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small prepared folder, made of the sample's text."""
    folder = tmp_path_factory.mktemp("a prepared folder")
    text = SAMPLE_PATH.read_text(encoding="utf-8")
    tokenizer = base.train_tokenizer([text, *[NIAH, VT, NOISE] * 200])
    base.save_tokenizer(tokenizer, folder / "tokenizer")
    np.asarray(tokenizer(text[:200_000]).input_ids, dtype=np.uint16).tofile(folder / "text.bin")
    prose = Prose.from_sentences([s for p in text[:200_000].split("\n\n") for s in base.sentences(p)], tokenizer)
    np.savez(folder / "prose.npz", ids=prose.ids, offsets=prose.offsets, starts=prose.starts)
    words = Words(("fat", "odd", "dry"), ("ox", "raven", "community"))
    (folder / "words.json").write_text(json.dumps(asdict(words)))
    (folder / "sources.json").write_text("{}")
    return folder


def test_rows_repeat_whatever_the_number_of_processes(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "ROWS_A_TASK", 40)
    made = [
        base.build(tmp_path / name, 192, 100, seed, data=prepared, processes=processes)
        for name, seed, processes in (("a", 1, 1), ("b", 1, 2), ("c", 2, 2))
    ]
    assert made[0] == made[1] and made[0]["sha256"]["tokens.bin"] != made[2]["sha256"]["tokens.bin"]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    tokens = (tmp_path / "a" / "tokens.bin").read_bytes()
    assert manifest["sha256"]["tokens.bin"] == hashlib.sha256(tokens).hexdigest()
    assert len(tokens) == 100 * 192 * 2 and sum(manifest["counts"].values()) == 100
    weights = np.fromfile(tmp_path / "a" / "weights.bin", dtype=np.uint8).reshape(100, 192)
    assert (weights[0::2] == 1).all() and (weights[1::2] == 10).any(axis=1).all()
    rows = np.frombuffer(tokens, dtype=np.uint16).reshape(100, 192)
    assert len(np.unique(rows, axis=0)) == 100


def test_a_folder_without_prepared_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sources\.json is missing"):
        base.build(tmp_path / "out", 192, 10, 0, data=tmp_path)
