"""What RoPE attention does between the observed distances: bounds, certificates, observability.

Importing the package loads nothing; a name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "rope_freqs": "spectra",
    "spectrum_from_qk": "spectra",
    "eval_score": "spectra",
    "coef_bounds": "bounds",
    "coef_bound": "bounds",
    "bernstein_bound": "bounds",
    "duffin_schaeffer_excess": "bounds",
    "nonvacuous_radius": "bounds",
    "softmax_shift_bound": "bounds",
    "windowed_counterexample": "bounds",
    "certified_max": "certificates",
    "roundoff": "certificates",
    "freq_rank": "rank",
    "frequency_classes": "rank",
    "true_sup": "rank",
    "distance_segments": "observability",
    "pair_counts": "observability",
    "gram": "observability",
    "gram_weighted": "observability",
    "worst_gap": "observability",
    "posterior_gap_rms": "observability",
    "amplification_log10": "exact",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
