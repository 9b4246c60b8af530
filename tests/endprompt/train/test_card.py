"""The model card: metadata that the hub's own classes read back, scores of this checkpoint alone, a guarded upload."""

import io
import json
import shutil
import sys
import types
from typing import ClassVar

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from benchmarks import commands, scoring
from benchmarks.config import CardConfig
from benchmarks.scoring import fingerprint
from endprompt import results, train
from endprompt.config import ExtendConfig
from endprompt.train import card


@pytest.fixture(scope="module")
def extended(llama, documents, tmp_path_factory):
    """A trained checkpoint whose base states its licence; from folders with telling names."""
    root = tmp_path_factory.mktemp("home-of-somebody")
    base = shutil.copytree(llama, root / "models--org--tiny" / "snapshots" / "abc")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlanguage: [en]\n---\n# Tiny\n")
    config = ExtendConfig(
        model=str(base), data=[str(documents)], output=str(root / "out"), target=128, prompt="EP_3", rows=2, steps=2,
        device="cpu",
    )  # fmt: skip
    return train.extend(config)


@pytest.fixture
def checkpoint(extended, tmp_path):
    return shutil.copytree(extended, tmp_path / "checkpoint")


def test_extend_leaves_a_card_that_the_hub_reads(extended):
    read = ModelCard.load(extended / "README.md")
    assert read.data.base_model == "org/tiny" and read.data.library_name == "transformers"
    assert read.data.pipeline_tag == "text-generation" and {"rope-linear", "endprompt"} <= set(read.data.tags)
    assert (read.data.license, read.data.license_name) == ("other", "own")
    assert "from 32 to 128 tokens" in read.text and "`endprompt+EP_3+linear`" in read.text
    assert "| training data | `documents.jsonl` |" in read.text and "2 of 2 rows of 32 tokens" in read.text
    assert "| RoPE scaling | linear, factor 4 |" in read.text
    assert "| training tokens | 128 |" in read.text and "max_length=128" in read.text
    assert str(json.loads((extended / "endprompt.json").read_text())["environment"]["revision"]) in read.text
    assert "somebody" not in read.content and "\n## Scores\n\nNone yet" in read.text


def test_no_vllm_is_offered_for_a_scaling_that_it_has_no_angles_of(extended):
    record = json.loads((extended / "endprompt.json").read_text())
    assert "\nvllm serve PATH --max-model-len 128\n" in card.text(record, [], "m")
    record["config"]["scaling"] = "dynamic"
    text = card.text(record, [], "m")
    assert "vllm serve" not in text and "vLLM has no angles of dynamic scaling beyond 32 tokens." in text


@pytest.mark.parametrize(
    "text", [None, "# no metadata", "---\nlicense: [a\n---\n", "---\nlicense: 3\n---\n", "---\n- a\n---\n", b"\xff\xfe"]
)
def test_no_licence_is_made_up(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert card.licence(tmp_path) == {}


def test_card_changes_no_hash_of_the_checkpoint(checkpoint):
    config = types.SimpleNamespace()
    before = fingerprint.checkpoint_sha256(str(checkpoint), config)
    (checkpoint / "README.md").unlink()
    assert fingerprint.checkpoint_sha256(str(checkpoint), config) == before


def scored(checkpoint, run, **changes):
    """A run directory with two rows of this checkpoint and one of another."""
    from endprompt.model import load_config

    config = scoring.ScoreConfig(str(checkpoint), dtype="float32", output=str(run))
    made_by = fingerprint.fingerprint(config, load_config(checkpoint))
    out = fingerprint.begin(run, config, made_by, computes=True)
    usual = {
        "suite": "ruler", "metric": "string_match_all", "model": "out", "method": "m", "seed": 3, "n": 50,
        "backend": "hf", "attn": "sdpa", "dtype": "float32", "samples_sha256": "s",
        "run_sha256": made_by.sha256,
    } | changes  # fmt: skip
    out.add(
        [
            results.result_row(task="vt", length=128, value=81.25, ci95=(70.0, 90.5), **usual),
            results.result_row(task="vt", length=64, value=12.0, **usual),
            results.result_row(task="vt", length=32, value=99.0, **usual | {"run_sha256": "another's"}),
        ]
    )
    return run


def test_scores_become_a_model_index(checkpoint, tmp_path, capsys):
    run = scored(checkpoint, tmp_path / "run")
    commands.card(CardConfig(str(checkpoint), [str(run)]))
    assert capsys.readouterr().out.strip() == str(checkpoint / "README.md")
    read = ModelCard.load(checkpoint / "README.md")
    found = [(r.dataset_config, r.metric_type, r.metric_value, r.metric_args) for r in read.data.eval_results]
    assert found == [
        ("vt@64", "string_match_all", 12.0, {"n": 50, "seed": 3}),
        ("vt@128", "string_match_all", 81.25, {"n": 50, "ci95": [70.0, 90.5], "seed": 3}),
    ]
    index = yaml.safe_load(read.content.split("---")[1])["model-index"]
    assert [entry["name"] for entry in index] == ["checkpoint"]
    assert "| RULER | vt | 128 | string_match_all | 81.2 | 70.0 to 90.5 | 50 |" in read.text and "99.0" not in read.text


def test_scores_of_other_weights_are_refused(checkpoint, tmp_path):
    run = scored(checkpoint, tmp_path / "run")
    raw = bytearray((checkpoint / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(raw)
    before = (checkpoint / "README.md").read_text()
    with pytest.raises(ValueError, match="none of its rows was scored on"):
        commands.card(CardConfig(str(checkpoint), [str(run)]))
    assert (checkpoint / "README.md").read_text() == before


def test_what_is_no_run_or_no_checkpoint_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="must be the output of `endprompt score`"):
        fingerprint.rows_of(checkpoint, tmp_path)
    with pytest.raises(ValueError, match=r"endprompt\.json does not exist"):
        commands.card(CardConfig(str(tmp_path)))


class FakeHub:
    """Stands for the hub's client: remembers, and fails as told."""

    calls: ClassVar[list] = []
    error: Exception | None = None

    def create_repo(self, repository, **settings):
        self.calls.append(("create", repository, settings))

    def upload_folder(self, **settings):
        if self.error:
            raise self.error
        self.calls.append(("upload", settings["repo_id"], settings))
        return "https://hub/org/name"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "error", None)
    monkeypatch.setenv("HF_TOKEN", "hf_SecretSecretSecret")
    return FakeHub


def typed(monkeypatch, line):
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))


def test_upload_after_the_name_is_typed(checkpoint, hub, monkeypatch, capsys):
    typed(monkeypatch, "org/name\n")
    commands.card(CardConfig(str(checkpoint), push_to_hub="org/name"))
    (made, _, how), (sent, repository, settings) = hub.calls
    assert (made, sent, repository) == ("create", "upload", "org/name") and how["private"] is True
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "https://hub/org/name" and "hf_" not in said.out + said.err
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(settings["allow_patterns"])
    for name in settings["allow_patterns"]:
        assert name in said.err and b"somebody" not in (checkpoint / name).read_bytes()


@pytest.mark.parametrize("line", ["", "\n", "yes\n", "org/nam\n"])
def test_nothing_is_uploaded_otherwise(checkpoint, hub, monkeypatch, line):
    typed(monkeypatch, line)
    with pytest.raises(ValueError, match="nothing was uploaded"):
        card.push(checkpoint, "org/name")
    with pytest.raises(ValueError, match="OWNER/NAME"):
        card.push(checkpoint, "name")
    assert hub.calls == []


def test_error_of_the_hub_quotes_no_token(checkpoint, hub, monkeypatch):
    typed(monkeypatch, "org/name\n")
    hub.error = RuntimeError("401 for hf_SecretSecretSecret, Authorization: Bearer abc.def")
    with pytest.raises(ValueError, match="the hub refused org/name: 401") as raised:
        card.push(checkpoint, "org/name")
    assert "Secret" not in str(raised.value) and "abc.def" not in str(raised.value)
