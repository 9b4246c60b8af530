"""The guard by hand: a running mean of 0.9 and 0.1, its best, and the limit above it."""

import math

import pytest

from endprompt.train.loop import Guard


def test_running_mean_and_limit_are_those_that_are_stated():
    guard = Guard(limit=0.5)
    assert guard.check(2.0, 1.0) is None and guard.smoothed == guard.best == 2.0
    assert guard.check(1.0, 1.0) is None and guard.smoothed == pytest.approx(1.9) and guard.best == guard.smoothed
    assert guard.check(6.8, 1.0) is None and guard.smoothed == pytest.approx(2.39)  # 0.49 above the best
    message = guard.check(2.6, 1.0)  # 2.411: 0.511 above it
    assert message is not None and "2.411 is over divergence=0.5 above its best 1.900" in message


def test_without_a_limit_only_what_is_not_finite_is_wrong():
    guard = Guard(limit=0.0)
    assert guard.check(1.0, 1.0) is None and guard.check(1e9, 1.0) is None
    assert guard.check(math.nan, 1.0) and guard.check(1.0, math.inf)
    before = guard.smoothed
    assert guard.check(5.0, 1.0, smooth=False) is None and guard.smoothed == before
