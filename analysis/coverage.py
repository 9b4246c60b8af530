"""`endprompt positions`: which distances a scheme shows, how often, and what that predicts for the gap."""

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from analysis import observability
from analysis.config import PositionsConfig
from analysis.spectra import rope_freqs
from endprompt.positions import Intervals


@dataclass(frozen=True)
class Coverage:
    """One scheme's view of the distances 0..target-1. counts: expected pairs a row at each distance, float64 [target].
    gap_rms: predicted error of the score on the reference gap, if every observed distance is seen once;
    gap_rms_by_pairs: with as many observations as the row has tokens, spread as its pairs are. Both in units of the
    score's own root mean square.
    """

    scheme: str
    counts: np.ndarray
    observed: Intervals
    gap: Intervals
    gap_rms: float
    gap_rms_by_pairs: float

    @property
    def share(self) -> float:
        return observability.size(self.observed) / self.counts.size


def survey(config: PositionsConfig) -> list[Coverage]:
    """The scheme of the configuration, or all of them. Raises ValueError for sizes that do not fit."""
    schemes = observability.with_room_for(config.prompt) if config.scheme == "all" else (config.scheme,)
    tokens = config.context + config.prompt
    factor = config.target / tokens if config.factor is None else config.factor
    omega, _ = rope_freqs(config.base, config.head_dim, "linear", factor, tokens)
    # One gap for all, the fixed end prompt's, so that the predictions can be compared.
    _, reference = observability.distance_segments(
        config.target, config.context, config.prompt, "endprompt" if config.prompt else "contiguous"
    )
    if not reference:
        raise ValueError(
            "the target must leave a gap: "
            f"target={config.target} context={config.context} prompt={config.prompt} observe every distance below it"
        )
    gram_gap = observability.gram(omega, reference)
    found = []
    for scheme in schemes:
        counts = observability.pair_counts(scheme, config.context, config.prompt, config.target, count=config.count)
        observed, gap = observability.runs(counts > 0), observability.runs(counts == 0)
        once = observability.posterior_gap_rms(
            observability.gram(omega, observed), observability.size(observed), gram_gap, config.noise
        )
        by_pairs = observability.posterior_gap_rms(
            observability.gram_weighted(omega, counts), tokens, gram_gap, config.noise
        )
        found.append(Coverage(scheme, counts, observed, gap, once, by_pairs))
    return found


def report(config: PositionsConfig) -> str:
    """The schemes as a table, or as a line of JSON each; drawn too if asked."""
    found = survey(config)
    kinds: list[str] = []
    if config.model:
        from endprompt.model import load_config, rope_geometry
        from endprompt.model.kinds import described
        from endprompt.model.wrapper import text_config

        settings = text_config(load_config(config.model))
        rope_geometry(settings)
        kinds = described(settings, config.target)
    if config.json:
        if config.plot:
            plot(config, found, config.plot)
        return "\n".join(json.dumps(values(c) | ({"layers": kinds} if kinds else {})) for c in found)
    lines = [
        f"target {config.target}, context {config.context}, end prompt {config.prompt}; predicted RMS error in the gap "
        f"(score = 1, noise {config.noise})",
        f"{'scheme':<18}{'coverage':>9}{'gap RMS, each once':>20}{'gap RMS, by pairs':>19}  observed; gap",
    ]
    for c in found:
        lines.append(
            f"{c.scheme:<18}{c.share:>9.1%}{c.gap_rms:>20.4f}{c.gap_rms_by_pairs:>19.4f}  "
            f"{spell(c.observed)}; {spell(c.gap)}"
        )
    lines += kinds
    if config.plot:
        lines.append(f"drawn: {plot(config, found, config.plot)}")
    return "\n".join(lines)


def values(c: Coverage) -> dict[str, Any]:
    """What the table says of a scheme, for a program; intervals of distance in tokens, both ends included."""
    return {
        "scheme": c.scheme,
        "coverage": c.share,
        "observed": [[int(lo), int(hi)] for lo, hi in c.observed],
        "gap": [[int(lo), int(hi)] for lo, hi in c.gap],
        "gap_rms": float(c.gap_rms),
        "gap_rms_by_pairs": float(c.gap_rms_by_pairs),
    }


def spell(segments: Intervals) -> str:
    return " ".join(f"[{lo}, {hi}]" for lo, hi in segments) or "none"


def plot(config: PositionsConfig, found: list[Coverage], path: str) -> Path:
    """Pairs a row against distance, one panel a scheme, and the predicted error in the gap beside each."""
    from matplotlib import style
    from matplotlib.figure import Figure

    from analysis.figures import OBSERVED, SCORE, SHEET, save

    target = Path(path)
    if target.suffix not in (".png", ".pdf"):
        raise ValueError(f"plot must name a .png or .pdf file: plot={path!r}")
    with as_file(files("analysis") / SHEET) as sheet, style.context(str(sheet)):
        figure = Figure(figsize=(7, 0.8 + 1.1 * len(found)), layout="constrained")
        axes: Any = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        for axis, c in zip(axes, found, strict=True):
            for lo, hi in c.observed:
                axis.axvspan(lo - 0.5, hi + 0.5, color=OBSERVED, lw=0)
            d = np.flatnonzero(c.counts)
            axis.plot(np.arange(c.counts.size), np.where(c.counts > 0, c.counts, np.nan), color=SCORE, lw=1)
            axis.set_yscale("log")
            axis.set_ylim(max(c.counts[d].min() / 3, 1e-3), c.counts.max() * 3)
            axis.set_title(
                f"{c.scheme}: {c.share:.0%} of the distances observed; predicted RMS error in the gap {c.gap_rms:.3f} "
                f"(each distance once), {c.gap_rms_by_pairs:.3f} (by pairs)",
            )
        axes[-1].set_xlim(0, config.target - 1)
        axes[-1].set_xlabel("relative distance (tokens); shaded: observed")
        figure.supylabel("expected pairs a row", fontsize=8)
        target.parent.mkdir(parents=True, exist_ok=True)
        return save(figure, target)
