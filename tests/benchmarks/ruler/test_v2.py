"""RULER's second edition: samples, and so wording, against the original's digests; scores by hand.

The digests are of NeMo-Skills' scripts (branch chsieh/ruler2, 991a743, unchanged but for the order of HotpotQA's set of
documents, which is sorted), run on `write_data`'s files with `benchmarks/base/256`'s tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.ruler import v2
from endprompt.text import Reader

BASE = Path(__file__).parents[3] / "benchmarks" / "base" / "256"
WORDS = ["rain", "tower", "harbour", "letter", "winter", "garden", "silver", "window", "market", "bridge", "candle"]
WORDS += ["river", "stone", "forest", "mirror"]
#: sha256 of the JSON of [question, expected answers] of the original's first 6 samples of 2,048 tokens.
ORIGINAL = {
    "mk_niah_basic": "1d33c78473d62abd884cf24d7b9190538912e6d5b77a6612469ac3b775a11aa7",
    "mk_niah_easy": "7262a06e640b5bbed3f7dd0622a6a1313a3e6228b2cd82ffa16a43f202410255",
    "mk_niah_medium": "3ca7a9f099dda0bbd9e6a5fc5178ee0a8b3579ffdc9d074d7758828604d6bba8",
    "mk_niah_hard": "4ff9dd2985c71e668732a5d2694f3125ccffe91f60da9316f23860d3131ca4b2",
    "mv_niah_basic": "b2f807593dacd4849b1d167100602f89b5e200402bfef0191c62c8609ef5ffe9",
    "mv_niah_easy": "bb22986a05592073cc329a2f874688047f85cc8d2e93e4b27f92e409e3b23a58",
    "mv_niah_medium": "6d14fda0140ef516eb61774927214317a4bbb7a417e4ee2119f4fb92cce5dbbc",
    "mv_niah_hard": "67c3aa1fd88bf77b4b209d71a60a5940061f4b1373179df533f2cca126b1b476",
    "qa_basic": "2f7723fa2f5e1f96f436e75684c95d3ceaad0faa0be246e3c7c26307275a35ab",
    "qa_easy": "f7ec133dd9ccac84c8c69285dff32d1a47f3003af84ae7626ccb6251e7714496",
    "qa_medium": "a4ee8ac693abf552b59f5b4dba7bc13dcfb468d7c31828918e7b378af506d339",
    "qa_hard": "01d4188ac0b6758c40da1abcc85208eac9fdc9d513bc45c745f15845c1694a0c",
}


def write_data(folder):
    """Made questions and documents in the layout that the hub has."""
    rng = random.Random(1)

    def words(n):
        return " ".join(rng.choices(WORDS, k=n))

    def question():
        return {"question": f"Which  {words(6)}\n{words(4)}?", "choices": [words(2) for _ in range(4)],
                "answer": rng.randrange(4)}  # fmt: skip

    def pages(record):
        titles = [f"{words(2)} {record} {page}" for page in range(4)]
        sentences = [[words(5) + ".", " " + words(6) + "."] for _ in titles]
        facts = {"title": [titles[2], titles[0], titles[2]], "sent_id": [0, 1, 1]}
        return {"question": words(7) + "?", "answer": words(2), "supporting_facts": facts,
                "context": {"title": titles, "sentences": sentences}}  # fmt: skip

    made = {
        "mmlu_test": [question() for _ in range(30)],
        "mmlu_auxiliary_train": [question() for _ in range(400)],
        "hotpot_validation": [pages(f"v{i}") for i in range(12)],
        "hotpot_train_0": [pages(f"a{i}") for i in range(60)],
        "hotpot_train_1": [pages(f"b{i}") for i in range(60)],
    }
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_data(tmp_path_factory.mktemp("v2")))


@pytest.fixture(scope="module")
def count():
    reader = Reader(AutoTokenizer.from_pretrained(BASE))
    return lambda text: len(reader.ids([text])[0])


@pytest.mark.parametrize("task", ORIGINAL)
def test_samples_are_those_of_the_original_letter_by_letter(task, data, count):
    made = [list(one) for one in v2.samples(task, count, 2048, 6, 0, data)]
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest() == ORIGINAL[task]
    assert all(count(text) <= 2048 for text, _ in made)
    assert [v2.score(task, f"So it is {' and '.join(golds)}" if len(golds[0]) > 1 else rf"\boxed{{{golds[0]}}}", golds)
            for _, golds in made] == [1.0] * 6  # fmt: skip
    assert {v2.score(task, "", golds) for _, golds in made} == {0.0}


SCORES = {
    "half of the texts": ("mv_niah_basic", "1234567890", ["1234567890", "99"], 0.5),
    "words of a text": ("mk_niah_easy", "the rain in the town", ["The rain in Spain"], 0.5),  # 2 edits, 4 words
    "a thought is cut off": ("mk_niah_easy", "x y</think>no", ["x y"], 0),
    "what stands behind Answer:": ("mk_niah_easy", "x y Answer: z", ["x y"], 0),
    "the last paragraph alone": ("mv_niah_medium", "a b\n\nc d", ["a b"], 0),
    "one of several": ("qa_easy", "index 77", ["12", "77"], 1),
    "copied documents do not count": ("qa_medium", "Document 12:\nParis\n\nRome", ["Paris"], 0),
    "the last box": ("mk_niah_hard", r"\boxed{A}, no, \boxed{B}", ["B"], 1),
    "a letter in words": ("mk_niah_hard", r"\boxed{\text{C. rain}}", ["C"], 1),
    "no box": ("mk_niah_hard", "**Answer:** D", ["D"], 1),
    "a letter alone": ("mk_niah_hard", "D", ["D"], 0),
    "a box that is not closed": ("mk_niah_hard", r"\boxed{D", ["D"], 0),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_by_hand(name):
    task, answer, golds, value = SCORES[name]
    assert v2.score(task, answer, golds) == pytest.approx(value)


def test_data_that_are_missing_or_of_another_version_are_named(tmp_path, count):
    from benchmarks import originals

    with pytest.raises(ValueError, match=r"needs mmlu_test.parquet .* `endprompt fetch ruler-v2 --data-dir"):
        v2.samples("mk_niah_easy", count, 2048, 1, 0, str(tmp_path))
    path = tmp_path / "hotpot_train_0.parquet"
    path.write_bytes(b"PAR1 another")
    with pytest.raises(ValueError, match=r"hotpot_train_0.parquet: of another version: its sha256 is \w{64}, that of"):
        originals.data_file("ruler-v2", "hotpot_train", tmp_path)
    (tmp_path / "mmlu_test.jsonl").write_text('{"question": "a", "choices": ["b"], "answer": 0}')
    with pytest.raises(ValueError, match=r"mmlu_test.jsonl, line 1: not a record of its data set"):
        v2.records(tmp_path / "mmlu_test.jsonl", v2.mmlu_question)
