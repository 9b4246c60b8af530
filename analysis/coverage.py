"""`endprompt positions`: which distances a scheme shows, how often, and what that predicts for the gap."""

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from analysis import measures, observability
from analysis.config import PositionsConfig
from analysis.spectra import rope_freqs
from endprompt.positions import Intervals


def survey(config: PositionsConfig) -> list[tuple[dict[str, Any], np.ndarray]]:
    """(row, expected pairs of a row of tokens at each distance, float64 [target]) of the configuration's scheme, or of
    all. A row has `coverage`, the share of distances that are observed; `observed` and `gap`, inclusive intervals in
    tokens; `gap_rms`, the predicted error of the score on the reference gap if every observed distance is seen once;
    `gap_rms_by_pairs`, with as many observations as the row has tokens, spread as its pairs are. Both in units of the
    score's own root mean square. Raises ValueError for sizes that do not fit.
    """
    schemes = observability.with_room_for(config.prompt) if config.scheme == "all" else (config.scheme,)
    tokens, sizes = config.context + config.prompt, (config.context, config.prompt, config.target)
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
    found = []
    for scheme in schemes:
        counts = observability.pair_counts(scheme, *sizes, count=config.count)
        observed = observability.runs(counts > 0)
        number = observability.size(observed)
        seen = (observability.gram(omega, observed), number), (observability.gram_weighted(omega, counts), tokens)
        once, by_pairs = (measures.gap_error(omega, rows, reference, config.noise) for rows in seen)
        row = {"scheme": scheme, "coverage": number / config.target, "observed": observed}
        row |= {"gap": observability.runs(counts == 0), "gap_rms": once, "gap_rms_by_pairs": by_pairs}
        found.append((row, counts))
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
    drawn = [f"drawn: {plot(config, found, config.plot)}"] if config.plot else []
    if config.json:
        return "\n".join(json.dumps(row | ({"layers": kinds} if kinds else {})) for row, _ in found)
    lines = [
        f"target {config.target}, context {config.context}, end prompt {config.prompt}; predicted RMS error in the gap "
        f"(score = 1, noise {config.noise})",
        f"{'scheme':<18}{'coverage':>9}{'gap RMS, each once':>20}{'gap RMS, by pairs':>19}  observed; gap",
    ]
    for row, _ in found:
        lines.append(
            f"{row['scheme']:<18}{row['coverage']:>9.1%}{row['gap_rms']:>20.4f}{row['gap_rms_by_pairs']:>19.4f}  "
            f"{spell(row['observed'])}; {spell(row['gap'])}"
        )
    return "\n".join([*lines, *kinds, *drawn])


def spell(segments: Intervals) -> str:
    return " ".join(f"[{lo}, {hi}]" for lo, hi in segments) or "none"


def plot(config: PositionsConfig, found: list[tuple[dict[str, Any], np.ndarray]], path: str) -> Path:
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
        for axis, (row, counts) in zip(axes, found, strict=True):
            for lo, hi in row["observed"]:
                axis.axvspan(lo - 0.5, hi + 0.5, color=OBSERVED, lw=0)
            axis.plot(np.arange(counts.size), np.where(counts > 0, counts, np.nan), color=SCORE, lw=1)
            axis.set_yscale("log")
            axis.set_ylim(max(counts[counts > 0].min() / 3, 1e-3), counts.max() * 3)
            axis.set_title(
                f"{row['scheme']}: {row['coverage']:.0%} of the distances observed; predicted RMS error in the gap "
                f"{row['gap_rms']:.3f} (each distance once), {row['gap_rms_by_pairs']:.3f} (by pairs)",
            )
        axes[-1].set_xlim(0, config.target - 1)
        axes[-1].set_xlabel("relative distance (tokens); shaded: observed")
        figure.supylabel("expected pairs a row", fontsize=8)
        target.parent.mkdir(parents=True, exist_ok=True)
        return save(figure, target)
