"""The results file beside the rows, read by lm-eval's own functions."""

import json

import lm_eval.evaluator
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_file_datetime, get_latest_filename, get_results_filenames, make_table

from benchmarks import scoring
from benchmarks.scoring import ScoreConfig, lm_eval_results
from benchmarks.scoring.recording import no_environment_report
from benchmarks.tasks.sample_task import SampleTask
from endprompt import results
from tests.support import ruler_helpers


def row(**changes):
    usual = dict(suite="ruler", task="vt", metric="string_match_all", value=87.5, stderr=2.5, length=4096, n=40)
    return results.result_row(**usual | dict(model="m", method="base", seed=3, run_sha256="now") | changes)


def written(folder, *lines):
    return lm_eval_results.write(folder, lines, "CKPT", "hf")


def cells(table):
    """The value cells of lm-eval's Markdown table: (task, metric, value, stderr)."""
    found, task = set(), ""
    for line in table.splitlines()[2:]:
        words = [word.strip() for word in line.strip("|").split("|")]
        task = words[0] or task
        found.add((task, words[4], float(words[6]), words[8].rstrip("0")))
    return found


def test_lm_evals_own_table_shows_the_rows(tmp_path):
    path = written(
        tmp_path,
        row(),
        row(length=8192, value=50.0, stderr=None),
        row(suite="longbench", task="qasper", metric="qa_f1_score", length=None, value=31.25, stderr=1.0),
        row(suite="longbench_e", task="lcc_e", metric="code_similarity", length=None, value=50.0, stderr=1.0),
        row(suite="short", task="gsm8k", metric="exact_match", length=None, value=12.5, shots=5),
    )
    content = json.loads(path.read_text())
    assert cells(make_table(content)) == {
        ("vt", "4096", 0.875, "0.025"),
        ("vt", "8192", 0.5, "N/A"),
        ("longbench_qasper", "qa_f1_score", 0.3125, "0.01"),
        ("longbench_lcc_e", "code_similarity", 0.5, "0.01"),
        ("gsm8k", "exact_match", 0.125, "0.025"),
    }
    assert content["n-shot"] == {"vt": 0, "longbench_qasper": 0, "longbench_lcc_e": 0, "gsm8k": 5}
    assert content["config"]["model_args"]["pretrained"] == "CKPT"


def test_file_is_found_and_dated_as_lm_eval_does_and_the_latest_rows_stand_alone(tmp_path):
    first = written(tmp_path, row())
    second = written(tmp_path, row(value=60.0))
    names = [str(path) for path in tmp_path.iterdir()]
    assert get_results_filenames(names) == [str(second)] and not first.exists()
    assert get_latest_filename([str(second), "x/results_2020-01-01T00-00-00.000000.json"]) == str(second)
    assert get_file_datetime(str(second)).startswith("20")
    assert json.loads(second.read_text())["results"]["vt"]["4096,none"] == 0.6


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return ruler_helpers.checkpoint(tmp_path_factory.mktemp("results") / "llama")


def test_keys_are_those_that_lm_eval_saves(llama, tmp_path):
    """A scoring run beside lm-eval's own file of the same model on a task of its own."""
    output = tmp_path / "run"
    config = ScoreConfig(str(llama), tasks="niah_single_1", lengths=400, samples=2, shots=0, max_new_tokens=4,
                         cache_dir=str(tmp_path / "cache"), dtype="float32", device="cpu", quiet=True,
                         output=str(output))  # fmt: skip
    scoring.score(config)
    (ours,) = (json.loads(path.read_text()) for path in output.glob("results_*.json"))

    class Silent(lm_eval.api.model.LM):
        def generate_until(self, requests):
            return [""] * len(requests)

        loglikelihood = loglikelihood_rolling = generate_until

    task = SampleTask(
        "niah_single_1", [{"index": 0, "input": "a", "outputs": ["b"], "max_new_tokens": 4}], lambda *_: 0.0
    )
    options = {"bootstrap_iters": 0, "log_samples": False, "task_manager": TaskManager(include_defaults=False)}
    with no_environment_report():
        theirs = lm_eval.evaluator.simple_evaluate(model=Silent(), tasks=[task], **options)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.save_results_aggregated(theirs)
    (saved,) = (json.loads(path.read_text()) for path in (tmp_path / "theirs").rglob("results_*.json"))
    shared = {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config",
              "git_hash", "date", "lm_eval_version", "model_source", "model_name"}  # fmt: skip
    assert shared <= ours.keys() and shared <= saved.keys()
    assert ours["n-samples"] == {"niah_single_1": {"original": 2, "effective": 2}}
    (found,) = results.read_rows(output / "results.jsonl")
    assert ours["results"]["niah_single_1"]["400,none"] == found["value"] / 100
