"""Predicted error of the score in the gap against what one can choose: target, context, anchors, scheme, scaling.

The average case of `posterior_gap_rms` with the white prior: coefficients c ~ N(0, I/n), one observation a distance,
so a score has mean square 1. A choice, not a measurement; it ranks what the positions alone determine.
"""

from typing import Any

import numpy as np

from analysis import measures, observability
from analysis.spectra import rope_freqs

FACTORS = (2, 4, 8, 16, 32)
ANCHORS = (1, 2, 3, 4, 5, 6, 8)
SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")


def outlook(geometry: Any, window: int, target: int, context: int, config: Any) -> dict[str, Any]:
    """What a checkpoint's RoPE lets the schemes determine, around the target and context at hand; plain lists. The gap
    is that of a fixed end prompt, or of none; `schemes` and `pretraining` are empty where rows leave none.
    """
    base, rotary = geometry.parameters["rope_theta"], geometry.rotary_dim
    kind = geometry.parameters.get("rope_type", "default")
    prompt, noise = config.prompt, config.noise
    fixed = ("contiguous", "endprompt") if prompt else ("contiguous",)
    own, _ = geometry.frequencies(target)

    def frequencies(length: int) -> np.ndarray:
        if kind in ("linear", "yarn", "llama3") and length > window:
            return rope_freqs(base, rotary, kind, length / window, window)[0]
        return own

    def predicted(scheme: str, length: int, tokens: int, count: int = 4) -> float | None:
        try:
            _, reference = observability.distance_segments(length, tokens, prompt, fixed[-1])
            observed, _ = observability.distance_segments(length, tokens, prompt, scheme, count=count)
        except ValueError:  # sizes that do not fit together: no point on the curve
            return None
        omega, number = frequencies(length), observability.size(observed)
        seen = (observability.gram(omega, observed), number) if number else None
        return measures.gap_error(omega, seen, reference, noise) if reference else None

    def line(scheme: str, places: list[int], at: Any) -> dict[str, Any]:
        found = [(place, at(scheme, place)) for place in places]
        kept = [(place, value) for place, value in found if value is not None]
        return {"scheme": scheme, "x": [place for place, _ in kept], "y": [float(f"{v:.6g}") for _, v in kept]}

    targets = sorted({window * factor for factor in FACTORS} | {target})
    contexts = sorted({max(prompt, window * share // 8, 1) for share in range(1, 9)} | {context})
    schemes: list[dict[str, Any]] = []
    _, reference = observability.distance_segments(target, context, prompt, fixed[-1])
    for scheme in observability.with_room_for(prompt) if reference else ():
        if (once := predicted(scheme, target, context, config.count)) is not None:
            schemes.append({"scheme": scheme, "once": once})
    if schemes:
        names = [entry["scheme"] for entry in schemes]
        counts = [observability.pair_counts(s, context, prompt, target, count=config.count) for s in names]
        for entry, pairs in zip(schemes, observability.gram_weighted(own, np.stack(counts)), strict=True):
            entry["by_pairs"] = measures.gap_error(own, (pairs, context + prompt), reference, noise)
    theta, _ = rope_freqs(base, rotary)
    pretraining = []
    for scaling in SCALINGS if reference else ():
        omega, _ = rope_freqs(base, rotary, scaling, max(target / window, 1.0), window)
        value = measures.gap_error(omega, None, reference, noise, (theta, window))
        pretraining.append({"scaling": scaling, "value": value})
    return {
        "target": [line(s, targets, lambda s, length: predicted(s, length, context)) for s in fixed],
        "context": [line(s, contexts, lambda s, tokens: predicted(s, target, tokens)) for s in fixed],
        "anchors": [line("anchors", list(ANCHORS) if prompt else [], lambda s, k: predicted(s, target, context, k))],
        "schemes": schemes,
        "pretraining": pretraining,
    }
