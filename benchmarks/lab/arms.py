"""The lab's arms as its rows have them: settings, and scores by length and seed."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paper_figures.names import CUE_WEIGHT, PIECES, SPAN

Row = dict[str, Any]
Key = tuple[str, int, str]  # base, fold and name of an arm


@dataclass(frozen=True)
class Arm:
    """One way to extend one base by one factor, with its scores by length and training seed (percent). kind: the
    scheme, except `full` (contiguous rows of the target's length), `longlora` (the same with shifted attention) and
    `base` (untrained). weight: loss weight of the end prompt. rate: the learning rate, where the rows say it. losses:
    nats per token on held-out text. samples: the scores of single samples, by (length, seed) and task, where the run
    kept them."""

    name: str
    base: str
    fold: int
    window: int
    target: int
    kind: str
    scaling: str
    prompt: str
    weight: float | None
    steps: int
    tokens: float | None
    seconds: float | None
    bernstein: float | None
    gap_rms: float | None
    whole: bool | None
    usual: bool = True
    rate: float | None = None
    scores: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    losses: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    samples: Mapping[tuple[int, int], Mapping[str, np.ndarray]] = field(default_factory=dict)

    @property
    def setting(self) -> tuple[str, int, str]:
        return self.base, self.fold, self.scaling

    @property
    def label(self) -> str:
        """Without the scaling, which stands in a column of its own."""
        if self.kind == "base":
            return "base" if self.scaling == "none" else "untrained"
        first = {"contiguous": "contiguous, short", "full": "full length", "longlora": "LongLoRA"}
        parts = [" ".join(part for part in (first.get(self.kind, self.kind), self.prompt) if part)]
        if self.weight not in (None, CUE_WEIGHT if self.prompt.startswith(("EP_", "text:")) else 1.0):
            parts.append(f"weight {self.weight:g}")
        if not self.usual:
            parts.append(f"{self.steps} steps")
        if self.kind == "longlora" and self.rate:  # tuned apart from the other arms
            parts.append(f"rate {self.rate:g}")
        if self.kind in ("full", "longlora") and self.tokens:
            parts.append(f"{self.tokens / 1e6:.1f}M tokens")
        return ", ".join(parts)

    def mean(self, length: int) -> float:
        return float(np.mean(list(self.scores[length].values())))


def arms_of(rows: Sequence[Row], samples: Iterable[Row] = (), suite: str = "ruler") -> list[Arm]:
    """The arms of a lab's rows, in their order, with the scores of one suite. Raises ValueError naming the first row
    that cannot be compared."""
    scores = [row for row in rows if row["suite"] == suite]
    for row, column in itertools.product(scores, ("arm", "base", "window")):
        if row.get(column) is None:
            raise ValueError(f"a lab's row must have the column {column!r}: {_name(row)}")
    check_samples(scores)
    members: dict[Key, list[Row]] = defaultdict(list)
    tasks: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row in scores:
        members[_key(row)].append(row)
        tasks[str(row["base"]), row["length"]].add(row["task"])
    losses: dict[Key, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["suite"] == "lab" and row["task"] == "loss":
            losses[_key(row)][row["length"]][row["seed"]] = row["value"]
    single: dict[Key, dict[tuple[int, int], dict[str, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for row in (row for row in samples if row.get("suite", "ruler") == suite):  # older lines do not say it
        single[_key(row)][row["length"], row["seed"]][row["task"]] = np.asarray(row["scores"], dtype=np.float64)
    steps: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for key, own in members.items():
        if own[0].get("steps"):
            steps[key[:2]][int(own[0]["steps"])] += 1
    usual = {setting: counts.most_common(1)[0][0] for setting, counts in steps.items()}
    arms = []
    for key, own in members.items():
        beside: dict[str, Any] = {"losses": losses.get(key, {}), "samples": single.get(key, {})}
        arms.append(Arm(**_about(key, own, usual.get(key[:2])), scores=_complete(own, tasks), **beside))
    return arms


def _complete(own: Sequence[Row], tasks: Mapping[tuple[str, int], set[str]]) -> dict[int, dict[int, float]]:
    cells: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for row in own:
        cells[row["length"], row["seed"]][row["task"]] = row["value"]
    found: dict[int, dict[int, float]] = {}
    for (length, seed), by_task in sorted(cells.items()):
        if by_task.keys() == tasks[str(own[0]["base"]), length]:
            found.setdefault(length, {})[seed] = float(np.mean([*by_task.values()]))
    return found


def check_samples(rows: Sequence[Row]) -> None:
    """Arms may only be compared on the same samples. Raises ValueError naming two rows that differ in theirs."""
    seen: dict[tuple, Row] = {}
    for row in rows:
        other = seen.setdefault((str(row["base"]), row["task"], row["length"], row["seed"]), row)
        if row["samples_sha256"] != other["samples_sha256"]:
            raise ValueError(
                f"rows of one base, task, length and seed must have the same samples_sha256: {_name(row)} differs from "
                f"{_name(other)}"
            )


def _name(row: Row) -> str:
    return ", ".join(f"{key}={row.get(key)!r}" for key in ("base", "arm", "method", "task", "length", "seed"))


def _key(row: Row) -> Key:
    """(base, fold, arm); an untrained base is the same whatever it would have been extended to: fold 1."""
    return str(row["base"]), 1 if row.get("method") == "base" else int(row["fold"]), str(row["arm"])


def _about(key: Key, own: Sequence[Row], usual: int | None) -> dict[str, Any]:
    row = own[0]
    steps, scheme = int(row.get("steps") or 0), row.get("scheme") or "base"
    prompt = row.get("prompt") or ""
    prompt = "" if prompt == "none" else "/".join(prompt) if isinstance(prompt, list) else str(prompt)
    target = int(row.get("target") or row["window"])
    kind = scheme
    if not steps:
        kind = "base"
    elif row.get("attention") == "shifted" or key[2].startswith("longlora"):
        kind = "longlora"
    elif scheme == "contiguous" and (row.get("row_tokens") == target or key[2].startswith("full")):
        kind = "full"
    elif scheme == "anchors":
        kind = f"anchors{row.get('anchors') or ''}"
    elif "sentences" in scheme and row.get("pieces") not in (None, PIECES):
        kind = f"{scheme}-{row['pieces']}"
    weight = row.get("prompt_weight")
    if prompt and weight is None:
        weight = 1.0 if prompt == "recall" else CUE_WEIGHT
    if prompt in ("recall", "question") and row.get("recall_span") not in (None, SPAN):
        prompt += f"-{row['recall_span']}"
    rates = [one["lr"] for one in own if one.get("lr") is not None]  # older rows do not say it
    spent = [one["gpu_seconds"] for one in own if one.get("gpu_seconds") is not None]
    columns = {"tokens": "train_tokens", "bernstein": "bernstein_constant", "gap_rms": "gap_rms", "whole": "text_whole"}
    return {
        **dict(zip(("base", "fold", "name"), key)),
        **{"kind": kind, "scaling": row.get("scaling") or "none", "window": int(row["window"]), "target": target},
        **{"prompt": prompt, "weight": weight if prompt else None, "steps": steps, "usual": steps == usual},
        **{name: row.get(column) for name, column in columns.items()},
        # The seeds share one cost: the median, since the first cell of a worker may compile.
        "seconds": float(np.median(spent)) if spent else None,
        "rate": rates[-1] if rates else None,
    }


def is_published(arm: Arm) -> bool:
    """The paper's method: a fixed end prompt at the far end."""
    return arm.kind == "endprompt" and arm.prompt == "EP_1" and arm.weight == CUE_WEIGHT


def is_recall(arm: Arm) -> bool:
    return arm.kind == "endprompt" and arm.prompt == "recall"


def is_main(arm: Arm) -> bool:
    """Not one of the other wordings and weights, which question 3 alone is about."""
    return not arm.prompt.startswith("EP_") or (arm.prompt == "EP_1" and arm.weight == CUE_WEIGHT)


def is_short(arm: Arm) -> bool:
    return arm.kind not in ("full", "longlora", "base")


def with_most_seeds(members: Sequence[Arm]) -> list[Arm]:
    """Those that have as many seeds at the target as most of them: what is taken over all arms needs common seeds."""
    counts = Counter(len(arm.scores[arm.target]) for arm in members)
    usual = max(counts, key=lambda count: (counts[count], count))
    return [arm for arm in members if len(arm.scores[arm.target]) >= usual]
