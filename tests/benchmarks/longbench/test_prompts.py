"""LongBench's prompts: published text, cut in the middle by the model's tokenizer, never over the window."""

from __future__ import annotations

import re
from functools import cache

import pytest

from benchmarks import longbench
from benchmarks.longbench import TASKS, Documents, prompts
from benchmarks.longbench.sets import WITHOUT_QUESTION
from benchmarks.ruler.cell import samples_sha256
from tests.support.longbench_fixtures import KINDS, documents, tokenizer

cached_tokenizer = cache(tokenizer)


def samples(task, kind, window, **options):
    items = options.pop("items", None) or documents(task)
    return longbench.build_samples(
        task, cached_tokenizer(kind), window=window, documents=Documents(task, items, {}), **options
    )


def chat(kind):
    inner = cached_tokenizer(kind)
    return lambda messages, **options: inner.apply_chat_template(messages, tokenize=False, **options)


def test_every_prompt_holds_context_and_question_once():
    for task in TASKS:
        template = prompts.prompt_template(task)
        places = re.findall(r"\{.*?\}", template)
        assert places == (["{context}"] if task in WITHOUT_QUESTION else ["{context}", "{input}"])


def test_a_document_cannot_reach_into_the_template():
    document = {"context": "{input} {context} {0} {{x}}", "input": "{context} %s"}
    prompt = prompts.prompt_text("trec", document)
    assert prompt.endswith("\n\n{input} {context} {0} {{x}}\n{context} %s")


def test_another_lm_eval_is_noticed(tmp_path, monkeypatch):
    """A task file that says something else is an error; one that has made the correction itself is taken as it is."""
    (tmp_path / "tasks" / "longbench").mkdir(parents=True)
    file = tmp_path / "tasks" / "longbench" / "lcc.yaml"
    original = (prompts.lm_eval_folder() / "tasks" / "longbench" / "lcc.yaml").read_text()
    expected = prompts.prompt_template("lcc")
    monkeypatch.setattr(prompts, "lm_eval_folder", lambda: tmp_path)
    try:
        for text in (original, original.replace("line of code:", "line of code:\\n")):
            file.write_text(text)
            prompts.prompt_template.cache_clear()
            assert prompts.prompt_template("lcc") == expected
        file.write_text(original.replace("Please", "Kindly"))
        prompts.prompt_template.cache_clear()
        with pytest.raises(ValueError, match=r"lcc in lm-eval .* is not the published one"):
            prompts.prompt_template("lcc")
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"missing: .*lcc\.yaml"):
            prompts.prompt_template("lcc")
    finally:
        prompts.prompt_template.cache_clear()


def given(inner, prompt):
    """What a model is given to continue: what stands in front by default, not what a WordPiece puts behind a text."""
    ids = inner(prompt)["input_ids"]
    return ids[:-1] if ids[-1] == inner.eos_token_id else ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["qasper", "multifieldqa_zh", "repobench-p", "samsum"])
def test_a_long_prompt_keeps_both_its_ends(task, kind):
    """The definition, by hand: the first and the last half of the tokens, decoded, one after the other."""
    inner = cached_tokenizer(kind)
    limit = 300
    for item, sample in zip(documents(task), samples(task, kind, 4096, prompt_length=limit), strict=True):
        prompt = prompts.prompt_text(task, item)
        ids = inner(prompt)["input_ids"]
        assert len(ids) > limit and sample["truncated"]
        halves = [inner.decode(part, skip_special_tokens=True) for part in (ids[:150], ids[-150:])]
        assert sample["input"] == "".join(halves)
        assert sample["length"] == len(given(inner, sample["input"]))
        if kind == "byte_bpe":
            assert sample["input"][:40] == prompt[:40] and sample["input"][-40:] == prompt[-40:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("task", ["hotpotqa", "dureader", "lcc"])
def test_no_input_is_over_the_window(task, kind, wrapped):
    inner = cached_tokenizer(kind)
    new_tokens = longbench.dataset_of(task).max_new_tokens
    for window in (170, 400, 5000):
        built = samples(task, kind, window, chat_template=chat(kind) if wrapped else None)
        for item, sample in zip(documents(task), built, strict=True):
            assert sample["length"] == len(given(inner, sample["input"]))
            assert sample["length"] + new_tokens <= window
            if not sample["truncated"]:
                assert prompts.prompt_text(task, item) in sample["input"]
            elif kind == "byte_bpe":  # the other decoders normalize: what they give back is shorter
                assert sample["length"] + new_tokens >= window - 12
    assert not any(sample["truncated"] for sample in built)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_through_a_character_still_fits(kind):
    """Half a character decodes to a replacement, which can have more tokens than what it stands for."""
    items = [{**item, "context": "😀龘𝔘" * 300} for item in documents("multifieldqa_zh", n=2)]
    for window in range(200, 212):
        for sample in samples("multifieldqa_zh", kind, window, items=items):
            assert sample["length"] + sample["max_new_tokens"] <= window
            assert len(given(cached_tokenizer(kind), sample["input"])) == sample["length"]


def test_a_short_prompt_is_given_whole():
    for task in TASKS:
        for item, sample in zip(
            documents(task, words=30), samples(task, "byte_bpe", 4096, items=documents(task, words=30))
        ):
            assert (sample["input"], sample["truncated"]) == (prompts.prompt_text(task, item), False)
            assert sample["outputs"] == item["answers"] and sample["id"] == item["_id"]


@pytest.mark.parametrize("kind", KINDS)
def test_bos_comes_once_whether_wrapped_or_not(kind):
    inner = cached_tokenizer(kind)
    for task in ("qasper", "trec"):
        for sample in samples(task, kind, 4096, chat_template=chat(kind)):
            ids = inner(sample["input"])["input_ids"]
            assert ids.count(inner.bos_token_id) == 1 and ids[0] == inner.bos_token_id

    # a tokenizer that is told to add nothing leaves the template its own
    for sample in samples("qasper", kind, 4096, chat_template=chat(kind), add_special_tokens=False):
        ids = inner(sample["input"], add_special_tokens=False)["input_ids"]
        assert ids.count(inner.bos_token_id) == 1 and len(ids) == sample["length"]


def test_a_system_message_belongs_to_the_chat():
    template = chat("byte_bpe")
    asked, continued = (
        samples(t, "byte_bpe", 4096, chat_template=template, system="Be brief.")[0] for t in ("qasper", "lcc")
    )
    assert asked["input"].startswith("<|system|>Be brief.<|end|><|user|>You are given a scientific article")
    assert asked["input"].endswith("Answer:<|end|><|assistant|>")
    assert "Be brief." not in continued["input"]


def test_room_is_checked_before_anything_is_cut():
    with pytest.raises(ValueError, match=r"qasper: prompt_length must be from 2 to 3968, .* window of 4096 .*: 4000"):
        samples("qasper", "byte_bpe", 4096, prompt_length=4000)
    with pytest.raises(ValueError, match=r"qasper: the window must be at least 130, .*: 100"):
        samples("qasper", "byte_bpe", 100)


def test_samples_do_not_depend_on_how_many_are_asked_for():
    items = documents("qasper", n=70)
    whole = samples("qasper", "byte_bpe", 500, items=items)
    assert [sample["index"] for sample in whole] == list(range(70))
    few = samples("qasper", "byte_bpe", 500, items=items, n=3)
    assert few == whole[:3]
    assert samples_sha256(few) == samples_sha256(whole[:3]) != samples_sha256(whole)
    changed = [{**few[0], "outputs": ["other"]}, *few[1:]]
    assert samples_sha256(changed) != samples_sha256(few)
