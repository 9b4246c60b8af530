"""RoPE frequencies and their scaling: the one definition, in float64, against which a loaded model's own float32 buffer
is held. Every formula is stated for head_dim D (the rotated part of it), n = D/2 frequencies theta_j = base^(-2j/D) in
radians per token, factor s, and the window before scaling.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Frequencies = tuple[np.ndarray, float]


def base_frequencies(base: float, head_dim: int) -> np.ndarray:
    """theta_j = base^(-2j/D), float64 (D/2,). Su et al. 2021, arXiv:2104.09864. ValueError: odd head_dim, base <= 1."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim must be even and at least 2: {head_dim=}")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"the RoPE base must be a finite number above 1: {base=}")
    return np.exp(np.arange(head_dim // 2, dtype=np.float64) * (-2.0 / head_dim * math.log(base)))


def none(base: float, head_dim: int, factor: float, original_length: int) -> Frequencies:
    """No scaling."""
    return base_frequencies(base, head_dim), 1.0


def linear(base: float, head_dim: int, factor: float, original_length: int) -> Frequencies:
    """Position interpolation, theta_j / s. Chen et al. 2023, arXiv:2306.15595."""
    return base_frequencies(base, head_dim) / factor, 1.0


def ntk(base: float, head_dim: int, factor: float, original_length: int) -> Frequencies:
    """NTK-aware: the base grows to base * s^(D/(D-2)), so theta_0 stays and theta_{n-1} is divided by s."""
    return base_frequencies(ntk_base(base, head_dim, factor), head_dim), 1.0


def ntk_base(base: float, head_dim: int, factor: float) -> float:
    if head_dim < 4:
        raise ValueError(f"ntk scaling needs at least two frequencies (head_dim >= 4): {head_dim=}")
    return base * factor ** (head_dim / (head_dim - 2))


def dynamic(
    base: float, head_dim: int, factor: float, original_length: int, *, length: int | None = None
) -> Frequencies:
    """Dynamic NTK at a sequence length (default: the extended window s * L0), as transformers computes it: base * (s *
    length / L0 - (s - 1))^(D/(D-2)); at lengths up to L0 nothing is scaled.
    """
    length = max(original_length, int(factor * original_length) if length is None else length)
    grown = factor * length / original_length - (factor - 1)
    return base_frequencies(base * grown ** (head_dim / (head_dim - 2)), head_dim), 1.0


def yarn(
    base: float,
    head_dim: int,
    factor: float,
    original_length: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    truncate: bool = True,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> Frequencies:
    """YaRN. Peng et al. 2023, arXiv:2309.00071.

    Frequencies that turn more than beta_fast times in the original window stay, those below beta_slow turns are divided
    by s, a linear ramp lies between. The attention scale 0.1 ln s + 1 (on q and on k) is returned, not applied; with
    both mscale and mscale_all_dim it is (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1), as DeepSeek has it.
    """
    theta = base_frequencies(base, head_dim)

    def index_of(turns: float) -> float:
        return head_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = index_of(beta_fast or 32.0), index_of(beta_slow or 1.0)  # transformers takes 0 for left out
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    if attention_factor is None:
        over, under = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
        attention_factor = (0.1 * over * math.log(factor) + 1.0) / (0.1 * under * math.log(factor) + 1.0)
    return theta / factor * ramp + theta * (1 - ramp), attention_factor


def llama3(
    base: float,
    head_dim: int,
    factor: float,
    original_length: int,
    *,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Frequencies:
    """Llama 3.1's: wavelengths above L0/low divided by s, below L0/high kept, interpolated in frequency between."""
    if not high_freq_factor > low_freq_factor:
        raise ValueError(f"high_freq_factor must be above low_freq_factor: {high_freq_factor=} {low_freq_factor=}")
    theta = base_frequencies(base, head_dim)
    turns = original_length * theta / (2 * math.pi)
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (1 - smooth) * theta / factor + smooth * theta, 1.0


def longrope(
    base: float,
    head_dim: int,
    factor: float,
    original_length: int,
    *,
    short_factor: Sequence[float] | None = None,
    long_factor: Sequence[float] | None = None,
    attention_factor: float | None = None,
    length: int | None = None,
) -> Frequencies:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): theta_j / lambda_j, with one list of divisors up to the original
    window and one beyond, chosen by `length` (default: beyond). The attention scale is sqrt(1 + ln s / ln L0).
    """
    divisors = long_factor if length is None or length > original_length else short_factor
    if divisors is None:
        raise ValueError("longrope needs short_factor and long_factor, one divisor a frequency")
    if len(divisors) != head_dim // 2:
        raise ValueError(f"longrope needs head_dim/2 = {head_dim // 2} divisors: got {len(divisors)}")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
    return base_frequencies(base, head_dim) / np.asarray(divisors, dtype=np.float64), attention_factor


def longrope_start(head_dim: int, factor: float) -> dict[str, list[float]]:
    """Divisors without a search: 1 up to the original window, beyond it ntk's, lambda_j = s^(2j/(D-2))."""
    exponents = np.arange(head_dim // 2) * 2.0 / (head_dim - 2)
    return {"short_factor": [1.0] * (head_dim // 2), "long_factor": (factor**exponents).tolist()}


SCALINGS: dict[str, Callable[..., Frequencies]] = {
    scaling.__name__: scaling for scaling in (none, linear, ntk, dynamic, yarn, llama3, longrope)
}

#: Share of the slowest component that `base_bounds` asks to be left after all layers; the paper leaves it open.
COHERENCE = 0.9


def base_bounds(
    target: int, layers: int, coherence: float = COHERENCE, precision: float = 2.0**-23
) -> dict[str, float]:
    """Bounds on the RoPE base for a window of `target`, by arXiv:2602.10959, which takes 1/base as slowest frequency.

    From below, aliasing: L / 2 pi, less than a turn over the window; stability: L / arccos(coherence^(1/layers)), so
    that so much is left of the slowest component after all layers. From above, precision: 1 / machine epsilon, of
    float32 by default, in which transformers holds frequencies. A scaled model's base is 1 / its slowest frequency.
    """
    stability = target / math.acos(coherence ** (1 / layers))
    return {"aliasing": target / (2 * math.pi), "stability": stability, "precision": 1 / precision}


#: Keys of rope_parameters that each scaling reads beside rope_theta; `rope_type` in transformers' configs.
YARN = ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor")
READ: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", *YARN),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor"),
    "proportional": ("factor",),
}
#: Keys that no scaling sets, and that an extension leaves as they are: the rotated part of a head, Llama 4's growth of
#: the queries with the position (Ministral 3), a note of YaRN's authors; the stated window, which some repeat.
CARRIED = ("partial_rotary_factor", "llama_4_scaling_beta", "finetuned", "max_position_embeddings")


def unknown_keys(parameters: Mapping[str, Any]) -> list[str]:
    """Keys of a config's rope_parameters that change something and are neither read by its scaling nor carried."""
    known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *CARRIED}
    known |= set(READ.get(parameters.get("rope_type", "default"), ()))
    return sorted(
        key
        for key, value in parameters.items()
        if key not in known and value is not None and (key, value) != ("factor", 1)
    )


def kept_options(parameters: Mapping[str, Any], factor: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling's own options of a checkpoint that go on when it is extended again to `factor`, a stated attention
    scale of 1 too. Raises ValueError for another one, made for the factor before, unless the user's options state it
    anew.
    """
    kind = parameters["rope_type"]
    kept = {key: parameters[key] for key in READ[kind] if key != "factor" and parameters.get(key) is not None}
    stated = kept.get("attention_factor", 1)
    if stated != 1 and "attention_factor" not in options:
        own = f" (YaRN's own is {0.1 * math.log(factor) + 1:.4f})" if kind == "yarn" else ""
        raise ValueError(
            f"attention_factor={stated} was stated for factor {parameters.get('factor') or 'of the config'}; for "
            f"factor {factor:g} give rope_options.attention_factor{own}"
        )
    return kept


def inverse_frequencies(
    scheme: str, base: float, head_dim: int, factor: float, original_length: int, **options: Any
) -> Frequencies:
    """(frequencies in radians per token, float64 (head_dim/2,); attention factor on q and on k) of a scaling. Raises
    ValueError if the scheme or an option is unknown, factor < 1, original_length < 1, or head_dim is odd.
    """
    if scheme not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}: {scheme=}")
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"the scaling factor must be a finite number of at least 1: {factor=}")
    if original_length < 1:
        raise ValueError(f"the original window must be positive: {original_length=}")
    known = inspect.signature(SCALINGS[scheme]).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"scaling {scheme!r} has no option {unknown[0]!r}: {unknown[0]}={options[unknown[0]]!r}")
    return SCALINGS[scheme](base, head_dim, factor, original_length, **options)


def rope_parameters(
    scheme: str, base: float, head_dim: int, factor: float, original_length: int, **options: Any
) -> dict[str, Any]:
    """The whole `rope_parameters` of a transformers config with these frequencies; `ntk` as a changed rope_theta."""
    inverse_frequencies(scheme, base, head_dim, factor, original_length, **options)  # refuses what is out of range
    if scheme == "none":
        return {"rope_type": "default", "rope_theta": float(base)}
    if scheme == "ntk":
        return {"rope_type": "default", "rope_theta": float(ntk_base(base, head_dim, factor))}
    parameters: dict[str, Any] = {"rope_type": scheme, "rope_theta": float(base), "factor": float(factor)}
    if scheme in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = int(original_length)
    if scheme == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return parameters | {key: value for key, value in options.items() if key != "length"}


def frequencies_of(parameters: Mapping[str, Any], head_dim: int, window: int, length: int | None = None) -> Frequencies:
    """Frequencies that a config's `rope_parameters` mean, by the same formulas. head_dim: the whole head, of which
    partial rotary (`partial_rotary_factor`) rotates the first part. window: the config's max_position_embeddings.
    length: of the sequence, where the scaling depends on it (dynamic and longrope); default the original window, the
    state of a model just loaded. Raises ValueError for a rope_type that is not known.
    """
    parameters = dict(parameters)
    kind = parameters.get("rope_type", "default")
    rotary = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    base = parameters["rope_theta"]
    original = parameters.get("original_max_position_embeddings") or window
    factor = parameters.get("factor") or (window / original)
    options: dict[str, Any] = {}
    if kind == "default":
        return none(base, rotary, 1.0, original)
    if kind == "proportional":  # Gemma 4: the fastest frequencies of a whole head, and the rest of it is not turned
        return base_frequencies(base, head_dim)[: rotary // 2] / (parameters.get("factor") or 1.0), 1.0
    if kind not in SCALINGS:
        raise ValueError(f"rope_type must be one of default, {', '.join(SCALINGS)}: rope_type={kind!r}")
    if kind == "dynamic":
        original = window  # transformers scales beyond max_position_embeddings, whatever else the config holds
    if kind in ("dynamic", "longrope"):
        options["length"] = int(original) if length is None else length
    names = [name for name in READ.get(kind, ()) if name != "factor"]
    options |= {name: parameters[name] for name in names if parameters.get(name) is not None}
    return inverse_frequencies(kind, base, rotary, factor, int(original), **options)
