"""Measures of a scaling: values by hand for a head of two frequencies, and other routes for each formula."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analysis
from analysis import attention, measures, observability, predict
from analysis.config import PredictConfig
from analysis.spectra import with_factor
from endprompt.model import extended_config, load_config, rope_geometry
from endprompt.rope import base_bounds, inverse_frequencies

BASE_256 = "benchmarks/base/256"
THETA, ENERGY = np.array([1.0, 0.01]), np.array([3.0, 1.0])
NONE, PI = THETA, THETA / 8
FULL, HALF = np.array([np.pi, np.pi / 2]), np.array([np.pi / 2, np.pi / 4])
EVEN = np.array([1.0, 1.0])


@pytest.mark.parametrize(
    ("value", "by_hand"),
    [
        # window 100, target 800: the first frequency turns 16 times, the second reaches 1 radian of 8
        (lambda: measures.left_range(ENERGY, THETA, NONE, 100, 800), 1 / 4),
        (lambda: measures.left_range(ENERGY, THETA, PI, 100, 800), 0),
        (lambda: measures.left_range(ENERGY, THETA, np.array([1 / 8, 0.01]), 100, 800), 1 / 4),
        # of 800 distances 0..100 and, one turn on, 629..728 are at angles up to 1 radian
        (lambda: measures.unseen_angles(ENERGY, THETA, NONE, 100, 800), 599 / 800 / 4),
        (lambda: measures.unseen_angles(ENERGY, THETA, PI, 100, 800), 0),
        # rows that show 600..700 add the angles from 6 radians to a turn: 600..628
        (lambda: measures.unseen_angles(ENERGY, THETA, NONE, 100, 800, [(600, 700)]), 570 / 800 / 4),
        (lambda: measures.local_change(EVEN, FULL, np.array([np.pi / 2, np.pi / 2]), 1), 1),
        (
            lambda: measures.local_change(np.array([1.0, 3.0]), FULL, np.array([np.pi / 2, np.pi / 2]), 1),
            math.sqrt(0.5),
        ),
        # before: (2 + 0) / 2 and (1 + 2) / 2; after: (1 + 2) / 2 and (1 - 2^-1/2 + 1) / 2
        (lambda: measures.resolution_lost(EVEN, FULL, HALF, 2), 0.141421356237),
        (lambda: measures.distance_share(ENERGY, np.array([1.0, 1j])), 2 / 4),
        # d = 0, 1: the mean score is 2, 0 before and 2, 1 + 1 after
        (lambda: measures.distance_change(*[EVEN.astype(complex)] * 2, np.full(2, np.pi / 2), np.zeros(2), 2), 1),
        # means (1, 0) and (0, 1) of unit vectors, each component of power 1: 2 / (1 + 1)
        (lambda: measures.separation(*np.eye(2), EVEN, EVEN, np.zeros(2), 7), 1),
        # one frequency of half a turn a token: at four positions the means are gone
        (lambda: measures.separation(EVEN[:1], -EVEN[:1], EVEN[:1] * 2, EVEN[:1] * 2, FULL[:1], 4), 0),
        (lambda: measures.separation(EVEN[:1], -EVEN[:1], EVEN[:1] * 2, EVEN[:1] * 2, FULL[:1], 1), math.sqrt(4 / 2)),
        (lambda: measures.smoothness(np.array([0.125, 0.01]), 1.2), 0.18),
        (lambda: measures.turns(np.array([1.0, 0.01]), 101), 1 / (2 * math.pi)),
    ],
)
def test_a_head_of_two_frequencies_by_hand(value, by_hand):
    assert value() == pytest.approx(by_hand, abs=1e-11)


def test_interpolation_by_one_changes_nothing_and_a_head_without_rope_has_nothing_at_stake():
    mean = np.array([1 + 2j, 0.5])
    for energy, omega in ((ENERGY, THETA), (np.zeros(2), PI)):
        ranges = (energy, THETA, omega, 100, 100 if omega is THETA else 800)
        assert measures.left_range(*ranges) == measures.unseen_angles(*ranges) == 0
        for d in measures.NEAR:
            assert (
                measures.local_change(energy, THETA, omega, d) == 0 == measures.resolution_lost(energy, THETA, omega, d)
            )
    assert (
        measures.distance_change(mean, mean, THETA, THETA, 9)
        == 0
        == measures.distance_change(0 * mean, mean, THETA, PI, 9)
    )
    assert measures.distance_share(np.zeros(2), 0 * mean) == 0


def test_changes_of_the_score_are_those_of_random_spectra():
    rng = np.random.default_rng(0)
    amplitude = np.sqrt(ENERGY)
    z = amplitude * np.exp(2j * np.pi * rng.random((40_000, 2)))
    d, omega = np.arange(1, 17), np.array([0.8, 0.002])
    before, after = analysis.eval_score(z, THETA, d), analysis.eval_score(z, omega, d)
    change = math.sqrt(np.mean((after - before) ** 2) / (ENERGY.sum() / 2))
    assert measures.local_change(ENERGY, THETA, omega, 16) == pytest.approx(change, rel=0.02)
    near = [np.mean((s - analysis.eval_score(z, w, [0])) ** 2) for s, w in ((before, THETA), (after, omega))]
    assert measures.resolution_lost(ENERGY, THETA, omega, 16) == pytest.approx(1 - near[1] / near[0], abs=0.01)


def test_separation_is_that_of_rotated_vectors():
    rng = np.random.default_rng(1)
    q, k = (rng.normal(size=(500, 2)) @ [1, 1j] * np.ones((3, 1)) + rng.normal(size=(3, 1)) * 2 for _ in range(2))
    q, k, omega = q.T, k.T, np.array([1.0, 0.05, 0.001])
    turn = np.exp(1j * np.multiply.outer(np.arange(60), omega))
    far = [(turn[:, None] * x).reshape(-1, 3) for x in (q, k)]
    # every content at every position; the means are turned on the way, which moves both alike and is taken back
    middle = np.exp(-1j * omega * 59 / 2)
    mean = [x.mean(0) * middle for x in far]
    spread = sum((np.abs(x) ** 2).mean(0).sum() - (np.abs(x.mean(0)) ** 2).sum() for x in far)
    ours = measures.separation(q.mean(0), k.mean(0), (np.abs(q) ** 2).mean(0), (np.abs(k) ** 2).mean(0), omega, 60)
    assert ours == pytest.approx(math.sqrt((np.abs(mean[1] - mean[0]) ** 2).sum() / spread), rel=1e-9)


@pytest.mark.parametrize(
    ("scaling", "alone", "with_prompt"),
    [("linear", 0.009, 0.007), ("yarn", 0.22, 0.07), ("llama3", 0.23, 0.03), ("ntk", 0.38, 0.28), ("none", 0.62, 0.50)],
)
def test_gap_error_is_the_tables(scaling, alone, with_prompt):
    """The published table: 8B shape, an end prompt of 20, each observed distance once."""
    theta, _ = inverse_frequencies("none", 500000.0, 128, 1, 8192)
    omega, _ = inverse_frequencies(scaling, 500000.0, 128, 8, 8192)
    observed, gap = observability.distance_segments(65536, 8172, 20)
    counts = np.zeros(65536)
    for lo, hi in observed:
        counts[lo : hi + 1] = 1
    pretraining = theta, 8192
    assert measures.gap_error(omega, None, gap, 0.1, pretraining) == pytest.approx(alone, abs=0.006)
    assert measures.gap_error(
        omega, (observability.gram_weighted(omega, counts), int(counts.sum())), gap, 0.1, pretraining
    ) == pytest.approx(with_prompt, abs=0.006)
    assert measures.gap_error(omega, None, gap, 0.1) == pytest.approx(1, abs=0.05)  # all of a score of size 1


def test_energies_are_the_prior_of_the_gap():
    """All energy at a frequency that pretraining saw in full leaves next to nothing; at a slow one, what it is wide."""
    omega = np.array([1.0, 1e-3])
    fast, slow = (measures.gap_error(omega, None, [(2000, 2100)], 0.1, (omega, 100), e) for e in np.eye(2))
    assert fast < 0.02 < slow
    assert measures.gap_error(omega, None, [(2000, 2100)], 0.1, None, np.array([0.0, 5.0])) == pytest.approx(1)


def test_bounds_of_the_base():
    found = base_bounds(65536, 32, 0.9, 2**-7)
    assert found["aliasing"] * 2 * math.pi == pytest.approx(65536)
    assert math.cos(65536 / found["stability"]) ** 32 == pytest.approx(0.9)
    assert found["precision"] == 128
    assert base_bounds(65536, 1, 0.9, 2**-7)["stability"] < found["stability"], "depth asks for more"


@pytest.mark.parametrize("name", ["yarn@1", "linear@yarn", "ntk@1.5", "llama3@yarn", "llama3"])
def test_a_factor_goes_with_any_frequencies(name):
    """By the config that a model of transformers is made of: the frequencies of the one, the factor of the other."""
    plain, _, stated = name.partition("@")
    scaling, options = with_factor(name, 10000.0, 64, 8, 256)
    config = extended_config(load_config(BASE_256), scaling, 2048, **options)
    omega, factor = rope_geometry(config).frequencies(2048)
    np.testing.assert_allclose(omega, inverse_frequencies(plain, 10000.0, 64, 8, 256)[0], rtol=1e-12)
    assert factor == pytest.approx({"yarn": 1.2079441541679836, "": 1}.get(stated) or float(stated))
    for bad in ("yarn@", "linear@x", "ntk@0", "llama3@inf"):
        with pytest.raises(ValueError, match=f"must be a positive number, or yarn: scaling={bad}"):
            with_factor(bad, 10000.0, 64, 8, 256)


def layer_of(rng, heads=4, groups=2, tokens=6, n=2, still=1):
    def draw(number):
        return rng.normal(size=(number, tokens, n)) + 1j * rng.normal(size=(number, tokens, n))

    return SimpleNamespace(
        q=draw(heads), k=draw(groups), scaling=0.5,
        still_q=rng.normal(size=(heads, tokens, still)), still_k=rng.normal(size=(groups, tokens, still)),
    )  # fmt: skip


def test_rows_longer_than_the_text_by_the_plain_sum():
    layer, omega, factor, length = layer_of(np.random.default_rng(2)), np.array([1.0, 0.1]), 1.3, 11
    frame = attention.Frame(omega, 6, length)
    content = attention.keys_of_row(6, length)
    assert content[0] == 0 and list(content[-5:]) == [1, 2, 3, 4, 5] and 0 not in content[1:]
    (rows,) = frame.rows(layer, factor)
    assert frame.query.tolist() == [3, 4, 5]
    for head in range(4):
        entropies = []
        for place, token in enumerate(frame.query.tolist()):
            position = length - 6 + token
            logits = []
            for key in range(position + 1):
                z = layer.q[head, token] * layer.k[head // 2, content[key]].conj()
                score = factor**2 * analysis.eval_score(z, omega, [position - key])[0]
                logits.append(0.5 * (score + layer.still_q[head, token] @ layer.still_k[head // 2, content[key]]))
            p = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(rows.p[head, place, : position + 1], p, atol=1e-5)
            assert rows.p[head, place, position + 1 :].sum() == 0
            entropies.append(-(p * np.log(p)).sum())
        assert rows.entropy[head] == pytest.approx(np.mean(entropies), abs=1e-5)
        assert rows.sink[head] == pytest.approx(float(rows.p[head, :, 0].mean()))
    with pytest.raises(ValueError, match="must hold the whole text"):
        attention.Frame(omega, 6, 5)


def test_attention_moved_is_a_share():
    def rows(*p):
        return attention.Rows(torch.tensor([[p]]), np.zeros(1), np.zeros(1))

    assert attention.moved(rows(1.0, 0.0), rows(0.0, 1.0)) == 1
    assert attention.moved(rows(0.5, 0.5), rows(0.75, 0.25)) == 0.25


@pytest.fixture(scope="module")
def reading():
    return predict.read(PredictConfig(BASE_256, 2048, tokens=256))


def test_a_checkpoint_read_once(reading):
    """What must come out of any checkpoint: the base has lost nothing, interpolation no phase, and so on."""
    found = {name: reading.of_scaling(name) for name in reading.scalings}
    assert all(set(values) == set(predict.SCALING) for values in found.values())
    none, linear = found["none"], found["linear"]
    assert reading.heads == 12
    for key in (*(f"local_change_{d}" for d in measures.NEAR), "distance_change", "attention_moved"):
        assert none[key] == 0 < linear[key], key
    assert linear["left_range"] == linear["unseen"] == 0 < none["unseen"] < none["left_range"]
    assert linear["separation_lost"] == pytest.approx(0, abs=1e-3) and none["separation_lost"] > 0.1
    assert found["yarn"]["entropy"] < found["yarn"]["entropy_plain"], "the attention factor sharpens"
    assert none["entropy"] == none["entropy_plain"]


def test_the_even_factor_keeps_the_entropy():
    config = PredictConfig(BASE_256, 2048, tokens=256)
    factor, heads = predict.even_factor(config, "yarn")
    assert 1.2079 < factor < 1.5
    one = f"yarn@{heads[1][2]}"
    assert predict.read(config, [one]).found[one]["entropy"][1][2] == pytest.approx(0, abs=0.03)
    name = f"yarn@{factor}"
    assert predict.read(config, [name]).of_scaling(name)["entropy"] == pytest.approx(0, abs=0.03)


def test_the_rows_of_a_scheme_can_only_add(reading):
    counts = observability.pair_counts("endprompt", 236, 20, 2048)
    alone, trained = reading.of_scheme("yarn", None, 256), reading.of_scheme("yarn", counts, 256)
    assert all(trained[key] <= alone[key] for key in predict.SCHEME)
    assert trained["gap_rows"] < alone["gap_rows"] and trained["gap_pretrained"] < trained["gap_rows"]


@pytest.mark.parametrize(("target", "last"), [(300, 299), (512, 511), (513, 257), (2048, 1792)])
def test_the_gap_of_any_target_by_plain_regression(reading, target, last):
    """Twice the window is a target like others, though an end prompt at its end leaves no distance out."""
    reading = copy.copy(reading)
    reading.target = target
    omega, n = reading.scalings["yarn"][0], reading.theta.size

    def waves(frequencies, distances):
        angle = np.multiply.outer(distances, frequencies)
        return np.hstack([np.cos(angle), np.sin(angle)])

    seen, asked = waves(reading.theta, np.arange(256)), waves(omega, np.arange(256, last + 1))
    left = np.linalg.inv(n * np.eye(2 * n) + seen.T @ seen / 0.1**2)
    expected = math.sqrt(np.einsum("di,ij,dj->d", asked, left, asked).mean())
    assert reading.of_scheme("yarn", None, 256)["gap_pretrained"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": 256}, "the target must be above the checkpoint's window: target=256 window=256"),
        ({"tokens": 100}, "the text must have at least 256 tokens: tokens=100"),
        ({"noise": 0.0}, "must be positive: noise=0.0"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        predict.read(PredictConfig(**{"checkpoint": BASE_256, "target": 2048} | changes))


def test_the_table_goes_by_its_order(reading, monkeypatch):
    monkeypatch.setattr(predict, "read", lambda config: reading)
    monkeypatch.setattr(predict, "SCHEMES", ("none", "pose"))
    config = PredictConfig(BASE_256, 2048)
    lines = [json.loads(line) for line in predict.report(dataclasses.replace(config, json=True)).splitlines()]
    assert len(lines) == 2 * 5 and all(set(predict.MEASURES) < set(line) for line in lines)
    for line in lines:
        values = reading.of_scaling(line["scaling"])
        if line["scheme"] == "pose":
            values |= reading.of_scheme(line["scaling"], observability.pair_counts("pose", 256, 0, 2048), 256)
            assert line["order"] == pytest.approx(27.7 * values["smoothness"] - 125.6 * values["gap_pretrained"])
        assert line["entropy"] == values["entropy"] and line["target"] == 2048
    order = [(line["scaling"], line["scheme"]) for line in sorted(lines, key=lambda line: -line["order"])]
    text = predict.report(config).splitlines()
    assert [tuple(line.split()[:2]) for line in text[1:11]] == order
    with pytest.raises(ValueError, match="must know the window to extend to, in tokens: target=0"):
        monkeypatch.undo()
        predict.read(PredictConfig(BASE_256))
