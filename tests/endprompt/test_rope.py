"""Our frequencies against transformers' own, for every scaling, and against formulas at known points."""

import math

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from endprompt import rope

DIM, BASE, WINDOW = 64, 500_000.0, 8192
LONG = {"short_factor": [1.0 + 0.01 * j for j in range(32)], "long_factor": [1.0 + j for j in range(32)]}
CASES = [
    ("linear", 8.0, {}, None),
    ("dynamic", 8.0, {}, None),
    ("dynamic", 8.0, {}, 3 * WINDOW),
    ("yarn", 8.0, {}, None),
    ("yarn", 32.0, {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, None),
    ("yarn", 4.0, {"attention_factor": 1.25}, None),
    ("yarn", 40.0, {"mscale": 1.0, "mscale_all_dim": 0.7}, None),
    ("yarn", 40.0, {"mscale": 1.0}, None),  # which alone counts for nothing
    ("yarn", 4.0, {"beta_fast": 0, "truncate": False}, None),
    ("llama3", 8.0, {}, None),
    ("longrope", 8.0, LONG, None),
    ("longrope", 8.0, LONG, WINDOW + 1),
]


def theirs(parameters, window, length):
    config = LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=window, rope_parameters=parameters
    )
    frequencies, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    return frequencies.double().numpy(), attention


@pytest.mark.parametrize(("scaling", "factor", "options", "length"), CASES)
def test_rope_equals_transformers(scaling, factor, options, length):
    parameters = rope.rope_parameters(scaling, BASE, DIM, factor, WINDOW, **options)
    window = WINDOW if scaling == "dynamic" else int(factor * WINDOW)
    expected, attention = theirs(parameters, window, length)
    ours, factor_of_attention = rope.frequencies_of(parameters, DIM, window, length)
    # float32 pow and one division: a few eps, times the exponent's own rounding
    np.testing.assert_allclose(ours, expected, rtol=32 * np.finfo(np.float32).eps)
    assert factor_of_attention == pytest.approx(attention, abs=1e-12)


def test_rope_ntk_keeps_the_fastest_and_divides_the_slowest_by_the_factor():
    plain, _ = rope.inverse_frequencies("none", BASE, DIM, 1.0, WINDOW)
    scaled, attention = rope.inverse_frequencies("ntk", BASE, DIM, 8.0, WINDOW)
    assert scaled[0] == plain[0] == 1.0
    assert scaled[-1] * 8 == pytest.approx(plain[-1], rel=1e-12)
    assert attention == 1.0


def test_rope_ntk_is_exported_as_a_changed_base():
    parameters = rope.rope_parameters("ntk", BASE, DIM, 8.0, WINDOW)
    assert parameters["rope_type"] == "default"
    assert parameters["rope_theta"] == pytest.approx(BASE * 8 ** (64 / 62), rel=1e-12)
    ours, _ = rope.inverse_frequencies("ntk", BASE, DIM, 8.0, WINDOW)
    np.testing.assert_allclose(rope.frequencies_of(parameters, DIM, 8 * WINDOW)[0], ours, rtol=1e-12)


def test_rope_known_points():
    plain, _ = rope.inverse_frequencies("none", 10_000.0, 4, 1.0, 16)
    assert plain.tolist() == pytest.approx([1.0, 0.01])
    linear, _ = rope.inverse_frequencies("linear", 10_000.0, 4, 8.0, 16)
    assert linear.tolist() == pytest.approx([0.125, 0.00125])
    _, attention = rope.inverse_frequencies("yarn", 10_000.0, 64, 8.0, 4096)
    assert attention == pytest.approx(0.1 * math.log(8) + 1)
    assert plain.dtype == np.float64


@pytest.mark.parametrize("scaling", sorted(set(rope.SCALINGS) - {"longrope"}))
def test_rope_factor_one_changes_nothing(scaling):
    ours, attention = rope.inverse_frequencies(scaling, BASE, DIM, 1.0, WINDOW)
    np.testing.assert_allclose(ours, rope.base_frequencies(BASE, DIM), rtol=1e-14)
    assert attention == 1.0


def test_rope_partial_rotary_rotates_the_first_part_of_the_head():
    parameters = {"rope_type": "linear", "rope_theta": BASE, "factor": 4.0, "partial_rotary_factor": 0.25}
    ours, _ = rope.frequencies_of(parameters, DIM, WINDOW)
    assert ours.shape == (8,)
    np.testing.assert_allclose(ours, theirs(parameters, WINDOW, None)[0], rtol=32 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("spiral", BASE, DIM, 2.0, WINDOW), "scaling must be one of"),
        (("linear", BASE, DIM, 0.5, WINDOW), "at least 1"),
        (("linear", BASE, DIM, math.nan, WINDOW), "finite number"),
        (("linear", BASE, 7, 2.0, WINDOW), "even"),
        (("linear", 1.0, DIM, 2.0, WINDOW), "base must be"),
        (("linear", BASE, DIM, 2.0, 0), "window must be positive"),
        (("longrope", BASE, DIM, 2.0, WINDOW), "short_factor and long_factor"),
    ],
)
def test_rope_refuses(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        rope.inverse_frequencies(*arguments)
