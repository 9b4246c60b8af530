"""Where lm-eval's LongBench differs from the benchmark's own: each rule fails on lm-eval's behaviour and holds on ours.

The upstream side is lm-eval's code and task files themselves, not a description of them.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest

from benchmarks import longbench
from benchmarks.longbench import TASKS, TASKS_E, Documents, dataset_of, metrics, prompts
from benchmarks.longbench.averages import averages
from benchmarks.longbench.sets import BUCKETS, DATASETS
from tests.support.longbench_fixtures import ANSWERS, CLASSES, answering_model, documents, tasks, tokenizer, write_data

lm_eval = pytest.importorskip("lm_eval")
UPSTREAM = Path(lm_eval.__file__).parent / "tasks" / "longbench"


@pytest.fixture(scope="module")
def bpe():
    return tokenizer("byte_bpe")


def upstream_config(name: str) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(UPSTREAM / f"{name}.yaml", resolve_func=False)


def upstream_task(name: str):
    """lm-eval's own task of a set, on our documents."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    items = [{**item, "question": item["input"]} for item in documents(name)]
    config = {**upstream_config(name), "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)}}
    for key in ("tag", "dataset_path", "dataset_name", "process_results"):
        config.pop(key)
    return ConfigurableTask(config={**config, "metric_list": [{"metric": "exact_match", "aggregation": "mean"}]})


@pytest.fixture(scope="module")
def upstream_metrics():
    stub = types.ModuleType("fuzzywuzzy")
    stub.fuzz = types.SimpleNamespace(ratio=metrics.edit_ratio)
    had = sys.modules.get("fuzzywuzzy")
    sys.modules["fuzzywuzzy"] = stub
    sys.modules.pop("lm_eval.tasks.longbench.metrics", None)
    yield importlib.import_module("lm_eval.tasks.longbench.metrics")
    del sys.modules["lm_eval.tasks.longbench.metrics"], sys.modules["fuzzywuzzy"]
    if had:
        sys.modules["fuzzywuzzy"] = had


def ours(name: str, folder: Path, bpe, window: int = 100_000, **options):
    (task,) = tasks([name], data_dir=folder, tokenizer=bpe, window=window, **options)
    return task


def first_input(task, **options) -> str:
    task.build_all_requests(limit=1, **options)
    return task.instances[0].args[0]


def test_rule_11_the_middle_is_cut_out_not_the_left(tmp_path, bpe):
    from lm_eval.models.huggingface import HFLM

    def keeps_both_ends(ids: list[int]) -> bool:
        text = bpe.decode(ids, skip_special_tokens=True)
        return text.startswith("You are given a scientific article") and text.endswith("\n\nAnswer:")

    window, new_tokens = 400, 128
    prompt = prompts.prompt_text("qasper", documents("qasper")[0])
    causal = types.SimpleNamespace(tokenizer=bpe, backend="causal", add_bos_token=None)
    upstream, _ = HFLM.tok_batch_encode(causal, [prompt], left_truncate_len=window - new_tokens)
    assert upstream.shape[1] == window - new_tokens and not keeps_both_ends(upstream[0].tolist())

    text = first_input(ours("qasper", write_data(tmp_path, ["qasper"]), bpe, window))
    ids = bpe(text)["input_ids"]
    assert len(ids) <= window - new_tokens and keeps_both_ends(ids)
    whole = bpe(prompt)["input_ids"]
    half = (window - new_tokens) // 2
    assert text == bpe.decode(whole[1:half]) + bpe.decode(whole[-half:])  # BOS is a token, and no text


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("lcc", "Next line of code:\n"),
        ("repobench-p", "Next line of code:\n"),
        ("passage_count", "The final answer is: "),
        ("passage_retrieval_en", "The answer is: "),
    ],
)
def test_rule_12_prompts_keep_their_last_characters(tmp_path, bpe, name, end):
    assert not first_input(upstream_task(name)).endswith(end)
    assert first_input(ours(name, write_data(tmp_path, [name]), bpe)).endswith(end)


@pytest.mark.parametrize("name", ["triviaqa", "samsum"])
def test_rule_13_two_newlines_before_the_question(tmp_path, bpe, name):
    item = documents(name)[0]
    end = f"{item['context'][-20:]}\n\n{item['input']}"
    assert not first_input(upstream_task(name)).endswith(end)
    assert first_input(ours(name, write_data(tmp_path, [name]), bpe)).endswith(end)


def test_all_other_prompts_are_lm_eval_s_own(tmp_path, bpe):
    changed = {"lcc", "repobench-p", "passage_count", "passage_retrieval_en", "triviaqa", "samsum"}
    folder = write_data(tmp_path, TASKS)
    for name in TASKS:
        upstream = upstream_task(name)
        assert upstream.config.generation_kwargs["max_gen_toks"] == dataset_of(name).max_new_tokens
        same = first_input(upstream) == first_input(ours(name, folder, bpe))
        assert same == (name not in changed)


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lsht"])
def test_rule_14_an_answer_after_newlines_counts(tmp_path, bpe, name):
    from lm_eval.models.utils import postprocess_generated_text

    answer = ANSWERS[dataset_of(name).metric][0]
    generated = f"\n\n{answer}\nDialogue: and so on"

    def score_with(stops: list[str]) -> float:
        return longbench.score(name, postprocess_generated_text(generated, stops, None), [answer], CLASSES)

    assert score_with(upstream_config(name)["generation_kwargs"]["until"]) == 0
    task = ours(name, write_data(tmp_path, [name]), bpe)
    task.build_all_requests()
    stops = task.instances[0].args[1]["until"]
    assert score_with(stops) == pytest.approx(100, abs=1e-5)
    # only the first line counts, as in the benchmark's own evaluation
    assert longbench.score(name, f"nothing\n{answer}", [answer], CLASSES) < 50
    assert longbench.score(name, f" \n{answer}", [answer], CLASSES) == 0


def test_rule_15_a_line_of_white_space_is_the_prediction(upstream_metrics):
    generated, answer = "    \n    return zebra(quartz)", "    return zebra(quartz)"
    assert upstream_metrics.get_code_sim_score({"answers": [answer]}, [generated])["code_sim_score"] == 1.0
    expected = round(100 * 2 * 4 / (4 + len(answer)))  # four spaces are shared
    assert longbench.score("lcc", generated, [answer]) == pytest.approx(expected)
    assert longbench.score("lcc", "\n\n" + answer + "\n# done", [answer]) == 100


def test_rule_16_averages_are_means_of_categories_and_of_the_16_sets():
    from lm_eval.api.metrics import aggregate_subtask_metrics

    # GPT-3.5-Turbo-16k in the benchmark's README, whose English average is 44.0
    scores = dict(zip(TASKS, (23.6, 43.3, 52.3, 61.2, 51.6, 37.7, 26.9, 28.7, 29.5, 23.4, 26.7, 16.0, 68.0, 91.4)))
    scores |= dict(zip(TASKS[14:], (41.7, 29.2, 4.5, 71.0, 77.5, 54.7, 53.6)))
    group = upstream_config("_longbench")
    (rule,) = group["aggregate_metric_list"]
    upstream = aggregate_subtask_metrics(list(scores.values()), [200] * 21, rule["weight_by_size"])
    found = averages(scores)
    assert found["english_category_mean"] == pytest.approx(44.0, abs=0.05)
    assert upstream != pytest.approx(44.0, abs=0.05)
    english = [score for name, score in scores.items() if DATASETS[name].language != "zh"]
    assert found["english_16_mean"] == pytest.approx(sum(english) / 16) != pytest.approx(upstream, abs=0.05)
    assert found["all_21_mean"] == pytest.approx(upstream)


def test_rule_17_the_extended_set_has_13_sets_and_three_lengths(tmp_path, bpe):
    members = {
        task.removeprefix("longbench_")
        for group in upstream_config("_longbench_e")["task"]
        for task in upstream_config(f"_{group}")["task"]
    }
    assert members < set(TASKS_E) and len(members) == 9 and len(TASKS_E) == 13
    assert not any(metric["metric"] in BUCKETS for metric in upstream_config("lcc_e")["metric_list"])

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


def test_rule_18_no_chat_template_where_the_prompt_is_continued(tmp_path, bpe):
    model = answering_model(lambda text, doc: "")
    chat = {"apply_chat_template": True, "chat_template": model.apply_chat_template, "fewshot_as_multiturn": True}
    plain = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    folder = write_data(tmp_path, TASKS)
    for name in TASKS:
        assert "<|assistant|>" in first_input(upstream_task(name), **chat)
        text = first_input(ours(name, folder, bpe), **chat)
        assert ("<|assistant|>" not in text) == (name in plain)
        prompt = prompts.prompt_text(name, documents(name)[0])
        assert text == (prompt if name in plain else f"<|user|>{prompt}<|end|><|assistant|>")


def test_the_middle_is_cut_before_the_chat_template_wraps(bpe):
    """An instruction model must still see where its turn begins and ends."""
    model = answering_model(lambda text, doc: "")
    (sample, *_) = longbench.build_samples(
        "qasper", bpe, window=400, documents=Documents("qasper", documents("qasper"), {}),
        chat_template=model.apply_chat_template,
    )  # fmt: skip
    assert sample["truncated"] and sample["length"] <= 400 - 128
    assert sample["input"].startswith("<|user|>You are given") and sample["input"].endswith(
        "Answer:<|end|><|assistant|>"
    )
