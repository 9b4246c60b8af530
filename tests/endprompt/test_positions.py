"""Positions against arrays typed by hand, and their purity in (seed, index)."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endprompt import positions


class Draws:
    """A generator that returns numbers given beforehand, so a random scheme can be checked against typed arrays."""

    def __init__(self, *values):
        self.values, self.asked = list(values), []

    def integers(self, low, high=None, endpoint=False):
        if high is None:
            low, high = 0, low
        self.asked.append((low, high if endpoint else high - 1))
        return self.values.pop(0)


def test_positions_sentences_typed():
    draws = Draws(0, 4)
    ids = positions.position_ids("sentences", 6, 0, 20, draws, starts=[0, 1, 4])
    assert ids.tolist() == [0, 1, 2, 3, 4 + 7 + 4, 5 + 7 + 4] and draws.asked == [(0, 6), (0, 6)]
    assert positions.position_ids("sentences", 6, 0, 20, Draws(), starts=[0]).tolist() == list(range(6))
    assert [positions.sentence_starts(n) for n in (20, 2)] == [[0, 6, 13], [0, 1]]
    draws = Draws(2, 5)  # 20 - 8 = 12: two strata of 6 places
    ids = positions.position_ids("endprompt-sentences", 5, 3, 20, draws, starts=[0, 1, 4])
    assert ids.tolist() == [0, 1 + 2, 2 + 2, 3 + 2, 4 + 6 + 5, 17, 18, 19] and draws.asked == [(0, 5), (0, 5)]


def test_whole_text_is_moved_in_one_piece():
    """From the second token on the context keeps its distances in the schemes that say so, and in no other."""
    for scheme in positions.SCHEMES:
        rows = [positions.position_ids(scheme, 24, 4, 256, positions.sample_rng(0, i))[:24] for i in range(50)]
        assert all((np.diff(row)[1:] == 1).all() for row in rows) == (scheme in positions.TEXT_WHOLE)


@pytest.mark.parametrize(
    ("scheme", "context", "prompt", "target", "draws", "ids", "asked"),
    [
        ("contiguous", 5, 0, 32, [], [0, 1, 2, 3, 4], []),
        ("endprompt", 6, 3, 32, [], [0, 1, 2, 3, 4, 5, 29, 30, 31], []),
        ("endprompt-random", 4, 2, 16, [10], [0, 1, 2, 3, 10, 11], [(4, 14)]),  # starts in [a, L - b]
        ("pose", 7, 0, 32, [3, 20], [0, 1, 2, 23, 24, 25, 26], [(1, 4), (0, 25)]),  # r1 in 1..(n+1)//2, u in 0..L-n
        ("endprompt-pose", 5, 2, 32, [2, 11], [0, 1, 13, 14, 15, 30, 31], [(1, 3), (0, 25)]),
        ("sliding", 5, 3, 32, [7], [0, 8, 9, 10, 11, 29, 30, 31], [(0, 24)]),
        ("sliding", 5, 3, 32, [24], [0, 25, 26, 27, 28, 29, 30, 31], [(0, 24)]),
    ],
)
def test_positions_typed(scheme, context, prompt, target, draws, ids, asked):
    given = Draws(*draws)
    layout = positions.layout(scheme, context, prompt, target, given)
    assert layout.position_ids.tolist() == ids and layout.position_ids.dtype == np.int64
    assert given.asked == asked
    assert layout.split == {"pose": 3, "endprompt-pose": 2}.get(scheme)  # where text is skipped


@pytest.mark.parametrize(("k", "end"), [(0, [6, 7]), (1, [14, 15]), (2, [22, 23]), (3, [30, 31])])
def test_positions_anchors_typed(k, end):
    assert positions.position_ids("anchors", 4, 2, 32, Draws(k), count=4).tolist() == [0, 1, 2, 3, *end]


def test_positions_anchor_inside_the_context_is_refused():
    with pytest.raises(ValueError, match="first of 8 anchors"):
        positions.position_ids("anchors", 4, 2, 32, Draws(0), count=8)


@given(
    st.sampled_from(sorted(positions.SCHEMES)),
    st.integers(2, 40),
    st.integers(1, 10),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)
@settings(suppress_health_check=[HealthCheck.too_slow])  # drawing is slow where other processes have the machine
def test_positions_rise_fit_and_depend_on_seed_and_index_only(scheme, context, prompt, seed, index):
    target = 256

    def draw():
        return positions.position_ids(scheme, context, prompt, target, positions.sample_rng(seed, index))

    ids = draw()
    assert ids.shape == (context + prompt,)
    assert ids[0] == 0 and ids[-1] < target
    assert (np.diff(ids) > 0).all()
    np.random.default_rng(3).random()  # other generators do not matter
    assert (draw() == ids).all()


def test_positions_differ_between_indices_and_seeds():
    drawn = {
        (seed, index): tuple(positions.position_ids("pose", 64, 0, 4096, positions.sample_rng(seed, index)))
        for seed in range(4)
        for index in range(8)
    }
    assert len(set(drawn.values())) == len(drawn)


def test_observed_distances_and_gap_by_brute_force():
    for context, prompt, target in [(6, 3, 32), (3, 6, 32), (10, 2, 12), (7, 4, 18), (5, 0, 16), (1, 1, 9)]:
        ids = positions.position_ids("endprompt" if prompt else "contiguous", context, prompt, target)
        seen = {int(b - a) for i, a in enumerate(ids) for b in ids[i:]}
        told = {d for lo, hi in positions.observed_distances(context, prompt, target) for d in range(lo, hi + 1)}
        assert told == seen
        hidden = sorted(set(range(target)) - seen)
        lo, hi = positions.gap(context, prompt, target) or (0, -1)
        assert hidden == list(range(lo, hi + 1))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("endprompt", 0, 2, 8), "context needs at least one token"),
        (("endprompt", 4, 8, 8), "shorter than the target window"),
        (("endprompt", 7, 2, 8), "must fit into the target window"),
        *(
            ((name, 4, 0, 8, np.random.default_rng(0)), f"'{name}' places an end prompt")
            for name in sorted(positions.WITH_PROMPT)
        ),
        (("zigzag", 4, 2, 8), "scheme must be one of"),
        (("pose", 4, 0, 8), "give it rng"),
        (("relay", 4, 4, 8), "scheme must be one of"),
        (("sentences", 9, 0, 9, np.random.default_rng(0)), "moves 2 pieces apart"),
    ],
)
def test_positions_refuse(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        positions.position_ids(*arguments)


def test_intervals_that_touch_are_joined_and_others_stay_apart():
    assert positions.merge([(5, 9), (0, 4)]) == [(0, 9)]
    assert positions.merge([(0, 3), (5, 9)]) == [(0, 3), (5, 9)]
    assert positions.merge([(0, 9), (2, 4), (9, 9)]) == [(0, 9)]
    # a = 4, b = 2, L = 9: 0..3 and 4..8 touch, so every distance is seen
    assert positions.observed_distances(4, 2, 9) == [(0, 8)] and positions.gap(4, 2, 9) is None
