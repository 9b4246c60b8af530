"""RULER samples: budget, seeds, needles, shortest lengths."""

from __future__ import annotations

import itertools
import json
import re
import sys

import pytest

from benchmarks import ruler
from benchmarks.ruler import cell, fit, questions, tasks
from benchmarks.ruler.tokens import counter
from endprompt.files import remembered_sha256
from tests.support import ruler_helpers as helpers
from tests.support.imports import loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    helpers.essay_file(folder)
    helpers.qa_files(folder)
    return folder


def build(task, length, n, folder, tokenizer=None, seed=0, **options):
    tokenizer = tokenizer or helpers.tokenizer()
    return ruler.build_samples(
        task, length, tokenizer, n, seed, folder, haystack_text=str(folder / "story.txt"), **options
    )


@pytest.mark.parametrize("task", ruler.TASKS)
def test_prompt_and_generation_never_exceed_the_budget_and_nearly_fill_it(task, folder):
    tokenizer, length = helpers.tokenizer(), 2048
    samples = build(task, length, 6, folder)
    used = [len(tokenizer(s["input"])["input_ids"]) + s["max_new_tokens"] for s in samples]
    assert max(used) <= length
    assert [s["length"] for s in samples] == [u - s["max_new_tokens"] for u, s in zip(used, samples)]
    # Lines of noise are not cut.
    loose = ruler.SPECS[task].family in ("fwe", "qa") or ruler.SPECS[task].haystack == "noise"
    assert sum(used) / len(used) >= (0.98 if loose else 0.995) * length


@pytest.mark.parametrize(
    ("task", "kind"),
    [*zip(ruler.TASKS, itertools.cycle(["bytes", "metaspace", "wordpiece"]))]
    + [(task, "glued") for task in ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe", "qa_1")],
)
def test_sums_are_right_or_replaced_by_a_search_for_every_kind_of_tokenizer(task, kind, folder, monkeypatch):
    monkeypatch.setattr(fit, "EXACT_TOKENS", 0)  # as in a large cell: only a few prompts are tokenized whole
    tokenizer = helpers.tokenizer(kind)
    length, n = (2500, 6) if kind == "glued" else (4000, 6)  # merges across words make that one slow
    samples = build(task, length, n, folder, tokenizer)
    used = [len(tokenizer(s["input"])["input_ids"]) + s["max_new_tokens"] for s in samples]
    assert max(used) <= length
    assert [s["length"] + s["max_new_tokens"] for s in samples] == used
    loose = ruler.SPECS[task].family in ("fwe", "qa") or ruler.SPECS[task].haystack == "noise"
    least = 0.95 if kind == "glued" else 0.98 if loose else 0.995
    assert sum(used) / len(used) >= least * length


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_1"])
def test_windows_of_256_tokens_hold_a_needle(task, folder):
    samples = build(task, 256, 12, folder, max_new_tokens=16)
    for s in samples:
        assert s["max_new_tokens"] == 16 and s["length"] + 16 <= 256
        assert all(re.search(rf"is: {re.escape(value)}\.", s["input"]) for value in s["outputs"])


def test_a_length_too_short_names_the_shortest_and_that_one_works(folder):
    for task in ruler.TASKS:
        with pytest.raises(ValueError, match="too short") as caught:
            build(task, 100, 3, folder)
        shortest = int(re.search(r"shortest possible is (\d+)", str(caught.value)).group(1))
        samples = build(task, shortest, 3, folder)
        assert max(s["length"] + s["max_new_tokens"] for s in samples) <= shortest


def test_samples_do_not_depend_on_count_order_or_other_cells(folder):
    first = build("niah_multikey_1", 1024, 8, folder)
    build("vt", 2048, 2, folder)
    build("niah_multikey_1", 512, 2, folder)
    assert build("niah_multikey_1", 1024, 4, folder) == first[:4]


def test_seed_and_length_change_the_samples(folder):
    base = build("niah_single_1", 1024, 4, folder)
    other_seed = build("niah_single_1", 1024, 4, folder, seed=1)
    longer = build("niah_single_1", 1100, 4, folder)
    assert all(a["outputs"] != b["outputs"] for a, b in zip(base, other_seed))
    assert all(a["outputs"] != b["outputs"] for a, b in zip(base, longer))
    assert len({s["outputs"][0] for s in base}) == 4


def test_a_needle_stands_at_the_depth_that_the_sample_says(folder):
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multivalue"):
        for s in build(task, 4096, 5, folder):
            context = s["input"].split("\n", 1)[1].rsplit("\n", 1)[0]
            for value, depth in zip(s["outputs"], s["depth"], strict=True):
                found = 100 * context.index(f"is: {value}") / len(context)
                assert abs(found - depth) < 6, (task, depth, found)


def test_key_words_are_indexed_not_made():
    from benchmarks.ruler import texts

    adjectives, nouns = texts.word_list("adjective"), texts.word_list("noun")
    assert texts.key_words() == len(adjectives) * len(nouns) > 6_000_000
    assert texts.key_word(0) == f"{adjectives[0]}-{nouns[0]}"
    assert texts.key_word(texts.key_words() - 1) == f"{adjectives[-1]}-{nouns[-1]}"
    assert texts.key_word(len(nouns) + 5) == f"{adjectives[1]}-{nouns[5]}"


def test_importing_the_module_loads_nothing_heavy():
    assert loaded("benchmarks.ruler.cell") - sys.stdlib_module_names == {"numpy", "yaml"}


def test_without_a_text_of_the_users_the_haystack_is_the_unseen_half_of_the_sample():
    from benchmarks.base import documents
    from benchmarks.ruler import texts

    s = ruler.build_samples("niah_single_2", 1024, helpers.tokenizer(), 1)[0]
    assert s["haystack"] == "sample.txt, second half"
    assert s["haystack_sha256"] == remembered_sha256(texts.shipped_sample())
    context = s["input"].split("\n", 1)[1]
    unseen, seen = documents.sample_haystack_sentences(), documents.sample_training_sentences()
    assert any(sentence in context for sentence in unseen[:10])
    assert not any(sentence in context for sentence in seen if len(sentence) > 60)


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece", "glued"])
def test_documents_cost_what_the_tokenizer_says(kind, monkeypatch):
    monkeypatch.setattr(questions, "CHECKED_DOCUMENTS", 8)
    story = helpers.STORY.split()
    documents = [f"Title {i}\n" + " ".join(story[i : i + 5 + i % 40]) for i in range(40)]
    documents += ["Two  spaces in a text of words", "Café and naïve words, été", "one", "a b"]
    tokenizer = helpers.tokenizer(kind)
    costs = questions.DocumentCosts(tokenizer, documents)
    count = counter(tokenizer)
    bare = count(["a\n\nDocument"])[0]
    blocks = [f"a\n\nDocument 1:\n{document}\n\nDocument" for document in documents]
    assert costs.of(range(len(documents))).tolist() == [tokens - bare for tokens in count(blocks)]
    assert costs.words_add_up == (kind != "glued")


def test_a_sample_of_common_words_keeps_no_more_of_the_long_list_than_fits(tmp_path):
    """500 of them must be there at once: all 100,000 words of each would be 400 MB."""
    (tmp_path / "english_words.json").write_text(json.dumps({str(i): f"wordling{i}" for i in range(100_000)}))
    made = cell.source("cwe", 131_072, helpers.tokenizer(), 0, tmp_path, tasks.DEFAULTS)
    assert len(made.long_words) == 100_000
    draft = made.draw(0)
    assert draft.long_order.base is None and draft.long_order.nbytes < 200_000
