"""`endprompt prepare`: documents to a shard that training reads as if it had the documents."""

import gzip
import json

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
    assert "dropped 1 documents below 2 tokens" in capsys.readouterr().err
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
