"""Which arms are compared with which, by question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.lab import claims, estimates
from benchmarks.lab.arms import Arm, is_main, is_published, is_recall, is_short

# --- comparisons ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """Two arms of one base and fold; `family` names what they differ in.

    left_out: seeds that do not count, since the first arm was chosen on them. chosen_on: where it was, in words.
    """

    question: int
    family: str
    first: Arm
    second: Arm
    left_out: frozenset[int] = frozenset()
    chosen_on: str | None = None

    def differences(self, length: int) -> dict[int, float]:
        """Score of the first less that of the second, for each seed that both have."""
        a, b = self.first.scores.get(length, {}), self.second.scores.get(length, {})
        return {seed: a[seed] - b[seed] for seed in a if seed in b and seed not in self.left_out}

    def means(self, length: int) -> list[float]:
        """Mean score of each arm, over all of its seeds that count."""
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


def contrasts_of(arms: Sequence[Arm]) -> list[Contrast]:
    """All pairs that the seven questions compare, the fold and base always the same."""
    found = []
    by_setting: dict[tuple[str, int, str], list[Arm]] = {}
    for arm in arms:
        if arm.kind != "base":
            by_setting.setdefault(arm.setting, []).append(arm)
    for members in by_setting.values():
        usual = [arm for arm in members if arm.usual]
        short = [arm for arm in usual if is_short(arm)]
        control = [arm for arm in short if arm.kind == "contiguous"]
        pose = [arm for arm in short if arm.kind == "pose"]
        fixed = [arm for arm in short if arm.kind == "endprompt"]
        placed = [arm for arm in short if arm.kind not in ("contiguous", "pose", "endprompt")]
        found += _pairs(1, claims.ANCHOR, filter(is_published, short), control)
        for reference in (arm for arm in short if arm.prompt == "EP_1" and arm.weight == claims.CUE_WEIGHT):
            others = [a for a in short if a.kind == reference.kind and a is not reference and a.prompt]
            for arm in others:
                families = {"recall": claims.RECALL, "EP_1": "weight of the prompt"}
                found.append(Contrast(3, families.get(arm.prompt, claims.WORDING), arm, reference))
        for reference in fixed:
            same = [a for a in placed if (a.prompt, a.weight) == (reference.prompt, reference.weight)]
            if is_published(reference) or is_recall(reference):
                found += _pairs(4, claims.FIXED, [*same, *pose], [reference])
        found += _pairs(4, claims.POSE, filter(is_main, placed), pose)
        long = [arm for arm in members if arm.kind in ("full", "longlora")]
        for arm in [*filter(is_main, short), *(arm for arm in long if arm.kind == "full")]:
            for other in long:
                if not (arm.tokens and other.tokens) or (arm.kind == "full" and other.kind != "longlora"):
                    continue
                name = {"full": "full length", "longlora": "LongLoRA"}[other.kind]
                if abs(other.tokens / arm.tokens - 1) <= 0.1:
                    found.append(Contrast(6, f"against {name}, equal tokens", arm, other))
                elif other.steps == arm.steps:
                    found.append(Contrast(6, f"against {name}, equal steps", arm, other))
    found += best_contrasts(arms)
    for arm in arms:  # yarn against linear, everything else the same
        if arm.scaling == "yarn" and arm.usual and arm.kind not in ("base", "longlora"):
            same = [a for a in arms if a.scaling == "linear" and _but_scaling(a) == _but_scaling(arm)]
            found += _pairs(5, "YaRN against PI", [arm], same)
    return found


def best_contrasts(arms: Sequence[Arm]) -> list[Contrast]:
    """The best scheme that keeps the text whole against PoSE, tested on other rows than it was chosen on.

    For each fold and scaling it is chosen by the mean score at the target on the smallest base, on the lower half of
    the seeds that PoSE has there; it is tested on the other seeds, and on the other bases.
    """
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
            found += [Contrast(4, claims.BEST, arm, reference, left_out, chosen_on) for arm in same]
    return found


def _pairs(question: int, family: str, firsts: Iterable[Arm], seconds: Sequence[Arm]) -> list[Contrast]:
    return [Contrast(question, family, a, b) for a in firsts for b in seconds if a is not b]


def _but_scaling(arm: Arm) -> tuple:
    return arm.base, arm.fold, arm.kind, arm.prompt, arm.weight, arm.steps, arm.tokens
