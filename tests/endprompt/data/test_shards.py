"""`endprompt prepare`: documents to a shard that training reads as if it had the documents."""

import gzip
import json
import sys

import numpy as np
import pytest

from endprompt import data, train
from endprompt.config import PrepareConfig
from endprompt.data import prepare, shards
from endprompt.data.documents import tokenize
from tests.support.checkpoints import WORDS


@pytest.fixture
def prepare_config(llama, documents, tmp_path):
    def make(**changes):
        values = {"data": [str(documents)], "output": str(tmp_path / "shard"), "tokenizer": str(llama)}
        return PrepareConfig(**(values | changes))

    return make


def test_training_on_a_shard_equals_training_on_its_documents(prepare_config, extend_config, tmp_path):
    shard = prepare(prepare_config())
    left = train.extend(extend_config(output=str(tmp_path / "a")))
    right = train.extend(extend_config(output=str(tmp_path / "b"), data=[str(shard)]))
    assert (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


def test_manifest_counts_what_was_written_and_dropped(prepare_config, tokenizer, tmp_path, capsys):
    lines = [{"text": "go"}, {"text": ""}, {"text": " ".join(WORDS), "completion": " the end"}, {"input_ids": [5] * 99}]
    path = tmp_path / "mixed.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    text, completion = len(tokenizer(" ".join(WORDS))["input_ids"]), len(tokenizer(" the end")["input_ids"]) + 1
    limit = text + 1  # cuts the completion and its EOS down to one token
    shard = prepare(prepare_config(data=[str(path)], min_tokens=2, max_tokens=limit))
    manifest = json.loads((shard / "manifest.json").read_text())
    lengths = [len(tokenizer("go")["input_ids"]) + 1, limit, limit]
    assert manifest["documents"] == 3 and manifest["tokens"] == sum(lengths)
    assert (manifest["documents_dropped"], manifest["tokens_dropped"]) == (1, 1)
    assert (manifest["documents_cut"], manifest["tokens_cut"]) == (2, completion - 1 + 100 - limit)
    assert manifest["tokenizer_sha256"] == shards.tokenizer_sha256(tokenizer)
    assert "; dropped below 2 tokens: 1 (1 tokens); cut: 2 (" in capsys.readouterr().err
    read = data.read_shard(shard, shards.tokenizer_sha256(tokenizer))
    assert read.lengths.tolist() == lengths
    assert (read.offsets[1:] - read.completions).tolist() == [0, 1, 0]
    ends = [tokenize([data.Document("go")], tokenizer).tokens.tolist(), read.tokens[: lengths[0]].tolist()]
    assert ends[0] == ends[1]


def test_hub_data_sets_are_streamed(prepare_config, documents, tmp_path):
    """A local directory stands for the hub: `datasets` loads both by the same call."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(documents.read_text())
    shard = prepare(prepare_config(data=[f"hub:{tmp_path / 'set'}"], max_documents=10))
    plain = prepare(prepare_config(output=str(tmp_path / "plain"), max_documents=10))
    assert (shard / "tokens.bin").read_bytes() == (plain / "tokens.bin").read_bytes()
    assert len(np.load(shard / "completions.npy")) == 10


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"data": []}, "data must be given"),
        ({"tokenizer": "nowhere"}, "must exist"),
        ({"min_tokens": 0}, "min_tokens must be at least 1"),
        ({"min_tokens": 10, "max_tokens": 5}, "max_tokens must not be below"),
        ({"min_tokens": 100_000}, "no document is left of 60"),
        ({"data": ["nowhere.jsonl"]}, "must exist: data='nowhere.jsonl'"),
        ({"data": ["hub:/nowhere/at/all"]}, "the data set cannot be read"),
    ],
)
def test_prepare_refuses_and_leaves_nothing(prepare_config, tmp_path, changes, rule):
    with pytest.raises(ValueError, match=rule):
        prepare(prepare_config(**changes))
    assert not list(tmp_path.iterdir())


def test_prepare_does_not_overwrite_unasked(prepare_config):
    shard = prepare(prepare_config())
    with pytest.raises(ValueError, match="output exists already"):
        prepare(prepare_config())
    assert prepare(prepare_config(overwrite=True)) == shard
    (shard / "manifest.json").unlink()  # now it could be anything
    with pytest.raises(ValueError, match="overwrite replaces an earlier shard only"):
        prepare(prepare_config(overwrite=True))


def test_shard_of_another_tokenizer_stops_a_run(prepare_config, extend_config):
    shard = prepare(prepare_config())
    manifest = json.loads((shard / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (shard / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        train.extend(extend_config(data=[str(shard)]))


def sources(documents, tmp_path):
    """The same documents in every way that they may be stored."""
    import fsspec
    import pyarrow

    plain = documents.read_bytes()
    packed = pyarrow.compress(plain, codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    for name, content in (("a.jsonl", plain), ("b.jsonl.gz", gzip.compress(plain)), ("c.jsonl.zst", packed)):
        with fsspec.open(f"memory://data/{name}", "wb") as file:
            file.write(content)
    table = pyarrow.Table.from_pylist([json.loads(line) for line in plain.splitlines()])
    with fsspec.open("memory://data/d.parquet", "wb") as file:
        pyarrow.parquet.write_table(table, file)
    names = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
    return [str(tmp_path / "a.jsonl.zst"), *(f"memory://data/{name}" for name in names)]


def test_zstd_and_addresses_hold_the_same_documents(
    prepare_config, documents, tmp_path, extend_config, tokenizer, monkeypatch
):
    import fsspec
    import pyarrow.parquet  # noqa: F401

    expected = (prepare(prepare_config()) / "tokens.bin").read_bytes()
    for number, source in enumerate(sources(documents, tmp_path)):
        shard = prepare(prepare_config(data=[source], output=str(tmp_path / f"shard-{number}")))
        assert (shard / "tokens.bin").read_bytes() == expected
    loaded = data.load_documents(["memory://data/a.jsonl"], tokenizer)
    assert len(loaded) == 60
    packed = (tmp_path / "a.jsonl.zst").read_bytes()
    (tmp_path / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    for source, rule in (
        (str(tmp_path / "cut.jsonl.zst"), "cut.jsonl.zst: not a whole zstd file"),
        ("memory://data/none.jsonl", "must exist: data='memory://data/none.jsonl'"),
        ("memory://data/a.jsonl:0.5x", "must exist"),
        ("nothing://data/a.jsonl", "cannot be reached: Protocol not known: nothing: data="),
    ):
        with pytest.raises(ValueError, match=rule):
            prepare(prepare_config(data=[source], output=str(tmp_path / "bad")))
    with pytest.raises(ValueError, match=r"cannot be reached: .*: data='nothing://a\.jsonl'"):
        train.extend(extend_config(data=["nothing://a.jsonl"]))
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", lambda *_: 1 / 0)  # as a server that is down
    with pytest.raises(ValueError, match="cannot be reached: division by zero: data='memory:"):
        prepare(prepare_config(data=["memory://data/a.jsonl"], output=str(tmp_path / "bad")))


def test_what_is_filtered_is_counted_and_printed(prepare_config, tokenizer, tmp_path, capsys):
    """Of five kinds of documents: short, long, the same, nearly the same, kept; by hand."""
    rng = np.random.default_rng(0)
    first = rng.integers(1, 300, 400).tolist()
    near, apart = first.copy(), first.copy()
    near[200] = 301  # 5 of 396 runs differ: a Jaccard index of 0.975
    apart[::8] = [301] * 50  # nearly every run differs
    path = tmp_path / "all.jsonl"
    held = [first, [7], rng.integers(1, 300, 900).tolist(), first, near, apart]
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in held))
    counted = {}
    for kind in ("keep", "exact", "near"):
        config = prepare_config(data=[str(path)], max_tokens=500, min_tokens=5, longer="drop", duplicates=kind,
                                append_eos=False, output=str(tmp_path / kind))  # fmt: skip
        manifest = json.loads((prepare(config) / "manifest.json").read_text())
        assert (manifest["documents_dropped"], manifest["documents_longer"], manifest["tokens_longer"]) == (1, 1, 900)
        counted[kind] = (manifest["documents"], manifest["documents_duplicate"], manifest["tokens_duplicate"])
        same = f"; dropped as duplicates: {counted[kind][1]} ({counted[kind][2]} tokens)" * (kind != "keep")
        said = (
            f" tokens (uint16); dropped below 5 tokens: 1 (1 tokens); dropped above max_tokens: 1 (900 tokens){same}\n"
        )
        assert capsys.readouterr().err.endswith(said)
    assert counted == {"keep": (4, 0, 0), "exact": (3, 1, 400), "near": (2, 2, 800)}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"duplicates": "some"}, "duplicates must be one of keep, exact, near: duplicates='some'"),
        ({"near_threshold": 0.0}, "near_threshold must be above 0"),
        ({"longer": "drop"}, "longer=drop needs max_tokens"),
        ({"longer": "drop", "max_tokens": 3}, "no document is left of 60.*max_tokens=3"),
    ],
)
def test_filters_that_cannot_be_are_refused(prepare_config, changes, rule):
    with pytest.raises(ValueError, match=rule):
        prepare(prepare_config(**changes))


def test_near_duplicates_need_their_package(prepare_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"duplicates=near needs a package.*pip install datasketch"):
        prepare(prepare_config(duplicates="near"))
