"""The unregularised worst case, in extended precision.

max rms_gap / rms_obs over all coefficients is astronomically large, and float64 returns confident nonsense: G_obs
has eigenvalues far below its rounding. Needs python-flint (`pip install "endprompt-lab[exact]"`).
"""

import contextlib
from fractions import Fraction
from typing import Any

from endprompt.positions import Intervals
from endprompt.rope import base_frequencies

#: Steps of power iteration before giving up.
STEPS = 500


def amplification_log10(
    base: float, head_dim: int, factor: float, observed: Intervals, gap: Intervals, bits: int = 2500
) -> float:
    """log10 of the largest ratio of a score's root mean square on the gap to that on the observed distances.

    The largest eigenvalue of G_obs^-1 G_gap by power iteration, at frequencies base^(-2j/D) / factor with that many
    bits, and again with four fifths of them: the answer must be the same, else a plausible wrong number could go
    unnoticed. Raises ImportError without python-flint, ValueError if the two differ.
    """
    flint = _flint()
    base_frequencies(base, head_dim)  # refuses what is no RoPE
    if not observed or not gap:
        raise ValueError(f"both observed distances and a gap are needed: {observed=} {gap=}")
    if not 80 <= bits <= 100_000:
        raise ValueError(f"bits must lie between 80 and 100000: {bits=}")
    value, check = (_amplification(flint, base, head_dim, factor, observed, gap, b) for b in (bits, bits * 4 // 5))
    if value is None or check is None or abs(value - check) > 1e-6 * abs(value) + 1e-9:
        raise ValueError(
            f"{bits} bits do not carry the answer (with {bits * 4 // 5} it is another one): take more, {bits=}"
        )
    return value


def _amplification(
    flint: Any, base: float, head_dim: int, factor: float, observed: Intervals, gap: Intervals, bits: int
) -> float | None:
    """The same in a given precision, right or wrong; None where it comes out singular or negative."""
    with flint.ctx.workprec(bits), contextlib.suppress(ZeroDivisionError):
        omega = _frequencies(flint, base, head_dim, factor)
        product = _gram(flint, omega, observed).solve(_gram(flint, omega, gap), algorithm="approx").mid()
        value = _largest_eigenvalue(flint, product)
        return None if value is None or not value > 0 else float(value.log() / (2 * flint.arb(10).log()))
    return None


def _flint() -> Any:
    try:
        import flint
    except ImportError:
        raise ImportError(
            "the unregularised worst case needs extended precision: pip install python-flint "
            '(or "endprompt-lab[exact]")'
        ) from None
    return flint


def _frequencies(flint: Any, base: float, head_dim: int, factor: float) -> list[Any]:
    def exact(x: float) -> Any:
        ratio = Fraction(x)
        return flint.arb(ratio.numerator) / ratio.denominator

    log = exact(base).log()
    return [(-log * 2 * j / head_dim).exp() / exact(factor) for j in range(head_dim // 2)]


def _gram(flint: Any, omega: list[Any], segments: Intervals) -> Any:
    """Means of products of cos(omega_j d), sin(omega_j d) over the integer intervals, closed form as in `gram`."""
    n = len(omega)

    def exponential_sum(alpha: Any) -> tuple[Any, Any]:
        real = imag = flint.arb(0)
        for lo, hi in segments:
            number = hi - lo + 1
            kernel = flint.arb(number) if alpha == 0 else (alpha * number / 2).sin() / (alpha / 2).sin()
            sine, cosine = (alpha * (lo + hi) / 2).sin_cos()
            real, imag = real + kernel * cosine, imag + kernel * sine
        return real, imag

    rows: list[list[Any]] = [[None] * (2 * n) for _ in range(2 * n)]
    for i in range(n):
        for j in range(i + 1):
            cos_minus, sin_minus = exponential_sum(omega[i] - omega[j] if i != j else flint.arb(0))
            cos_plus, sin_plus = exponential_sum(omega[i] + omega[j])
            rows[i][j] = rows[j][i] = (cos_minus + cos_plus) / 2
            rows[n + i][n + j] = rows[n + j][n + i] = (cos_minus - cos_plus) / 2
            rows[i][n + j] = rows[n + j][i] = (sin_plus - sin_minus) / 2
            rows[j][n + i] = rows[n + i][j] = (sin_plus + sin_minus) / 2
    return (flint.arb_mat(rows) / sum(hi - lo + 1 for lo, hi in segments)).mid()


def _largest_eigenvalue(flint: Any, matrix: Any) -> Any:
    """By power iteration; None if it does not settle."""
    size = matrix.nrows()
    vector = flint.arb_mat([[flint.arb(1) / (1 + i)] for i in range(size)])
    value = flint.arb(0)
    for _ in range(STEPS):
        vector = (matrix * vector).mid()
        norm = sum((x * x for x in vector.entries()), start=flint.arb(0)).sqrt().mid()
        vector = (vector / norm).mid()
        if abs(norm - value) < norm * 1e-9:
            return norm
        value = norm
    return None
