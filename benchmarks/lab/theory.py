"""The theory held to the scores: do measures of a scaling and a scheme, taken before training, say which arm works?

    python -m benchmarks.lab.theory --lab ROWS --study ROWS --later ROWS --study-model CHECKPOINT --controls ROWS ... \
        --heads ROWS ... --study-factor ROWS ... --output FILE

Each arm of a lab's rows has the measures of `analysis.predict` on its base, and its score: the mean over tasks and
training seeds at the target. What is chosen (a measure's sign, the best pair, a calibration) is chosen on the settings
CHOSEN alone; the lab's other settings and the study's arms are what it is tested on. All measures are reported.

- Rank correlation (Spearman) inside a setting (base and target), averaged by its arms, with a 95% interval over drawn
  arms.
- p: permutation test, one-sided in the direction of the chosen half, the larger of two: arms change places inside a
  setting; whole scalings do, an arm taking the measure of the same scheme under the other scaling if there is one. Arms
  of one scaling are much alike, so few exchanges are left: 36 on the other half, 24 on the study.
- error: mean distance in points from a prediction, isotonic in one measure, a straight line in two. ceiling: what a
  measure of the scaling alone could reach, the mean score of each scaling's own arms.
- Two candidates go to the test, the best single measure and the best pair of the chosen half. One holds if its
  correlation has the same sign on all three sets, each interval free of 0, and p < 0.05 on the other half. What only
  stands beside it, without a claim: all other measures; `later`, the study's arms trained five times as long; and
  `controls`, arms of that preset (one scaling's frequencies, another's attention factor).

Of preset `controls` two more things are said, by rules that were written before its rows:

- `predict-again`: the same test whole, with the preset's arms (seeds 20 and up) in place of the lab's own. Signs and
  pair are chosen anew on its chosen half; there are seven scalings or more in a setting, so an exchange says something.
- `predict-tuned`: YaRN's frequencies with a factor that `analysis.predict.even_factor` found, one for all heads
  (`even`) or one each (`heads`), against YaRN. Trained arms alone (contiguous, recall, PoSE), seeds 20 to 24, on the
  lab's four settings; recall, seeds 3 to 5, on SmolLM2. The score is the mean over tasks and the lengths above the
  window; arms of both below 5 percent count for nothing. The mean over the arms, seed by seed, is judged as the lab
  judges any (`estimates.decide`: 5 points, interval, p; Holm over the two). A scaling gets a name only if it helps on
  both and hurts nowhere. Of its own seeds and samples none took part in choosing it; no score did. Added when a run
  was cut off: an arm that lacks seeds that others have does not count.

Left out: shifted sparse attention, which no measure is about, and arms whose pairs `pair_counts` does not know.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from analysis import observability, predict
from analysis.config import PredictConfig
from benchmarks.lab import estimates
from benchmarks.lab.arms import Arm, arms_of, is_short
from benchmarks.lab.contrasts import less
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


def by_setting(cases: Sequence[Case]) -> list[list[int]]:
    settings = sorted({case.setting for case in cases})
    return [[i for i, case in enumerate(cases) if case.setting == setting] for setting in settings]


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
            about: dict[str, Any] = {"half": name, "p": p_value(x, members, line.sign)}
            about |= {"candidate": line in candidates, "error": float(np.abs(line(members) - scores).mean())}
            about |= {"error_of_mean": float(np.abs(line.mean - scores).mean()), "inside_scaling": scheme and [*scheme]}
            about |= {"points": line.points if len(line.names) == 2 else None}
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


def of_heads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the bases of `benchmarks.lab.heads` under the names of the bases that they were made of."""
    names = {"scaling": "yarn@heads"}
    return [
        r | names | {"base": Path(r["base"]).name.partition("-")[0], "arm": r["arm"].replace("yarn@1", "yarn@heads")}
        for r in rows
    ]


def tuned(rows: Sequence[dict[str, Any]], half: str) -> list[dict[str, Any]]:
    """The decision on each tuned scaling: its trained arms less YaRN's, seed by seed; `parts` are the single ones."""
    arms = {(arm.base, arm.target, arm.kind, tuning(arm.scaling)): arm for arm in arms_of(rows) if is_short(arm)}
    found = []
    for name in ("even", "heads"):
        parts: list[dict[str, Any]] = []
        for (*of, what), arm in arms.items():
            yarn = arms.get((arm.base, arm.target, arm.kind, "yarn"))
            if what == name and yarn is not None:
                both = [above_window(arm), above_window(yarn)]
                means = [float(np.mean([*scores.values()])) for scores in both]
                parts.append({"of": of, "arms": [arm.name, yarn.name], "scores": means, "per_seed": less(*both)})
        most = max((len(part["per_seed"]) for part in parts), default=0)
        whole = [part for part in parts if len(part["per_seed"]) == most]
        live = [part["per_seed"] for part in whole if max(part["scores"]) >= estimates.FLOOR]
        seeds = sorted(set.intersection(*map(set, live))) if live else []
        judged([(part, estimates.over_seeds([*part["per_seed"].values()])) for part in parts])
        if seeds:
            value = estimates.over_seeds([float(np.mean([part[seed] for part in live])) for seed in seeds])
            found.append((row("predict-tuned", "score_difference", 0.0, name, half=half, parts=parts), value))
    judged(found)
    return [r for r, _ in found]


def tuning(scaling: str) -> str:
    name, _, factor = scaling.partition("@")
    return "even" if name == "yarn" and factor not in ("", "1", "heads") else factor if factor == "heads" else scaling


def above_window(arm: Arm) -> dict[int, float]:
    longer = [scores for length, scores in arm.scores.items() if length > arm.window]
    seeds = set.intersection(*map(set, longer))
    return {seed: float(np.mean([scores[seed] for scores in longer])) for seed in sorted(seeds)}


def judged(found: Sequence[tuple[dict[str, Any], estimates.Estimate]]) -> None:
    """Adds to each its estimate and, corrected by Holm over all of them, p and the verdict."""
    p_values = estimates.holm([1.0 if one.p is None else one.p for _, one in found])
    for (about, one), p in zip(found, p_values):
        about |= {"value": one.value, "ci95": (one.lo, one.hi), "n": one.n, "p": one.p, "p_holm": p}
        about |= {"verdict": estimates.decide(one, None if one.p is None else p)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--lab", "--study", "--later", "--study-model"):
        parser.add_argument(flag, required=True)
    for flag in ("--controls", "--heads", "--study-factor"):
        parser.add_argument(flag, nargs="*", default=[])
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args(argv)
    bases = {base: str(BASES / base) for base in ("256", "512")}
    cases = cases_of(read_rows(given.lab), bases)
    for half, rows in (("study", read_rows(given.study)), (LATER, read_rows(given.later))):
        cases += cases_of(rows, {str(r["base"]): given.study_model for r in rows}, half)
    controls, heads, factor = (
        [r for path in paths for r in read_rows(path)] for paths in (given.controls, given.heads, given.study_factor)
    )
    again = cases_of(controls, bases)
    both = [*again, *(case for case in cases if case.half == "study")]
    cases += [dataclasses.replace(case, half=CONTROLS) for case in again]
    tests, pair = tested(cases)
    if again:
        tests += [r | {"task": "predict-again"} for r in tested(both)[0]]
        tests += [*tuned([*controls, *of_heads(heads)], "lab"), *tuned(factor, "study")]
    about = {"text": "analysis/sample.txt", "tokens": TOKENS, "device": "cpu", "revision": git_revision()}
    write_rows(given.output, [one | about for one in (*rows_of(cases, pair), *tests)])
    for r in tests:
        said = r.get("verdict", r.get("holds"))
        print(
            r["task"], r["method"], r["half"], r["n"], f"{r['value']:+.2f}", r["ci95"], f"p {r.get('p') or 0:.3f}", said
        )


if __name__ == "__main__":
    main()
