"""The cache of LongBench's prompts: the same bytes as without it, another key for every difference, faults seen."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from benchmarks.longbench import Documents, Prompter
from benchmarks.longbench.cache import cached_fits, common_start
from tests.support.longbench_fixtures import KINDS, documents, tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: tokenizer(kind) for kind in KINDS}


def found(task, n=4, **options):
    return Documents(task, documents(task, n=n, **options), {"file": f"{options}"})


def refuse(self, items):
    raise AssertionError("prompts were made again")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("task", "wrapped"), [("qasper", True), ("dureader", False), ("lcc", True)])
def test_cached_prompts_are_the_same(tmp_path, tokenizers, monkeypatch, kind, task, wrapped):
    inner = tokenizers[kind]

    def template(messages, **options):
        return inner.apply_chat_template(messages, tokenize=False, **options)

    mixed = [*documents(task, n=3, words=1500), *documents(task, n=2, words=20)]  # three to be cut, two that fit
    given = Documents(task, mixed, {"file": "0"})
    prompter = Prompter(task, inner, 1200, chat_template=template if wrapped else None)
    direct = prompter.fit(mixed)
    assert cached_fits(prompter, given, None, "t", tmp_path) == direct
    assert {fit.truncated for fit in direct} == {True, False}
    monkeypatch.setattr(Prompter, "fit", refuse)
    again = cached_fits(prompter, given, None, "t", tmp_path)
    assert again == direct
    assert prompter.samples(mixed, again) == prompter.samples(mixed, direct)
    (path,) = tmp_path.glob("*.json")
    if kind == "byte_bpe" and task != "dureader":  # elsewhere a cut may fall inside a character, or text is normalized
        assert '"text"' not in path.read_text() and path.stat().st_size < 1500


def test_every_difference_is_another_file(tmp_path, tokenizers):
    prompter = Prompter("qasper", tokenizers["byte_bpe"], 500)
    given = found("qasper")

    def template(messages, add_generation_prompt):
        return f"<{messages[-1]['content']}>"

    calls = [
        (prompter, given, None, "t"),
        (prompter, given, 2, "t"),
        (prompter, given, None, "another tokenizer"),
        (prompter, dataclasses.replace(given, sha256={"file": "changed"}), None, "t"),
        *(
            (dataclasses.replace(prompter, **change), given, None, "t")
            for change in (
                {"window": 501},
                {"prompt_length": 300},
                {"max_new_tokens": 127},
                {"chat_template": template},
                {"add_special_tokens": False},
            )
        ),
        (Prompter("qasper_e", tokenizers["byte_bpe"], 500), found("qasper_e"), None, "t"),
    ]
    for number, call in enumerate(calls, 1):
        expected = call[0].fit(call[1].items[: call[2]])
        assert cached_fits(*call, tmp_path) == expected == cached_fits(*call, tmp_path)
        assert len(list(tmp_path.glob("*.json"))) == number


def test_a_changed_file_is_an_error(tmp_path, tokenizers):
    call = (Prompter("qasper", tokenizers["byte_bpe"], 500), found("qasper"), None, "t", tmp_path)
    cached_fits(*call)
    (path,) = tmp_path.glob("*.json")
    whole = path.read_text()
    head, body = whole.split("\n")
    cut = json.loads(body)
    cut[0]["ends"][0] += 1
    for broken in (f"{head}\n{json.dumps(cut)}", whole[:-5], "", f"{{}}\n{body}", "[]\n"):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"longbench-qasper-500-.*changed after it was written"):
            cached_fits(*call)
    path.unlink()
    assert cached_fits(*call) == call[0].fit(call[1].items)
    assert path.read_text() == whole  # the same bytes again


def test_common_start_by_bisection():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("ab", k=rng.randint(0, 9))) for _ in range(2))
        naive = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        assert common_start(a, b) == naive
