"""Faults around lm-eval's tasks that spoil scores without a word: each is seen in lm-eval itself, and not in ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.task import ConfigurableTask

import benchmarks
from benchmarks import ruler
from benchmarks.scoring.hf import LongContextLM
from benchmarks.scoring.recording import Predictions, RecordingLM
from benchmarks.tasks.ruler_task import RulerTask
from tests.support import ruler_helpers as helpers

TASKS = Path(benchmarks.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(helpers.checkpoint(tmp_path_factory.mktemp("faults") / "llama"))


def settings(llama, folder, **more):
    small = {"samples": 2, "shots": 0, "max_new_tokens": 12, "cache_dir": str(folder / "cache")}
    return {"tokenizer": llama, **small, **more}


class Answering(LM):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests):
        return [self.answer for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_the_request_cache_serves_another_length_s_prompts(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))

    def theirs(length):
        import datasets

        samples = ruler.build_samples("vt", length, helpers.tokenizer(), 2, 0, shots=0, max_new_tokens=12)
        docs = [{"input": sample["input"]} for sample in samples]
        return ConfigurableTask(
            config={
                "task": "vt",
                "custom_dataset": lambda **given: {"test": datasets.Dataset.from_list(docs)},
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": "{{input}}",
                "doc_to_target": "",
                "metadata": {"max_seq_lengths": [length]},
            }
        )

    def ours(length):
        return RulerTask({"task": "endprompt_vt", "metadata": settings(llama, tmp_path, max_seq_lengths=[length])})

    def prompts(task):
        task.build_all_requests(cache_requests=True, tokenizer_name="llama")
        return [request.args[0] for request in task.instances]

    assert prompts(theirs(400)) == prompts(theirs(512))  # the key holds no length
    short, long = prompts(ours(400)), prompts(ours(512))
    assert max(map(len, short)) < min(map(len, long))


def test_the_response_cache_serves_another_model_s_answers(tmp_path):
    request = Instance("generate_until", {}, ("What is it?", {"until": []}), 0, metadata=("vt", 0, 1))
    theirs = [CachingLM(Answering(answer), str(tmp_path / "responses.db")) for answer in ("first", "second")]
    assert [lm.generate_until([request]) for lm in theirs] == [["first"], ["first"]]

    def ours(answer, run):
        scored = {"score": 0.0, "outputs": []}
        return RecordingLM(Answering(answer), Predictions(tmp_path, run), chunk=1, note=lambda *about: scored)

    assert ours("first", run="hash of one").generate_until([request]) == ["first"]
    assert ours("second", run="hash of another").generate_until([request]) == ["second"]
    assert ours("not asked", run="hash of one").generate_until([request]) == ["first"]


def test_a_prompt_over_the_window_loses_its_start(llama):
    from lm_eval.models.huggingface import HFLM

    common = {"pretrained": llama, "max_length": 64, "device": "cpu", "batch_size": 1}
    request = Instance("generate_until", {}, ("first " + "word " * 80, {"until": [], "max_gen_toks": 12}), 0)
    seen = []
    theirs = HFLM(**common)
    generate = theirs._model_generate
    theirs._model_generate = lambda context, **given: seen.append(context) or generate(context=context, **given)
    theirs.generate_until([request], disable_tqdm=True)
    assert seen[0].shape[1] == 52 and "first" not in theirs.tok_decode(seen[0][0])
    ours = LongContextLM(**common)
    with pytest.raises(ValueError, match=r"must fit the window: \d+ \+ 12 tokens, window 64"):
        ours.generate_until([request])
    assert ours.tok_encode("<s>The grass is green.") == ours.tok_encode("The grass is green.")
    assert ours.tok_encode("The grass is green.").count(ours.tokenizer.bos_token_id) == 1


def test_metadata_beside_a_task_manager_is_dropped(llama, tmp_path):
    """lm-eval runs on with a task's defaults; ours says what it was not told."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    given = settings(llama, tmp_path, max_seq_lengths=[512])
    common = {"model": Answering("?"), "tasks": ["endprompt_vt"], "bootstrap_iters": 0}
    bare = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.raises(ValueError, match="endprompt_vt sizes its prompts by tokens: name a tokenizer in the metadata"):
        simple_evaluate(**common, task_manager=bare, metadata=given)
    told = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given)
    assert simple_evaluate(**common, task_manager=told)["results"]["endprompt_vt"]["512,none"] == 0


def test_a_model_given_as_an_object_takes_every_sample_in_every_process(llama, monkeypatch):
    """So a run is given a path, and the processes that see no GPU are counted too."""
    import types

    import torch
    from lm_eval.models import huggingface
    from transformers import AutoModelForCausalLM

    pair = types.SimpleNamespace(
        num_processes=2, process_index=1, device=torch.device("cpu"), is_local_main_process=False
    )
    pair.prepare_model = pair.unwrap_model = lambda model, **given: model
    monkeypatch.setattr(huggingface, "Accelerator", lambda **given: pair)
    model = AutoModelForCausalLM.from_pretrained(llama)
    theirs = huggingface.HFLM(pretrained=model, tokenizer=helpers.tokenizer())
    assert (theirs.rank, theirs.world_size) == (0, 1)
    ours = LongContextLM(pretrained=llama, device="cpu")
    assert (ours.rank, ours.world_size) == (1, 2)


def test_an_automatic_batch_size_probes_with_the_logits_of_every_position(llama):
    """lm-eval runs the whole window first, with a logit for each token of it; ours computes those of the last."""
    from lm_eval.models.huggingface import HFLM

    def largest(lm, prompt):
        shapes = []
        hook = lm.model.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.logits.shape)))
        request = Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": 4}), 0)
        lm.generate_until([request], disable_tqdm=True)
        hook.remove()
        return max(rows * positions for rows, positions, _ in shapes)

    common = {"pretrained": llama, "max_length": 256, "device": "cpu"}
    assert largest(HFLM(**common, batch_size="auto", max_batch_size=2), "a short prompt") == 2 * 256
    assert largest(LongContextLM(**common, batch_size=2), "word " * 60) < 16  # a trial's few tokens, before all prompts
