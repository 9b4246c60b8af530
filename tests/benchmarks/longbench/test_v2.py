"""LongBench v2: its prompt, cut, reading of answers and groups, and data that are not as published."""

from __future__ import annotations

import json

import pytest

from benchmarks.longbench import v2
from benchmarks.scoring import ScoreConfig, run, score
from endprompt.results import read_rows
from tests.support import ruler_helpers as helpers
from tests.support.answering import answering


def question(i: int, **changes) -> dict:
    letter = "ABCD"[i % 4]
    made = {
        "_id": f"q{i}", "domain": "Code" if i % 2 else "Letters", "sub_domain": "x",
        "difficulty": ["easy", "hard"][i % 2], "length": ["short", "medium", "long"][i % 3],
        "question": f" Which tower is number {i}? ", "answer": letter,
        "context": f"\nTower {i} stands apart. " + "Nobody asks about the harbour. " * (20 + 30 * i),
    }  # fmt: skip
    return {**made, **{f"choice_{one}": f"tower {one}{i} " for one in "ABCD"}, **changes}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2")
    helpers.checkpoint(folder / "llama")
    (folder / "data").mkdir()
    (folder / "data" / "data.json").write_text(json.dumps([question(i) for i in range(12)]))
    return folder


def config(place, output, **changes):
    settings = dict(
        checkpoint=str(place / "llama"), suite="longbench-v2", data_dir=str(place / "data"), output=str(output),
        dtype="float32", device="cpu", quiet=True,
    )  # fmt: skip
    return ScoreConfig(**{**settings, **changes})


@pytest.fixture
def fake(monkeypatch):
    def install(answer):
        monkeypatch.setattr(run, "load", lambda *args, **kwargs: answering(answer))

    return install


def test_a_prompt_is_the_published_one_and_its_places_are_filled_one_after_the_other():
    assert v2.prompt_text(question(1, context=" Its door: $Q$\n")) == (
        "Please read the following text and answer the question below.\n\n<text>\n"
        "Its door: Which tower is number 1?\n</text>\n\n"
        "What is the correct answer to this question: Which tower is number 1?\nChoices:\n"
        "(A) tower A1\n(B) tower B1\n(C) tower C1\n(D) tower D1\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (C)**", "C"),
        ("So: The correct answer is *D*", "D"),
        ("The correct answer is A, no. The correct answer is (C)", "C"),  # brackets are looked for first
        ("The correct answer is (insert answer here)", None),
        ("the correct answer is (B)", None),
        ("The correct answer is E", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(answer, letter):
    assert v2.chosen(answer) == letter


def test_a_prompt_over_its_length_loses_its_middle_as_the_benchmark_cuts_it(place):
    """By ids, the halves decoded as one text."""
    tokenizer, item = helpers.tokenizer(), question(9)
    for limit in (200, 201):
        prompter = v2.QuestionPrompter(v2.TASK, tokenizer, 2000, limit)
        (fit,) = prompter.fit([item])
        ids = tokenizer.encode(v2.prompt_text(item))
        assert len(ids) > limit and fit.truncated
        assert fit.text == tokenizer.decode(ids[: limit // 2] + ids[-limit // 2 :], skip_special_tokens=True)
        assert len(ids[: limit // 2] + ids[-limit // 2 :]) == limit == prompter.new_tokens + limit - 128


def test_an_oracle_has_100_an_empty_answer_and_an_echo_0(place, tmp_path, fake):
    fake(lambda request: f"The correct answer is ({request.doc['outputs'][0]})")
    (row,) = score(config(place, tmp_path / "oracle"))
    assert (row["value"], row["n"], row["compensated"], row["suite"]) == (100, 12, 100, "longbench-v2")
    assert row["n_truncated"] > 0 and row["questions_whole"] is False and row["data_sha256"].keys() == {"data.json"}
    for name, answer in (("empty", lambda request: ""), ("echo", lambda request: request.args[0])):
        fake(answer)
        (row,) = score(config(place, tmp_path / name))
        assert (row["value"], row["compensated"]) == (0, 25)


def test_groups_are_means_over_their_questions(place, tmp_path, fake):
    """Right where the question is easy."""
    fake(
        lambda request: f"The correct answer is ({request.doc['outputs'][0] if request.doc['index'] % 2 == 0 else 'E'})"
    )
    (row,) = score(config(place, tmp_path))
    groups = {one["task"]: (one["value"], one["n"]) for one in read_rows(tmp_path / "summary.jsonl")}
    half = (50, 4)
    assert groups == {"easy": (100, 6), "hard": (0, 6), "short": half, "medium": half, "long": half} | {
        "Letters": (100, 6), "Code": (0, 6),
    }  # fmt: skip
    assert row["value"] == 50


BAD = {
    "an answer that is none": ([question(0, answer="E")], "question 1: answer must be one of A, B, C, D: 'E'"),
    "no context": ([question(0), question(1, context=None)], "question 2: context must be text, got NoneType"),
    "twice": ([question(0), question(0)], "question 2: a question of this _id stands before: 'q0'"),
    "none": ([], "holds no question"),
    "an object": ({}, "must be a list of questions: dict"),
    "a pointer": (None, "git lfs|LFS"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_are_not_as_published_are_refused(place, tmp_path, name):
    content, message = BAD[name]
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "data.json").write_text(pointer if content is None else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        score(config(place, tmp_path / "run", data_dir=str(tmp_path)))


def test_data_that_are_not_there_are_named_with_their_source(place, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none of longbench_v2.jsonl, .*`endprompt fetch longbench-v2 --data-dir"
    ):
        score(config(place, tmp_path / "run", data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"lengths is for suite ruler or .*, not longbench-v2"):
        config(place, tmp_path, lengths="512")
