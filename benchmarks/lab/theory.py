"""The theory held to the scores: do measures of a scaling and a scheme, taken before training, say which arm works?

    python -m benchmarks.lab.theory --lab ROWS --study ROWS --later ROWS --study-model CHECKPOINT --controls ROWS ... \
        --output FILE

Each arm of a lab's rows has the measures of `analysis.predict` on its base, and its score: the mean over tasks and
training seeds at the target. What is chosen (a measure's sign, the best pair, a calibration) is chosen on the settings
CHOSEN alone; the lab's other settings and the study's arms are what it is tested on. All measures are reported.

- Rank correlation (Spearman; Kendall's tau beside it) inside a setting (base and target), averaged by its arms, with a
  95% interval over drawn arms.
- p: permutation test, one-sided in the direction of the chosen half, the larger of two: arms change places inside a
  setting; whole scalings do, an arm taking the measure of the same scheme under the other scaling if there is one. Arms
  of one scaling are much alike, so few exchanges are left: 36 on the other half, 24 on the study.
- error: mean distance in points from a prediction, isotonic in one measure, a straight line in two. ceiling: what a
  measure of the scaling alone could reach, the mean score of each scaling's own arms.
- Two candidates go to the test, the best single measure and the best pair of the chosen half. One holds if its
  correlation has the same sign on all three sets, each interval free of 0, and p < 0.05 on the other half. What only
  stands beside it, without a claim: all other measures; `later`, the study's arms trained five times as long; and
  `controls`, arms of that preset (one scaling's frequencies, another's attention factor) beside the lab's own.

Left out: shifted sparse attention, which no measure is about, and arms whose pairs `pair_counts` does not know.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from analysis import observability, predict
from analysis.config import PredictConfig
from benchmarks.lab import estimates
from benchmarks.lab.arms import Arm, arms_of
from benchmarks.lab.matrix import BASES
from endprompt.results import read_rows, result_row, write_rows
from endprompt.runs import git_revision

#: (base, fold) of the half that everything is chosen on; the lab's others are the other half.
CHOSEN = (("256", 8), ("512", 32))
PERMUTATIONS = 4000
TOKENS = 1024  # tokens of the text, or the window if that is shorter
SETS = ("chosen", "other", "study")  # what decides
LATER, CONTROLS = "later", "controls"  # what only stands beside it


@dataclass(frozen=True)
class Case:
    """One arm at its target. scheme: of its rows, None if it was not trained. values: of every measure."""

    arm: Arm
    target: int
    scheme: str | None
    score: float
    values: dict[str, float]
    half: str

    @property
    def setting(self) -> tuple[str, int]:
        return self.arm.base, self.target


def half_of(arm: Arm, target: int) -> str:
    return "chosen" if (arm.base, target // arm.window) in CHOSEN else "other"


@functools.cache
def reading_of(checkpoint: str, target: int, scalings: tuple[str, ...]) -> predict.Reading:
    return predict.read(PredictConfig(checkpoint, target, tokens=TOKENS), scalings)


def cases_of(rows: Sequence[dict[str, Any]], checkpoints: dict[str, str], half: str | None = None) -> list[Case]:
    """The arms that can be measured. checkpoints: base -> directory. half: of all of them, where not by `half_of`."""
    layouts = {(str(r["base"]), r["arm"], r["target"]): r for r in rows if r["suite"] == "ruler"}
    found, arms = [], arms_of(rows)
    for base, target in sorted({(arm.base, arm.target) for arm in arms if not is_bare(arm)}):
        mine = [arm for arm in arms if arm.base == base and target in arm.scores and known(arm)]
        mine = [arm for arm in mine if arm.target == target or is_bare(arm)]
        scalings = tuple(sorted({arm.scaling for arm in mine}))
        reading = reading_of(checkpoints[base], target, scalings)
        fixed = {name: reading.of_scaling(name) for name in scalings}
        by_layout: dict[Any, dict[str, float]] = {}
        for arm in mine:
            row = layouts[base, arm.name, target] if arm.kind != "base" else {}
            scheme, size, prompt = row.get("scheme"), row.get("row_tokens", 0), row.get("prompt_tokens", 0)
            anchors = row.get("anchors") or 4
            key = (arm.scaling, scheme, size, prompt, anchors)
            if key not in by_layout:
                counts = scheme and observability.pair_counts(scheme, size - prompt, prompt, target, count=anchors)
                by_layout[key] = reading.of_scheme(arm.scaling, counts, size)
            values = fixed[arm.scaling] | by_layout[key]
            found.append(Case(arm, target, scheme, arm.mean(target), values, half or half_of(arm, target)))
    return found


def is_bare(arm: Arm) -> bool:
    return (arm.kind, arm.scaling) == ("base", "none")


def known(arm: Arm) -> bool:
    scheme = arm.kind.rstrip("0123456789") if arm.kind.startswith("anchors") else arm.kind
    return scheme in (*observability.SCHEMES, "base", "full")


def correlation(x: np.ndarray, cases: Sequence[Case], inside_scaling: bool = False) -> estimates.Correlation | None:
    """Spearman's of x with the score inside each setting, or each setting and scaling."""
    groups = [(*case.setting, case.arm.scaling if inside_scaling else "") for case in cases]
    return estimates.rank_correlation(x.tolist(), np.array([[case.score] for case in cases]), groups)


def part(x: np.ndarray, cases: Sequence[Case]) -> list[float] | None:
    chosen = [i for i, case in enumerate(cases) if case.scheme]
    found = correlation(x[np.array(chosen, dtype=int)], [cases[i] for i in chosen])
    return found and [*found]


def by_setting(cases: Sequence[Case]) -> list[list[int]]:
    settings = sorted({case.setting for case in cases})
    return [[i for i, case in enumerate(cases) if case.setting == setting] for setting in settings]


def kendall(x: np.ndarray, cases: Sequence[Case]) -> float:
    found = []
    for members in by_setting(cases):
        tau = stats.kendalltau(x[members], [cases[i].score for i in members]).statistic
        if len(members) >= 3 and not np.isnan(tau):
            found.append((float(tau), len(members)))
    return sum(tau * n for tau, n in found) / max(sum(n for _, n in found), 1)


def p_value(x: np.ndarray, cases: Sequence[Case], sign: float, seed: int = 0) -> float:
    """One-sided permutation test of the correlation, the larger p of two exchanges: of arms, of whole scalings."""
    rng = np.random.default_rng([seed, len(cases)])
    scores = np.array([case.score for case in cases])
    total, value = np.zeros((2, PERMUTATIONS)), 0.0
    for members in by_setting(cases):
        own, y = x[members], scores[members]
        if len(members) < 3 or np.ptp(own) == 0 or np.ptp(y) == 0:
            continue
        arms = rng.permuted(np.tile(own, (PERMUTATIONS, 1)), axis=1)
        drawn = (arms, exchanged(own, [cases[i] for i in members], rng))
        for place, values in enumerate(drawn):
            total[place] += len(members) * np.nan_to_num(estimates.spearman(values, np.tile(y, (PERMUTATIONS, 1))))
        value += len(members) * float(estimates.spearman(own[None], y[None])[0])
    reached = (sign * total >= sign * value - 1e-9).sum(axis=1)
    return float((1 + reached.max()) / (1 + PERMUTATIONS))


def exchanged(x: np.ndarray, cases: Sequence[Case], rng: np.random.Generator) -> np.ndarray:
    """x of one setting with its scalings exchanged at random, [PERMUTATIONS, arms]."""
    names = sorted({case.arm.scaling for case in cases})
    takes = np.empty((len(names), len(cases)))  # [scaling, arm]: what an arm takes from it
    for i, name in enumerate(names):
        there = [j for j, case in enumerate(cases) if case.arm.scaling == name]
        for k, case in enumerate(cases):
            same = [j for j in there if cases[j].scheme == case.scheme]
            takes[i, k] = x[rng.choice(same or there)] if case.arm.scaling != name else x[k]
    own = np.array([names.index(case.arm.scaling) for case in cases])
    place = rng.permuted(np.tile(np.arange(len(names)), (PERMUTATIONS, 1)), axis=1)[:, own]
    return takes[place, np.arange(len(cases))]


class Line:
    """A prediction of the score fitted on the chosen half: isotonic in one measure, a straight line in two."""

    def __init__(self, names: Sequence[str], cases: Sequence[Case]):
        self.names = tuple(names)
        x, y = self.of(cases), np.array([case.score for case in cases])
        self.mean = float(y.mean())
        if len(names) == 1:
            found = correlation(x[:, 0], cases)
            self.sign = 1.0 if found is None or found.value >= 0 else -1.0
            order = np.argsort(self.sign * x[:, 0], kind="stable")
            at, first = np.unique(self.sign * x[order, 0], return_index=True)
            means = np.array([part.mean() for part in np.split(y[order], first[1:])])
            weights = np.diff([*first, len(y)])
            self.at, self.value = at, optimize.isotonic_regression(means, weights=weights).x
        else:
            self.centre, self.scale = x.mean(0), np.maximum(x.std(0), 1e-12)
            design = np.column_stack([(x - self.centre) / self.scale, np.ones(len(x))])
            self.slope = np.linalg.lstsq(design, y, rcond=None)[0]
            self.sign = 1.0

    @property
    def points(self) -> dict[str, float]:
        """Points of score a unit of each of two measures."""
        return dict(zip(self.names, map(float, self.slope[:-1] / self.scale)))

    def of(self, cases: Sequence[Case]) -> np.ndarray:
        return np.array([[case.values[name] for name in self.names] for case in cases])

    def __call__(self, cases: Sequence[Case]) -> np.ndarray:
        x = self.of(cases)
        if len(self.names) == 1:
            return np.interp(self.sign * x[:, 0], self.at, self.value)
        return np.clip((x - self.centre) / self.scale @ self.slope[:-1] + self.slope[-1], 0, 100)

    def ranking(self, cases: Sequence[Case]) -> np.ndarray:
        """What ranks the arms: the measure itself, or the line before it is cut at 0 and 100."""
        x = self.of(cases)
        return x[:, 0] if len(self.names) == 1 else x @ (self.slope[:-1] / self.scale)


def tested(cases: Sequence[Case]) -> tuple[list[dict[str, Any]], Line]:
    """(rows of the test: every measure, and the pair that is best on the chosen half, on each of SETS; that pair)."""
    sets = {name: [case for case in cases if case.half == name] for name in (*SETS, LATER, CONTROLS)}
    sets = {name: members for name, members in sets.items() if members}
    singles = [Line([name], sets["chosen"]) for name in predict.MEASURES]
    pairs = [Line(names, sets["chosen"]) for names in itertools.combinations(predict.MEASURES, 2)]

    def chosen_value(line: Line) -> float:
        found = correlation(line.ranking(sets["chosen"]), sets["chosen"])
        return -1.0 if found is None else line.sign * found.value

    candidates = [max(lines, key=chosen_value) for lines in (singles, pairs)]
    rows = []
    for line in (*singles, candidates[1]):
        mine = []
        for name, members in sets.items():
            x = line.ranking(members)
            found, scheme = correlation(x, members), correlation(x, members, inside_scaling=True)
            scores = np.array([case.score for case in members])
            about: dict[str, Any] = {"half": name, "kendall": kendall(x, members), "p": p_value(x, members, line.sign)}
            about |= {"candidate": line in candidates, "error": float(np.abs(line(members) - scores).mean())}
            about |= {"error_of_mean": float(np.abs(line.mean - scores).mean()), "inside_scaling": scheme and [*scheme]}
            about |= {"trained": part(x, members), "points": line.points if len(line.names) == 2 else None}
            value, ci95 = (0.0, None) if found is None else (found.value, (found.lo, found.hi))
            about |= {"ci95": ci95, "n": len(members)}
            mine.append(row("predict-test", "rank_correlation", value, " + ".join(line.names), **about))
        free = [r["ci95"] and r["ci95"][0] * r["ci95"][1] > 0 and r["value"] * line.sign > 0 for r in mine]
        one_sign = all(free[: len(SETS)])
        holds = line in candidates and one_sign and mine[1]["p"] < estimates.LEVEL
        rows += [r | {"one_sign": bool(one_sign), "holds": bool(holds)} for r in mine]
    for name, members in sets.items():
        alike = pd.DataFrame([(*c.setting, c.arm.scaling, c.score) for c in members]).groupby([0, 1, 2])[3]
        top = correlation(alike.transform("mean").to_numpy(), members)
        assert top is not None
        about = {"half": name, "n": len(members), "ci95": (top.lo, top.hi)}
        rows.append(row("predict-test", "ceiling", top.value, "mean score of the scaling", **about))
    return rows, candidates[1]


def row(task: str, metric: str, value: float, method: str, model: str = "lab", **extra: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"task": task, "metric": metric, "model": model, "method": method}
    return result_row(suite="analysis", value=value, seed=None, **about, **extra)


def rows_of(cases: Sequence[Case], pair: Line) -> list[dict[str, Any]]:
    """A row for each arm and measure, and for the best pair (`best_pair`, in points), with the arm's score."""
    found = []
    for case, order in zip(cases, pair.ranking(cases)):
        arm, values = case.arm, case.values | {"best_pair": float(order)}
        about: dict[str, Any] = {"length": case.target, "base": arm.base, "window": arm.window, "target": case.target}
        about |= {"arm": arm.name, "label": arm.label, "scaling": arm.scaling, "scheme": case.scheme}
        about |= {"score": case.score, "seeds": len(arm.scores[case.target]), "half": case.half}
        found += [row("predict", key, value, arm.name, f"base {arm.base}", **about) for key, value in values.items()]
    return found


def beside(rows: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        return str(r["base"]), r["target"], r["seed"], r["arm"].partition("+")[0]

    wanted = set(map(place, controls))
    return [r for r in rows if "@" not in r["arm"] and place(r) in wanted]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--lab", "--study", "--later", "--study-model"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--controls", nargs="*", default=[])
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args(argv)
    bases = {base: str(BASES / base) for base in ("256", "512")}
    cases = cases_of(read_rows(given.lab), bases)
    for half, rows in (("study", read_rows(given.study)), (LATER, read_rows(given.later))):
        cases += cases_of(rows, {str(r["base"]): given.study_model for r in rows}, half)
    if controls := [r for path in given.controls for r in read_rows(path)]:
        cases += cases_of([*beside(read_rows(given.lab), controls), *controls], bases, CONTROLS)
    tests, pair = tested(cases)
    about = {"text": "analysis/sample.txt", "tokens": TOKENS, "device": "cpu", "revision": git_revision()}
    write_rows(given.output, [one | about for one in (*rows_of(cases, pair), *tests)])
    for r in tests:
        print(r["method"], r["half"], r["n"], f"{r['value']:+.2f}", r["ci95"], f"p {r.get('p', 0):.3f}", r.get("holds"))


if __name__ == "__main__":
    main()
