"""The test of the theory on made-up arms whose answer is known, and on a few of the lab's own."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis import predict
from analysis.config import PredictConfig
from benchmarks.lab import heads, theory
from benchmarks.lab.arms import Arm
from tests.benchmarks.lab.test_pages import MEASURED, packed_rows
from tests.support import figure_pages as pages
from tests.support import measures_page

#: (base, window, fold) of the lab's four settings and of the study.
SETTINGS = [("256", 256, 8), ("512", 512, 32), ("256", 256, 32), ("512", 512, 8), ("Published", 8192, 8)]
SCALES = {"linear": 10.0, "ntk": 30.0, "yarn": 70.0}


@pytest.fixture(autouse=True)
def fewer_permutations(monkeypatch):
    monkeypatch.setattr(theory, "PERMUTATIONS", 1500)


def case(base="256", window=256, fold=8, scaling="linear", scheme="pose", score=50.0, **values):
    arm = Arm(f"{scheme}+{scaling}", base, fold, window, window * fold, scheme or "base", scaling, "", None, 300, None,
              None, None, None, True)  # fmt: skip
    arm = dataclasses.replace(arm, scores={arm.target: {0: score}})
    half = theory.half_of(arm, arm.target) if base in ("256", "512") else "study"
    return theory.Case(arm, arm.target, scheme, score, dict.fromkeys(predict.MEASURES, 0.0) | values, half)


def made_up(seed=0):
    """Scores fall with `entropy` (of the scaling) and, less, with `gap_rows` (of the scheme); `turns` is noise."""
    rng = np.random.default_rng(seed)
    return [
        case(*setting, scaling, scheme, level - 6 * place, entropy=-level, gap_rows=float(place), turns=rng.random())
        for setting in SETTINGS
        for scaling, level in SCALES.items()
        for place, scheme in enumerate(("pose", "endprompt", "contiguous"))
    ]


def test_what_the_scores_were_made_of_is_found_and_holds():
    rows, pair_line = theory.tested(made_up())
    assert {r["half"] for r in rows} == set(theory.SETS)
    candidates = {r["method"] for r in rows if r.get("candidate")}
    assert candidates == {"entropy", "entropy + gap_rows"}
    found = {(r["method"], r["half"]): r for r in rows}
    pair = found["entropy + gap_rows", "other"]
    assert pair["value"] == pytest.approx(1) and pair["holds"]
    # whole scalings can be exchanged in 3! ways in each of two settings: no p below 1 in 36
    assert pair["p"] == pytest.approx(1 / 36, rel=0.35)
    assert pair["error"] < 1 < pair["error_of_mean"]
    assert pair["points"] == pair_line.points == pytest.approx({"entropy": -1, "gap_rows": -6})
    assert {r["metric"] for r in theory.rows_of(made_up(), pair_line)} == {*predict.MEASURES, "best_pair"}
    noise = found["turns", "other"]
    assert not noise["holds"] and noise["p"] > 0.05
    assert found["gap_rows", "other"]["inside_scaling"][0] == pytest.approx(-1), "inside a scaling it orders all"
    ceiling = found["mean score of the scaling", "other"]["value"]
    assert found["entropy", "other"]["value"] == pytest.approx(-ceiling) and ceiling < 1


def test_a_measure_that_turns_round_on_the_study_does_not_hold():
    cases = [
        dataclasses.replace(c, values=c.values | {"entropy": -c.values["entropy"]}) if c.half == "study" else c
        for c in made_up()
    ]
    rows = [r for r in theory.tested(cases)[0] if r["method"] == "entropy"]
    assert all(r["candidate"] and not r["holds"] and not r["one_sign"] for r in rows)


def test_exchanges_of_scalings_count_arms_of_one_scaling_as_one():
    """Two scalings of five arms: perfect, but the exchange is one of two; arms alone would say 1 in 252."""
    cases = [
        case(scaling=s, scheme=f"scheme {i}", score=10 * j + i) for j, s in enumerate(SCALES) for i in range(5) if j < 2
    ]
    x = np.array([float(c.arm.scaling == "ntk") for c in cases])
    assert theory.p_value(x, cases, 1.0) == pytest.approx(0.5, abs=0.03)
    assert theory.p_value(x, cases, -1.0) == pytest.approx(1, abs=0.03)
    apart = [case(scaling=s, score=level) for s, level in SCALES.items()]
    scores = np.array([c.score for c in apart])
    orders = [np.corrcoef(order, [0, 1, 2])[0, 1] for order in itertools.permutations(range(3))]
    for order, rho in zip(itertools.permutations(range(3)), orders):
        expected = np.mean(np.array(orders) >= rho - 1e-9)
        assert theory.p_value(np.array(order, dtype=float), apart, 1.0) == pytest.approx(expected, abs=0.03)
    assert scores.argsort().tolist() == [0, 1, 2]


def test_the_isotonic_prediction_by_hand():
    cases = [
        case(scheme=str(i), score=s, entropy=x) for i, (x, s) in enumerate([(1, 40), (2, 10), (3, 30), (3, 10), (4, 0)])
    ]
    line = theory.Line(["entropy"], cases)
    assert line.sign == -1
    # falling: 40, then 10 and twice 20 are pooled to 16.67, then 0
    assert line(cases) == pytest.approx([40, 50 / 3, 50 / 3, 50 / 3, 0])
    assert line([case(entropy=9.0), case(entropy=1.5)]) == pytest.approx([0, (40 + 50 / 3) / 2])


@pytest.mark.parametrize(
    ("kind", "there"),
    [("pose", True), ("anchors4", True), ("base", True), ("full", True), ("longlora", False), ("relay", False),
     ("randomised", False), ("sentences-8", False), ("endprompt-sentences", True)],
)  # fmt: skip
def test_arms_whose_pairs_are_not_known_are_left_out(kind, there):
    assert theory.known(dataclasses.replace(case().arm, kind=kind)) is there


def test_cases_are_the_labs_arms_with_their_rows_own_pairs(monkeypatch):
    """Each base is read once a target; an arm's rows decide its pairs, an untrained one has none."""
    asked = []

    class Reading:
        def of_scaling(self, name):
            return {"entropy": float(len(name))}

        def of_scheme(self, name, counts, tokens):
            asked.append((name, None if counts is None else counts.sum().round(6), tokens))
            return {"gap_rows": 1.0}

    read = []
    monkeypatch.setattr(predict, "read", lambda config, scalings: read.append((config.target, *scalings)) or Reading())

    def row(arm, scaling, method, target=2048, **more):
        about = {"suite": "ruler", "task": "vt", "length": target, "value": 30.0, "seed": 0, "samples_sha256": "x"}
        about |= {"base": "256", "window": 256, "target": target, "fold": target // 256, "arm": arm, "method": method}
        return about | {"scaling": scaling, "steps": 0, "n": 4} | more

    trained = {
        "steps": 300,
        "scheme": "endprompt",
        "row_tokens": 256,
        "prompt_tokens": 13,
        "anchors": None,
        "prompt": "EP_1",
    }
    rows = [
        row("untrained+none", "none", "base"),
        row("untrained+none", "none", "base", 8192),
        row("untrained+yarn", "yarn", "untrained+yarn"),
        row("endprompt+yarn", "yarn", "endprompt+yarn", **trained),
        row("endprompt+yarn", "yarn", "endprompt+yarn", 8192, **trained),
        row("relay+yarn", "yarn", "relay+yarn", **(trained | {"scheme": "relay"})),
    ]
    cases = theory.cases_of(rows, {"256": "somewhere"})
    assert (
        read == [(2048, "none", "yarn"), (8192, "none", "yarn")]
        and theory.cases_of(rows, {"256": "somewhere"}, "study")[0].half == "study"
    )
    assert len(read) == 2, "a base is read once a target"
    assert [(c.target, c.arm.name, c.scheme) for c in cases] == [
        (2048, "untrained+none", None),
        (2048, "untrained+yarn", None),
        (2048, "endprompt+yarn", "endprompt"),
        (8192, "untrained+none", None),
        (8192, "endprompt+yarn", "endprompt"),
    ]
    pairs = 256 * 257 / 2  # of a row, a token with itself included
    assert asked[:3] == [("none", None, 0), ("yarn", None, 0), ("yarn", pairs, 256)]
    assert [c.half for c in cases] == ["chosen"] * 3 + ["other"] * 2


def test_a_tuned_scaling_is_judged_seed_by_seed_against_yarn():
    """By hand: PoSE gains 8, 10, 12 and recall 6, 6, 6 with one factor; heads lose 20 where both do not fail."""

    def cell(scaling, scheme, seed, score, base="256", target=2048):
        about = {"suite": "ruler", "task": "vt", "length": target, "value": score, "seed": seed, "samples_sha256": "x"}
        about |= {"base": base, "window": 256, "target": target, "fold": target // 256, "arm": f"{scheme}+{scaling}"}
        inside = about | {"length": 256, "value": 77.0}
        more = {"method": "m", "scaling": scaling, "steps": 300, "scheme": scheme, "prompt": None}
        return [about | more, inside | more]

    gains = {"pose": (8, 10, 12), "endprompt": (6, 6, 6)}
    rows = [
        row
        for scheme, gain in gains.items()
        for seed, points in enumerate(gain)
        for scaling, score in (("yarn", 40.0), ("yarn@1.347", 40.0 + points), ("yarn@1", 90.0), ("linear@yarn", 9.0))
        for row in cell(scaling, scheme, 20 + seed, score)
    ]
    failing = [row for scaling in ("yarn", "yarn@1.5") for row in cell(scaling, "pose", 20, 1.0, target=8192)]
    for seed in (20, 21, 22):  # as many seeds as the others, and both fail: no part of the mean
        failing += [row for scaling in ("yarn", "yarn@1.4") for row in cell(scaling, "pose", seed, 1.0, target=4096)]
    sharp = [row for seed in (20, 21) for row in cell("yarn@1", "pose", seed, 20.0 + seed - 20, "runs/x/256-2048")]
    found = {r["method"]: r for r in theory.tuned([*rows, *failing, *theory.of_heads(sharp)], "lab")}
    even, heads = found["even"], found["heads"]
    assert (even["value"], even["n"], even["verdict"]) == (8, 3, "helps")
    half = 4.302653 / np.sqrt(3)  # t of two degrees of freedom; the seeds' means are 7, 8, 9
    assert even["ci95"] == pytest.approx((8 - half, 8 + half))
    assert {tuple(p["of"]): p["verdict"] for p in even["parts"]} == {
        ("256", 2048, "pose"): "helps", ("256", 2048, "endprompt"): "helps", ("256", 8192, "pose"): "not decided",
        ("256", 4096, "pose"): "no difference",
    }  # fmt: skip
    assert heads["value"] == -19.5 and heads["parts"][0]["arms"] == ["pose+yarn@heads", "pose+yarn"]
    assert [even["p_holm"], heads["p_holm"]] == pytest.approx([2 * even["p"], heads["p"]])


def test_each_heads_queries_carry_its_factor(tmp_path):
    heads.sharpen("256", 2048, tmp_path)
    _, factors = predict.even_factor(PredictConfig("benchmarks/base/256", 2048), "yarn")
    old, new = (load_file(folder / "model.safetensors") for folder in (Path("benchmarks/base/256"), tmp_path))
    assert all(torch.equal(old[key], new[key]) for key in old if "q_proj" not in key)
    key = "model.layers.1.self_attn.q_proj.weight"
    ratio = (new[key] / old[key]).reshape(3, -1).mean(1)
    assert ratio.numpy() == pytest.approx(factors[1] ** 2, rel=1e-4) and ratio.std() > 0.01


def test_the_commands_order_and_words_are_those_of_the_rows():
    """What `endprompt predict` goes by and says, against the committed rows, from which the test is made again."""
    rows = packed_rows(MEASURED / "lab_predict.jsonl.gz")
    later = packed_rows(MEASURED / "pages" / "lab_predict_again.jsonl.gz")
    tests = {(r["method"], r["half"]): r for r in [*rows, *later] if r["task"] == "predict-test"}
    sets = ("other", "study", "controls")
    pair = " + ".join(predict.ORDER)
    assert tests[pair, "other"]["candidate"] and tests[pair, "other"]["holds"]
    assert pytest.approx(tests[pair, "chosen"]["points"], rel=2e-3) == predict.ORDER
    assert all(f"{tests[pair, half]['value']:+.2f}" in predict.WORTH for half in sets)
    assert all(f"{end:.2f}" in predict.WORTH for half in sets for end in tests[pair, half]["ci95"])
    assert all(f"{tests[pair, half]['n']} arms" in predict.WORTH for half in sets)
    assert f"{tests['mean score of the scaling', 'controls']['value']:+.2f}" in predict.WORTH
    assert tests[pair, "controls"]["p"] == pytest.approx(1 / 4001)
    assert tests[pair, "other"]["p"] == pytest.approx(1 / 36, rel=0.1)
    assert tests[pair, "study"]["p"] == pytest.approx(2 / 24, rel=0.1)
    made = {}
    for r in rows:
        if r["task"] == "predict":
            made.setdefault((r["half"], r["base"], r["target"], r["arm"]), (r, {}))[1][r["metric"]] = r["value"]
    cases = [
        case(r["base"], r["window"], r["target"] // r["window"], r["scaling"], r["scheme"], r["score"], **values)
        for r, values in made.values()
    ]
    for half in ("chosen", "other"):
        members = [c for c in cases if c.half == half]
        found = theory.correlation(np.array([c.values["best_pair"] for c in members]), members)
        assert found.value == pytest.approx(tests[pair, half]["value"]) and found.n == tests[pair, half]["n"]
    order, members = {}, []
    for r in (r for r in later if r["task"] == "predict" and r["metric"] in predict.ORDER):
        arm = (r["base"], r["target"], r["arm"])
        if arm not in order:
            members.append(
                case(r["base"], r["window"], r["target"] // r["window"], r["scaling"], r["scheme"], r["score"])
            )
        order[arm] = order.get(arm, 0.0) + predict.ORDER[r["metric"]] * r["value"]
    found = theory.correlation(np.array([*order.values()]), members)
    assert found.value == pytest.approx(tests[pair, "controls"]["value"], abs=2e-3) and found.n == 128


def test_expected_pairs_predict_as_the_labs_drawn_rows_did():
    """`gap_rows`, from expectations in closed form, beside the lab's own `gap_rms`, from rows as they were trained."""
    ours = {
        (r["base"], r["target"], r["arm"]): r["value"]
        for r in packed_rows(MEASURED / "lab_predict.jsonl.gz")
        if r["task"] == "predict" and r["metric"] == "gap_rows" and r["base"] in ("256", "512")
    }
    theirs = {
        (r["base"], r["target"], r["arm"]): r["gap_rms"]
        for r in packed_rows(MEASURED / "lab_results.jsonl.gz")
        if r.get("gap_rms") is not None
    }
    both = ours.keys() & theirs.keys()
    assert len(both) > 90
    ratio = np.array([ours[key] / theirs[key] for key in both])
    assert np.all(np.abs(ratio - 1) < 0.25) and np.median(np.abs(ratio - 1)) < 0.02


def test_the_page_of_measures_is_written_from_the_rows():
    written = (pages.HERE / measures_page.PAGE).read_text(encoding="utf-8")
    assert written == measures_page.page(), "run python -m tests.support.measures_page"
