"""LongBench under lm-eval: oracle, empty and echo models, the real backend, the task files, any number of processes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import benchmarks
from benchmarks.longbench import TASKS, TASKS_E
from benchmarks.longbench.sets import DATASETS
from benchmarks.tasks.longbench_task import PREFIX
from tests.support.longbench_fixtures import answering_model, documents, jsonl, tasks, tokenizer, write_data

lm_eval = pytest.importorskip("lm_eval")
FILES = Path(benchmarks.__file__).parent / "tasks" / "longbench"


@pytest.fixture(scope="module")
def bpe():
    return tokenizer("byte_bpe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("longbench"), words=1000)


def run(model, chosen, **options):
    """lm-eval's run of these tasks, without the search for its own."""
    return lm_eval.evaluate(model, {"tasks": {task.task_name: task for task in chosen}}, bootstrap_iters=0, **options)


def scores(model, names, data, bpe, window=100_000, **options) -> dict[str, float]:
    results = run(model, tasks(names, data_dir=data, tokenizer=bpe, window=window), **options)["results"]
    return {name: results[PREFIX + name]["score,none"] for name in names}


def test_an_oracle_scores_100_and_silence_0(tmp_path, bpe):
    names, data = TASKS + TASKS_E, write_data(tmp_path, words=200)
    oracle = scores(answering_model(lambda text, doc: doc["answers"][0]), names, data, bpe)
    assert oracle == pytest.approx(dict.fromkeys(names, 100.0), abs=1e-5)
    assert scores(answering_model(lambda text, doc: ""), names, data, bpe) == dict.fromkeys(names, 0.0)


def test_an_echo_of_the_prompt_does_not_score(data, bpe):
    """Nothing on questions, though the context does hold the answer."""
    items = [{**item, "context": f"{item['context']} {item['answers'][0]}"} for item in documents("qasper", words=1000)]
    names = [name for name, rules in DATASETS.items() if rules.category.endswith("_qa")] + ["trec", "triviaqa"]
    (data / "qasper.jsonl").write_bytes(jsonl(items))
    try:
        found = scores(answering_model(lambda text, doc: text), names, data, bpe)
    finally:
        write_data(data, ["qasper"], words=1000)
    assert max(found.values()) < 1 and found["qasper"] > 0


def test_logs_hold_no_documents(data, bpe):
    result = run(answering_model(lambda text, doc: ""), tasks(["qasper"], data_dir=data, tokenizer=bpe, window=500))
    (task,) = result["samples"]
    for sample in result["samples"][task]:
        assert set(sample["doc"]) == {"index", "id", "answers", "words", "all_classes", "truncated", "prompt_tokens"}
        assert sample["doc"]["truncated"] and sample["doc"]["prompt_tokens"] <= 500 - 128
    assert result["results"][task]["truncated,none"] == len(result["samples"][task]) == 4
    assert result["configs"][task]["metadata"]["data_sha256"].keys() == {"qasper.jsonl"}


def test_two_processes_make_the_same_requests_as_one(data, bpe):
    (task,) = tasks(["samsum"], data_dir=data, tokenizer=bpe, window=600)
    task.build_all_requests()
    whole = [instance.args for instance in task.instances]
    parts = {}
    for rank in range(3):
        (task,) = tasks(["samsum"], data_dir=data, tokenizer=bpe, window=600)
        task.build_all_requests(rank=rank, world_size=3)
        parts |= {instance.doc["index"]: instance.args for instance in task.instances}
    assert [parts[i] for i in range(4)] == whole
    task.build_all_requests(samples=[1, 3], cache_requests=True)
    assert [instance.args for instance in task.instances] == [whole[1], whole[3]]


def test_generation_settings_reach_the_window(data, bpe):
    """Tokens to generate that a user sets for all tasks are reserved in the window."""
    from lm_eval.tasks import TaskManager

    chosen = tasks(["gov_report"], data_dir=data, tokenizer=bpe, window=700)
    seen = []
    model = answering_model(lambda text, doc: seen.append(len(bpe(text)["input_ids"])) or "")
    options = {"gen_kwargs": {"max_gen_toks": 100}, "task_manager": TaskManager(include_defaults=False)}
    result = lm_eval.simple_evaluate(model, tasks=chosen, bootstrap_iters=10, **options)
    assert result["results"][PREFIX + "gov_report"]["score_stderr,none"] == 0
    assert max(seen) <= 600 and min(seen) > 580


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, bpe):
    """A tiny model with random weights and a window of 512, as a directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(bpe), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=bpe.bos_token_id,
        eos_token_id=bpe.eos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


def test_the_real_backend_is_given_what_was_built(data, bpe, checkpoint, caplog):
    """Through HFLM: nothing is cut from the left, BOS comes once in every row, wrapped or not, in a shared batch."""
    from lm_eval.models.huggingface import HFLM

    rows = []

    class Recording(HFLM):
        def _model_generate(self, context, max_length, stop, **kwargs):
            mask = kwargs["attention_mask"]
            rows.extend(row[keep.bool()].tolist() for row, keep in zip(context, mask, strict=True))
            return context  # nothing generated

    model = Recording(pretrained=str(checkpoint), device="cpu", batch_size=16)
    names = ["multifieldqa_en", "multifieldqa_zh", "trec", "lsht"]  # 64 tokens each: one batch for all
    chosen = tasks(names, data_dir=data, tokenizer=bpe, window=512)
    with caplog.at_level(logging.WARNING):
        result = run(model, chosen, apply_chat_template=True)
    assert "Left truncation" not in caplog.text
    assert len(rows) == 16 and all(row.count(bpe.bos_token_id) == 1 == row.index(bpe.bos_token_id) + 1 for row in rows)
    assert all(400 < len(row) <= 512 - 64 for row in rows)
    wrapped = ["<|assistant|>" in bpe.decode(row) for row in rows]
    assert sum(wrapped) == 8
    counted = sorted(s["doc"]["prompt_tokens"] for samples in result["samples"].values() for s in samples)
    assert counted == sorted(map(len, rows))


def test_plain_lm_eval_runs_the_task_files_to_the_same_requests(data, bpe, checkpoint):
    """`lm_eval --include_path`: the model's arguments and --metadata say what `tasks` is told in Python."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(FILES.parent),
        include_defaults=False,
        metadata={"pretrained": str(checkpoint), "data_dir": str(data)},
    )
    assert {name for name in manager.all_subtasks if "longbench" in name} == {PREFIX + name for name in TASKS + TASKS_E}
    loaded = manager.load(["endprompt_longbench_en", "endprompt_longbench_e"])["tasks"]
    assert len(loaded) == 16 + 13
    for name in ("qasper", "lcc_e"):
        ours = tasks([name], data_dir=data, tokenizer=bpe, window=512)[0]
        for task in (ours, loaded[PREFIX + name]):
            task.build_all_requests()
        assert [i.args for i in loaded[PREFIX + name].instances] == [i.args for i in ours.instances]
    shorter = TaskManager(
        include_path=str(FILES.parent),
        include_defaults=False,
        metadata={"tokenizer": str(checkpoint), "data_dir": str(data), "max_length": 400, "prompt_length": 200},
    )
    task = shorter.load(["endprompt_longbench_qasper"])["tasks"]["endprompt_longbench_qasper"]
    task.build_all_requests()
    assert all(190 < instance.doc["prompt_tokens"] <= 210 for instance in task.instances)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "--data-dir"),
        ({"data_dir": "DATA"}, "tokenizer= in --metadata"),
        ({"data_dir": "DATA", "tokenizer": "CHECKPOINT"}, "max_length= in --metadata"),
    ],
)
def test_what_plain_lm_eval_was_not_told_is_named(data, checkpoint, metadata, message):
    from benchmarks.tasks.longbench_task import LongBenchTask

    places = {"DATA": str(data), "CHECKPOINT": str(checkpoint)}
    metadata = {key: places[value] for key, value in metadata.items()}
    with pytest.raises((ValueError, OSError), match=message):
        LongBenchTask({"task": "endprompt_longbench_qasper", "metadata": metadata}).build_all_requests()
