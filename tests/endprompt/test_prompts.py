"""End prompts: what is appended, what carries loss."""

import numpy as np
import pytest

from endprompt import prompts


def letters(text):
    return [ord(c) for c in text]


def test_cue_is_the_papers_words_and_all_of_it_is_scored():
    kind = prompts.prompt_kind(["EP_1"], letters)
    built = kind.build(0, np.arange(3), np.random.default_rng(0))
    assert bytes(built.tokens.tolist()).decode() == "This is the end of text, please pay attention here"
    assert built.scored.all() and len(built) == 50


def test_cue_is_drawn_evenly_from_the_set():
    kind = prompts.prompt_kind(["EP_3", "text:Stop", "text:!"], letters)
    rng = np.random.default_rng(1)
    counts = np.bincount([kind.choose(rng) for _ in range(3000)])
    assert np.abs(counts - 1000).max() < 5 * (3000 * 2 / 9) ** 0.5  # five standard deviations
    assert [kind.length(i) for i in range(3)] == [4, 4, 1] and kind.longest == 4


def test_recall_copies_a_span_and_scores_it_after_its_first_tokens():
    kind = prompts.prompt_kind(["recall"], letters, recall_span=8, recall_given=3)
    context = np.arange(1000, 1050)
    starts = set()
    for seed in range(300):
        built = kind.build(0, context, np.random.default_rng(seed))
        cue, span = built.tokens[:-8], built.tokens[-8:]
        assert bytes(cue.tolist()).decode() == "\nQuote from the text above:"
        assert (np.diff(span) == 1).all() and span[0] >= 1000 and span[-1] < 1050
        assert built.scored.tolist() == [False] * (len(cue) + 3) + [True] * 5
        starts.add(int(span[0]))
    assert {1000, 1042} <= starts  # both ends can be drawn


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        ([], "at least one end prompt"),
        (["EP_9"], "prompt must be recall, question, EP_1"),
        (["recall", "EP_1"], "recall cannot be mixed"),
        (["EP_1", "question"], "question cannot be mixed"),
        (["text:"], "at least one token"),
        (["EP_2"], "does not have"),
    ],
)
def test_prompt_names_refused(names, rule):
    with pytest.raises(ValueError, match=rule):
        prompts.prompt_kind(names, letters)


def test_recall_with_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="recall_given=8 recall_span=8"):
        prompts.prompt_kind(["recall"], letters, recall_span=8, recall_given=8)
