"""The base's training data: what text is taken, what is held out, and that rows repeat."""

import hashlib
import json
from dataclasses import asdict
from email.message import Message

import numpy as np
import pytest

from benchmarks.base import rebuild
from benchmarks.base import text as base
from benchmarks.base.documents import NIAH, NOISE, SAMPLE_PATH, VT, Prose, Words, sentences


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
    prose = Prose.from_sentences([s for p in text[:200_000].split("\n\n") for s in sentences(p)], tokenizer)
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


# ------------------------------------------------------------------------------------------- collect, prepare, rebuild

MANUAL = "\n\n".join(
    f"The keeper of lighthouse number {'abcdefghij'[n]} writes about the weather, the ships and the birds that he sees."
    for n in range(10)
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages, one of whose files is no Python, in place of the installed ones; returns their folder."""
    folder = tmp_path / "packages"
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "manual.md").write_text(MANUAL)
    (folder / "one" / "broken.py").write_text("def f(:\n" + "# a remark that is long enough to be taken\n" * 9)
    (folder / "two.py").write_text(SOURCE + "\n".join(f"number_{n} = {n} + len('{n}')" for n in range(40)))
    sources = [
        base.Source("one", "1.0", "MIT", (folder / "one" / "broken.py", folder / "one" / "manual.md"), "Too short."),
        base.Source("two", "2.5", "BSD", (folder / "two.py",)),
    ]
    monkeypatch.setattr(base, "installed_sources", lambda: sources)
    return folder


def test_collected_text_is_that_of_the_packages_and_is_counted(packages):
    prose, code, record = base.collect(10_000, 10_000, processes=1)
    comment, docstring = base.prose_of(SOURCE)
    assert sorted(prose) == sorted([MANUAL, f"{comment}\n\n{docstring}"])
    (program,) = code
    assert program.startswith("import os\n\ndef f(x):\n    return x  # short") and program.endswith("len('39')")
    assert record == [
        {"name": "one", "version": "1.0", "licence": "MIT", "prose_bytes": len(MANUAL), "code_bytes": 0},
        {"name": "two", "version": "2.5", "licence": "BSD", "prose_bytes": len(comment + docstring) + 2,
         "code_bytes": len(program)},
    ]  # fmt: skip
    whole = sum(len(text) for text in prose)
    assert len(base.collect(whole, 0, processes=1)[0]) == 2
    prose, code, record = base.collect(whole - 1, 0, processes=1)  # the second document is one byte too long
    assert len(prose) == 1 and code == [] and len(record) == 1


def test_prepared_text_comes_back_from_its_tokens(packages, tmp_path, monkeypatch):
    text = SAMPLE_PATH.read_text(encoding="utf-8")[:30_000].rpartition("\n\n")[0]
    monkeypatch.setattr(base, "collect", lambda *_: ([MANUAL, text], ["import os\n"], [{"name": "one"}]))
    prepared = base.load_prepared(str(base.prepare(tmp_path / "data", processes=1)))
    ids = prepared.text.tolist()
    ends = [place for place, token in enumerate(ids) if token == prepared.tokenizer.eos_token_id]
    starts = [0, *(end + 1 for end in ends[:-1])]
    documents = {prepared.tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends)}
    assert documents == {MANUAL, text, "import os\n"} and ends[-1] == len(ids) - 1
    summary = json.loads((tmp_path / "data" / "sources.json").read_text())
    assert summary["text_tokens"] == len(ids) and summary["packages"] == [{"name": "one"}]
    assert summary["text_bytes"] == len((MANUAL + text).encode()) + len("import os\n")
    kept = [p for whole in (MANUAL, text) for p in base.readable(whole)]
    assert summary["haystack_sentences"] == sum(len(sentences(p)) for p in kept) == len(prepared.prose.offsets) - 1
    assert len(prepared.tokenizer("4096")["input_ids"]) == 4  # a digit is a token


def test_a_base_is_rebuilt_with_the_shape_and_the_steps_of_its_recipe(prepared, tmp_path, monkeypatch):
    small = rebuild.BaseRecipe(192, 2, 128, 2, steps=3, rows=4, distinct=12, lr=1e-3, export_dtype="bfloat16", seed=5)
    monkeypatch.setitem(rebuild.RECIPES, 192, small)
    path = rebuild.rebuild(192, str(tmp_path / "made"), data=str(prepared))
    config = json.loads((path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["head_dim"], config["intermediate_size"]) == (2, 64, 3 * 128)
    assert config["max_position_embeddings"] == 192 and config["dtype"] == "bfloat16"
    vocabulary = config["vocab_size"]
    count, kinds = stored(path)
    # embeddings once; a layer has four products of attention, three of the MLP and two norms; one norm at the end
    assert count == vocabulary * 128 + 2 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128) + 128 and kinds == {"BF16"}
    record = json.loads((path / "endprompt.json").read_text())
    assert (
        record["method"] == "base" and record["tokens"] == 3 * 4 * 192 and record["final_loss"] < np.log(vocabulary) + 1
    )
    assert record["base"]["recipe"] == vars(small) and record["base"]["rows"]["rows"] == 12
    assert (path / "sources.json").read_text() == (prepared / "sources.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]  # the rows are gone
    with pytest.raises(ValueError, match="window must be one of 256, 512, 192: window=100"):
        rebuild.rebuild(100, str(tmp_path / "other"), data=str(prepared))


def stored(path):
    """Numbers in a checkpoint's weights, and their types, read from the file's head."""
    whole = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + size])
    head.pop("__metadata__", None)
    return sum(int(np.prod(tensor["shape"])) for tensor in head.values()), {t["dtype"] for t in head.values()}


@pytest.mark.parametrize("window", [256, 512])
def test_the_card_of_the_bases_says_what_their_files_say(window):
    card = " ".join((rebuild.FOLDER / "README.md").read_text(encoding="utf-8").split())
    folder, recipe = rebuild.FOLDER / str(window), rebuild.RECIPES[window]
    config, record = (json.loads((folder / name).read_text()) for name in ("config.json", "endprompt.json"))
    sources = json.loads((folder / "sources.json").read_text())
    count, kinds = stored(folder)
    dtype = {"F32": "float32", "BF16": "bfloat16"}[kinds.pop()]
    assert f"{count / 1e6:.1f} million, {dtype}" in card and dtype == recipe.export_dtype
    shape = f"{config['num_hidden_layers']} layers × {config['hidden_size']}, {config['num_attention_heads']} heads of"
    assert f"Llama, {shape} {config['head_dim']}" in card
    steps = f"{record['steps']:,} steps × {record['config']['rows']} rows × {window} tokens"
    assert f"{steps} ({record['tokens'] / 1e6:.0f}M tokens), seed {recipe.seed}" in card
    assert record["tokens"] == recipe.steps * recipe.rows * window
    assert f"{record['seconds']:.0f} s, and {record['base']['seconds_for_rows']:.0f} s for the rows" in card
    revision = json.loads((folder / "environment.json").read_text())["revision"]
    assert f"`{revision[:8]}`" in card
    assert f"{sources['text_tokens'] / 1e6:.1f}M tokens ({sources['text_bytes'] / 1e6:.0f} MB)" in card
    others = [entry for entry in sources["packages"] if entry["name"] != "python"]
    assert f"Python interpreter and of {len(others)} installed packages" in card
    assert all(base.PERMISSIVE.search(entry["licence"]) for entry in sources["packages"])
    assert sum(e["prose_bytes"] + e["code_bytes"] for e in sources["packages"]) == sources["text_bytes"]
    counts = record["base"]["rows"]["counts"]
    assert counts["text"] == recipe.distinct / 2 == sum(n for kind, n in counts.items() if kind != "text")
