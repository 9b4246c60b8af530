"""LongBench's averages against the tables that the benchmark and a paper print; rows and their errors."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.longbench import TASKS, TASKS_E, dataset_of
from benchmarks.longbench.averages import CHINESE, ENGLISH, average_weights, average_weights_e, averages, result_rows
from benchmarks.longbench.sets import BUCKETS
from endprompt.results import append_rows, read_rows
from tests.support.longbench_fixtures import documents

# The benchmark's README: all sets in the order of TASKS, then the English and the Chinese average.
PUBLISHED = {
    "GPT-3.5-Turbo-16k": (
        (
            *(23.6, 43.3, 52.3, 61.2, 51.6, 37.7, 26.9, 28.7, 29.5, 23.4, 26.7, 16.0),
            *(68.0, 91.4, 41.7, 29.2, 4.5, 71.0, 77.5, 54.7, 53.6),
        ),
        44.0,
        44.5,
    ),
    "Llama2-7B-chat-4k": (
        (
            *(18.7, 19.2, 36.8, 11.9, 25.4, 32.8, 9.4, 5.2, 27.3, 20.8, 25.8, 0.2),
            *(61.5, 77.8, 40.7, 19.8, 2.1, 9.8, 0.5, 52.4, 43.8),
        ),
        31.0,
        14.3,
    ),
    "ChatGLM2-6B-32k": (
        (
            *(21.1, 31.5, 46.2, 51.6, 45.1, 34.0, 21.9, 37.6, 32.4, 24.0, 26.5, 16.2),
            *(62.5, 78.7, 36.3, 27.7, 1.5, 77.0, 64.5, 55.6, 49.9),
        ),
        40.9,
        41.7,
    ),
    "Vicuna-v1.5-7B-16k": (
        (
            *(19.4, 26.1, 38.5, 43.0, 25.3, 20.8, 9.8, 19.3, 27.9, 22.8, 27.2, 15.1),
            *(71.5, 86.2, 40.8, 28.8, 6.5, 4.5, 5.0, 51.0, 43.5),
        ),
        31.9,
        26.4,
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_readme_s_averages_are_means_of_category_means(model):
    scores, english, chinese = PUBLISHED[model]
    found = averages(dict(zip(TASKS, scores, strict=True)))
    assert found["english_category_mean"] == pytest.approx(english, abs=0.1)
    assert found["chinese_category_mean"] == pytest.approx(chinese, abs=0.1)


def test_the_readme_s_categories():
    found = averages(dict(zip(TASKS, PUBLISHED["ChatGLM2-6B-32k"][0], strict=True)))
    english = {"single_doc_qa": 32.9, "multi_doc_qa": 33.7, "summarization": 27.6, "few_shot": 59.1, "code": 52.7}
    for category, printed in {**english, "synthetic": 39.2}.items():
        assert found[f"english:{category}"] == pytest.approx(printed, abs=0.1)
    assert found["chinese:single_doc_qa"] == 51.6 and found["chinese:code"] == found["english:code"]
    assert found["all:single_doc_qa"] == pytest.approx((21.1 + 31.5 + 46.2 + 51.6) / 4)


def test_papers_average_the_16_english_sets():
    """A table of category means whose printed average, 38.30, is the mean over sets; over categories it is 37.99."""
    printed = dict(
        single_doc_qa=32.03, multi_doc_qa=30.81, summarization=26.04, few_shot=68.04, synthetic=4.54, code=66.48
    )
    found = averages({name: printed[dataset_of(name).category] for name in ENGLISH})
    assert found["english_16_mean"] == pytest.approx(38.30, abs=0.005)
    assert found["english_category_mean"] == pytest.approx(37.99, abs=0.005)
    assert not {"all_21_mean", "chinese_category_mean", "all:few_shot"} & set(found)


def test_every_average_has_weights_that_sum_to_one():
    assert (len(ENGLISH), len(CHINESE)) == (16, 5)
    for weights in [*average_weights().values(), *average_weights_e().values()]:
        assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
    assert set(average_weights_e()["all_13_mean"]) == {task.removesuffix("_e") for task in TASKS_E}


def scored(task: str, n: int = 8, seed: int = 0) -> list[dict]:
    rng = random.Random(f"{task}{seed}")
    return [
        {"input": f"{task} {i}", "outputs": ["x"], "all_classes": None, "length": 100 + i, "max_new_tokens": 8}
        | {"truncated": i % 4 == 0, "words": item["length"], "score": rng.uniform(0, 100)}
        for i, item in enumerate(documents(task, n=n, words=30))
    ]


def rows_of(samples, **options):
    return result_rows(samples, model="m", method="base", **options)


def pick(rows, **columns):
    found = [row for row in rows if all(row.get(key) == value for key, value in columns.items())]
    assert len(found) == 1, (columns, len(found))
    return found[0]


@pytest.fixture(scope="module")
def full():
    samples = {task: scored(task) for task in TASKS + TASKS_E}
    hashes = {"qasper": {"data.zip:data/qasper.jsonl": "ab"}}
    return samples, rows_of(samples, data_sha256=hashes, window=4096)


def test_rows_are_the_means(full, tmp_path):
    samples, rows = full
    row = pick(rows, task="qasper", suite="longbench")
    values = [sample["score"] for sample in samples["qasper"]]
    mean = math.fsum(values) / 8
    assert row["value"] == pytest.approx(mean, abs=1e-9) and row["metric"] == "qa_f1"
    assert row["stderr"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 7 / 8))
    assert row["ci95"][0] < mean < row["ci95"][1]
    # a normal interval from the population's deviation, which the percentiles of many resamples come near
    half = 1.96 * row["stderr"] * math.sqrt(7 / 8)
    assert row["ci95"] == pytest.approx([mean - half, mean + half], abs=0.25 * half)
    assert (row["n"], row["n_truncated"], row["prompt_tokens"]) == (8, 2, 103.5)
    assert row["data_sha256"] == {"data.zip:data/qasper.jsonl": "ab"} and row["window"] == 4096
    append_rows(tmp_path / "results.jsonl", rows)
    assert read_rows(tmp_path / "results.jsonl") == rows


def test_averages_of_rows(full):
    samples, rows = full
    means = {task: math.fsum(s["score"] for s in samples[task]) / 8 for task in TASKS}
    errors = {task: pick(rows, task=task, suite="longbench")["stderr"] for task in TASKS}
    flat = pick(rows, task="all_21_mean")
    assert flat["value"] == pytest.approx(sum(means.values()) / 21)
    assert flat["stderr"] == pytest.approx(math.sqrt(sum(e**2 for e in errors.values())) / 21)
    assert (flat["n"], flat["n_truncated"]) == (21 * 8, 21 * 2)
    assert flat["ci95"][1] - flat["ci95"][0] == pytest.approx(2 * 1.96 * flat["stderr"], rel=0.2)
    row = pick(rows, task="few_shot", group="english", suite="longbench")
    assert row["value"] == pytest.approx((means["trec"] + means["triviaqa"] + means["samsum"]) / 3)
    assert row["metric"] == "category_mean"
    # six bars each for English, Chinese and all sets
    assert sum(row["metric"] == "category_mean" and row["suite"] == "longbench" for row in rows) == 18


def test_extended_rows_have_buckets(full):
    samples, rows = full
    for name, words in zip(BUCKETS, ((3999,), (4000, 7999), (8000,)), strict=True):
        row = pick(rows, task="lcc_e", bucket=name)
        values = [s["score"] for s in samples["lcc_e"] if s["words"] in words]
        assert row["value"] == pytest.approx(sum(values) / len(values)) and row["n"] == len(values)
        assert pick(rows, task="all_13_mean", bucket=name)["suite"] == "longbench_e"
        assert pick(rows, task="code", bucket=name)["n"] == 2 * len(values)
    whole = [row for row in rows if row["task"] == "lcc_e" and "bucket" not in row]
    assert [row["n"] for row in whole] == [8]


def test_what_was_not_run_is_absent():
    samples = {task: scored(task, n=1) for task in ("qasper", "qasper_e", "lcc", "repobench-p")}
    samples["hotpotqa_e"] = []
    rows = rows_of(samples)
    assert {row["task"] for row in rows} == {"qasper", "qasper_e", "lcc", "repobench-p", "code"}
    assert {row.get("bucket") for row in rows if row["task"] == "qasper_e"} == {None, "0-4k"}
    single = pick(rows, task="qasper")
    assert single["stderr"] is None and single["ci95"] is None and single["n"] == 1
    assert {row["group"] for row in rows if row["task"] == "code"} == {"english", "chinese", "all"}


def test_a_task_s_row_does_not_depend_on_the_others(full):
    samples, rows = full
    alone = rows_of({"qasper": samples["qasper"]}, window=4096)
    assert {**alone[0], "data_sha256": None} == {**pick(rows, task="qasper", suite="longbench"), "data_sha256": None}
    other = rows_of({"qasper": samples["qasper"]}, seed=1, window=4096)
    assert other[0]["ci95"] != alone[0]["ci95"] and other[0]["value"] == alone[0]["value"]
