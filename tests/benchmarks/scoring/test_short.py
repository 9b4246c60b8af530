"""The short-text suite around lm-eval's own tasks: settings, rows, errors; the evaluation itself is lm-eval's."""

import dataclasses
import json
import os

import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from benchmarks import scoring
from benchmarks.scoring import ScoreConfig, run
from benchmarks.scoring.hf import LongContextLM
from benchmarks.scoring.suites import short
from endprompt import files, results
from endprompt.model import load_tokenizer
from tests.support import ruler_helpers


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return ruler_helpers.checkpoint(tmp_path_factory.mktemp("short") / "llama")


@pytest.fixture
def evaluated(monkeypatch):
    """Calls of lm-eval's evaluation, each answered with half of the points."""
    calls = []

    def simple_evaluate(**settings):
        calls.append(settings)
        (task,) = settings["tasks"]
        metric = short.SETTINGS[task][1]
        name, _, kind = metric.partition(",")
        return {"results": {task: {metric: 0.5, f"{name}_stderr,{kind}": 0.02, "sample_len": 50}}}

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", simple_evaluate)
    monkeypatch.setattr(run, "load", lambda *args: "the model")
    return calls


def test_settings_are_those_of_the_literature_and_rows_are_percent(llama, tmp_path, evaluated):
    made = scoring.score(ScoreConfig(str(llama), suite="short", samples=50, output=str(tmp_path / "run"), seed=3))
    assert [(c["tasks"], c["num_fewshot"]) for c in evaluated] == [(["mmlu"], 5), (["gsm8k"], 5), (["hellaswag"], 10)]
    assert all(c["limit"] == 50 and c["fewshot_random_seed"] == 3 and c["model"] == "the model" for c in evaluated)
    assert not any(c["confirm_run_unsafe_code"] for c in evaluated)
    metrics = {"mmlu": "acc", "gsm8k": "exact_match", "hellaswag": "acc_norm"}
    assert {row["task"]: row["metric"] for row in made} == metrics
    assert all((row["value"], row["stderr"], row["n"]) == (50.0, 2.0, 50) for row in made)
    assert results.read_rows(tmp_path / "run" / "results.jsonl") == made


def test_generated_code_runs_only_where_it_is_asked_for(llama, tmp_path, evaluated, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    scoring.score(ScoreConfig(str(llama), suite="short", output=str(tmp_path / "a")))
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0" and all(c["limit"] is None for c in evaluated)
    scoring.score(ScoreConfig(str(llama), suite="short", tasks="humaneval", output=str(tmp_path / "b")))
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1" and evaluated[-1]["confirm_run_unsafe_code"]


SCALED = {
    "dynamic": {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 8.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_log_likelihoods_are_those_of_each_text_alone_and_what_is_cut_is_counted(tmp_path, kind, monkeypatch):
    path = ruler_helpers.checkpoint(tmp_path / "m")
    settings = json.loads((path / "config.json").read_text()) | SCALED[kind]
    settings["rope_parameters"] |= {"rope_theta": 10000.0}
    (path / "config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(path)
    options = dict(tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=4, max_length=512)
    lm = LongContextLM(pretrained=str(path), **options)
    texts = [("the grass is green " * n, "the sky is blue") for n in (2, 30, 45)]
    requests = [Instance("loglikelihood", {}, pair, 0, ("t", i, 1)) for i, pair in enumerate(texts)]
    found = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    wanted = []
    for context, answer in texts:
        ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
        first = len(tokenizer(context.rstrip())["input_ids"])
        with torch.no_grad():  # a fresh model, which no other text has been through
            logits = AutoModelForCausalLM.from_pretrained(path)(ids[:, :-1]).logits[0, first - 1 :]
        wanted.append(float(logits.log_softmax(-1).gather(1, ids[0, first:, None]).sum()))
    assert found == pytest.approx(wanted, rel=1e-4) and lm.cut == set()
    lm._max_length = 100

    def simple_evaluate(model, **settings):
        model.loglikelihood(2 * requests, disable_tqdm=True)
        return {"results": {"mmlu": {"acc,none": 0.5, "sample_len": 3}}}

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", simple_evaluate)
    row = short.made_row(ScoreConfig(str(path), suite="short"), lm, "mmlu")
    lengths = [len(tokenizer(context + answer)["input_ids"]) for context, answer in texts]
    assert row["n_truncated"] == sum(length > 101 for length in lengths) > 0


def test_unknown_task_and_data_that_cannot_be_had(llama, tmp_path, evaluated, monkeypatch):
    config = ScoreConfig(str(llama), suite="short", tasks="mmlu,arc", output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="unknown short-text task 'arc'; tasks: mmlu, gsm8k"):
        scoring.score(config)
    assert not evaluated

    def offline(**_):
        raise ConnectionError("the hub does not answer\nmore")

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", offline)
    with pytest.raises(ValueError, match="the data of mmlu come from the hub and are not to be had: the hub does not"):
        scoring.score(ScoreConfig(str(llama), suite="short", tasks="mmlu", output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_model_id_that_the_hub_does_not_give(tmp_path):
    with pytest.raises(ValueError, match=r"no such directory.*model='nobody/nothing'"):
        scoring.score(ScoreConfig("nobody/nothing", suite="short", tasks="mmlu", output=str(tmp_path / "run")))


def test_finished_tasks_are_not_run_again_and_one_that_fails_costs_itself_alone(
    llama, tmp_path, evaluated, monkeypatch
):
    config = ScoreConfig(str(llama), suite="short", tasks="mmlu,gsm8k", output=str(tmp_path / "run"))
    answered = lm_eval.evaluator.simple_evaluate

    def cut(**settings):
        if settings["tasks"] == ["gsm8k"]:
            raise ConnectionError("gone")
        return answered(**settings)

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", cut)
    with pytest.raises(ValueError, match="gsm8k"):
        scoring.score(config)
    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", answered)
    made = scoring.score(config)
    assert [call["tasks"] for call in evaluated] == [["mmlu"], ["gsm8k"]]
    assert results.read_rows(tmp_path / "run" / "results.jsonl") == made
    monkeypatch.setattr(run, "load", lambda *args: pytest.fail("a model was loaded"))
    assert scoring.score(config) == made
    named = scoring.score(dataclasses.replace(config, name="other"))
    assert named == [row | {"model": "other"} for row in made] and len(evaluated) == 2


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples": 50}, {"dtype": "float32"}])
def test_other_settings_are_other_rows(llama, tmp_path, evaluated, change):
    config = ScoreConfig(str(llama), suite="short", tasks="mmlu", output=str(tmp_path / "run"))
    (first,) = scoring.score(config)
    (other,) = scoring.score(dataclasses.replace(config, **change))
    assert len(evaluated) == 2 and first["run_sha256"] != other["run_sha256"]


def test_overwrite_starts_again_and_an_output_in_use_is_refused(llama, tmp_path, evaluated):
    config = ScoreConfig(str(llama), suite="short", tasks="mmlu", output=str(tmp_path / "run"))
    scoring.score(config)
    scoring.score(dataclasses.replace(config, overwrite=True))
    assert len(evaluated) == 2 and len(results.read_rows(tmp_path / "run" / "results.jsonl")) == 1
    with files.sole_use(tmp_path / "run"), pytest.raises(ValueError, match="another run writes to this output now"):
        scoring.score(dataclasses.replace(config, overwrite=True))
    assert len(evaluated) == 2 and len(results.read_rows(tmp_path / "run" / "results.jsonl")) == 1


def test_lm_evals_prompts_are_of_the_day_that_was_written_down(tmp_path, evaluated, monkeypatch):
    """What lm-eval's model class would be told, and the clock that its template would read meanwhile."""
    from transformers import AutoTokenizer

    made = ruler_helpers.checkpoint(tmp_path / "llama")
    config_file = made / "tokenizer_config.json"
    about = json.loads(config_file.read_text())
    monkeypatch.setattr(run, "load", lambda config, *_: AutoTokenizer.from_pretrained(config.checkpoint))
    texts = []
    answered = lm_eval.evaluator.simple_evaluate

    def simple_evaluate(**settings):
        texts.append(settings["model"].apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
        return answered(**settings)

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", simple_evaluate)
    config_file.write_text(json.dumps(about | {"chat_template": "{{ strftime_now('%d %b %Y') }}"}))
    usual = {"suite": "short", "tasks": "mmlu", "chat": True, "output": str(tmp_path / "run")}
    (row,) = scoring.score(ScoreConfig(str(made), date="2026-05-01", **usual))
    assert texts == ["01 May 2026"] and row["date"] == "2026-05-01"
    assert scoring.score(ScoreConfig(str(made), **usual)) == [row] and len(texts) == 1  # goes on with its day
