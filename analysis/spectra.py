"""The attention score of one query-key pair as a function of relative distance.

    S(d) = Re sum_j z_j exp(i omega_j d) = sum_j a_j cos(omega_j d + phi_j),   z_j = a_j exp(i phi_j)

P pairs, n frequencies (n = D/2), N distances in tokens. S carries neither 1/sqrt(D) nor the attention factor squared:
the logit before softmax is S * attention_factor**2 * scaling. A part of the head that RoPE does not turn (partial
rotary) is a frequency 0 with a real z. All angles are float64.
"""

import math
from typing import Any

import numpy as np

from endprompt.rope import base_frequencies, inverse_frequencies

LAYOUTS = ("half", "interleaved")


def rope_freqs(
    base: float, head_dim: int, scheme: str = "none", factor: float = 1.0, original_length: int = 8192, **options: Any
) -> tuple[np.ndarray, float]:
    """(radians per token, float64 (D/2,); attention factor) of a RoPE scaling; errors as of `inverse_frequencies`."""
    return inverse_frequencies(scheme, base, head_dim, factor, original_length, **options)


def with_factor(name: str, base: float, head_dim: int, factor: float, window: int) -> tuple[str, dict[str, Any]]:
    """(scaling, options) of a name: a scaling, or NAME@FACTOR, its frequencies with that attention factor on q and k: a
    number, or `yarn` for YaRN's own, 0.1 ln s + 1. Frequencies of scalings that know no such factor go as the divisors
    of longrope, for every length. Raises ValueError for a factor that is not positive.
    """
    name, at, stated = name.partition("@")
    if not at:
        return name, {}
    try:
        attention_factor = 0.1 * math.log(factor) + 1 if stated == "yarn" else float(stated)
    except ValueError:
        attention_factor = math.nan
    if not 0 < attention_factor < math.inf:
        raise ValueError(f"an attention factor must be a positive number, or yarn: scaling={name}@{stated}")
    if name == "yarn":
        return name, {"attention_factor": attention_factor}
    divisors = (
        base_frequencies(base, head_dim) / inverse_frequencies(name, base, head_dim, factor, window)[0]
    ).tolist()
    return "longrope", {"short_factor": divisors, "long_factor": divisors, "attention_factor": attention_factor}


def spectrum_from_qk(q: Any, k: Any, layout: str = "half") -> np.ndarray:
    """z = q conj(k) as complex numbers, complex128 [..., n], from q and k [..., D] before RoPE. layout: `half` pairs
    component j with j + n (Llama), `interleaved` pairs 2j with 2j + 1 (GPT-J, Cohere). Raises ValueError if D is odd,
    the shapes differ, or a value is not finite.
    """
    q, k = as_float64(q), as_float64(k)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head_dim: {q.shape=} {k.shape=}")
    return as_complex(q, layout) * as_complex(k, layout).conj()


def as_float64(x: Any) -> np.ndarray:
    """An array or a torch tensor of any dtype and device."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu()
    return np.asarray(x, dtype=np.float64)


def as_complex(x: np.ndarray, layout: str) -> np.ndarray:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}: {layout=}")
    head_dim = x.shape[-1]
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim must be even and at least 2: {head_dim=}")
    if not np.isfinite(x).all():
        raise ValueError("queries and keys must be finite: found NaN or infinity")
    if layout == "half":
        return x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]
    return x[..., 0::2] + 1j * x[..., 1::2]


def check_spectrum(z: Any, omega: Any) -> tuple[np.ndarray, np.ndarray]:
    """z as complex128 [..., n] and omega as float64 [n]; raises ValueError if they do not fit or are not finite."""
    z, omega = np.asarray(z, dtype=np.complex128), np.asarray(omega, dtype=np.float64)
    if omega.ndim != 1 or z.ndim < 1 or z.shape[-1] != omega.size:
        raise ValueError(f"a spectrum needs one amplitude a frequency: {z.shape=} {omega.shape=}")
    if not omega.size:
        raise ValueError("a spectrum needs at least one frequency")
    if not (np.isfinite(z).all() and np.isfinite(omega).all()):
        raise ValueError("amplitudes and frequencies must be finite: found NaN or infinity")
    return z, omega


def check_order(order: int) -> int:
    if order < 0 or order != int(order):
        raise ValueError(f"the order of a derivative must be a whole number of at least 0: {order=}")
    return int(order)


def derivative_spectrum(z: np.ndarray, omega: np.ndarray, order: int) -> np.ndarray:
    """Spectrum of the derivative, z (i omega)^order. The power of i is a swap of parts, so it costs no rounding."""
    scaled = z * omega**order
    return (scaled, 1j * scaled, -scaled, -1j * scaled)[order % 4]


def eval_score(z: Any, omega: Any, d: Any, order: int = 0) -> np.ndarray:
    """S, or its derivative of that order, at the distances d: float64 [P, N] (or [N] for z of shape [n])."""
    z, omega = check_spectrum(z, omega)
    zr = derivative_spectrum(z, omega, check_order(order))
    angle = np.multiply.outer(omega, np.asarray(d, dtype=np.float64))
    return zr.real @ np.cos(angle) - zr.imag @ np.sin(angle)
