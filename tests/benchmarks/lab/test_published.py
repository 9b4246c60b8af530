"""The lab on a base that others trained: inputs of the user's, prepared apart, cells that go on, rates by the loss."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from benchmarks.base import documents
from benchmarks.lab import cells as cell_runs
from benchmarks.lab import inputs, material, matrix, predict, runner, verdicts
from benchmarks.lab.arms import arms_of
from benchmarks.lab.config import LabConfig
from benchmarks.scoring import ScoreConfig
from benchmarks.scoring.suite import suite_of
from benchmarks.scoring.units import Asker
from endprompt.data.shards import read_shard, tokenizer_sha256
from endprompt.model import load_model, load_tokenizer
from endprompt.results import append_rows, read_rows
from tests.benchmarks.lab.test_runner import make_base
from tests.support.longbench_fixtures import documents as set_documents
from tests.support.longbench_fixtures import jsonl
from tests.support.processes import forked_workers
from tests.support.runs import lines_of

MATRIX = {
    "inputs": ["documents", "held_out", "PaulGrahamEssays.json", "triviaqa.jsonl"],
    "retrieval": 0.5,
    "seeds": [7],
    "train": {"steps": 2, "warmup": 1, "rows": 2, "lr": 1e-3},
    "score": {
        "tasks": ["niah_single_2"], "samples": 2, "samples_at": {512: 1}, "loss_rows": 2, "bins": 4, "hops": 3,
        "shots": 0, "longbench": {"triviaqa": 3},
    },
    "arms": {"base": {"train": False}, "pose": {"scheme": "pose"}},
    "blocks": [
        {
            "base": "org/published",
            "target": 512,
            "lengths": [256, 512],
            "runs": [
                {"arms": ["base"], "scaling": "none"},
                {"arms": ["pose"], "scaling": "yarn", "lr": [1e-3, 1e-2]},
            ],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, the inputs and the matrix."""
    folder = tmp_path_factory.mktemp("published")
    make_base(folder / "published")
    note = {"file": "published.gguf", "sha256": "ab" * 32, "quantisation": "Q4_1"}
    (folder / "published" / "origin.json").write_text(json.dumps(note))
    text = " ".join(documents.sample_training_sentences())
    append_rows(folder / "books.jsonl", [{"text": text[start : start + 6000]} for start in range(0, 30000, 6000)])
    append_rows(folder / "held.jsonl", [{"text": "short"}, *({"text": text[k:]} for k in (31000, 33000, 35000))])
    (folder / "data").mkdir()
    essays = " ".join(documents.sample_haystack_sentences())
    (folder / "data" / "PaulGrahamEssays.json").write_text(json.dumps({"text": essays}))
    # Random weights say the prompt's last word over and over
    asked = zip(set_documents("triviaqa"), ("we and", "we of", "we to"))
    items = [one | {"input": last, "answers": ["and and", "of"]} for one, last in asked]
    (folder / "data" / "triviaqa.jsonl").write_bytes(jsonl(items))
    (folder / "matrix.yaml").write_text(yaml.safe_dump(MATRIX))
    return folder


def config_of(place, **changes):
    given = {
        "documents": str(place / "books.jsonl"),
        "held_out": str(place / "held.jsonl"),
        "data_dir": str(place / "data"),
    }
    common = {"matrix": str(place / "matrix.yaml"), "model": str(place / "published"), "output": str(place / "run")}
    return LabConfig(**{**given, **common, "device": "cpu", "jobs": 1, "cache": str(place / "cache"), **changes})


def cells_of(config):
    return matrix.cells(matrix.read_matrix(Path(config.matrix)), "m", config)


@pytest.fixture(scope="module")
def run(place):
    """Prepared with the inputs at hand, then run elsewhere from the cache alone."""
    with forked_workers():
        assert runner.lab(config_of(place, prepare_only=True, output=str(place / "first"))) == 0
    assert not (place / "first" / "results.jsonl").exists()
    shutil.copytree(place / "cache", place / "carried")
    elsewhere = config_of(place, documents=None, held_out=None, data_dir=None, cache=str(place / "carried"))
    with forked_workers():
        assert runner.lab(elsewhere) == 0
    return elsewhere, read_rows(place / "run" / "results.jsonl")


def test_rows_say_what_they_were_made_from(run, place):
    _, rows = run
    assert {(row["method"], row["base"]) for row in rows} == {
        ("base", "published"), ("pose+lr-0.01+yarn", "published"), ("pose+yarn", "published"),
    }  # fmt: skip
    for row in rows:
        assert row["origin"] == f"dequantised from Q4_1, published.gguf, sha256 {'ab' * 32}"
        assert row["sources"]["documents"] == inputs.remembered_sha256(place / "books.jsonl")
    scored = [row for row in rows if row["suite"] == "ruler"]
    assert {(row["length"], row["n"]) for row in scored} == {(256, 2), (512, 1)}
    assert all(0 <= row["empty"] <= 100 for row in scored)


def test_the_loss_by_length_and_position_is_transformers_own(run, place):
    _, rows = run
    model = load_model(place / "published")
    tokenizer = load_tokenizer(place / "published")
    texts = [json.loads(line)["text"] for line in (place / "held.jsonl").read_text().splitlines()]
    long = [ids for text in texts if len(ids := tokenizer(text, add_special_tokens=False)["input_ids"]) >= 512][:2]
    ids = torch.tensor([one[:512] for one in long])
    with torch.no_grad():
        each = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(0).numpy()
    base = {(row["task"], row["length"]): row for row in rows if row["method"] == "base" and row["suite"] == "lab"}
    assert base["loss", 512]["value"] == pytest.approx(each.mean(), rel=1e-5)
    assert base["loss", 256]["value"] == pytest.approx(each[:255].mean(), rel=1e-5)
    ends = sorted(length for task, length in base if task == "loss_by_position")
    assert ends == [129, 257, 385, 512] and base["loss_by_position", 512]["first"] == 385
    assert base["loss_by_position", 257]["value"] == pytest.approx(each[128:256].mean(), rel=1e-5)


def test_longbench_is_scored_on_the_prompts_of_score_as_transformers_answers_them(run, place):
    """The base with its own window, an extended arm with the target's; the answers by transformers' generate()."""
    _, rows = run
    lines = lines_of(place / "run" / "scores.jsonl")
    found = {row["method"]: row for row in rows if row["suite"] == "longbench"}
    assert {method: row["length"] for method, row in found.items()} == {
        "base": 256, "pose+lr-0.01+yarn": 512, "pose+yarn": 512,
    }  # fmt: skip
    model, tokenizer = load_model(place / "published"), load_tokenizer(place / "published")
    asked = ScoreConfig(
        str(place / "published"), suite="longbench", tasks=["triviaqa"], samples=3, data_dir=str(place / "data")
    )
    (unit,) = suite_of(asked).units(Asker(asked, model.config, tokenizer))
    scores = []
    for sample in unit.samples:
        ids = torch.tensor([tokenizer(sample["input"])["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        scores.append(100 * unit.score(sample, text))
    base = found["base"]
    assert scores == pytest.approx([200 / 17, 200 / 33, 0])  # F1 of 32 words with the answer's two, or one
    assert base["value"] == pytest.approx(np.mean(scores)) and base["n"] == 3
    assert base["samples_sha256"] == unit.sha256 and base["n_truncated"] == unit.n_truncated == 3
    assert (base["metric"], base["category"]) == ("qa_f1", "few_shot")
    (line,) = (line for line in lines if line["suite"] == "longbench" and line["method"] == "base")
    assert line["scores"] == pytest.approx(scores, abs=0.01)
    for arm in arms_of(rows, lines):  # the scores of RULER stand by themselves
        assert {task for tasks in arm.samples.values() for task in tasks} == {"niah_single_2"}
    bases = [
        arm.scores for suite in ("ruler", "longbench") for arm in arms_of(rows, lines, suite) if arm.kind == "base"
    ]
    assert bases[0].keys() == {256, 512} and bases[1] == {256: {7: base["value"]}}


def test_a_second_training_is_held_to_the_first_sample_by_sample(run, place, tmp_path):
    _, rows = run
    shutil.copytree(place / "run", tmp_path / "again", ignore=shutil.ignore_patterns("*.lock"))
    lines = lines_of(place / "run" / "scores.jsonl")
    changed = next(line for line in lines if line["arm"] == "pose+yarn@lr=0.01" and line["suite"] == "longbench")
    changed["scores"] = [score + more for score, more in zip(changed["scores"], (6.0, 0.0, 0.0))]
    (tmp_path / "again" / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = verdicts.repeated(place / "run", tmp_path / "again")
    assert len(made) == 3 * 3  # three cells, RULER at two lengths and LongBench at one
    (other,) = (row for row in made if row["value"])
    assert other["value"] == pytest.approx(2) and other["changed"] == pytest.approx(100 / 3)
    assert other["ci95"] == [0, 6] and (other["task"], other["method"]) == ("longbench", changed["arm"])
    text = (tmp_path / "again" / "results.jsonl").read_text()
    digest = next(row["samples_sha256"] for row in rows if row["suite"] == "longbench")
    (tmp_path / "again" / "results.jsonl").write_text(text.replace(digest, "0" * 64))
    with pytest.raises(ValueError, match="must have the same samples_sha256"):
        verdicts.repeated(place / "run", tmp_path / "again")


@pytest.mark.parametrize(
    ("longbench", "inputs", "said"),
    [
        ({"lccc": 3}, [], "did you mean lcc"),
        ({"lcc": 0}, ["lcc.jsonl"], "must give each set a number of documents: lcc: 0"),
        ({"lcc": 3}, [], "m: inputs must name lcc.jsonl"),
    ],
)
def test_sets_that_cannot_be_scored_are_one_line(place, longbench, inputs, said):
    content = MATRIX | {"inputs": inputs, "score": {"longbench": longbench}}
    with pytest.raises(ValueError, match=said):
        matrix.cells(content, "m", config_of(place))


def test_training_reads_the_given_documents_and_the_share_of_questions(run, place):
    config, _ = run
    cell = next(cell for cell in cells_of(config) if cell.trained)
    given, asked = material.parts(cell)
    tokenizer = load_tokenizer(cell.model)
    read = read_shard(given.path(place / "carried"), tokenizer_sha256(tokenizer))
    first = json.loads((place / "books.jsonl").read_text().splitlines()[0])["text"]
    ids = tokenizer(first, add_special_tokens=False)["input_ids"]
    assert list(read.tokens[: len(ids)]) == ids
    assert asked.count == 2 and not any(kind == "text" for kind in asked.mixture)  # half of 2 steps of 2 rows


def test_an_interrupted_cell_goes_on_behind_its_training_and_its_scored_tasks(place, tmp_path, monkeypatch, run):
    config, rows = run
    cell = next(cell for cell in cells_of(config) if cell.arm == "pose+yarn")
    spot = cell_runs.Workplace(tmp_path, place / "carried", "cpu")
    real, calls = cell_runs.scored, []

    def broken(cell, item, *rest):
        if item.length == 512:
            raise KeyboardInterrupt
        return real(cell, item, *rest)

    monkeypatch.setattr(cell_runs, "scored", broken)
    with pytest.raises(KeyboardInterrupt):
        cell_runs.run(cell, spot)
    other = shutil.copytree(tmp_path, tmp_path.with_name("other"))
    monkeypatch.setattr(cell_runs.train, "extend", lambda config: pytest.fail("trained again"))
    with pytest.raises(pytest.fail.Exception):  # nothing is taken over of what was computed in another way
        cell_runs.run(cell, dataclasses.replace(spot, deterministic=False, output=other))
    monkeypatch.setattr(
        cell_runs, "scored", lambda cell, item, *rest: calls.append(item.task) or real(cell, item, *rest)
    )
    made = cell_runs.run(cell, spot)
    assert calls == ["niah_single_2", "triviaqa"]
    before = {(r["task"], r["length"]): r["value"] for r in rows if r["cell"] == cell.sha256}
    assert {(r["task"], r["length"]): r["value"] for r in made.rows} == pytest.approx(before)
    assert not list((tmp_path / "unfinished").iterdir())


def test_rates_are_chosen_by_the_held_out_loss_and_taken_over(run, place):
    _, rows = run
    losses = {
        row["lr"]: row["value"] for row in rows if row["task"] == "loss" and row["length"] == 512 and row.get("lr")
    }
    best = min(losses, key=losses.get)
    assert json.loads((place / "run" / "rates.json").read_text()) == {"pose+yarn": best}
    content = json.loads(json.dumps(MATRIX))
    del content["blocks"][0]["runs"][1]["lr"]
    (place / "rates.json").write_text('{"pose+yarn": 0.5}')
    made = matrix.cells(content, "m", config_of(place, rates=str(place / "rates.json")))
    assert [cell.settings["lr"] for cell in made if cell.trained] == [0.5]


def test_missing_inputs_are_one_line(place, tmp_path):
    for key, said in (
        ("documents", "needs documents, and .*: give documents"),
        ("data_dir", "needs PaulGrahamEssays.json, and .*: give data_dir"),
    ):
        with pytest.raises(ValueError, match=said):
            runner.lab(config_of(place, **{key: None}, cache=str(tmp_path / "empty"), output=str(tmp_path / "run")))
    (tmp_path / "no.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(ValueError, match=r"no.jsonl, line 1: must hold `text`"):
        runner.lab(config_of(place, documents=str(tmp_path / "no.jsonl"), cache=str(tmp_path / "c")))
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_position_losses_go_by_pieces_without_a_difference(place):
    model = load_model(place / "published")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 40))
    whole = predict.position_losses(model, ids)
    torch.testing.assert_close(
        torch.from_numpy(whole), torch.from_numpy(predict.position_losses(model, ids, max_batch_tokens=40))
    )
