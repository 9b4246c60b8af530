"""Where versions of LongBench differ from the benchmark's own: each rule by values of ours, the task under lm-eval."""

from __future__ import annotations

from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from benchmarks import longbench
from benchmarks.longbench import TASKS, TASKS_E, Documents, dataset_of, prompts
from benchmarks.longbench.sets import BUCKETS
from tests.support.longbench_fixtures import ANSWERS, CLASSES, answering_model, documents, tasks, tokenizer, write_data

CONTINUED = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}  # texts, not questions


@pytest.fixture(scope="module")
def bpe():
    return tokenizer("byte_bpe")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("lcc", "Next line of code:\n"),
        ("repobench-p", "Next line of code:\n"),
        ("passage_count", "The final answer is: "),
        ("passage_retrieval_en", "The answer is: "),
        ("triviaqa", "{context}\n\n{input}"),
        ("samsum", "{context}\n\n{input}"),
    ],
)
def test_prompts_keep_their_last_characters(name, end):
    assert prompts.prompt_template(name).endswith(end)


@pytest.mark.parametrize("name", sorted(CONTINUED - {"lcc", "repobench-p"}))
def test_only_the_first_line_of_an_answer_counts_behind_newlines(name):
    answer = ANSWERS[dataset_of(name).metric][0]
    assert longbench.score(name, f"\n\n{answer}\nDialogue: and so on", [answer], CLASSES) == pytest.approx(
        100, abs=1e-5
    )
    assert longbench.score(name, f"nothing\n{answer}", [answer], CLASSES) < 50
    assert longbench.score(name, f" \n{answer}", [answer], CLASSES) == 0


def test_tokens_to_generate_are_those_of_lm_eval_s_task_files():
    for name in TASKS:
        about = load_yaml(Path(lm_eval.__file__).parent / f"tasks/longbench/{name}.yaml", resolve_func=False)
        assert about["generation_kwargs"]["max_gen_toks"] == dataset_of(name).max_new_tokens


def test_a_line_of_white_space_is_the_prediction():
    generated, answer = "    \n    return zebra(quartz)", "    return zebra(quartz)"
    expected = round(100 * 2 * 4 / (4 + len(answer)))  # four spaces are shared
    assert longbench.score("lcc", generated, [answer]) == pytest.approx(expected)
    assert longbench.score("lcc", "\n\n" + answer + "\n# done", [answer]) == 100


def test_the_extended_set_has_13_sets_and_three_lengths(tmp_path, bpe):
    # right on documents below 4000 words and from 8000 on, wrong between
    def answer(text, doc):
        return "" if 4000 <= doc["words"] < 8000 else doc["answers"][0]

    folder = write_data(tmp_path, TASKS_E)
    chosen = {task.task_name: task for task in tasks(TASKS_E, data_dir=folder, tokenizer=bpe, window=100_000)}
    results = lm_eval.evaluate(answering_model(answer), {"tasks": chosen}, bootstrap_iters=0)["results"]
    assert len(results) == 13
    for result in results.values():
        found = [result[f"{name},none"] for name in (*BUCKETS, "score")]
        assert found == pytest.approx([100, 0, 100, 50], abs=1e-5)


def test_no_chat_template_where_the_prompt_is_continued(tmp_path, bpe):
    model = answering_model(lambda text, doc: "")
    for name in TASKS:
        item = documents(name, n=1, words=60)[0]
        (sample,) = longbench.build_samples(
            name, bpe, window=100_000, documents=Documents(name, [item], {}), chat_template=model.apply_chat_template
        )
        prompt = prompts.prompt_text(name, item)
        assert sample["input"] == (prompt if name in CONTINUED else f"<|user|>{prompt}<|end|><|assistant|>")


def test_the_middle_is_cut_before_the_chat_template_wraps(bpe):
    """An instruction model must still see where its turn begins and ends."""
    model = answering_model(lambda text, doc: "")
    (sample, *_) = longbench.build_samples(
        "qasper", bpe, window=400, documents=Documents("qasper", documents("qasper"), {}),
        chat_template=model.apply_chat_template,
    )  # fmt: skip
    assert sample["truncated"] and sample["length"] <= 400 - 128
    assert sample["input"].startswith("<|user|>You are given")
    assert sample["input"].endswith("Answer:<|end|><|assistant|>")
