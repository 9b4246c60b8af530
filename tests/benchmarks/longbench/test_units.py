"""`endprompt score --suite longbench`: cells from the configuration, predictions to rows and summary."""

from __future__ import annotations

import json
import shutil
import types

import pytest
from transformers import LlamaConfig

from benchmarks import longbench
from benchmarks.longbench import TASKS, TASKS_E, dataset_of
from benchmarks.longbench.averages import result_rows, summary_rows, table
from benchmarks.scoring import ScoreConfig
from benchmarks.scoring.suite import suite_of
from benchmarks.scoring.units import Asker
from tests.support.longbench_fixtures import tokenizer, write_data

pytest.importorskip("benchmarks.scoring.run")


@pytest.fixture(scope="module")
def bpe():
    return tokenizer("byte_bpe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("longbench"))


def units(data, bpe, names, window=700, **options):
    settings = {"tasks": names, "data_dir": str(data), "suite": "longbench"}
    config = ScoreConfig("checkpoint", **{**settings, **options})
    return suite_of(config).units(Asker(config, LlamaConfig(max_position_embeddings=window), bpe))


def test_names_and_groups_of_tasks():
    assert longbench.select(["all"]) == list(TASKS) and longbench.select(["extended"]) == list(TASKS_E)
    assert len(longbench.select(["english"])) == 16
    assert longbench.select(["lcc", "lcc", "qasper_e"]) == ["lcc", "qasper_e"]
    with pytest.raises(ValueError, match="did you mean lcc"):
        longbench.select(["lccc"])
    with pytest.raises(ValueError, match="at least one"):
        longbench.select([])


def test_a_cell_a_set(data, bpe):
    made = units(data, bpe, ["qasper", "lcc_e"], chat=True, samples=3)
    assert [(unit.name, unit.suite, unit.metric, len(unit.samples)) for unit in made] == [
        ("qasper", "longbench", "qa_f1", 3),
        ("lcc_e", "longbench_e", "code_similarity", 3),
    ]
    qasper, lcc = (unit.columns for unit in made)
    assert (qasper["chat"], lcc["chat"]) == (True, False)
    assert qasper["category"] == "single_doc_qa" and qasper["data_sha256"].keys() == {"qasper.jsonl"}
    assert 0.9 < qasper["fill"] <= 1 and qasper["max_new_tokens"] == 128
    for unit in made:
        for index, sample in enumerate(unit.samples):
            assert sample["index"] == index and sample["length"] + sample["max_new_tokens"] <= 700
            assert unit.score(sample, sample["outputs"][0]) == pytest.approx(1, abs=1e-6)
            assert unit.score(sample, "") == 0


def test_prompts_are_cut_to_the_length_of_published_tables(data, bpe):
    whole, cut = (units(data, bpe, ["qasper"], prompt_length=length)[0] for length in (None, 200))
    assert (whole.columns["prompt_length"], cut.columns["prompt_length"]) == (None, 200)
    assert max(sample["length"] for sample in cut.samples) <= 200 < max(sample["length"] for sample in whole.samples)


def test_code_is_read_by_difflib_and_by_levenshtein(data, bpe):
    (lcc,) = units(data, bpe, ["lcc"])
    sample = {**lcc.samples[0], "outputs": ["aaaaab"]}
    assert {name: reading(sample, "ababab") for name, reading in lcc.readings.items()} == {
        "code_similarity_difflib": 0.33,
        "code_similarity_levenshtein": 0.67,
    }
    assert units(data, bpe, ["qasper"])[0].readings == {}


def test_a_pointer_in_place_of_the_data_is_named(data, bpe, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:affcd6d45fdf3cc8\nsize 8564991\n"
    for name in ("qasper.jsonl", "data.zip", "qasper/test-00000.parquet"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(pointer)
        with pytest.raises(ValueError, match=rf"{name}: must hold the data, and is a Git LFS pointer .*git lfs pull"):
            units(folder, bpe, ["qasper"])


def test_chat_needs_a_template(data):
    with pytest.raises(ValueError, match="chat template"):
        units(data, types.SimpleNamespace(chat_template=None), ["qasper"], chat=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unknown task", "unknown LongBench task 'hotpotq'; did you mean hotpotqa"),
        ("missing file", r"LongBench's qasper is missing .*fetch longbench --data-dir"),
        ("corrupt line", r"qasper\.jsonl, line 2"),
        ("small window", "qasper: the window must be at least"),
        ("no weights", "the checkpoint does not load"),
    ],
)
def test_every_fault_is_named_before_the_model_is_loaded(data, checkpoints, tmp_path, monkeypatch, fault, message):
    from benchmarks import scoring
    from benchmarks.scoring import run

    monkeypatch.setattr(run, "load", lambda *given: pytest.fail("a model was loaded"))
    folder, model = tmp_path / "data", tmp_path / "model"
    folder.mkdir()
    shutil.copytree(checkpoints(), model)
    if fault != "missing file":
        shutil.copy(data / "qasper.jsonl", folder)
    path = folder / "qasper.jsonl"
    if fault == "corrupt line":
        path.write_text(path.read_text().split("\n", 1)[0] + '\n{"context": \n')
    if fault == "small window":
        about = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 100}))
    settings = {"suite": "longbench", "tasks": "hotpotq" if fault == "unknown task" else "qasper", "device": "cpu"}
    settings |= {"data_dir": str(folder), "output": str(tmp_path / "out")}
    if fault == "no weights":
        (model / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=message):
        scoring.score(scoring.ScoreConfig(str(model), **settings))
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_predictions_become_rows_and_a_table(data, bpe):
    scored = {}
    for unit in units(data, bpe, ["all", "extended"], window=100_000):
        right = dataset_of(unit.task).category != "code"
        predictions = [sample["outputs"][0] if right else "" for sample in unit.samples]
        scored[unit.task] = [
            {**sample, "score": 100 * unit.score(sample, text)} for sample, text in zip(unit.samples, predictions)
        ]
    about = {"model": "m", "method": "base"}
    rows, summary = result_rows(scored, **about), summary_rows(scored, **about)
    assert [row for row in rows if row not in summary and "bucket" not in row] == rows[:21] + [
        row for row in rows if row["task"] in TASKS_E and "bucket" not in row
    ]
    values = {row["task"]: row["value"] for row in summary if row["metric"] == "average" and "bucket" not in row}
    assert values["english_category_mean"] == pytest.approx(500 / 6, abs=1e-4)
    assert values["english_16_mean"] == pytest.approx(1400 / 16, abs=1e-4)
    assert values["all_21_mean"] == pytest.approx(1900 / 21, abs=1e-4)
    text = table(rows).splitlines()
    assert text[0].split() == ["all", "0-4k", "4-8k", "8k+"]
    assert f"{'lcc_e':<23}{0:8.2f}{0:8.2f}{0:8.2f}{0:8.2f}".split() in [line.split() for line in text]
    assert ["all:", "code", "0.00"] in [line.split() for line in text]  # and LongBench-E's on a line of its own
    assert ["extended:", "code", *["0.00"] * 4] in [line.split() for line in text]
    assert ["english_16_mean", "87.50"] in [line.split() for line in text]
