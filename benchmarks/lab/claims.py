"""What was said before the lab's rows existed: by the paper, by our own prototypes, by the theory of `analysis`.

The prototypes were one to three seeds an arm; their claims are leads that the lab's rows may confirm or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Loss weight of an end prompt whose words are fixed, where rows do not say.
CUE_WEIGHT = 0.1

ANCHOR, SLOPE, KEPT = "anchor against control", "points for ten times the steps", "after against before"
BEST = "best with whole text against PoSE"
WORDING, RECALL = "wording", "recall against cue"
FIXED, POSE, FULL = "place against fixed", "against PoSE", "against full length, equal tokens"
LONGLORA = "against LongLoRA, equal tokens"


@dataclass(frozen=True)
class Claim:
    """One claim, and what the rows must show if it holds.

    source: `paper`, `prototypes`, `theory` or `aim` (what we looked for).
    expected: `better`, `worse`, `same`, `no worse` (the interval stays above minus the margin) or `predicts`.
    family, metric, kind and prompt of the first arm, prompt of the second, fold, scaling: the estimates that it speaks
    of; None is any. They are averaged over the settings (base, fold, scaling) in which not both arms fail.
    """

    question: int
    source: str
    says: str
    expected: str
    family: str
    metric: str = "score_difference"
    kind: str | None = None
    prompt: str | None = None
    second_prompt: str | None = None
    fold: int | None = None
    scaling: str | None = None

    def speaks_of(self, row: Mapping[str, Any]) -> bool:
        """Is this estimate (at the target length, or inside the window for question 7) one of them?"""
        if (row["task"], row["metric"], row["family"]) != (f"q{self.question}", self.metric, self.family):
            return False
        wanted = {"fold": self.fold, "scaling": self.scaling}
        if not row["primary"] or any(value not in (None, row[key]) for key, value in wanted.items()):
            return False
        if not row["kinds"]:
            return True
        kind, (prompt, second) = row["kinds"][0], row["prompts"]
        published = not prompt.startswith("EP_") or row["prompt_weights"][0] == CUE_WEIGHT
        pairs = ((self.kind, kind), (self.prompt, prompt), (self.second_prompt, second))
        return published and all(value in (None, found) for value, found in pairs)


def _paper(question: int, says: str, expected: str, family: str, **chosen: Any) -> Claim:
    return Claim(question, "paper", says, expected, family, **chosen)


def _ours(question: int, says: str, expected: str, family: str, **chosen: Any) -> Claim:
    return Claim(question, "prototypes", says, expected, family, **chosen)


def _aim(says: str, scaling: str) -> Claim:
    """Of the scheme that is chosen on some rows and tested on others (verdicts.best_contrasts)."""
    return Claim(4, "aim", says, "no worse", BEST, fold=32, scaling=scaling)


PUBLISHED: dict[str, Any] = {"kind": "endprompt", "prompt": "EP_1"}
COPIED: dict[str, Any] = {"kind": "endprompt", "prompt": "recall"}
BOTH: dict[str, Any] = {"kind": "endprompt-pose", "prompt": "EP_1"}
ANYWHERE: dict[str, Any] = {"kind": "endprompt-random", "prompt": "recall", "fold": 32}
CLAIMS = (
    _paper(1, "the terminal anchor brings the long range (76.03; full-length interpolation 72.24)", "better", ANCHOR),
    _ours(1, "a fixed end prompt adds little to interpolation trained short", "same", ANCHOR),
    _paper(
        2,
        "the score grows with the training tokens (0.5B 74.72, 1B 76.03, 2B 75.61)",
        "better",
        SLOPE,
        metric="slope",
        **PUBLISHED,
    ),
    _ours(2, "a fixed end prompt collapses when trained longer", "worse", SLOPE, metric="slope", **PUBLISHED),
    _ours(2, "an end prompt copied from the context does not", "no worse", SLOPE, metric="slope", **COPIED),
    _paper(3, "the wording matters little (EP_2 76.45, EP_1 76.03)", "same", WORDING, kind="endprompt", prompt="EP_2"),
    _paper(3, "the wording matters little (EP_3 74.63, EP_1 76.03)", "same", WORDING, kind="endprompt", prompt="EP_3"),
    _ours(3, "an end prompt that must be read from the context works better", "better", RECALL, **COPIED),
    _paper(4, "the end prompt on top of PoSE beats the fixed one (79.44, 76.03)", "better", FIXED, **BOTH),
    _paper(4, "PoSE beats the fixed one (78.91, 76.03)", "better", FIXED, kind="pose", second_prompt="EP_1"),
    _paper(4, "the end prompt on top of PoSE is no worse than PoSE (79.44, 78.91)", "no worse", POSE, **BOTH),
    _ours(
        4,
        "at 8-fold, with YaRN, PoSE and recall at the fixed end look alike",
        "same",
        FIXED,
        kind="pose",
        second_prompt="recall",
        fold=8,
        scaling="yarn",
    ),
    _ours(4, "at 32-fold recall at a random place beats recall at the fixed end", "better", FIXED, **ANYWHERE),
    _ours(4, "at 32-fold recall at a random place stays behind PoSE", "worse", POSE, **ANYWHERE),
    _aim("at 32-fold, with YaRN, a scheme that keeps the text whole reaches PoSE", "yarn"),
    _aim("at 32-fold, with PI, a scheme that keeps the text whole reaches PoSE", "linear"),
    _paper(
        5,
        "the smaller the smoothness constant, the better the extension",
        "predicts",
        "smoothness constant, all arms",
        metric="rank_correlation",
    ),
    Claim(
        5,
        "theory",
        "the smaller the predicted error in the gap, the better the extension",
        "predicts",
        "gap RMS, all arms",
        metric="rank_correlation",
    ),
    _ours(5, "YaRN beats PI, its smoothness constant 11.7 times larger", "better", "YaRN against PI"),
    _paper(6, "the end prompt beats full length on the same tokens (76.03, 69.23)", "better", FULL, **PUBLISHED),
    _ours(6, "PoSE is no worse than full length on the same tokens", "no worse", FULL, kind="pose"),
    # With YaRN alone: with PI LongLoRA does not learn here, at any rate that was tried.
    _paper(
        6,
        "the end prompt beats LongLoRA on the same tokens (76.03, 72.95)",
        "better",
        LONGLORA,
        scaling="yarn",
        **PUBLISHED,
    ),
    _ours(6, "with YaRN, PoSE beats LongLoRA on the same tokens", "better", LONGLORA, kind="pose", scaling="yarn"),
    _paper(7, "what the base does inside its window is kept", "no worse", KEPT, **PUBLISHED),
    _ours(7, "recall with YaRN keeps it", "no worse", KEPT, **COPIED, scaling="yarn"),
)
