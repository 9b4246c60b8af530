"""lm-eval's groups through our recording: a group of task files of our own, whose data are a local file."""

from __future__ import annotations

import json

import pytest

from benchmarks.scoring import ScoreConfig, run, score
from benchmarks.scoring.suites import lm_eval
from endprompt.results import read_rows
from endprompt.text import Reader
from tests.support import ruler_helpers as helpers
from tests.support.answering import answering

TASK = """
task: tower_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}} Which tower?"
doc_to_target: "{{{{answer}}}}"
{more}
num_fewshot: 0
generation_kwargs: {{until: ["\\n"], max_gen_toks: {kept}, do_sample: false}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
filter_list: [{{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metadata: {{version: 2.0}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    helpers.checkpoint(folder / "llama")
    data = [{"context": f"Tower {i}. " + "Rain. " * 40 * i + "End.", "answer": f"tower {i}"} for i in range(12)]
    (folder / "towers.json").write_text("\n".join(map(json.dumps, data)))
    (folder / "tasks").mkdir()
    for name, kind, kept, more in (
        ("a", "generate_until", 8, ""),
        ("b", "generate_until", 12, ""),
        ("c", "multiple_choice", 8, "doc_to_choice: [x, y]"),
    ):
        metric = "acc" if kind == "multiple_choice" else "exact_match"
        text = TASK.format(name=name, data=folder / "towers.json", kind=kind, kept=kept, more=more, metric=metric)
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "group.yaml").write_text("group: towers\ntask: [tower_a, tower_b]\n")
    return folder


@pytest.fixture
def asked(monkeypatch, tmp_path_factory):
    """Only our own task files are read; the model answers by `asked.answer`, and `asked.requests` has what it saw."""
    from lm_eval.tasks import TaskManager

    made = answering(lambda request: request.doc["outputs"][0])
    monkeypatch.setattr(run, "load", lambda *args, **kwargs: made)
    monkeypatch.setattr(lm_eval, "manager", lambda folder: TaskManager(include_path=folder, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    return made


def config(place, output, **changes):
    settings = dict(
        checkpoint=str(place / "llama"), suite="lm-eval:towers", data_dir=str(place / "tasks"), output=str(output),
        dtype="float32", device="cpu", quiet=True,
    )  # fmt: skip
    return ScoreConfig(**{**settings, **changes})


def test_a_group_is_scored_by_its_own_rules_and_goes_on_by_sample(place, tmp_path, asked):
    """Filters are the task's: white space around an answer does not matter. Half of the answers are right."""
    asked.answer = lambda request: f" {request.doc['outputs'][0]} " if request.doc["index"] % 2 else "no"
    made = score(config(place, tmp_path))
    assert [(row["task"], row["value"], row["n"], row["metric"], row["max_new_tokens"]) for row in made] == [
        ("tower_a", 50, 12, "exact_match", 8), ("tower_b", 50, 12, "exact_match", 12),
    ]  # fmt: skip
    assert all(row["ci95"][0] < 50 < row["ci95"][1] and row["suite"] == "lm-eval:towers" for row in made)
    (mean,) = read_rows(tmp_path / "summary.jsonl")
    assert (mean["task"], mean["value"]) == ("average", 50)
    kept = (tmp_path / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "predictions.jsonl").write_text("\n".join(kept[:-3]) + "\n")
    before = len(asked.requests)
    again = score(config(place, tmp_path))
    assert len(asked.requests) - before == 3 and [row["value"] for row in again] == [50, 50]


def test_a_prompt_over_the_window_loses_its_middle_and_keeps_its_ends(place, tmp_path, asked):
    (row,) = score(config(place, tmp_path, suite="lm-eval:tower_a"))
    reader, prompts = Reader(helpers.tokenizer()), [request.args[0] for request in asked.requests]
    lengths = [len(ids) for ids in reader.prompts(prompts)]
    assert 2 < row["n_truncated"] < 12 and 490 < max(lengths) <= 512 - 8 and row["n"] == 12
    assert {prompt.split(".")[0] for prompt in prompts} == {f"Tower {i}" for i in range(12)}
    assert all(prompt.endswith("End. Which tower?") for prompt in prompts)
    assert asked.requests[0].args[1]["until"] == ["\n"] and row["value"] == 100


@pytest.mark.parametrize("answer", [lambda request: "", lambda request: request.args[0]], ids=["empty", "echo"])
def test_an_empty_answer_and_an_echo_gain_nothing(place, tmp_path, asked, answer):
    asked.answer = answer
    assert {row["value"] for row in score(config(place, tmp_path))} == {0}


BAD = {
    "a group that is none": ({"suite": "lm-eval:tower"}, r"knows no group or task 'tower'; did you mean tower"),
    "no group": ({"suite": "lm-eval:"}, "suite must be one of ruler, .* or lm-eval:GROUP: 'lm-eval:'"),
    "a task that does not generate": ({"suite": "lm-eval:tower_c"}, "these ask for something else: tower_c"),
    "lengths": ({"lengths": "512"}, "lengths are for groups of babilong, and not for towers: 512"),
    "no room": ({"max_new_tokens": 511}, "must hold a prompt beside 511 tokens for the answer: 512"),
    "RULER's settings": ({"hops": 2}, "hops is for suite ruler, not lm-eval"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_refused_in_one_line(place, tmp_path, asked, name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        score(config(place, tmp_path, **changes))
    assert not asked.requests


def test_data_that_are_not_to_be_had_are_named(place, tmp_path, asked):
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = (place / "tasks" / "a.yaml").read_text().replace("towers.json", "missing.json")
    (folder / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="lm-eval:tower_a: a task or its data cannot be loaded: "):
        score(config(place, tmp_path / "run", suite="lm-eval:tower_a", data_dir=str(folder)))
