"""RULER's sizes by arithmetic against the tokenizer itself, and the bytes of its samples."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import ruler
from benchmarks.ruler import cell, fit, tasks, tokens
from tests.support import ruler_helpers as helpers

KINDS = ["bytes", "metaspace", "wordpiece", "glued"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    helpers.essay_file(folder)
    return helpers.qa_files(folder)


def letters() -> PreTrainedTokenizerFast:
    """A token a byte: nothing about it is trained, so samples are the same wherever they are built."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=None)


# sha256 of three samples of each task at 16,000 bytes (common words: 32,000), cut to 16 digits.
BYTES = {
    "niah_single_1": "e0388b4030838deb", "niah_single_2": "efda45e07cf59532", "niah_single_3": "c84e6d16e70da8c2",
    "niah_multikey_1": "fc97c5e2aab5452a", "niah_multikey_2": "ab25d005edb75b65",
    "niah_multikey_3": "506e4bf6e24ff93d", "niah_multivalue": "ed2b568bb392dd7e",
    "niah_multiquery": "4ecc82a5c589d924", "vt": "5b9662699cd61aad", "cwe": "88c3251fe3b29fd4",
    "fwe": "49da4737804a8753", "qa_1": "de8844b1fd747f9c", "qa_2": "2e6fd9bbc0b4d8eb",
}  # fmt: skip


# Where the default edition differs from that of the lab, at this length.
BYTES_2025 = {"niah_single_1": "db17080a119ae902", "vt": "b6e9732156031a96"}


@pytest.mark.parametrize(
    ("task", "edition", "exact"),
    [*((task, "lab-2026", False) for task in BYTES), *((task, "2025", True) for task in BYTES_2025)]
    + [(task, "lab-2026", True) for task in ("niah_multikey_2", "cwe", "fwe", "qa_2")],
)
def test_samples_of_this_generator_keep_their_bytes(task, edition, exact, folder, monkeypatch):
    monkeypatch.setattr(fit, "EXACT_TOKENS", 10**6 if exact else 0)
    monkeypatch.setattr(fit, "CHECKED_SAMPLES", 1)
    options = {"haystack_text": str(folder / "story.txt"), "edition": edition}
    samples = ruler.build_samples(task, 32_000 if task == "cwe" else 16_000, letters(), 3, 0, folder, **options)
    assert tasks.GENERATOR == "ruler-1", "a new generator has new samples: write their hashes here"
    assert cell.samples_sha256(samples)[:16] == (BYTES if edition == "lab-2026" else BYTES_2025)[task]
    assert [s["length"] for s in samples] == [len(s["input"].encode()) for s in samples]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["niah_single_1", "niah_multiquery", "niah_multikey_2", "vt", "cwe", "fwe", "qa_2"])
def test_a_search_by_sums_ends_where_one_by_the_tokenizer_does(task, kind, folder):
    tokenizer, length, n = helpers.tokenizer(kind), 1500, 3
    options = ruler.Options(haystack_text=str(folder / "story.txt"), max_new_tokens=20)
    made = cell.source(task, length, tokenizer, 0, folder, options)
    count, join = tokens.counter(tokenizer), tokens.assembler(tokenizer)

    def measure(drafts, states):
        return count([join(*draft.render(state)) for draft, state in zip(drafts, states)])

    drafts = [made.draw(i) for i in range(n)]
    smallest = measure(drafts, [draft.empty for draft in drafts])
    slow = fit.search(drafts, smallest, length - 20, measure)
    fast = fit.fit(length, made, drafts, 20, count, join)
    assert fast == slow


@pytest.mark.parametrize("kind", KINDS)
def test_texts_cost_what_the_tokenizer_counts_or_are_counted(kind):
    texts = [
        helpers.STORY.strip(),
        "One line.\nTwo lines of words.\n\nThree of them, in all",
        "Two  spaces are   counted whole, and",
        "VAR AB = VAR CD \nThe end of it",
        "a line \n of space on both sides of it",
        "Café and naïve “words”, 12,345 – of été",
        "two words",
        "",
        "<s>The start of a chat, with its own mark",
    ]
    tokenizer = helpers.tokenizer(kind)
    costs, count = tokens.Costs(tokenizer), tokens.counter(tokenizer)
    by_words = tokens.word_counter(costs, count, texts)
    assert by_words(texts) == [
        len(tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]) for text in texts
    ]
    assert (by_words == count) == (kind == "glued")
    assert [text for text in texts if not tokens.spaced(text)] == [texts[2], texts[4], texts[6], texts[7]]


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_smallest_prompts_are_summed_to_what_they_are(task, folder):
    tokenizer = helpers.tokenizer()
    made = cell.source(task, 6000, tokenizer, 0, folder, ruler.Options(haystack_text=str(folder / "story.txt")))
    drafts = [made.draw(i) for i in range(3)]
    cores = [draft.core() for draft in drafts]
    summed = [len(tokenizer("".join(prompt))["input_ids"]) + left for prompt, left in cores]
    assert summed == [len(tokenizer("".join(draft.render(draft.empty)))["input_ids"]) for draft in drafts]


def test_documents_come_from_the_article_then_from_all_others_once_then_again(folder):
    made = cell.source("qa_1", 2000, helpers.tokenizer(), 0, folder, ruler.Options())
    draft = made.draw(5)
    total, related = len(made.library.documents), set(draft.question.related)
    drawn = draft.candidates(3 * total).tolist()
    once = total - len(draft.question.context)
    assert related and set(drawn[: len(related)]) == related
    assert sorted([*drawn[:once], *draft.question.context]) == list(range(total))
    assert sorted(drawn[once : once + total]) == list(range(total))
    assert draft.candidates(7).tolist() == made.draw(5).candidates(7).tolist() == drawn[:7]


def test_a_token_that_was_added_is_counted():
    tokenizer = letters()
    text = "the grey harbour lay there"
    assert tokens.Costs(tokenizer).texts([text]) == [len(text)]
    tokenizer.add_tokens(["harbour"])
    assert tokens.Costs(tokenizer).texts([text]) == [len(text) - len("harbour") + 1]
