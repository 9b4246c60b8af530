"""The lab's table of contrasts: which arms are compared with which, by question, and what was said of them before.

What was said before the rows existed came from the paper, from our own prototypes (one to three seeds an arm) and from
the theory of `analysis`. Claims are leads that the rows may confirm or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.lab import estimates
from benchmarks.lab.arms import Arm, is_main, is_published, is_recall, is_short
from paper_figures.names import CUE_WEIGHT

ANCHOR, SLOPE, KEPT = "anchor against control", "points for ten times the steps", "after against before"
BEST = "best with whole text against PoSE"
WORDING, RECALL, WEIGHT = "wording", "recall against cue", "weight of the prompt"
FIXED, POSE, FULL = "place against fixed", "against PoSE", "against full length, equal tokens"
LONGLORA, SCALING = "against LongLoRA, equal tokens", "YaRN against PI"
LONG = {"full": "full length", "longlora": "LongLoRA"}


def less(first: Mapping[Any, float], second: Mapping[Any, float]) -> dict[Any, float]:
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def comparisons(a: Arm, b: Arm) -> Iterator[tuple[int, str]]:
    """Questions and families in which an arm is compared with another of its base and fold, the reference."""
    placed = a.kind not in ("contiguous", "pose", "endprompt")
    if a.scaling != b.scaling:
        same = all(getattr(a, key) == getattr(b, key) for key in ("kind", "prompt", "weight", "steps", "tokens"))
        if (a.scaling, b.scaling) == ("yarn", "linear") and same and a.usual and a.kind != "longlora":
            yield 5, SCALING
    elif b.kind in LONG:
        if a.tokens and b.tokens and ((_usual(a) and is_main(a)) or (a.kind, b.kind) == ("full", "longlora")):
            if abs(b.tokens / a.tokens - 1) <= 0.1:
                yield 6, f"against {LONG[b.kind]}, equal tokens"
            elif a.steps == b.steps:
                yield 6, f"against {LONG[b.kind]}, equal steps"
    elif _usual(a) and _usual(b):
        if is_published(a) and b.kind == "contiguous":
            yield 1, ANCHOR
        if a.kind == b.kind and a.prompt and b.prompt == "EP_1" and b.weight == CUE_WEIGHT:
            yield 3, {"recall": RECALL, "EP_1": WEIGHT}.get(a.prompt, WORDING)
        alike = placed and (a.prompt, a.weight) == (b.prompt, b.weight)
        if (is_published(b) or is_recall(b)) and (a.kind == "pose" or alike):
            yield 4, FIXED
        if placed and is_main(a) and b.kind == "pose":
            yield 4, POSE


def _usual(arm: Arm) -> bool:
    return is_short(arm) and arm.usual


def contrasts_of(arms: Sequence[Arm]) -> list[Contrast]:
    trained = [arm for arm in arms if arm.kind != "base"]
    settings = dict.fromkeys(arm.setting for arm in trained)
    own = [[arm for arm in trained if arm.setting == setting] for setting in settings]
    pairs = [(a, b) for members in own for a in members for b in members if a is not b]
    pairs += [(a, b) for a in trained for b in trained if a.setting[:2] == b.setting[:2] and a.scaling != b.scaling]
    found = [Contrast(question, family, a, b) for a, b in pairs for question, family in comparisons(a, b)]
    return found + best_contrasts(arms)


def best_contrasts(arms: Sequence[Arm]) -> list[Contrast]:
    """The best scheme that keeps the text whole against PoSE, tested on other rows than it was chosen on. For each fold
    and scaling it is chosen by the mean score at the target on the smallest base, on the lower half of the seeds that
    PoSE has there; it is tested on the other seeds, and on the other bases."""
    groups: dict[tuple[int, str], list[Arm]] = {}
    for arm in arms:
        if is_short(arm) and arm.usual and is_main(arm) and arm.scores.get(arm.target):
            groups.setdefault((arm.fold, arm.scaling), []).append(arm)
    found = []
    for members in groups.values():
        references = sorted((arm for arm in members if arm.kind == "pose"), key=lambda arm: arm.window)
        if not references:
            continue
        pose = references[0]
        seeds = sorted(pose.scores[pose.target])
        half = frozenset(seeds[: (len(seeds) + 1) // 2])
        own = [arm for arm in members if arm.base == pose.base and arm.whole and arm.prompt]
        able = [arm for arm in own if half <= arm.scores[arm.target].keys()]
        if not able:
            continue
        best = max(able, key=lambda arm: float(np.mean([arm.scores[arm.target][seed] for seed in half])))
        chosen_on = f"base {pose.base}, seeds {', '.join(map(str, sorted(half)))}"
        for reference in references:
            same = [arm for arm in members if (arm.base, arm.name) == (reference.base, best.name)]
            left_out = half if reference is pose else frozenset()
            found += [Contrast(4, BEST, arm, reference, left_out, chosen_on) for arm in same]
    return found


@dataclass(frozen=True)
class Contrast:
    """Two arms of one base and fold; `family` names what they differ in. left_out: seeds that do not count, since the
    first arm was chosen on them. chosen_on: where it was, in words."""

    question: int
    family: str
    first: Arm
    second: Arm
    left_out: frozenset[int] = frozenset()
    chosen_on: str | None = None

    def differences(self, length: int) -> dict[int, float]:
        every = less(self.first.scores.get(length, {}), self.second.scores.get(length, {}))
        return {seed: value for seed, value in every.items() if seed not in self.left_out}

    def means(self, length: int) -> list[float]:
        both = (self.first.scores[length], self.second.scores[length])
        return [float(np.mean([score for seed, score in s.items() if seed not in self.left_out])) for s in both]

    def bootstrap(self, length: int) -> list[float] | None:
        """Over seeds and samples; None unless both arms kept the scores of the same samples."""
        per_seed = []
        for seed in self.differences(length):
            a, b = (arm.samples.get((length, seed), {}) for arm in (self.first, self.second))
            if not a or a.keys() != b.keys() or any(len(a[task]) != len(b[task]) for task in a):
                return None
            per_seed.append([a[task] - b[task] for task in sorted(a)])
        return list(estimates.nested_bootstrap(per_seed)) if len(per_seed) > 1 else None


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


SAID = Path(__file__).parent / "claims" / "claims.yaml"
CLAIMS = tuple(Claim(**one) for one in yaml.safe_load(SAID.read_text(encoding="utf-8")))
