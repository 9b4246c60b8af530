"""Damaged files of every kind that comes from outside: a bounded, seeded fuzz of their parsers.

Whatever the damage, a reader gives a value, or raises a ValueError or OSError whose one line names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import endprompt
from benchmarks import longbench, scoring
from benchmarks.ruler import texts
from benchmarks.scoring import checkpoint, predictions
from endprompt import cli, data, model, results
from endprompt.config import ExtendConfig
from endprompt.distributed import World
from endprompt.model import load
from endprompt.train.output import Output
from paper_figures.inputs import read_results
from tests.support import longbench_fixtures, ruler_helpers
from tests.support.checkpoints import make_checkpoint, make_tokenizer

ROUNDS = int(os.environ.get("ENDPROMPT_FUZZ_ROUNDS", "45"))  # damaged copies of each kind of file
NASTY = (
    b"", b"\x00", b"\xff\xfe", b"\n", b"\r", b"\xe2\x80\xa8", b"{}", b"[]", b"null", b"NaN", b"1e999", b"-1",
    b'"\\ud800"', b"[" * 3000, b"9" * 5000, b'"', b"\\", b"!!python/object/apply:os.system [exit]", b"&a [*a]",
)  # fmt: skip
VALUES = (None, True, -1, 0, 1e308, float("nan"), 10**30, "", "\ud800", "x" * 300, [], [[]], {}, {"a": 1}, [None, 1])


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A copy with one to three faults: bytes changed, cut out, doubled, or something nasty put in."""
    copy = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(copy) + 1)
        end = min(len(copy), at + draw.choice((1, 1, 4, 40, 10**9)))
        kind = draw.randrange(5)
        if kind == 0 and at < len(copy):
            copy[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del copy[at:end]
        elif kind == 2:
            copy[at:at] = copy[at : min(end, at + 200)]
        else:
            copy[at : at + draw.choice((0, 1))] = draw.choice(NASTY)
    return bytes(copy)


def another(value, draw: random.Random):
    """The JSON value with one of its parts replaced by a value of another kind, or left out."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        copy = value.copy()
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        if draw.random() < 0.2:
            del copy[key]
        else:
            copy[key] = another(value[key], draw)
        return copy
    return draw.choice(VALUES)


def read_documents(path: Path):
    return data.load_documents([str(path)], make_tokenizer())


def read_shard(path: Path):
    data.read_shard(path.parent, verify=False)


def read_predictions(path: Path):
    entries = predictions.show(path.parent, "vt")
    predictions.shown(entries)


def read_longbench(path: Path):
    longbench.load_documents("qasper", path.parent)


def read_record(path: Path):
    checkpoint.method_of(scoring.ScoreConfig(str(path.parent)))
    Output(ExtendConfig(model="m", data=["d"], output=str(path.parent), resume=True), World()).finished()


def read_state(path: Path):
    from endprompt.train.states import newest_state

    newest_state(path.parent.parent)  # a damaged one is passed over, and said


def read_config(path: Path):
    model.rope_geometry(model.load_config(path.parent))


def read_tokenizer(path: Path):
    tokenizer = model.load_tokenizer(path.parent)
    load.check_vocabulary(model.load_config(path.parent), tokenizer)


def read_weights(path: Path):
    model.load_model(path.parent)


def essay_text(path: Path):
    texts.essay(path, None)


def essays(path: Path):
    texts.essay(None, path.parent)


def squad(path: Path):
    texts.library("squad", path.parent, "qa_1")


def hotpotqa(path: Path):
    texts.library("hotpotqa", path.parent, "qa_2")


def words(path: Path):
    texts.more_words(path)


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(records) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), out)
    return out.getvalue()


def archive(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(name, content)
    return out.getvalue()


def question_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ruler_helpers.qa_files(Path(folder), articles=2, paragraphs=2)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


DOCUMENTS = [
    {"text": "the grass is green"},
    {"text": "a question", "completion": " an answer"},
    {"input_ids": [1, 2, 3]},
]
ROW = results.result_row(
    suite="ruler", task="vt", metric="string_match_all", value=50.0, model="m", method="base", seed=0, length=4096,
    stderr=1.0, ci95=(40.0, 60.0), n=10, samples_sha256="0" * 64,
)  # fmt: skip
PREDICTION = {
    "run": "r", "task": "vt@4096", "index": 0, "prompt_sha256": "0" * 64, "prediction": "p", "score": 50.0,
    "outputs": ["a"], "length": 9, "depth": [50.0],
}  # fmt: skip
RECORD = {"method": "base", "config": {"model": "m"}, "steps": 3}
MANIFEST = {
    "schema": 1, "tokenizer_sha256": "0" * 64, "dtype": "uint16", "tokens": 4, "documents": 1,
    "sha256": dict.fromkeys(("tokens.bin", "offsets.npy", "completions.npy"), "0" * 64),
}  # fmt: skip
LONGBENCH = longbench_fixtures.documents("qasper", n=2, words=20)
QUESTIONS = question_files()
#: name of the file, what it holds when it is whole, and what reads it.
FILES: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "documents.jsonl": (lines(*DOCUMENTS), read_documents),
    "documents.jsonl.gz": (gzip.compress(lines(*DOCUMENTS), mtime=0), read_documents),
    "documents.parquet": (parquet(DOCUMENTS[:2]), read_documents),
    "documents.txt": ("the grass is green, die Wiese ist grün".encode(), read_documents),
    "shard/manifest.json": (json.dumps(MANIFEST, indent=1).encode(), read_shard),
    "results.jsonl": (lines(ROW, ROW | {"seed": 1}), results.read_rows),
    "measured.jsonl": (lines(ROW, ROW | {"seed": 1}), lambda path: read_results([path])),
    "run/predictions.jsonl": (lines(PREDICTION, PREDICTION | {"index": 1}), read_predictions),
    "checkpoint/endprompt.json": (json.dumps(RECORD, indent=1).encode(), read_record),
    "states/step-00000002/state.json": (json.dumps({"step": 2, "sha256": {}}).encode(), read_state),
    "qasper.jsonl": (lines(*LONGBENCH), read_longbench),
    "zip/data.zip": (archive("data/qasper.jsonl", lines(*LONGBENCH)), read_longbench),
    "parquet/qasper.parquet": (
        parquet([{k: v for k, v in d.items() if v is not None} for d in LONGBENCH]),
        read_longbench,
    ),
    "squad.json": (QUESTIONS["squad.json"], squad),
    "hotpotqa.json": (QUESTIONS["hotpotqa.json"], hotpotqa),
    "PaulGrahamEssays.json": (json.dumps({"text": "One sentence. Another one."}).encode(), essays),
    "story.txt": ("One sentence. Ein schöner Satz.".encode(), essay_text),
    "english_words.json": (json.dumps({"1": "one", "2": "two"}).encode(), words),
}


def outcome(read: Callable[[Path], object], path: Path) -> str | None:
    """None if the file was read; else what a user sees. Fails for any other kind of error."""
    try:
        read(path)
    except (ValueError, OSError) as error:
        return cli.one_line(error)
    return None


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_read_or_named_in_one_line(name, tmp_path, capsys):
    whole, read = FILES[name]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole)
    if name.startswith("shard"):
        import numpy as np

        np.array([1, 2, 3, 0], dtype=np.uint16).tofile(path.with_name("tokens.bin"))
        np.save(path.with_name("offsets.npy"), np.array([0, 4]))
        np.save(path.with_name("completions.npy"), np.array([4]))
    assert outcome(read, path) is None, "the whole file must be readable, or the fuzz shows nothing"
    draw, refused = random.Random(name), 0
    for number in range(ROUNDS):
        copy = damaged(whole, draw)
        if path.suffix in (".json", ".jsonl") and number % 2:
            records = [json.loads(line) for line in whole.split(b"\n") if line] if path.suffix == ".jsonl" else None
            value = another(records if records is not None else json.loads(whole), draw)
            copy = lines(*value) if records is not None and isinstance(value, list) else json.dumps(value).encode()
        path.write_bytes(copy)
        try:
            message = outcome(read, path)
        except Exception as error:
            raise AssertionError(f"round {number}: {type(error).__name__}: {error} from {copy[:2000]!r}") from error
        if message is not None:
            refused += 1
            named = path.name in message or path.parent.name in message
            assert named and len(message) <= cli.LONGEST and "\n" not in message, (number, message, copy[:2000])
    capsys.readouterr()
    assert refused > ROUNDS // 10 or name.startswith(("states", "documents.txt", "story", "run/")), refused


def read_generation(path: Path):
    settings = scoring.ScoreConfig(str(path.parent), device="cpu", dtype="float32")
    checkpoint.check_model(settings, model.load_config(path.parent))


CHECKPOINT = {
    "config.json": read_config,
    "generation_config.json": read_generation,
    "tokenizer.json": read_tokenizer,
    "tokenizer_config.json": read_tokenizer,
    "model.safetensors": read_weights,
    "model.safetensors.index.json": read_weights,
}


@pytest.mark.parametrize("name", CHECKPOINT)
def test_damaged_checkpoint_is_read_or_named_in_one_line(name, tmp_path, capsys):
    """As above; only the first bytes of the weights are damaged, their header: no hash protects the numbers."""
    path = make_checkpoint(tmp_path / "checkpoint") / name
    if "index" in name:
        AutoModelForCausalLM.from_pretrained(path.parent).save_pretrained(path.parent, max_shard_size="20KB")
        path.with_name("model.safetensors").unlink()
    whole, draw, refused = path.read_bytes(), random.Random(name), 0
    for number in range(ROUNDS // 4):
        copy = damaged(whole[:2000], draw) + whole[2000:]
        if path.suffix == ".json" and number % 2:
            copy = json.dumps(another(json.loads(whole), draw)).encode()
        path.write_bytes(copy)
        try:
            message = outcome(CHECKPOINT[name], path)
        except Exception as error:
            raise AssertionError(f"round {number}: {type(error).__name__}: {error} from {copy[:2000]!r}") from error
        if message is not None:
            refused += 1
            assert "checkpoint" in message and len(message) <= cli.LONGEST, (number, message)
    capsys.readouterr()
    assert refused > ROUNDS // 40


def test_damaged_recipes_are_bad_usage_and_run_nothing(tmp_path, capsys):
    """A YAML file that is handed on by other people: no code of it runs, and what is wrong with it is said."""
    from jsonargparse import ArgumentParser  # noqa: F401  (imported once, outside the loop)

    recipe = Path(endprompt.__file__).parent / "recipes" / "extend" / "endprompt-llama3-8b-64k.yaml"
    whole = recipe.read_bytes()
    path, draw = tmp_path / "recipe.yaml", random.Random(5)
    for _ in range(16):
        path.write_bytes(damaged(whole, draw))
        try:
            code = cli.main(["extend", "--config", str(path), "--print_config"])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        assert code in (0, 2), path.read_bytes()
        if code == 0:
            assert isinstance(yaml.safe_load(said.out), dict)
        else:
            assert "recipe.yaml" in said.err or "--help" in said.err, said.err
    mark = tmp_path / "ran"
    path.write_text(f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{mark}]]\n")
    with pytest.raises(SystemExit):
        cli.main(["extend", "--config", str(path), "--print_config"])
    assert not mark.exists()
