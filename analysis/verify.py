"""`endprompt verify`: bounds on real weights, what the gap can hide, and what training changed.

A text is read once. For every layer and head the same pairs of places are taken, their spectra checked against the
model's own logits, all distances 0..L-1 evaluated in float64, and the values held against bounds over the whole line.
Values are in units of the logit (attention factor squared and 1/sqrt(D) included).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from analysis import observability, sweep
from analysis.bounds import bernstein_bound, coef_bound, nonvacuous_radius
from analysis.commands import VerifyConfig
from analysis.spectra import derivative_spectrum, eval_score
from endprompt.positions import Intervals
from endprompt.rows import RunDirectory, read_rows, result_row, sha256_of, write_text

#: A curve with more distances than this is stored as the range in each of so many bins.
CURVE_POINTS = 2048
CURVES = "curves.json"
#: Frequencies that turn this many radians over the window decide the gap: slower ones hardly move, faster ones repeat.
CRITICAL_BAND = (2.0, 60.0)

CHECKS = {
    "coefficient_order0": "|S| within sum a",
    "coefficient_order1": "|S'| within B1",
    "coefficient_order2": "|S''| within B2",
    "bernstein_order1": "|S'| within Bernstein",
    "bernstein_order2": "|S''| within Bernstein",
    "duffin_schaeffer": "S'^2 + sigma^2 S^2 within Duffin-Schaeffer",
}


@dataclass
class VerifyReport:
    """What `verify` found.

    shares: bound -> share of pairs within it over all layers and heads (1.0 unless something is wrong).
    worst: bound -> largest value over bound. rows: the rows written. curves: the content of curves.json, from which the
    figures are drawn. directory: of the run.
    """

    checkpoint: str
    shares: dict[str, float]
    worst: dict[str, float]
    rows: list[dict[str, Any]]
    curves: dict[str, Any]
    directory: Path

    @property
    def holds(self) -> bool:
        return all(share == 1.0 for share in self.shares.values())

    def table(self) -> str:
        c = self.curves
        lines = [
            f"{self.checkpoint}: {c['layers']} layers x {c['heads']} heads x {c['pairs']} pairs, "
            f"distances 0..{c['length'] - 1}",
            f"observed {spell(c['observed'])}; gap {spell(c['gap'])}",
            f"{'bound (over the whole line)':<46}{'share within':>13}{'largest/bound':>15}",
        ]
        for name, label in CHECKS.items():
            lines.append(f"{label:<46}{self.shares[name]:>13.6f}{self.worst[name]:>15.4f}")
        gap_width = max(hi - lo + 1 for lo, hi in c["gap"])
        lines.append(
            f"Bernstein says more than |S| <= sup|S| within {c['radius']:.3g} tokens of an observed distance; "
            f"the gap is {gap_width} wide"
        )
        for row in self.rows:
            if row["task"] in ("roughness", "observability", "change"):
                lines.append(f"{row['task'] + ': ' + row['metric']:<59}{row['value']:>15.4g}")
        return "\n".join(lines)


def spell(segments: Intervals) -> str:
    return " ".join(f"[{lo}, {hi}]" for lo, hi in segments) or "none"


def verify(config: VerifyConfig) -> VerifyReport:
    """Examine a checkpoint; writes rows, curves and figures into config.output and returns them.

    Raises ValueError for impossible sizes, a target that leaves no gap, and what the model loader refuses.
    """
    from analysis import figures

    scene = prepare(config)
    run = RunDirectory(config.output, config)
    findings = Findings(scene)
    scene.read(findings.add)
    report = findings.report(run.path)
    replace_rows(run, report.rows)
    write_text(run.path / CURVES, json.dumps(report.curves, allow_nan=False) + "\n")
    figures.draw(run.path / CURVES, run.path / "verify", config.formats)
    return report


def replace_rows(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    """Add the rows; those of an earlier verification of the same checkpoint in this directory make room."""
    own = {(row["suite"], row["model"], row["method"]) for row in rows}
    if run.results.exists():
        kept = [row for row in read_rows(run.results) if (row["suite"], row["model"], row["method"]) not in own]
        write_text(run.results, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    run.add(rows)


@dataclass
class Scene:
    """What is examined: a model, a text, pairs of places in it, and the distances observed and not."""

    config: VerifyConfig
    model: Any
    base: Any | None
    ids: np.ndarray
    pairs: Any
    window: int
    length: int
    context: int
    omega: np.ndarray
    attention_factor: float
    observed: Intervals
    gap: Intervals
    samples: str

    def read(self, consume: Any) -> None:
        """Both models over the text, layer by layer: consume(layer of the model, the same layer before or None)."""
        from analysis.capture import capture

        before: dict[int, Any] = {}
        if self.base is not None:
            capture(self.base, self.ids, self.pairs, lambda layer: before.__setitem__(layer.layer, layer))
        capture(self.model, self.ids, self.pairs, lambda layer: consume(layer, before.pop(layer.layer, None)))


def prepare(config: VerifyConfig) -> Scene:
    import torch

    from analysis.capture import choose_pairs
    from endprompt import model as models

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that this machine has: device='cuda', and torch finds no CUDA device")
    model = load(config.checkpoint, config)
    base = load(config.against, config) if config.against else None
    geometry = models.rope_geometry(model.config)
    if base is not None and (
        base.config.num_attention_heads != model.config.num_attention_heads
        or base.config.num_hidden_layers != model.config.num_hidden_layers
        or models.rope_geometry(base.config).head_dim != geometry.head_dim
    ):
        raise ValueError(f"against must be the same architecture as the checkpoint: {config.against!r}")
    length = geometry.window if config.target is None else config.target
    window = original_window(geometry, base)
    context = window - config.prompt if config.context is None else config.context
    if length <= window and config.context is None:
        raise ValueError(
            f"the target must be above the window that was trained: target={length} window={window} "
            "(give --target, or --context for a shorter one)"
        )
    observed, gap = observability.distance_segments(length, context, config.prompt, config.scheme, count=config.count)
    if not gap:
        raise ValueError(
            f"the target must leave a gap, but scheme {config.scheme!r} observes every distance below it: "
            f"target={length} {context=} prompt={config.prompt}"
        )
    omega, attention_factor = geometry.frequencies(length)
    text = read_text(config.text)
    ids = np.asarray(models.load_tokenizer(config.checkpoint)(text)["input_ids"], dtype=np.int64)
    ids = ids[: min(config.tokens, window)]
    if ids.size and ids.max() >= model.config.vocab_size:
        raise ValueError(f"the tokenizer is of another vocabulary: token {ids.max()}, {model.config.vocab_size=}")
    pairs = choose_pairs(ids.size, config.pairs, config.seed)
    return Scene(
        config=config,
        model=model,
        base=base,
        ids=ids,
        pairs=pairs,
        window=window,
        length=length,
        context=context,
        omega=omega,
        attention_factor=attention_factor,
        observed=observed,
        gap=gap,
        samples=sha256_of(ids.tobytes(), pairs.query.tobytes(), pairs.key.tobytes()),
    )


def load(path: str, config: VerifyConfig) -> Any:
    from endprompt import model as models

    settings = models.load_config(path)
    # torch's fused attention has no soft-capping of logits, so those families run their own
    attention = "eager" if getattr(settings, "attn_logit_softcapping", None) else "sdpa"
    return models.load_model(path, dtype=config.dtype, attention=attention, device=config.device)


def original_window(geometry: Any, base: Any | None) -> int:
    """Window before extension: the base's, else what the scaling says of it."""
    if base is not None:
        return int(base.config.max_position_embeddings)
    original = geometry.parameters.get("original_max_position_embeddings")
    return int(original or geometry.window / geometry.parameters.get("factor", 1.0))


def read_text(path: str | None) -> str:
    source = files("analysis") / "sample.txt" if path is None else Path(path)
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text must be UTF-8: text={path!r}: {error}") from None


class Findings:
    """Collects layer by layer what the report needs; never a layer's q or k."""

    def __init__(self, scene: Scene):
        self.scene = scene
        # the part of a head that RoPE leaves alone is a frequency of 0
        self.omega = np.append(scene.omega, 0.0)
        self.gram = {
            name: observability.gram(self.omega, segments)
            for name, segments in (("observed", scene.observed), ("gap", scene.gap))
        }
        self.layers: list[dict[str, Any]] = []
        self.curves: list[dict[str, Any]] = []
        self.power = np.zeros(scene.omega.size)

    def add(self, layer: Any, before: Any | None) -> None:
        scene, omega = self.scene, self.omega
        unit = layer.scaling * scene.attention_factor**2
        z = unit * np.concatenate([layer.z, layer.constant[..., None]], axis=-1)
        heads, pairs, _ = z.shape
        flat = z.reshape(heads * pairs, -1)
        largest = sweep.maxima(flat, omega, scene.length)
        ratio = bound_ratios(flat, omega, largest)
        slope = {name: self.rms(derivative_spectrum(flat, omega, 1), name) for name in self.gram}
        band = (omega * scene.length >= CRITICAL_BAND[0]) & (omega * scene.length <= CRITICAL_BAND[1])
        energy = np.abs(flat[:, :-1]) ** 2
        self.power += energy.sum(0)
        record: dict[str, Any] = {
            "layer": layer.layer,
            "logit_error": layer.error,
            "within": {name: value <= 1.0 for name, value in ratio.items()},
            "ratio": {name: value.reshape(heads, pairs) for name, value in ratio.items()},
            "tightness": (largest.size[1] / np.maximum(coef_bound(flat, omega, 1), 1e-300)).reshape(heads, pairs),
            "roughness": (slope["gap"] / np.maximum(slope["observed"], 1e-300)).reshape(heads, pairs),
            "band": (energy[:, band[:-1]].sum(1) / np.maximum(energy.sum(1), 1e-300)).reshape(heads, pairs),
            "B1": coef_bound(flat, omega, 1).max(),
        }
        if before is not None:
            old = unit * np.concatenate([before.z, before.constant[..., None]], axis=-1)
            change = (z - old).reshape(heads * pairs, -1)
            record["change"] = {name: self.rms(change, name).reshape(heads, pairs) for name in self.gram}
            record["before"] = {
                name: self.rms(old.reshape(change.shape), name).reshape(heads, pairs) for name in self.gram
            }
            record["change_power"] = (np.abs(change[:, :-1]) ** 2).sum(0)
        self.layers.append(record)
        self.curves.append(self.curve(layer.layer, z))

    def rms(self, z: np.ndarray, where: str) -> np.ndarray:
        c = np.concatenate([z.real, -z.imag], axis=-1)
        return np.sqrt(np.maximum(np.einsum("pi,ij,pj->p", c, self.gram[where], c, optimize=True), 0.0))

    def curve(self, layer: int, z: np.ndarray) -> dict[str, Any]:
        """The far pair with the largest slope bound in a layer, as a curve."""
        far = np.flatnonzero(self.scene.pairs.stratum == 1)
        steep = coef_bound(z[:, far], self.omega, 1)
        head, place = np.unravel_index(int(steep.argmax()), steep.shape)
        pair = int(far[place])
        spectrum = z[head, pair]
        d = np.arange(self.scene.length)
        orders = []
        for order in sweep.ORDERS:
            low, high, centre = envelope(eval_score(spectrum, self.omega, d, order), d)
            orders.append(
                {
                    "low": rounded(low),
                    "high": rounded(high),
                    "coefficient": float(coef_bound(spectrum, self.omega, order)),
                    "bernstein": float(bernstein_bound(spectrum, self.omega, order)),
                }
            )
        return {
            "layer": layer,
            "head": int(head),
            "query": int(self.scene.pairs.query[pair]),
            "key": int(self.scene.pairs.key[pair]),
            "distance": [float(x) for x in centre],
            "orders": orders,
        }

    def report(self, directory: Path) -> VerifyReport:
        scene = self.scene
        layers = sorted(self.layers, key=lambda record: record["layer"])
        shares = {name: float(np.mean([r["within"][name] for r in layers])) for name in CHECKS}
        worst = {name: float(max(r["ratio"][name].max() for r in layers)) for name in CHECKS}
        curves = {
            "checkpoint": Path(scene.config.checkpoint).name,
            "method": self.method(),
            "length": scene.length,
            "window": scene.window,
            "context": scene.context,
            "prompt": scene.config.prompt,
            "scheme": scene.config.scheme,
            "observed": scene.observed,
            "gap": scene.gap,
            "sigma": float(scene.omega.max()),
            "attention_factor": scene.attention_factor,
            "radius": nonvacuous_radius(scene.omega),
            "layers": len(layers),
            "heads": int(layers[0]["roughness"].shape[0]),
            "pairs": int(layers[0]["roughness"].shape[1]),
            "curves": self.curves,
            "tightness": [rounded(np.median(r["tightness"], axis=1)) for r in layers],
            "roughness": [rounded(np.median(r["roughness"], axis=1)) for r in layers],
        }
        rows = self.rows(layers, shares)
        return VerifyReport(curves["checkpoint"], shares, worst, rows, curves, directory)

    def method(self) -> str:
        scaling = self.scene.model.config.rope_parameters.get("rope_type", "default")
        return self.scene.config.method or ("base" if scaling == "default" else scaling)

    def rows(self, layers: list[dict[str, Any]], shares: dict[str, float]) -> list[dict[str, Any]]:
        scene = self.scene
        number = sum(r["roughness"].size for r in layers)

        def row(task: str, metric: str, value: float, n: int | None = number, **extra: Any) -> dict[str, Any]:
            return result_row(
                suite="analysis",
                task=task,
                metric=metric,
                value=value,
                model=Path(scene.config.checkpoint).name,
                method=self.method(),
                seed=scene.config.seed,
                length=scene.length,
                n=n,
                samples_sha256=scene.samples,
                scheme=scene.config.scheme,
                context=scene.context,
                prompt=scene.config.prompt,
                **extra,
            )

        rows = [row("bounds", f"share_within_{name}", share) for name, share in shares.items()]
        rows.append(row("bounds", "logit_error_over_sum_a", max(r["logit_error"] for r in layers)))
        rows.append(row("bounds", "nonvacuous_radius_tokens", nonvacuous_radius(scene.omega), n=None))
        tightness = np.concatenate([r["tightness"].ravel() for r in layers])
        roughness = np.concatenate([r["roughness"].ravel() for r in layers])
        for name, values, task in (
            ("tightness_order1", tightness, "bounds"),
            ("gap_to_observed", roughness, "roughness"),
        ):
            for quantile in (0.01, 0.5, 0.99):
                rows.append(row(task, f"{name}_q{100 * quantile:02.0f}", float(np.quantile(values, quantile))))
        band = np.concatenate([r["band"].ravel() for r in layers])
        rows.append(row("roughness", "critical_band_energy_share_median", float(np.median(band))))
        average = observability.posterior_gap_rms(
            observability.gram(scene.omega, scene.observed),
            observability.size(scene.observed),
            observability.gram(scene.omega, scene.gap),
            scene.config.noise,
        )
        rows.append(row("observability", "posterior_gap_rms", average, n=None, noise=scene.config.noise))
        if "change" in layers[0]:
            for name in self.gram:
                values = np.concatenate([r["change"][name].ravel() for r in layers])
                rows.append(row("change", f"delta_rms_{name}", float(np.sqrt(np.mean(values**2)))))
        return rows


def bound_ratios(z: np.ndarray, omega: np.ndarray, largest: sweep.Maxima) -> dict[str, np.ndarray]:
    """Value over bound, [P] for each of CHECKS: what is certainly reached over what the theorem allows anywhere.

    The rounding of the value is taken off, so a ratio above 1 is a violation and not noise.
    """
    sigma = np.abs(omega).max()
    sum_a = coef_bound(z, omega)
    reached = {order: np.maximum(largest.size[order] - largest.error[order], 0.0) for order in sweep.ORDERS}
    both = np.maximum(largest.duffin_schaeffer - largest.error[1] - sigma * largest.error[0], 0.0)

    def over(value: np.ndarray, bound: np.ndarray) -> np.ndarray:
        return np.divide(value, bound, out=np.where(value > 0, np.inf, 0.0), where=bound > 0)

    return {
        "coefficient_order0": over(reached[0], sum_a),
        "coefficient_order1": over(reached[1], coef_bound(z, omega, 1)),
        "coefficient_order2": over(reached[2], coef_bound(z, omega, 2)),
        "bernstein_order1": over(reached[1], bernstein_bound(z, omega, 1)),
        "bernstein_order2": over(reached[2], bernstein_bound(z, omega, 2)),
        "duffin_schaeffer": over(both, sigma * sum_a),
    }


def envelope(values: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lowest, highest value, middle) of each of at most CURVE_POINTS bins; the values themselves if they are fewer."""
    if values.size <= CURVE_POINTS:
        return values, values, d
    parts = np.array_split(values, CURVE_POINTS)
    centres = np.array([part.mean() for part in np.array_split(d, CURVE_POINTS)])
    return np.array([p.min() for p in parts]), np.array([p.max() for p in parts]), centres


def rounded(values: np.ndarray) -> list[float]:
    """For files that are drawn from: six digits."""
    return [float(f"{x:.6g}") for x in np.asarray(values).ravel()]
