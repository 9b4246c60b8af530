"""Rows of a lab run with effects that are known, for the tests of verdicts and figures (never shipped)."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "vt")
SIGMA = {"none": 1.0, "linear": 0.125, "ntk": 1.0, "yarn": 1.46, "llama3": 1.0}
WAVES = {"contiguous": 0.6, "endprompt": 0.45, "anchors": 0.3, "endprompt-random": 0.2, "pose": 0.1}


def packed_rows(path):
    """Rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class Made:
    """An arm with its true mean score at the window, in the middle, and at the target."""

    scheme: str
    scaling: str
    scores: tuple[float, float, float]
    prompt: str = "none"
    weight: float | None = None
    steps: int = 300
    full: bool = False
    longlora: bool = False
    lr: float | None = None
    seconds: float = 4.0
    tokens: float = 1.2288e6
    gap_rms: float | None = None
    loss: float = 3.0
    whole: bool = True
    anchors: int = 4
    tag: str = ""

    @property
    def name(self) -> str:
        first = "full" if self.full else "base" if self.scheme == "base" else self.scheme
        first = "longlora" if self.longlora else first
        prompt = "" if self.prompt == "none" else f"-{self.prompt}"
        steps = "" if self.steps in (300, 0) else f"@steps={self.steps}"
        weight = "" if self.weight is None or self.prompt == "recall" else f"@prompt_weight={self.weight:g}"
        return f"{first}{self.tag}{prompt}+{self.scaling}{steps}{weight}"

    @property
    def method(self) -> str:
        if self.scheme == "base":
            return "base" if self.scaling == "none" else f"untrained+{self.scaling}"
        first = f"anchors{self.anchors}" if self.scheme == "anchors" else self.scheme
        first = "longlora" if self.longlora else f"full{self.tag}" if self.full else first
        return "+".join(part for part in (first, "" if self.prompt == "none" else self.prompt, self.scaling) if part)


def digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def made_rows(arms, base=256, fold=8, seeds=range(5), noise=2.0, shared=3.0, samples=0):
    """(rows, lines of scores.jsonl). Every arm of a seed is moved by one draw (`shared`, its samples), and by its own.

    The draws of the seeds are standardised, so that means and standard deviations over the seeds are exactly as asked:
    `noise` is the standard deviation of an arm about its true mean, and what two arms share cancels in a difference.
    """
    seeds, window = list(seeds), base
    target = base * fold
    middle = target // 2 if fold == 8 else 2048 * base // 256
    rng = np.random.default_rng([base, fold, len(seeds)])
    common = _standard(rng, len(seeds)) * shared
    rows, singles = [], []
    for arm in arms:
        own = _standard(rng, len(seeds)) * noise
        spread = 0 if len(seeds) < 2 else 1
        for index, seed in enumerate(seeds):
            for length, true in zip((window, middle, target), arm.scores):
                if arm.scheme == "base" and length == middle:
                    continue
                moved = min(100.0, max(0.0, true + spread * (own[index] + common[index]) * (0 < true < 100)))
                for task in TASKS:
                    rows.append(_row(arm, base, fold, window, target, task, length, seed, round(moved, 6)))
                    if samples:
                        right = round(moved / 100 * samples)
                        scores = [100.0] * right + [0.0] * (samples - right)
                        place = {"base": str(base), "fold": fold, "arm": arm.name, "method": arm.method}
                        singles.append(place | {"seed": seed, "task": task, "length": length, "scores": scores})
            for length, value in ((window, arm.loss), (target, arm.loss + 1)):
                loss = _row(arm, base, fold, window, target, "loss", length, seed, value + 0.001 * index)
                rows.append({**loss, "suite": "lab", "metric": "loss", "ci95": None, "samples_sha256": None})
    return rows, singles


def _standard(rng, n):
    if n < 2:
        return np.zeros(n)
    draws = rng.normal(size=n)
    return (draws - draws.mean()) / draws.std(ddof=1)


def _row(arm, base, fold, window, target, task, length, seed, value):
    row = {
        "schema": 1,
        "suite": "ruler",
        "task": task,
        "length": length,
        "metric": "string_match_all",
        "value": value,
        "stderr": 2.0,
        "ci95": [max(0.0, value - 6), min(100.0, value + 6)] if 0 <= value <= 100 else None,
        "n": 64,
        "n_truncated": 0,
        "model": f"base/{base}",
        "method": arm.method,
        "seed": seed,
        "samples_sha256": digest(base, task, length, seed),
        "base": str(base),
        "fold": fold,
        "window": window,
        "target": target,
        "arm": arm.name,
        "scheme": arm.scheme if arm.scheme != "base" else None,
        "scaling": arm.scaling,
        "steps": arm.steps,
        "questions": [1],
    }
    if arm.scheme == "base":
        return {**row, "steps": 0}
    gap_rms = arm.gap_rms if arm.gap_rms is not None else WAVES.get(arm.scheme, 0.05)
    return {
        **row,
        "prompt": None if arm.prompt == "none" else arm.prompt,
        "prompt_weight": arm.weight,
        "anchors": arm.anchors if arm.scheme == "anchors" else None,
        "train_tokens": arm.tokens,
        "gpu_seconds": arm.seconds + 0.01 * seed,
        "text_whole": arm.whole,
        "bernstein_constant": SIGMA[arm.scaling],
        "gap_rms": gap_rms,
        "attention": "shifted" if arm.longlora else "sdpa",
        "lr": arm.lr,
    }


BASE = Made("base", "none", (99.0, 0.0, 0.0), steps=0)


def matrix(fold=8):
    """The arms of the lab's plan, with scores as the prototypes had them: every kind of row that figures must draw."""
    far = fold > 8
    arms = [BASE, Made("base", "linear", (0.0, 0.0, 0.0), steps=0), Made("base", "yarn", (60.0, 30.0, 11.0), steps=0)]

    def add(scheme, scaling, scores, **extra):
        arms.append(Made(scheme, scaling, scores, **extra))

    places = ("endprompt", "endprompt-random", "anchors", "endprompt-pose")
    if far:
        add("contiguous", "linear", (95.0, 1.0, 0.0))
        add("contiguous", "yarn", (99.0, 40.0, 5.5))
        for scaling, top in (("linear", 46.0), ("yarn", 80.0)):
            add("pose", scaling, (95.0, top + 8, top), whole=False, seconds=4.3)
            add("endprompt", scaling, (96.0, 50.0, 12.5 if scaling == "yarn" else 0.0), prompt="EP_1")
            add("endprompt", scaling, (96.0, 55.0, 39.5 if scaling == "yarn" else 0.0), prompt="recall", weight=1.0)
        for place, score in zip(places[1:], (75.0, 60.0, 88.0)):
            add(place, "yarn", (98.0, score + 6, score), prompt="recall", weight=1.0, whole=place != "endprompt-pose")
        add("recall-chain", "yarn", (98.0, 90.0, 81.0), prompt="recall", weight=1.0)
        add("contiguous", "yarn", (90.0, 88.0, 85.0), full=True, seconds=30.0)
        return arms
    for scaling, lift in (("linear", 0.0), ("yarn", 20.0)):
        add("contiguous", scaling, (95.0, 80 + lift / 2, 38 + lift))
        add("pose", scaling, (96.0, 93.0, 86 + lift / 2), whole=False, seconds=4.3)
        add("endprompt", scaling, (95.5, 82 + lift / 2, 44 + lift), prompt="EP_1")
        add("endprompt", scaling, (96.0, 90.0, 75 + lift), prompt="recall", weight=1.0)
        add("contiguous", scaling, (92.0, 92.0, 90.0), full=True, seconds=14.0)
        lora = {"longlora": True, "tag": "-2048", "seconds": 16.0, "lr": 2e-3}
        add("contiguous", scaling, (80.0, 60.0, 1.0 if scaling == "linear" else 78.0), **lora)
        for place, score in zip(places[1:], (70.0, 65.0, 89.0)):
            for prompt, more in (("EP_1", -10.0), ("recall", 3.0)):
                weight = 1.0 if prompt == "recall" else None
                whole = place != "endprompt-pose"
                add(place, scaling, (96.0, 90.0, score + lift / 3 + more), prompt=prompt, weight=weight, whole=whole)
    add("contiguous", "yarn", (93.0, 94.0, 95.0), full=True, seconds=60.0, tokens=9.8304e6, tag="-long")
    for prompt, score in (("EP_2", 43.0), ("EP_3", 41.0)):
        add("endprompt", "linear", (95.0, 81.0, score), prompt=prompt)
    for weight, score in ((0.0, 36.0), (1.0, 48.0)):
        add("endprompt", "linear", (95.0, 81.0, score), prompt="EP_1", weight=weight)
    for steps, fixed, control, recall in ((100, 40.0, 30.0, 80.0), (1000, 3.0, 36.0, 96.0)):
        tokens, seconds = steps * 4096.0, steps / 75
        cost = {"steps": steps, "tokens": tokens, "seconds": seconds}
        add("endprompt", "linear", (98.0, 60.0, fixed), prompt="EP_1", **cost)
        add("contiguous", "linear", (97.0, 80.0, control), **cost)
        add("endprompt", "yarn", (99.0, 95.0, recall), prompt="recall", weight=1.0, **cost)
    for scaling, top in (("none", 0.0), ("ntk", 2.0), ("llama3", 55.0)):
        add("contiguous", scaling, (98.0, 20.0, top))
        add("pose", scaling, (98.0, 90.0, top + 30), whole=False, seconds=4.3)
        add("endprompt", scaling, (98.0, 21.0, top + 2), prompt="EP_1")
        add("endprompt", scaling, (98.0, 50.0, top + 12), prompt="recall", weight=1.0)
    return arms


def lab_run(path, samples=0, bases=((256, 8), (256, 32), (512, 8)), seeds=range(5)) -> Path:
    """A run directory with the whole plan."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    made = [made_rows(matrix(fold), base, fold, seeds=seeds, samples=samples) for base, fold in bases]
    write_lines(path / "results.jsonl", [row for rows, _ in made for row in rows])
    if samples:
        write_lines(path / "scores.jsonl", [line for _, lines in made for line in lines])
    return path


def write_lines(path: Path, lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
