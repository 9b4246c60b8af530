"""From the rows of a lab run to answers: estimates for each of the seven questions, and what they say.

Of `results.jsonl`, and of `scores.jsonl` (every sample's score), which adds a second interval; `write` puts the
estimates into `questions.jsonl`. The unit is the training seed: a score is the mean over the tasks at one length, a
difference is taken seed by seed, since arms of one seed share documents, their order and samples. Intervals are 95%,
Student's t over the seeds, beside them a bootstrap over seeds and samples; they speak of training anew from the same
base, not of another base. `estimates.decide` turns them into words; p is corrected by Holm over a question's
comparisons of one kind (`family`) at the target length, or at the other lengths. Settings in which both arms score
under 5 percent (`both fail`) are left out of averages over settings. Two runs side by side: `compare` for their
verdicts, `repeated` for what it changes to train the same cells a second time,

    endprompt lab ... --only arm=contiguous+yarn seed=0 --output AGAIN
    python -m benchmarks.lab.verdicts RUN AGAIN
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.lab import contrasts, estimates
from benchmarks.lab.arms import Arm, Row, arms_of, check_samples, is_main, is_short, with_most_seeds
from benchmarks.lab.contrasts import Contrast, contrasts_of
from benchmarks.lab.estimates import BOTH_FAIL, FLOOR, HELPS, HURTS, OPEN, SAME, Estimate, shared_scores
from endprompt.files import read_json_lines
from endprompt.results import read_rows, result_row, write_rows
from paper_figures.names import QUESTIONS, SAID_BY, SCALINGS

SUITE = "lab-question"
LONGBENCH = "longbench_difference"  # the metric of a difference of means over LongBench's sets

LOSS_MARGIN = 0.05  # mean next-token loss inside the window may move this far (nats per token) and still count as kept

CORRELATION_MARGIN = 0.3  # a rank correlation this close to 0, interval and all, is called none

#: What the four outcomes are called where "helps" is not the word.
WORDS = {
    "slope": {HELPS: "rises", HURTS: "falls", SAME: "flat", OPEN: OPEN},
    "interaction": {HELPS: "larger", HURTS: "smaller", SAME: SAME, OPEN: OPEN},
    "kept": {HELPS: "gains", HURTS: "lost", SAME: "kept", OPEN: OPEN},
    "loss": {HELPS: "lost", HURTS: "gains", SAME: "kept", OPEN: OPEN},
}

#: Unit, digits and sign of estimates that are not differences of scores.
UNITS = {
    "rank_correlation": ("rank correlation", 2, "+"),
    "loss_difference": ("nats", 3, "+"),
    "slope": ("points for ten times the steps", 1, "+"),
} | dict.fromkeys(("score_by_tokens", "score_by_seconds"), ("percent", 1, ""))

#: What a rank correlation says of its predictor, and an estimate of a claim.
PREDICTS, CONTRADICTS, UNRELATED = "predicts", "contradicts", "no correlation"

AGREES, DISAGREES = "agrees", "does not agree"

#: The place of an average over settings.
ALL_SETTINGS = {"base": "all", "fold": None, "scaling": "all", "length": None, "window": None, "target": None}


def rows_of(arms: Sequence[Arm], on_sets: Sequence[Arm] = ()) -> list[Row]:
    """All estimates, question by question, each with its verdict; in each question, last, its contrasts. on_sets: the
    arms with their scores of LongBench, which the same contrasts compare."""
    rows = [row for contrast in contrasts_of(arms) for row in score_rows(contrast)]
    rows += interaction_rows(rows)
    rows += [r | {"metric": LONGBENCH} for contrast in contrasts_of(on_sets) for r in score_rows(contrast)]
    rows += [row for made in (slope_rows, correlation_rows, cost_rows, window_rows) for row in made(arms)]
    judge(rows)
    spoken = ((claim, [row for row in rows if claim.speaks_of(row)]) for claim in contrasts.CLAIMS)
    said = [claim_row(claim, chosen) for claim, chosen in spoken if chosen]
    judge(said)
    for row in said:
        row["agrees"] = agreement(row)
        row["sentence"] = claim_sentence(row)
    return sorted([*rows, *said], key=lambda row: row["task"])  # stable: within a question as they were made


def estimate_row(contrast: Contrast, metric: str, length: int, per_seed: Mapping[int, float], **extra: Any) -> Row:
    """One estimate, not judged yet. per_seed: the values that it is the mean of, which the row carries with it."""
    first, second = contrast.first, contrast.second
    method = first.name if first is second else f"{first.name} - {second.name}"
    about: dict[str, Any] = {"suite": SUITE, "task": f"q{contrast.question}", "model": f"base {first.base}"}
    columns = {"comparison": "name"} | {f"{one}s": one for one in ("label", "kind", "prompt")}
    columns["prompt_weights"] = "weight"
    return {
        **result_row(length=length, metric=metric, method=method, seed=None, **about, **_estimated(per_seed)),
        "question": QUESTIONS[contrast.question],
        "family": contrast.family,
        **{column: [getattr(first, name), getattr(second, name)] for column, name in columns.items()},
        **{key: getattr(first, key) for key in ("base", "window", "target", "fold", "scaling")},
        "interval": "t over seeds",
        "primary": length == first.target,
        "margin": estimates.MARGIN,
        "p": estimates.over_seeds([*per_seed.values()]).p,
        "per_seed": {str(seed): value for seed, value in per_seed.items()},
        **extra,
    }


def _estimated(per_seed: Mapping[Any, float]) -> dict[str, Any]:
    found = estimates.over_seeds([*per_seed.values()])
    interval = None if found.lo is None or found.hi is None else (found.lo, found.hi)
    return {"value": found.value, "stderr": found.stderr, "ci95": interval, "n": found.n}


def score_rows(contrast: Contrast) -> list[Row]:
    rows = []
    for length in sorted(contrast.first.scores.keys() & contrast.second.scores.keys()):
        if differences := contrast.differences(length):
            scores = contrast.means(length)
            row = estimate_row(contrast, "score_difference", length, differences, scores=scores)
            if contrast.chosen_on:
                row["chosen_on"] = contrast.chosen_on
            row["both_fail"] = max(scores) < FLOOR
            if row["primary"] and (interval := contrast.bootstrap(length)):
                row["ci95_bootstrap"] = interval
            rows.append(row)
    return rows


def interaction_rows(rows: Sequence[Row]) -> list[Row]:
    """Is a difference larger at the larger fold, or with YaRN than with PI? Differences of differences, seed by seed.
    At the target length of each; questions 1, 3 and 4. Nothing is said where both arms fail in one of the settings."""
    found = []
    chosen = [row for row in rows if row["primary"] and row["task"] in ("q1", "q3", "q4")]
    for one, two in itertools.product(chosen, chosen):
        if any(one[key] != two[key] for key in ("task", "family", "labels", "base")):
            continue
        if one["scaling"] == two["scaling"] and one["fold"] > two["fold"]:
            metric, against = "interaction_fold", f"{two['fold']}-fold"
        elif one["fold"] == two["fold"] and (one["scaling"], two["scaling"]) == ("yarn", "linear"):
            metric, against = "interaction_scaling", SCALINGS["linear"]
        else:
            continue
        if values := contrasts.less(one["per_seed"], two["per_seed"]):
            row = {**one, **_estimated(values), "metric": metric, "against": against, "per_seed": values}
            row |= {"p": estimates.over_seeds([*values.values()]).p, "both_fail": one["both_fail"] or two["both_fail"]}
            found.append({key: value for key, value in row.items() if key != "ci95_bootstrap"})
    return found


def slope_rows(arms: Sequence[Arm]) -> list[Row]:
    """Question 2: points gained for ten times the steps, a straight line over log10(steps) for each seed. Arms that
    differ in their steps alone, at least two of them, and the seeds that all of them have. Beside it the difference
    between the longest training and the usual one, and, for an end prompt, its slope less the control's."""
    families: dict[tuple, dict[int, Arm]] = {}
    for arm in arms:
        if is_short(arm):
            families.setdefault((arm.setting, arm.kind, arm.prompt, arm.weight), {})[arm.steps] = arm
    rows, lines_of = [], {}
    for key, by_steps in families.items():
        members = [by_steps[steps] for steps in sorted(by_steps)]
        if len(members) < 2:
            continue
        usual = next((arm for arm in members if arm.usual), members[0])
        x = np.log10([arm.steps for arm in members])
        for length in sorted(set.intersection(*(set(arm.scores) for arm in members))):
            seeds, scores = shared_scores([arm.scores[length] for arm in members])
            if not seeds:
                continue
            slopes = (x - x.mean()) @ scores / ((x - x.mean()) ** 2).sum()
            lines_of[key, length] = usual, dict(zip(seeds, slopes.tolist()))
            extra = {"scores": scores.mean(axis=1).tolist(), "over_steps": [arm.steps for arm in members]}
            extra["both_fail"] = bool(scores.mean(axis=1).max() < FLOOR)
            contrast = Contrast(2, contrasts.SLOPE, usual, usual)
            rows.append(estimate_row(contrast, "slope", length, lines_of[key, length][1], **extra))
        if members[-1] is not usual:
            rows += score_rows(Contrast(2, "longest training against the usual", members[-1], usual))
    for ((setting, _, prompt, _), length), (arm, own) in lines_of.items():
        control, theirs = lines_of.get(((setting, "contiguous", "", None), length), (arm, {}))
        if prompt and (values := contrasts.less(own, theirs)):
            rows.append(estimate_row(Contrast(2, "slope less the control's", arm, control), "slope", length, values))
    return rows


def correlation_rows(arms: Sequence[Arm]) -> list[Row]:
    """Question 5: rank correlation of both predictors with the score at the target length. By base and fold, and
    averaged over them (base `all`). Over all arms of short rows and of the usual length, and averaged inside schemes
    (for the smoothness constant, which depends on the scaling alone) or inside scalings (for the gap's error)."""
    groups: dict[tuple[str, int], list[Arm]] = {}
    for arm in arms:
        whole = arm.target in arm.scores and None not in (arm.bernstein, arm.gap_rms)
        if is_short(arm) and arm.usual and whole and is_main(arm):
            groups.setdefault((arm.base, arm.fold), []).append(arm)
    groups = {key: with_most_seeds(members) for key, members in groups.items()}
    groups = {key: members for key, members in groups.items() if len(members) >= 4}
    together = [[*itertools.chain.from_iterable(groups.values())]] if len(groups) > 1 else []
    rows = []
    for members in [*groups.values(), *together]:
        alone = len({(arm.base, arm.fold) for arm in members}) == 1
        seeds, scores = shared_scores([arm.scores[arm.target] for arm in members])
        if not seeds:
            continue
        groupings: dict[str, list[tuple]] = {
            "all arms": [(arm.base, arm.fold) for arm in members],
            "within a scheme": [(arm.base, arm.fold, arm.kind, arm.prompt) for arm in members],
            "within a scaling": [(arm.base, arm.fold, arm.scaling) for arm in members],
        }
        for predictor, values, inner in (
            ("smoothness constant", [arm.bernstein for arm in members], "within a scheme"),
            ("gap RMS", [arm.gap_rms for arm in members], "within a scaling"),
        ):
            for grouping in ("all arms", inner):
                found = estimates.rank_correlation([v or 0.0 for v in values], scores, groupings[grouping])
                if found is None:
                    continue
                family = f"{predictor}, {grouping}"
                row = estimate_row(Contrast(5, family, members[0], members[0]), "rank_correlation", 0, {0: 0.0})
                row |= {"value": found.value, "ci95": [found.lo, found.hi], "n": len(seeds), "arms": found.n}
                row |= {"method": family, "comparison": [family, "score"], "labels": [family, "score"], "kinds": []}
                row |= {"interval": "bootstrap over arms and seeds", "margin": CORRELATION_MARGIN, "scaling": "all"}
                row |= {"length": members[0].target if alone else None, "primary": True, "p": None, "per_seed": {}}
                rows.append(row if alone else row | ALL_SETTINGS)
    return rows


def cost_rows(arms: Sequence[Arm]) -> list[Row]:
    """Question 6: every arm's score at the target with its cost, and how surely it belongs to the Pareto set."""
    groups: dict[tuple[str, int], list[Arm]] = {}
    for arm in arms:
        if arm.kind != "base" and arm.scores.get(arm.target) and arm.tokens and arm.seconds:
            groups.setdefault((arm.base, arm.fold), []).append(arm)
    rows = []
    for members in map(with_most_seeds, groups.values()):
        scores = [arm.scores[arm.target] for arm in members]
        costs = {metric: [getattr(arm, metric) for arm in members] for metric in ("tokens", "seconds")}
        for metric, cost in costs.items() if shared_scores(scores)[0] else ():
            front = estimates.pareto(cost, [arm.mean(arm.target) for arm in members])
            shares = estimates.pareto_shares(cost, scores)
            for arm, inside, share in zip(members, front, shares):
                extra = {"train_tokens": arm.tokens, "gpu_seconds": arm.seconds, "pareto": inside, "p": None}
                contrast = Contrast(6, f"Pareto set by {metric}", arm, arm)
                row = estimate_row(contrast, f"score_by_{metric}", arm.target, arm.scores[arm.target], **extra)
                if row["ci95"]:  # of a score, not of a difference
                    row["ci95"] = [max(0.0, row["ci95"][0]), min(100.0, row["ci95"][1])]
                rows.append(row | {"pareto_share": share})
    return rows


def window_rows(arms: Sequence[Arm]) -> list[Row]:
    """Question 7: score and loss inside the original window, after less before, for every trained arm."""
    bases = {arm.base: arm for arm in arms if arm.kind == "base" and arm.fold == 1}
    rows = []
    for arm in arms:
        before = bases.get(arm.base)
        if arm.kind == "base" or before is None:
            continue
        contrast = Contrast(7, contrasts.KEPT, arm, before)
        rows += [row | {"primary": True} for row in score_rows(contrast) if row["length"] == arm.window]
        a, b = arm.losses.get(arm.window, {}), before.losses.get(arm.window, {})
        if values := contrasts.less(a, b):
            means = [float(np.mean([losses[seed] for seed in values])) for losses in (a, b)]
            extra = {"margin": LOSS_MARGIN, "primary": True, "scores": means}
            rows.append(estimate_row(contrast, "loss_difference", arm.window, values, **extra))
    return rows


def judge(rows: Sequence[Row]) -> None:
    """Give each row its corrected p-value, its verdict and its sentence. One test is corrected once, however many
    claims are made about it."""
    families: dict[tuple, dict[tuple, float]] = {}
    for row in (row for row in rows if row["p"] is not None):
        families.setdefault(_family(row), {})[_test(row)] = row["p"]
    adjusted = {key: dict(zip(tests, estimates.holm([*tests.values()]))) for key, tests in families.items()}
    for row in rows:
        row["p_holm"] = None if row["p"] is None else adjusted[_family(row)][_test(row)]
        row["outcome"] = outcome_of(row)
        row["verdict"] = words(row).get(row["outcome"], row["outcome"])
        row["sentence"] = sentence_of(row)


def _family(row: Row) -> tuple:
    """Tests that are corrected together: those of one kind, or all claims of a question."""
    return row["task"], row["primary"], row["metric"], None if row["metric"] == "claim" else row["family"]


def _test(row: Row) -> tuple:
    """What makes two rows one test: the same estimate, whatever is claimed of it."""
    keys = ("family", "method", "base", "fold", "scaling", "length", "against", "value")
    return metric_of(row), *(row.get(key) for key in keys)


def outcome_of(row: Row) -> str:
    lo, hi = row["ci95"] or (None, None)
    metric = metric_of(row)
    if metric == "rank_correlation":
        return correlation_verdict(lo, hi)
    if metric.startswith("score_by"):
        return "in the Pareto set" if row["pareto"] else "outdone"
    if row.get("both_fail"):
        return BOTH_FAIL
    found = Estimate(row["value"], lo, hi, row["stderr"], row["p"], row["n"])
    return estimates.decide(found, row["p_holm"], row["margin"])


def metric_of(row: Row) -> str:
    """What a row is an estimate of; a claim's row is one of the metric that it speaks of."""
    return str(row["of"] if row["metric"] == "claim" else row["metric"])


def words(row: Row) -> Mapping[str, str]:
    metric = metric_of(row)
    if row["task"] == "q7":
        return WORDS["loss" if metric == "loss_difference" else "kept"]
    return WORDS.get(metric.partition("_")[0], {})


def correlation_verdict(lo: float | None, hi: float | None) -> str:
    """A larger constant should mean a lower score: an interval below 0 is what the theory predicts."""
    if lo is None or hi is None:
        return OPEN
    if hi < 0:
        return PREDICTS
    if lo > 0:
        return CONTRADICTS
    return UNRELATED if max(-lo, hi) < CORRELATION_MARGIN else OPEN


def sentence_of(row: Row) -> str:
    first, second = row["labels"]
    estimate = f"{estimate_text(row)}, {row['n']} seed{'s' if row['n'] != 1 else ''}: {row['verdict']}."
    between = first if first == second or row["metric"] == "rank_correlation" else f"{first} against {second}"
    if "against" in row:
        between += f", compared with {row['against']}"
    return f"{between} ({setting_text(row)}): {estimate}"


def setting_text(row: Row) -> str:
    if row["base"] == "all":
        return "all settings"
    scaling = "all scalings" if row["scaling"] == "all" else SCALINGS.get(row["scaling"], row["scaling"])
    where = "LongBench, cut to" if row["metric"] == LONGBENCH else "length"
    return f"base {row['base']}, {row['fold']}-fold, {scaling}, {where} {row['length']}"


def estimate_text(row: Row) -> str:
    """`+7.1 points [+2.0, +12.2]`"""
    unit, digits, sign = UNITS.get(metric_of(row), ("points", 1, "+"))
    value, *bounds = (f"{round(v, digits) + 0.0:{sign}.{digits}f}" for v in (row["value"], *(row["ci95"] or ())))
    return f"{value} {unit}" + (f" [{', '.join(bounds)}]" if bounds else "")


def claim_row(claim: contrasts.Claim, chosen: Sequence[Row]) -> Row:
    if claim.metric == "rank_correlation":  # the row over all bases and folds is their average already
        chosen = [row for row in chosen if row["base"] == "all"] or chosen
    live = [row for row in chosen if not row.get("both_fail")]
    shown = ("base", "fold", "scaling", "length", "labels", "value", "ci95", "n", "verdict", "chosen_on")
    said = {"source": claim.source, "claim": claim.says, "expected": claim.expected}
    parts = [{key: part[key] for key in shown if key in part} for part in chosen]
    row = {**chosen[0], "metric": "claim", "of": claim.metric, **said, "parts": parts, "both_fail": not live}
    if len(live) > 1 and len({frozenset(part["per_seed"]) for part in live}) == 1:
        values = {seed: float(np.mean([part["per_seed"][seed] for part in live])) for seed in live[0]["per_seed"]}
        row |= {**_estimated(values), **ALL_SETTINGS, "per_seed": values}
        row["p"] = estimates.over_seeds([*values.values()]).p
    elif len(live) > 1:
        found = estimates.over_settings([estimates.over_seeds([*part["per_seed"].values()]) for part in live])
        interval = None if found.lo is None else [found.lo, found.hi]
        row |= {"value": found.value, "stderr": found.stderr, "ci95": interval, "n": found.n, "p": found.p}
        row |= {**ALL_SETTINGS, "per_seed": {}, "interval": "t over settings of different seeds (Welch)"}
    elif live:
        row |= {key: live[0][key] for key in ("value", "stderr", "ci95", "n", "p", "per_seed", *ALL_SETTINGS)}
    for key in ("ci95_bootstrap", "scores"):  # of one setting, not of the average
        row.pop(key, None)
    return row


def agreement(row: Row) -> str:
    """Do the estimates agree with the claim? Only where they decide it."""
    outcome, expected = row["outcome"], row["expected"]
    if expected == "no worse" and row["ci95"] and row["ci95"][0] > -row["margin"] and outcome != BOTH_FAIL:
        return AGREES
    wanted = {"better": HELPS, "worse": HURTS, "same": SAME, "no worse": SAME, "predicts": PREDICTS}[expected]
    if outcome in (OPEN, BOTH_FAIL):
        return OPEN
    return AGREES if outcome == wanted else DISAGREES


def claim_sentence(row: Row) -> str:
    """The verdict on a claim: the average with its interval, every setting's own verdict, and whether they agree."""
    compared = {tuple(part["labels"]) for part in row["parts"]}
    what = row["family"] if len(compared) > 1 or not row["kinds"] else " against ".join(dict.fromkeys(row["labels"]))
    if row["family"] == contrasts.KEPT:
        what = f"{row['labels'][0]}, {contrasts.KEPT}"
    counts = Counter(part["verdict"] for part in row["parts"])
    each = "; ".join(f"{verdict} in {count}" for verdict, count in counts.items())
    several = f" (setting by setting: {each})" if len(row["parts"]) > 1 else f" ({setting_text(row)})"
    if row["outcome"] == BOTH_FAIL:
        found = "both arms fail in every setting"
    else:
        sizes = sorted({part["n"] for part in row["parts"]})
        seeds = f"{sizes[0]} to {sizes[-1]} seeds" if len(sizes) > 1 else f"{row['n']} seed{'s' * (row['n'] != 1)}"
        found = f"{estimate_text(row)}, {seeds}: {row['verdict']}"
    if row.get("chosen_on"):
        what += f" (chosen on {row['chosen_on']}, tested on others)"
    verdict = {AGREES: "agrees with", DISAGREES: "goes against", OPEN: "does not decide"}[row["agrees"]]
    return f"{what}: {found}{several}; this {verdict} {SAID_BY[row['source']]}: {row['claim']}."


def write(run: str | Path) -> list[Row]:
    """Answer the questions from a run directory; writes questions.jsonl into it, anew, and returns its rows. Raises
    ValueError if results.jsonl has no scores of a lab or rows that must not be compared."""
    run, path = Path(run), Path(run, "scores.jsonl")
    rows, samples = read_rows(run / "results.jsonl"), [r for _, r in read_json_lines(path)] if path.is_file() else []
    arms, on_sets = (arms_of(rows, samples, suite) for suite in ("ruler", "longbench"))
    if not arms:
        raise ValueError(f"{run / 'results.jsonl'}: the questions need a lab's rows of suite 'ruler'; found none")
    found = rows_of(arms, on_sets)
    write_rows(run / "questions.jsonl", found)
    return found


def table(rows: Sequence[Row]) -> Table:
    made = Table(title="The seven questions: 95% intervals over training seeds", title_justify="left", show_lines=True)
    for head in ("question", "claim", "estimate", "verdict", "the claim"):
        made.add_column(head)
    last = ""
    for row in rows:
        if row["metric"] == "claim":
            question = f"{row['task'][1:]}. {row['question']}" if row["task"] != last else ""
            last = row["task"]
            said = f"{row['source']}: {row['claim']}"
            verdict = {AGREES: "holds", DISAGREES: "does not hold", OPEN: OPEN}[row["agrees"]]
            made.add_row(question, said, estimate_text(row) + f", {row['n']} seeds", row["verdict"], verdict)
    return made


def repeated(first: str | Path, second: str | Path) -> list[Row]:
    """For every cell, suite and length that both runs have: the mean score of `second` less that of `first`, its 95%
    interval over the samples (drawn anew; of how much a further training would differ it says nothing), and `changed`,
    percent of the samples with another score. Raises ValueError if no cell is the same, or samples of one differ."""
    check_samples([r for run in (first, second) for r in read_rows(Path(run, "results.jsonl")) if r["samples_sha256"]])
    sides: list[dict[tuple, dict[str, np.ndarray]]] = []
    keys = ("cell", "suite", "length", "base", "fold", "arm", "seed")
    for run in (first, second):
        sides.append({})
        for _, line in read_json_lines(Path(run, "scores.jsonl")):
            scores = np.asarray(line["scores"], dtype=np.float64)
            sides[-1].setdefault(tuple(line.get(key) for key in keys), {})[line["task"]] = scores
    found = []
    for key, a in sides[0].items():
        if (b := sides[1].get(key, {})).keys() != a.keys():  # not there, or not whole
            continue
        parts = [b[task] - a[task] for task in a]
        (cell, suite, length, base, fold, arm, seed), changed = key, np.concatenate(parts) != 0
        row = result_row(
            suite="lab-repeat", task=suite or "ruler", metric="score_difference", model=f"base {base}", method=arm,
            value=float(np.mean([part.mean() for part in parts])), ci95=estimates.nested_bootstrap([parts]),
            n=changed.size, seed=seed, length=length, fold=fold, cell=cell, changed=100 * float(changed.mean()),
        )  # fmt: skip
        found.append(row)
    if not found:
        raise ValueError(f"{second} must have a cell of {first}, with the scores of its samples: there is none")
    return found


def compare(first: str | Path, second: str | Path) -> list[Row]:
    """Verdicts of two runs side by side, for every estimate that either has. A line each: task, metric, method, base,
    fold, scaling, length, source, claim, `first` and `second` (the verdicts, None where a run lacks it; for a claim
    whether it holds: agrees, does not agree, not decided), `same`. A claim is one and the same whatever settings and
    arms a run answers it from. Raises OSError if a run has no questions.jsonl."""
    keys = ("task", "metric", "family", "method", "base", "fold", "scaling", "length", "against", "source", "claim")

    def key(row: Row) -> tuple[Any, ...]:
        kept = ("task", "metric", "source", "claim") if row["metric"] == "claim" else keys
        return tuple(row.get(k) if k in kept else None for k in keys)

    sides = [{key(row): row for row in read_rows(Path(run) / "questions.jsonl")} for run in (first, second)]
    out = []
    for found in dict.fromkeys([*sides[0], *sides[1]]):
        both = (side.get(found) for side in sides)
        a, b = (row and row["agrees" if row["metric"] == "claim" else "verdict"] for row in both)
        out.append({**dict(zip(keys, found)), "first": a, "second": b, "same": a == b})
    return out


def main(first: str, second: str) -> None:
    for row in repeated(first, second):
        lo, hi = row["ci95"]
        where = f"{row['method']}, seed {row['seed']}, {row['task']} at {row['length']}"
        print(
            f"{where}: {row['value']:+.1f} points [{lo:+.1f}, {hi:+.1f}], {row['changed']:.0f}% of {row['n']} changed"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
