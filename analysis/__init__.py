"""What RoPE attention does between the observed distances: bounds, certificates, observability.

Importing the package loads nothing; a name loads its module on first use.
"""

import importlib
from typing import Any

import endprompt  # noqa: F401  # says how threads wait, before numpy and torch are imported

_NAMES = {
    "spectra": "rope_freqs spectrum_from_qk eval_score",
    "bounds": "coef_bounds coef_bound bernstein_bound nonvacuous_radius softmax_shift_bound windowed_counterexample",
    "certificates": "certified_max roundoff",
    "rank": "freq_rank frequency_classes true_sup",
    "observability": "distance_segments pair_counts gram gram_weighted worst_gap posterior_gap_rms",
    "exact": "amplification_log10",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
