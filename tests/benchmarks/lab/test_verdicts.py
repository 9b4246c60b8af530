"""Verdicts: every rule both ways on rows with known effects, and the statistics against independent ones."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.lab import contrasts, estimates, verdicts
from benchmarks.lab.arms import arms_of
from benchmarks.lab.estimates import BOTH_FAIL, HELPS, HURTS, OPEN, SAME
from tests.support.lab_rows import BASE, Made, lab_run, made_rows, write_lines

CONTROL = Made("contiguous", "linear", (95.0, 80.0, 40.0))


def fixed(score, scaling="linear", **extra):
    return Made("endprompt", scaling, (95.0, 80.0, score), prompt="EP_1", **extra)


def recall(score, scaling="linear", **extra):
    return Made("endprompt", scaling, (95.0, 80.0, score), prompt="recall", weight=1.0, **extra)


def judged(arms, **how):
    return verdicts.rows_of(arms_of(made_rows(arms, **how)[0]))


def pick(rows, **wanted):
    """The one row with these columns."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    assert len(found) == 1, [(row["method"], row["length"]) for row in found]
    return found[0]


def test_an_estimate_is_the_paired_t_test():
    a, b = np.array([41.0, 47.0, 39.5, 52.0, 44.0]), np.array([38.0, 41.0, 40.0, 45.5, 43.0])
    found = estimates.over_seeds(a - b)
    test = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(test.pvalue, rel=1e-12)
    interval = test.confidence_interval(0.95)
    assert (found.lo, found.hi) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.value == pytest.approx((a - b).mean()) and found.n == 5


def test_seeds_that_all_agree_and_a_single_seed():
    assert estimates.over_seeds([3.0, 3.0, 3.0])[1:] == (3.0, 3.0, 0.0, 0.0, 3)
    assert estimates.over_seeds([0.0, 0.0]).p == 1.0
    assert estimates.over_seeds([7.0])[1:] == (None, None, None, None, 1)
    with pytest.raises(ValueError, match="at least one seed"):
        estimates.over_seeds([])


def test_an_average_over_settings_of_different_seeds_is_welch_s_test():
    """The mean of two is half the difference of the first and the second with its sign turned."""
    one, two = [3.0, 5.0, 4.5, 6.0], [1.0, -2.0, 4.0]
    found = estimates.over_settings([estimates.over_seeds(one), estimates.over_seeds(two)])
    welch = stats.ttest_ind(one, [-value for value in two], equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert (found.value, found.p) == pytest.approx(((np.mean(one) + np.mean(two)) / 2, welch.pvalue))
    assert (found.lo, found.hi) == pytest.approx((interval.low / 2, interval.high / 2)) and found.n == 3
    assert estimates.over_settings([estimates.over_seeds(one), estimates.over_seeds([2.0])]).lo is None


def test_holm_by_hand():
    """Sorted: .001 x 4, .01 x 3, .03 x 2 = .06, .04 x 1 but never below the one before."""
    assert estimates.holm([0.04, 0.001, 0.03, 0.01]) == pytest.approx([0.06, 0.004, 0.06, 0.03])
    assert estimates.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "p", "verdict"),
    [
        ([9, 10, 11, 10, 10], 0.001, HELPS),
        ([-9, -10, -11, -10, -10], 0.001, HURTS),
        ([9, 10, 11, 10, 10], 0.06, OPEN),  # the correction takes it back
        ([0.5, -0.5, 0.2, -0.2, 0.0], 1.0, SAME),
        ([3.9, 4.0, 4.1, 4.0, 4.0], 0.0001, SAME),  # surely above 0, and surely below the margin
        ([3, 4, 5, 4, 4.9], 0.001, OPEN),  # surely above 0, but not surely 5, nor surely less
        ([20, -20, 10, -10, 1], 0.9, OPEN),
        ([10.0], None, OPEN),
    ],
)
def test_the_rule_for_words(values, p, verdict):
    assert estimates.decide(estimates.over_seeds(values), p) == verdict


def test_nested_bootstrap_has_the_spread_of_both_levels():
    """Variance of the mean: seeds' own / S, as drawn, plus samples' / (S n)."""
    rng = np.random.default_rng(3)
    moves = rng.normal(0, 1, 12)
    data = [[rng.normal(move, 30, 50) for _ in range(2)] for move in moves]
    low, high = estimates.nested_bootstrap(data)
    means = np.array([np.mean([task.mean() for task in seed]) for seed in data])
    error = np.sqrt(means.var() / 12 + 30**2 / (12 * 100))
    assert (low + high) / 2 == pytest.approx(means.mean(), abs=1.0)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (high - low) / 2 > 1.1 * 1.96 * np.sqrt(means.var() / 12), "the samples' share is missing"


def test_rank_correlation_is_spearmans():
    x = [1.0, 2.0, 2.0, 3.0, 5.0, 8.0]
    scores = np.array([[9.0, 11], [8, 8], [9, 9], [4, 6], [5, 5], [1, 1]])
    found = estimates.rank_correlation(x, scores, ["all"] * 6)
    assert found.value == pytest.approx(stats.spearmanr(x, scores.mean(axis=1)).statistic)
    assert found.lo <= found.value <= found.hi < 0 and found.n == 6
    falling, rising = np.array([[3.0], [2], [1]]), np.array([[1.0], [2], [3]])
    both = estimates.rank_correlation([1, 2, 3] * 2, np.concatenate([falling, rising]), [0, 0, 0, 1, 1, 1])
    assert both.value == pytest.approx(0), "one group falls, one rises; together they would correlate otherwise"
    assert estimates.rank_correlation([1.0, 1, 1], falling, [0, 0, 0]) is None


def test_pareto_by_hand():
    #                        cheap     dominated  best   as dear as best, worse   a tie with the first
    cost, score = [1, 2, 3, 3, 1], [50, 40, 90, 80, 50]
    assert estimates.pareto(cost, score) == [True, False, True, False, True]
    scores = [{0: 50.0, 1: 50.0}, {0: 40.0, 1: 61.0}, {0: 90.0, 1: 90.0}]
    shares = estimates.pareto_shares([1, 2, 3], scores)
    assert shares[0] == shares[2] == 1.0
    assert shares[1] == pytest.approx(0.75, abs=0.05), "in unless both draws are the seed in which it loses"


@pytest.mark.parametrize(
    ("score", "noise", "verdict", "paper", "ours"),
    [
        (60.0, 1.0, HELPS, "agrees", "does not agree"),
        (25.0, 1.0, HURTS, "does not agree", "does not agree"),
        (40.5, 1.0, SAME, "does not agree", "agrees"),
        (45.0, 15.0, OPEN, OPEN, OPEN),
    ],
)
def test_question_1(score, noise, verdict, paper, ours):
    rows = judged([CONTROL, fixed(score)], noise=noise)
    row = pick(rows, task="q1", metric="score_difference", length=2048)
    assert row["verdict"] == verdict
    assert row["value"] == pytest.approx(score - 40, abs=1e-6) and row["n"] == 5
    assert row["comparison"] == ["endprompt-EP_1+linear", "contiguous+linear"]
    assert (row["base"], row["fold"], row["scaling"], row["scores"]) == ("256", 8, "linear", pytest.approx([score, 40]))
    assert verdict in row["sentence"] and "8-fold, PI, length 2048" in row["sentence"]
    agreed = {row["source"]: row["agrees"] for row in rows if row["metric"] == "claim" and row["task"] == "q1"}
    assert agreed == {"paper": paper, "prototypes": ours}


def test_what_the_arms_of_a_seed_share_cancels():
    """Twenty points up and down with the seed, in both arms: the difference knows nothing of it."""
    rows = judged([CONTROL, fixed(55.0)], shared=10.0, noise=1.0)
    row = pick(rows, task="q1", length=2048, metric="score_difference")
    assert row["verdict"] == HELPS and row["ci95"][1] - row["ci95"][0] < 8


def test_two_that_both_fail_are_no_finding():
    rows = judged([Made("contiguous", "linear", (95, 1, 0)), fixed(0.0)], fold=32)
    assert pick(rows, task="q1", length=8192, metric="score_difference")["verdict"] == BOTH_FAIL
    claim = pick(rows, task="q1", metric="claim", source="paper")
    assert claim["agrees"] == OPEN and "both arms fail" in claim["sentence"]


def test_a_failing_setting_is_left_out_of_the_average():
    yarn = [Made("contiguous", "yarn", (95, 80, 30)), fixed(50.0, "yarn")]
    rows = judged([Made("contiguous", "linear", (95, 1, 0)), fixed(0.0), *yarn], noise=1.0)
    claim = pick(rows, task="q1", metric="claim", source="paper")
    assert claim["value"] == pytest.approx(20) and claim["verdict"] == HELPS
    assert [part["verdict"] for part in claim["parts"]] == [BOTH_FAIL, HELPS]


def test_one_seed_decides_nothing():
    rows = judged([CONTROL, fixed(90.0)], seeds=[0])
    row = pick(rows, task="q1", length=2048, metric="score_difference")
    assert (row["verdict"], row["ci95"], row["n"]) == (OPEN, None, 1)


@pytest.mark.parametrize(
    ("scores", "verdict"), [((60, 40, 20), "falls"), ((30, 40, 50), "rises"), ((40, 40, 40), "flat")]
)
def test_question_2(scores, verdict):
    arms = [fixed(float(score), steps=steps) for steps, score in zip((100, 300, 1000), scores)]
    arms += [Made("contiguous", "linear", (95, 80, 40), steps=steps) for steps in (100, 300, 1000)]
    arms += [recall(75.0), Made("pose", "linear", (95, 80, 80))]  # 300 steps are the usual
    rows = judged(arms, noise=0.5)
    own = {"family": "points for ten times the steps", "method": "endprompt-EP_1+linear"}
    row = pick(rows, task="q2", metric="slope", length=2048, **own)
    line = stats.linregress(np.log10([100, 300, 1000]), scores)
    assert row["value"] == pytest.approx(line.slope, abs=1e-5) and row["verdict"] == verdict
    assert row["over_steps"] == [100, 300, 1000]
    relative = pick(rows, task="q2", family="slope less the control's", length=2048)
    assert relative["value"] == pytest.approx(line.slope, abs=1e-5)


def test_question_3_recall_wording_and_weight():
    other = Made("endprompt", "linear", (95, 80, 41), prompt="EP_2")
    rows = judged([fixed(40.0), recall(75.0), other, fixed(20.0, weight=0.0)], noise=1.0)
    found = {
        row["family"]: (round(row["value"]), row["verdict"])
        for row in rows
        if row["task"] == "q3" and row["primary"] and row["metric"] == "score_difference"
    }
    assert found == {contrasts.RECALL: (35, HELPS), contrasts.WORDING: (1, SAME), "weight of the prompt": (-20, HURTS)}


def test_question_4_places_and_interactions():
    arms = [recall(75.0, "yarn"), Made("endprompt-random", "yarn", (95, 80, 76), prompt="recall", weight=1.0)]
    arms += [Made("pose", "yarn", (95, 80, 77), whole=False)]
    near, _ = made_rows(arms, noise=1.0, seeds=range(10))
    far = [recall(40.0, "yarn"), Made("endprompt-random", "yarn", (95, 80, 75), prompt="recall", weight=1.0)]
    far += [Made("pose", "yarn", (95, 80, 82), whole=False)]
    rows = verdicts.rows_of(arms_of(near + made_rows(far, fold=32, noise=1.0, seeds=range(10))[0]))
    random = {"task": "q4", "family": contrasts.FIXED, "method": "endprompt-random-recall+yarn - endprompt-recall+yarn"}
    assert pick(rows, **random, metric="score_difference", length=2048, fold=8)["verdict"] == SAME
    assert pick(rows, **random, metric="score_difference", length=8192)["verdict"] == HELPS
    grown = pick(rows, **random, metric="interaction_fold")
    assert grown["verdict"] == "larger" and grown["value"] == pytest.approx(35 - 1, abs=1e-5)
    best = pick(rows, task="q4", family=contrasts.BEST, metric="score_difference", length=8192)
    assert best["comparison"] == ["endprompt-random-recall+yarn", "pose+yarn"] and best["verdict"] == HURTS
    assert pick(rows, source="aim")["agrees"] == "does not agree"


def test_the_best_with_whole_text_is_tested_where_it_was_not_chosen():
    """Lucky is far above PoSE on seeds 0 to 4 and far below on 5 to 9, as it is on the larger base."""
    lucky = Made("endprompt-random", "yarn", (95, 80, 60), prompt="recall", weight=1.0)
    arms = [Made("pose", "yarn", (95, 80, 70), whole=False), recall(69.0, "yarn"), lucky]
    rows, _ = made_rows(arms, fold=32, noise=0.5, seeds=range(10))
    for row in rows:
        if row["arm"] == lucky.name and row["suite"] == "ruler" and row["seed"] < 5:
            row["value"] += 30
    rows += made_rows(arms, base=512, fold=32, noise=0.5, seeds=range(3))[0]
    rows += made_rows(arms, base=1024, fold=8, noise=0.5, seeds=range(3))[0]  # another fold: a choice of its own
    found = verdicts.rows_of(arms_of(rows))
    tested = [
        r for r in found if r["family"] == contrasts.BEST and r["fold"] == 32 and r["metric"] == "score_difference"
    ]
    assert {(r["base"], r["n"]) for r in tested if r["primary"]} == {("256", 5), ("512", 3)}
    assert {tuple(r["comparison"]) for r in tested} == {(lucky.name, "pose+yarn")}
    assert {r["chosen_on"] for r in tested} == {"base 256, seeds 0, 1, 2, 3, 4"}
    own = pick(tested, base="256", length=8192)
    assert own["value"] == pytest.approx(-10, abs=1) and own["scores"] == pytest.approx([60, 70], abs=2)
    assert set(own["per_seed"]) == {"5", "6", "7", "8", "9"}
    claim = pick(found, source="aim")
    assert claim["agrees"] == "does not agree" and "5" not in claim["per_seed"]
    assert claim["value"] == pytest.approx(np.mean([r["value"] for r in tested if r["primary"]]))
    assert "chosen on base 256" in claim["sentence"] and "3 to 5 seeds" in claim["sentence"]


def test_arms_with_few_seeds_do_not_take_seeds_from_the_others():
    arms = [CONTROL, fixed(45), recall(60), Made("pose", "linear", (95, 80, 70), whole=False)]
    few = Made("sentences", "linear", (95, 80, 10), whole=False)
    rows = made_rows(arms, seeds=range(5))[0] + made_rows([few], seeds=range(2))[0]
    found = verdicts.rows_of(arms_of(rows))
    for row in found:
        if row["metric"] == "rank_correlation" or row["family"].startswith("Pareto"):
            assert row["n"] == 5 and few.name not in row["comparison"]
    assert {row["n"] for row in found if row["family"] == contrasts.POSE} == {2}


@pytest.mark.parametrize(("sign", "verdict"), [(1, "contradicts"), (-1, "predicts")])
def test_question_5(sign, verdict):
    order = {"linear": 0, "ntk": 1, "yarn": 2}
    arms = [
        Made(scheme, scaling, (95, 80, 45 + 12 * sign * place + move), prompt=prompt, weight=weight, gap_rms=gap)
        for scaling, place in order.items()
        for scheme, prompt, weight, move, gap in (
            ("contiguous", "none", None, -4, 0.6),
            ("endprompt", "EP_1", None, -2, 0.5),
            ("endprompt", "recall", 1.0, 2, 0.3),
            ("pose", "none", None, 4, 0.1),
        )
    ]
    rows = judged(arms, noise=1.0)
    assert pick(rows, metric="rank_correlation", family="smoothness constant, all arms")["verdict"] == verdict
    inside = pick(rows, metric="rank_correlation", family="smoothness constant, within a scheme")
    assert inside["value"] == pytest.approx(sign) and inside["arms"] == 12
    gap = pick(rows, metric="rank_correlation", family="gap RMS, within a scaling")
    assert gap["value"] == pytest.approx(-1) and gap["verdict"] == "predicts"
    yarn = pick(rows, task="q5", family="YaRN against PI", method="pose+yarn - pose+linear", length=2048)
    assert yarn["value"] == pytest.approx(24 * sign, abs=1e-5)


def test_question_6_costs():
    full = Made("contiguous", "linear", (95, 92, 90), full=True, seconds=20.0)
    longer = Made("contiguous", "linear", (95, 92, 93), full=True, seconds=80.0, tokens=9.8e6, tag="-long")
    rows = judged([CONTROL, fixed(50.0), full, longer, recall(70.0, seconds=4.5)], noise=1.0)
    pair = {"family": contrasts.FULL, "method": "endprompt-EP_1+linear - full+linear"}
    equal = pick(rows, task="q6", length=2048, metric="score_difference", **pair)
    assert equal["verdict"] == HURTS and equal["value"] == pytest.approx(-40, abs=1e-5)
    by_seconds = {row["labels"][0]: row["verdict"] for row in rows if row["metric"] == "score_by_seconds"}
    assert by_seconds["contiguous, short"] == "outdone", "the end prompt costs the same and scores more"
    assert by_seconds["endprompt recall"] == by_seconds["full length, 9.8M tokens"] == "in the Pareto set"
    shares = [row["pareto_share"] for row in rows if row["metric"] == "score_by_seconds"]
    assert all(0 <= share <= 1 for share in shares)
    assert {row["metric"] for row in rows if row["task"] == "q6"} >= {"score_by_tokens", "score_by_seconds", "claim"}


@pytest.mark.parametrize(
    ("score", "paper", "ours"),
    [(55.0, "agrees", "agrees"), (69.8, "does not agree", "agrees"), (88.0, "does not agree", "does not agree")],
)
def test_question_6_longlora_is_judged_where_it_learns(score, paper, ours):
    """With PI it scores 1 and everything beats it by 69 or more: no claim may lean on that."""

    def longlora(scaling, top, **extra):
        return Made("contiguous", scaling, (90, 70, top), longlora=True, tag="-2048", seconds=16.0, **extra)

    arms = [fixed(70.0), Made("pose", "linear", (95, 80, 80.0), whole=False), longlora("linear", 1.0)]
    arms += [fixed(70.0, "yarn"), Made("pose", "yarn", (95, 80, 80.0), whole=False), recall(75.0, "yarn")]
    full = Made("contiguous", "yarn", (90, 70, 75.0), full=True, tag="-2048", seconds=14.0)
    rows = judged([*arms, full, longlora("yarn", score, lr=2e-3)], noise=1.0)
    told = {row["source"]: row for row in rows if row["metric"] == "claim" and row["family"] == contrasts.LONGLORA}
    assert {source: row["agrees"] for source, row in told.items()} == {"paper": paper, "prototypes": ours}
    assert told["paper"]["value"] == pytest.approx(70 - score, abs=1e-5)
    assert told["prototypes"]["value"] == pytest.approx(80 - score, abs=1e-5)
    assert {part["scaling"] for row in told.values() for part in row["parts"]} == {"yarn"}
    compared = [r for r in rows if r["family"] == contrasts.LONGLORA and r["primary"] and r["metric"] != "claim"]
    assert {(row["kinds"][0], row["prompts"][0]) for row in compared if row["scaling"] == "yarn"} == {
        ("endprompt", "EP_1"), ("endprompt", "recall"), ("pose", ""), ("full", ""),
    }  # fmt: skip
    assert {row["labels"][1] for row in compared} == {"LongLoRA, 1.2M tokens", "LongLoRA, rate 0.002, 1.2M tokens"}
    kept = [row["labels"][0] for row in rows if row["task"] == "q7" and row["metric"] == "score_difference"]
    assert not kept, "the base was not scored"
    costs = [row for row in rows if row["metric"] == "score_by_seconds"]
    assert {row["method"] for row in costs} >= {"longlora-2048+yarn", "longlora-2048+linear"}


def test_a_rate_that_only_later_rows_say_is_the_arm_s():
    arm = Made("contiguous", "yarn", (90, 70, 60), longlora=True, tag="-2048", lr=2e-3)
    rows, _ = made_rows([arm])
    for row in rows:
        if row["seed"] < 3:
            del row["lr"]
    (found,) = arms_of(rows)
    assert found.label == "LongLoRA, rate 0.002, 1.2M tokens"


@pytest.mark.parametrize(("after", "verdict", "agrees"), [(98.5, "kept", "agrees"), (80.0, "lost", "does not agree")])
def test_question_7(after, verdict, agrees):
    arms = [BASE, Made("endprompt", "linear", (after, 80, 40), prompt="EP_1", loss=3.0 if after > 90 else 3.4)]
    rows = judged(arms, noise=1.0, shared=0.5)
    assert pick(rows, task="q7", metric="score_difference")["verdict"] == verdict
    loss = pick(rows, task="q7", metric="loss_difference")
    assert loss["verdict"] == verdict and loss["value"] == pytest.approx(0 if after > 90 else 0.4)
    assert pick(rows, task="q7", metric="claim")["agrees"] == agrees
    assert "nats" in loss["sentence"]


def test_a_cell_without_all_tasks_is_no_cell():
    rows, _ = made_rows([CONTROL, fixed(50.0)])
    lost = [r for r in rows if not (r["arm"] == CONTROL.name and r["seed"] == 3 and r["task"] == "vt")]
    row = pick(verdicts.rows_of(arms_of(lost)), task="q1", length=2048, metric="score_difference")
    assert sorted(row["per_seed"]) == ["0", "1", "2", "4"]


def test_samples_that_differ_are_not_compared():
    rows, _ = made_rows([CONTROL, fixed(50.0)])
    rows[-20] = {**rows[-20], "samples_sha256": "other"}
    with pytest.raises(ValueError, match=r"same samples_sha256: .*arm='endprompt-EP_1.linear'.* differs from"):
        arms_of(rows)


def test_a_missing_column_is_named():
    rows, _ = made_rows([CONTROL])
    del rows[0]["base"]
    with pytest.raises(ValueError, match="must have the column 'base'"):
        arms_of(rows)


def test_a_run_without_lab_rows_is_refused(tmp_path):
    write_lines(tmp_path / "results.jsonl", [])
    with pytest.raises(ValueError, match=r"results\.jsonl: the questions need a lab's rows"):
        verdicts.write(tmp_path)


def test_the_whole_plan_is_answered_twice_alike(tmp_path):
    """Every question has estimates and claims; the file says what the function returned; one seed less may differ."""
    run = lab_run(tmp_path / "first", bases=((256, 8), (256, 32)), seeds=range(2), samples=4)
    rows = verdicts.write(run)
    read = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    assert read == json.loads(json.dumps(rows))
    for number in verdicts.QUESTIONS:
        metrics = {row["metric"] for row in rows if row["task"] == f"q{number}"}
        assert "claim" in metrics and len(metrics) >= 2, number
    columns = ("task", "metric", "family", "method", "base", "fold", "scaling", "length", "against", "claim")
    keys = [tuple(row.get(column) for column in columns) for row in rows]
    assert len(set(keys)) == len(keys)
    assert any("ci95_bootstrap" in row for row in rows)
    for row in rows:
        assert row["suite"] == "lab-question" and row["sentence"].endswith(".")
        if row["ci95"]:
            assert row["ci95"][0] - 1e-9 <= row["value"] <= row["ci95"][1] + 1e-9
    turned = tmp_path / "turned"
    turned.mkdir()
    lines = (run / "results.jsonl").read_text().splitlines(keepends=True)
    (turned / "results.jsonl").write_text("".join(reversed(lines)))
    verdicts.write(turned)
    told = [line for line in verdicts.compare(run, turned) if line["metric"] == "claim"]
    assert len(told) > 15 and all(line["first"] and line["second"] for line in told), "known by its words"
    changed = lab_run(tmp_path / "third", bases=((256, 8),), seeds=[0])
    verdicts.write(changed)
    told = verdicts.compare(run, changed)
    assert any(line["second"] is None for line in told)
    assert any(line["first"] == HELPS != line["second"] for line in told)


def test_longbench_has_differences_of_its_own_and_changes_no_others(tmp_path):
    rows, _ = made_rows([BASE, CONTROL, fixed(41.0)])
    write_lines(tmp_path / "results.jsonl", rows)
    before = verdicts.write(tmp_path)
    target = [row for row in rows if row["task"] == "vt" and row["length"] == 2048 and row["steps"]]
    for name, moved in (("qasper", 1.0), ("lcc", -1.0)):
        for row in target:
            value = 30 + moved + row["seed"] + (12 + 0.5 * (row["seed"] - 2)) * (row["scheme"] == "endprompt")
            rows.append(row | {"suite": "longbench", "task": name, "metric": "qa_f1", "value": value, "ci95": None})
    write_lines(tmp_path / "results.jsonl", rows)
    found = verdicts.write(tmp_path)
    assert [row for row in found if row["metric"] != verdicts.LONGBENCH] == before
    row = pick(found, metric=verdicts.LONGBENCH, family=contrasts.ANCHOR)
    half = stats.t.ppf(0.975, 4) * np.std([-1.0, -0.5, 0.0, 0.5, 1.0], ddof=1) / np.sqrt(5)
    assert row["value"] == pytest.approx(12) and row["ci95"] == pytest.approx([12 - half, 12 + half])
    assert row["verdict"] == HELPS and "LongBench, cut to 2048" in row["sentence"]
    assert row["scores"] == pytest.approx([44, 32])


def test_the_table_names_every_claim(tmp_path):
    from rich.console import Console

    rows = judged([BASE, CONTROL, fixed(60.0), recall(80.0)])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(verdicts.table(rows))
    text = console.export_text()
    assert "1. Does the terminal anchor help" in text and "7. Is the short window kept?" in text
    assert "does not hold" in text and "holds" in text
