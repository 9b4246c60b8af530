"""`endprompt verify`: bounds on real weights, what the gap can hide, and what training changed.

A text is read once. For every layer and head the same pairs of places are taken, their spectra checked against the
model's own logits, all distances 0..L-1 evaluated in float64, and the values held against bounds over the whole line.
Values are in units of the logit (attention factor squared and 1/sqrt(D) included).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from analysis import observability, outlook
from analysis.bounds import bernstein_bound, coef_bound, nonvacuous_radius, softmax_change
from analysis.capture import STRATA, capture, choose_pairs
from analysis.certificates import certified_max
from analysis.commands import VerifyConfig
from analysis.rank import true_sup
from analysis.spectra import derivative_spectrum, eval_score
from analysis.sweep import ORDERS, Maxima, Sweep
from endprompt import origin
from endprompt.positions import Intervals
from endprompt.rows import (
    RECORD,
    RunDirectory,
    read_rows,
    read_text,
    recorded,
    result_row,
    sha256_of,
    sole_use,
    write_text,
)
from endprompt.text import Reader

#: A curve with more distances than this is stored as the range in each of so many bins.
CURVE_POINTS = 2048
CURVES = "curves.json"
#: Frequencies that turn this many radians over the window decide the gap: slower ones hardly move, faster ones repeat.
CRITICAL_BAND = (2.0, 60.0)
#: Points of the picture of observed against gap, and where the worst case is computed for it.
POINTS, WORST_CASES = 1500, 12
#: Observed root mean square of the extremal score that is drawn, for coefficients of norm 1.
EXTREMAL_EPS = 0.01
#: Heads whose curves are drawn: of the first, the middle and the last layer.
DRAWN = 3
TINY = np.finfo(np.float64).tiny

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
            *(
                [f"layers without RoPE, left out: {', '.join(map(str, c['without_rope']))}"]
                if c["without_rope"]
                else []
            ),
            f"observed {spell(c['observed'])}; gap {spell(c['gap'])}",
            f"{'bound (over the whole line)':<46}{'share within':>13}{'largest/bound':>15}",
        ]
        for name, label in CHECKS.items():
            lines.append(f"{label:<46}{self.shares[name]:>13.6f}{self.worst[name]:>15.4f}")
        gap_width = max(hi - lo + 1 for lo, hi in c["gap"])
        lines.append(
            f"Bernstein says more than |S(d) - S(d')| <= 2 sup|S| only for |d - d'| < {c['radius']:.3g} tokens; "
            f"the gap is {gap_width} wide"
        )
        for row in self.rows:
            if row["task"] != "bounds":
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
    config = scene.config
    before: dict[int, Any] = {}
    if config.against:  # this model is let go before the other is loaded
        read_layers(config.against, scene, lambda layer: before.__setitem__(layer.layer, layer))
    findings = Findings(scene)
    read_layers(config.checkpoint, scene, lambda layer: findings.add(layer, before.pop(layer.layer, None)))
    report = findings.report(Path(config.output))
    with sole_use(config.output):
        run = RunDirectory(config.output, config)
        replace_rows(run, report.rows)
        write_text(run.path / CURVES, json.dumps(report.curves, allow_nan=False) + "\n")
        figures.draw(run.path / CURVES, run.path, config.formats)
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
    """What is examined: a text, pairs of places in it, and the distances that training observed and did not."""

    config: VerifyConfig
    geometry: Any
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
    heads: list[tuple[int, int]]
    without_rope: list[int] = dataclasses.field(default_factory=list)


def prepare(config: VerifyConfig) -> Scene:
    """Everything but the weights. Raises ValueError for sizes that cannot be, before anything is loaded."""
    import torch

    from endprompt import model as models

    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has: device={config.device!r}, torch finds no CUDA")
    if not config.noise > 0:
        raise ValueError(f"the noise of an observed score must be positive: noise={config.noise}")
    config = dataclasses.replace(
        config,
        checkpoint=str(models.checkpoint_path(config.checkpoint)),
        against=str(models.checkpoint_path(config.against)) if config.against else None,
    )
    settings = models.load_config(config.checkpoint)
    geometry = models.rope_geometry(settings)
    base = models.load_config(config.against) if config.against else None
    if base is not None:
        same = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
        differing = [key for key in same if getattr(base, key, None) != getattr(settings, key, None)]
        if differing:
            raise ValueError(
                f"against must be the model before extension, of the same architecture: against={config.against!r} "
                f"differs in {', '.join(differing)}"
            )
    config, window, length = resolved(config, settings, base)
    scheme, context, prompt, count = config.scheme, config.context, config.prompt, config.count
    assert scheme is not None and context is not None and prompt is not None and count is not None
    observed, gap = observability.distance_segments(length, context, prompt, scheme, count=count)
    if not gap:
        raise ValueError(
            f"the target must leave a gap, but scheme {scheme!r} observes every distance below it: "
            f"target={length} {context=} {prompt=} (scheme, context and prompt are those of the flags, else of the "
            f"checkpoint's {RECORD})"
        )
    omega, attention_factor = geometry.frequencies(length)
    text = read_text(str(files("analysis") / "sample.txt") if config.text is None else config.text)
    ids = np.asarray(Reader(models.load_tokenizer(config.checkpoint)).prompts([text])[0], dtype=np.int64)
    ids = ids[: min(config.tokens, window)]
    if ids.size and ids.max() >= settings.vocab_size:
        raise ValueError(
            f"{config.checkpoint}: the tokenizer is of another vocabulary: token {ids.max()}, {settings.vocab_size=}"
        )
    pairs = choose_pairs(ids.size, config.pairs, config.seed)
    return Scene(
        config=config,
        geometry=geometry,
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
        heads=parse_heads(config.heads, settings.num_hidden_layers, settings.num_attention_heads),
    )


def parse_heads(names: str, layers: int, heads: int) -> list[tuple[int, int]]:
    """(layer, head) of each `layer.head` in a list with commas. Raises ValueError if the model has no such head."""
    found = []
    for name in filter(None, names.split(",")):
        layer, _, head = name.strip().partition(".")
        if not (layer.isdigit() and head.isdigit() and int(layer) < layers and int(head) < heads):
            raise ValueError(f"heads must be layer.head of a model with {layers} layers of {heads} heads: {name!r}")
        found.append((int(layer), int(head)))
    return found


def resolved(config: VerifyConfig, settings: Any, base: Any | None) -> tuple[VerifyConfig, int, int]:
    """(the configuration with target, scheme, context, prompt and count; window before extension; window after it).

    Flags go before the checkpoint's own record, and that before what its config says. Raises ValueError where nothing
    says what the window was.
    """
    from endprompt.model import window_of

    record = recorded(config.checkpoint)
    known = None not in (record.get("window"), record.get("target"), record.get("row_tokens"))
    trained = record.get("config", {}) if known else {}
    rows: dict[str, Any] = {"scheme": trained.get("scheme"), "count": trained.get("anchors"), "prompt": None}
    if known:
        rows["prompt"] = record.get("prompt_tokens", 0)
    for key, usual in (("scheme", "endprompt"), ("count", 4), ("prompt", 20)):
        stated = getattr(config, key)
        rows[key] = next(value for value in (stated, rows[key], usual) if value is not None)
    now = None if known and config.window is None else window_of(settings, config.window)
    if base is not None:
        window = window_of(base).window
    else:
        window = int(record["window"]) if now is None else now.original
    length = config.target or (int(record["target"]) if now is None else now.window)
    if length <= window and config.context is None:
        raise ValueError(
            f"the target must be above the window that was trained: target={length} window={window} "
            "(give --target; or --against the base, or --context, where the config does not say what it was)"
        )
    row_tokens = int(record["row_tokens"]) if known else window
    context = row_tokens - rows["prompt"] if config.context is None else config.context
    return dataclasses.replace(config, context=context, **rows), window, length


def load(path: str, config: VerifyConfig) -> Any:
    from endprompt import model as models

    settings = models.load_config(path)
    # torch's fused attention has no soft-capping of logits, so those families run their own
    attention = "eager" if getattr(settings, "attn_logit_softcapping", None) else "sdpa"
    return models.load_model(path, dtype=config.dtype, attention=attention, device=config.device)


def read_layers(path: str, scene: Scene, consume: Callable[[Any], None]) -> None:
    """Run a checkpoint over the text and hand its spectra on layer by layer; a terminal shows a bar."""
    from rich.console import Console
    from rich.progress import Progress

    model = load(path, scene.config)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or console.no_color) as progress:
        bar = progress.add_task(f"verify {Path(path).name}: layers", total=model.config.num_hidden_layers)

        def pass_on(layer: Any) -> None:
            consume(layer)
            progress.advance(bar)

        without_rope: list[int] = []
        capture(model, scene.ids, scene.pairs, pass_on, without_rope=without_rope)
    scene.without_rope[:] = without_rope
    for layer, head in scene.heads:
        if layer in without_rope:
            raise ValueError(f"heads must be of layers with RoPE, which layer {layer} has not: heads={layer}.{head}")


class Findings:
    """Collects layer by layer what the report needs; never a layer's q or k."""

    def __init__(self, scene: Scene):
        self.scene = scene
        # the part of a head that RoPE leaves alone is a frequency of 0
        self.omega = np.append(scene.omega, 0.0)
        self.sweep = Sweep(self.omega, scene.length, device=scene.config.device)
        self.gram = {
            name: observability.gram(self.omega, segments)
            for name, segments in (("observed", scene.observed), ("gap", scene.gap))
        }
        self.rng = np.random.default_rng([scene.config.seed, 1])
        self.layers: list[dict[str, Any]] = []

    def add(self, layer: Any, before: Any | None) -> None:
        """One layer's spectra, and the same layer's before extension."""
        scene, omega = self.scene, self.omega
        unit = layer.scaling * scene.attention_factor**2
        z = unit * np.concatenate([layer.z, layer.constant[..., None]], axis=-1)
        heads, pairs, _ = z.shape
        flat = z.reshape(heads * pairs, -1)
        largest = self.sweep.maxima(flat, duffin_schaeffer=True)
        ratio = bound_ratios(flat, omega, largest)
        energy = np.abs(flat[:, :-1]) ** 2
        turns = omega[:-1] * scene.length
        band = (turns >= CRITICAL_BAND[0]) & (turns <= CRITICAL_BAND[1])
        record: dict[str, Any] = {
            "layer": layer.layer,
            "logit_error": layer.error,
            "within": {name: value <= 1.0 for name, value in ratio.items()},
            "worst": {name: float(value.max()) for name, value in ratio.items()},
            "tightness": (largest.size[1] / np.maximum(coef_bound(flat, omega, 1), TINY)).reshape(heads, pairs),
            "tightness_bernstein": largest.size[1] / np.maximum(bernstein_bound(flat, omega, 1), TINY),
            "roughness": self.roughness(flat).reshape(heads, pairs),
            "null": self.roughness(np.abs(flat) * np.exp(2j * np.pi * self.rng.random(flat.shape))),
            "band": energy[:, band].sum(1) / np.maximum(energy.sum(1), TINY),
            "power": energy.sum(0),
            "B1": float(coef_bound(flat, omega, 1).max()),
            "curves": self.steepest(layer.layer, z),
        }
        subject = flat
        if before is not None:
            old = unit * np.concatenate([before.z, before.constant[..., None]], axis=-1)
            subject = flat - old.reshape(flat.shape)
            record["change_power"] = (np.abs(subject[:, :-1]) ** 2).sum(0)
        record["norm"] = np.sqrt((np.abs(subject) ** 2).sum(1))
        record["rms"] = {name: self.rms(subject, name) for name in self.gram}
        self.layers.append(record)

    def rms(self, z: np.ndarray, where: str) -> np.ndarray:
        """Root mean square of scores over the observed distances or the gap, [P], by the Gram matrix."""
        c = np.concatenate([z.real, -z.imag], axis=-1)
        return np.sqrt(np.maximum(((c @ self.gram[where]) * c).sum(-1), 0.0))

    def roughness(self, z: np.ndarray) -> np.ndarray:
        """Root mean square of S' in the gap over that on the observed distances, [P]."""
        slope = derivative_spectrum(z, self.omega, 1)
        return self.rms(slope, "gap") / np.maximum(self.rms(slope, "observed"), TINY)

    def steepest(self, layer: int, z: np.ndarray) -> list[dict[str, Any]]:
        """Of each head that may be drawn, the far pair whose coefficient bound on the slope is largest."""
        far = np.flatnonzero(self.scene.pairs.stratum == STRATA.index("far"))
        steep = coef_bound(z[:, far], self.omega, 1)
        wanted = [head for place, head in self.scene.heads if place == layer]
        found = []
        for head in wanted if self.scene.heads else [int(steep.max(axis=1).argmax())]:
            pair = int(far[steep[head].argmax()])
            query, key = (int(places[pair]) for places in (self.scene.pairs.query, self.scene.pairs.key))
            found.append({"layer": layer, "head": head, "query": query, "key": key, "z": z[head, pair]})
        return found

    def drawn(self, curve: dict[str, Any]) -> dict[str, Any]:
        """A curve with its values, bounds, supremum on the line and certificate in the gap."""
        scene, z = self.scene, curve.pop("z")
        d = np.arange(scene.length)
        base, head_dim = scene.geometry.parameters["rope_theta"], scene.geometry.rotary_dim
        if scene.geometry.parameters.get("rope_type") == "dynamic" and head_dim > 2:
            base = float(scene.omega[1]) ** (-head_dim / 2)  # the base grows with the length
        supremum = true_sup(z, self.omega, base, head_dim, 0, rtol=1e-4)
        orders = []
        for order in ORDERS:
            low, high, centre = envelope(eval_score(z, self.omega, d, order), d)
            enclosures = [certified_max(z, self.omega, lo, hi, order, 1e-3)[:2] for lo, hi in scene.gap]
            orders.append(
                {
                    "low": rounded(low),
                    "high": rounded(high),
                    "coefficient": float(coef_bound(z, self.omega, order)),
                    "bernstein": float(bernstein_bound(z, self.omega, order, supremum[1])),
                    "gap_maximum": [max(lo for lo, _ in enclosures), max(hi for _, hi in enclosures)],
                }
            )
        sum_a = orders[0]["coefficient"]
        return curve | {"distance": rounded(centre), "supremum": list(supremum), "sum_a": sum_a, "orders": orders}

    def report(self, directory: Path) -> VerifyReport:
        scene = self.scene
        layers = sorted(self.layers, key=lambda record: record["layer"])
        shares = {name: float(np.mean([r["within"][name] for r in layers])) for name in CHECKS}
        worst = {name: max(r["worst"][name] for r in layers) for name in CHECKS}
        to_draw = [curve for r in layers for curve in r["curves"]]
        if not scene.heads:
            to_draw = [
                to_draw[place] for place in np.unique(np.linspace(0, len(to_draw) - 1, DRAWN).round().astype(int))
            ]
        prediction = self.predict(layers)
        heads, pairs = layers[0]["roughness"].shape
        curves: dict[str, Any] = {
            "checkpoint": origin.name_of(scene.config.checkpoint),
            "against": origin.name_of(scene.config.against) if scene.config.against else None,
            "method": self.method(),
            "length": scene.length,
            "window": scene.window,
            "context": scene.context,
            "prompt": scene.config.prompt,
            "scheme": scene.config.scheme,
            "noise": scene.config.noise,
            "observed": scene.observed,
            "gap": scene.gap,
            "sigma": float(scene.omega.max()),
            "attention_factor": scene.attention_factor,
            "radius": nonvacuous_radius(scene.omega),
            "layers": len(layers),
            "without_rope": scene.without_rope,
            "heads": int(heads),
            "pairs": int(pairs),
            "curves": [self.drawn(curve) for curve in to_draw],
            "tightness": [rounded(np.median(r["tightness"], axis=1)) for r in layers],
            "roughness": [rounded(np.median(r["roughness"], axis=1)) for r in layers],
            "roughness_pairs": rounded(thinned(np.concatenate([r["roughness"].ravel() for r in layers]))),
            "roughness_null": rounded(thinned(np.concatenate([r["null"] for r in layers]))),
            "prediction": prediction,
            "outlook": outlook.outlook(scene.geometry, scene.window, scene.length, scene.context, scene.config),
        }
        rows = self.rows(layers, shares, worst, curves)
        return VerifyReport(curves["checkpoint"], shares, worst, rows, curves, directory)

    def predict(self, layers: list[dict[str, Any]]) -> dict[str, Any]:
        """Observed against gap, for what training changed (or for S itself), beside the worst and the average case.

        All are for coefficients of norm 1. A pair above the worst case would break a theorem.
        """
        scene = self.scene
        norm = np.concatenate([r["norm"] for r in layers])
        live = norm > 0
        size = {name: np.concatenate([r["rms"][name] for r in layers]) for name in self.gram}
        share = {name: values[live] / norm[live] for name, values in size.items()}
        result: dict[str, Any] = {
            "subject": "change" if scene.config.against else "score",
            "rms": {name: float(np.sqrt(np.mean(values**2))) for name, values in size.items()},
            "points": {name: rounded(thinned(values)) for name, values in share.items()},
            "worst": {"eps": [], "value": []},
        }
        if not live.any():
            return result
        low, high = max(share["observed"].min(), 1e-6), max(share["observed"].max(), 1e-5)
        for eps in np.geomspace(low * 0.9, high * 1.1, WORST_CASES):
            try:
                value, _ = observability.worst_gap(self.gram["observed"], self.gram["gap"], float(eps))
            except ValueError:  # float64 cannot carry it: the point stays off the picture
                continue
            result["worst"]["eps"].append(float(f"{eps:.6g}"))
            result["worst"]["value"].append(float(f"{value:.6g}"))
        result["extremal"] = self.extremal()
        power = sum(r.get("change_power", r["power"]) for r in layers) / norm.size
        result["average"] = observability.posterior_gap_rms(
            observability.gram(scene.omega, scene.observed),
            observability.size(scene.observed),
            observability.gram(scene.omega, scene.gap),
            scene.config.noise * max(float(np.sqrt(power.sum() / 2)), TINY),
            prior=power,
        )
        return result

    def extremal(self) -> dict[str, Any]:
        """The score of coefficient norm 1 that is next to nothing where it is observed and largest in the gap."""
        value, c = observability.worst_gap(self.gram["observed"], self.gram["gap"], EXTREMAL_EPS)
        n = c.size // 2
        d = np.arange(self.scene.length)
        low, high, centre = envelope(eval_score(c[:n] - 1j * c[n:], self.omega, d), d)
        return {
            "eps": EXTREMAL_EPS,
            "value": value,
            "distance": rounded(centre),
            "low": rounded(low),
            "high": rounded(high),
        }

    def method(self) -> str:
        scaling = self.scene.geometry.parameters.get("rope_type", "default")
        noted = recorded(self.scene.config.checkpoint).get("method")
        return self.scene.config.method or str(noted or ("base" if scaling == "default" else scaling))

    def rows(
        self,
        layers: list[dict[str, Any]],
        shares: dict[str, float],
        worst: dict[str, float],
        curves: dict[str, Any],
    ) -> list[dict[str, Any]]:
        scene = self.scene
        number = sum(r["roughness"].size for r in layers)

        def row(task: str, metric: str, value: float, n: int | None = number, **extra: Any) -> dict[str, Any]:
            return result_row(
                suite="analysis",
                task=task,
                metric=metric,
                value=value,
                model=origin.name_of(scene.config.checkpoint),
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

        def quantiles(task: str, name: str, values: np.ndarray) -> list[dict[str, Any]]:
            return [row(task, f"{name}_q{q:02d}", float(np.quantile(values, q / 100))) for q in (1, 50, 99)]

        def together(key: str) -> np.ndarray:
            return np.concatenate([r[key].ravel() for r in layers])

        rows = [row("bounds", f"share_within_{name}", share) for name, share in shares.items()]
        rows += [row("bounds", f"largest_over_{name}", value) for name, value in worst.items()]
        rows.append(row("bounds", "logit_error_over_sum_a", max(r["logit_error"] for r in layers)))
        rows.append(row("bounds", "nonvacuous_radius_tokens", curves["radius"], n=None))
        rows += quantiles("bounds", "slope_over_coefficient_bound", together("tightness"))
        rows += quantiles("bounds", "slope_over_bernstein_bound", together("tightness_bernstein"))
        for index, stratum in enumerate(STRATA):
            chosen = scene.pairs.stratum == index
            tight = np.concatenate([r["tightness"][:, chosen].ravel() for r in layers])
            median = float(np.median(tight))
            rows.append(row("bounds", "slope_over_coefficient_bound_q50", median, tight.size, stratum=stratum))
        for curve in curves["curves"]:
            place = {"layer": curve["layer"], "head": curve["head"]}
            rows.append(row("bounds", "supremum_over_sum_a", curve["supremum"][1] / curve["sum_a"], n=1, **place))
        # a shift of all distances by one token moves a logit by at most B1, which is in logits already
        log_probability, variation = softmax_change(max(r["B1"] for r in layers))
        rows.append(row("softmax", "log_probability_change_per_token_bound", log_probability))
        rows.append(row("softmax", "total_variation_per_token_bound", variation))
        rows += quantiles("roughness", "gap_over_observed", together("roughness"))
        rows += quantiles("roughness", "gap_over_observed_random_phase", together("null"))
        rows.append(row("roughness", "critical_band_energy_share_median", float(np.median(together("band")))))
        prediction = curves["prediction"]
        for name, value in prediction["rms"].items():
            rows.append(row(prediction["subject"], f"rms_{name}", value, against=curves["against"]))
        if "average" in prediction:
            rows.append(row(prediction["subject"], "rms_gap_undetermined", prediction["average"]))
        for entry in curves["outlook"]["schemes"]:
            for kind in ("once", "by_pairs"):
                metric = f"gap_rms_{kind}_{entry['scheme']}"
                rows.append(row("observability", metric, entry[kind], n=None, noise=scene.config.noise))
        for entry in curves["outlook"]["pretraining"]:
            rows.append(
                row(
                    "observability",
                    f"gap_rms_pretraining_{entry['scaling']}",
                    entry["value"],
                    n=None,
                    noise=scene.config.noise,
                )
            )
        return rows


def bound_ratios(z: np.ndarray, omega: np.ndarray, largest: Maxima) -> dict[str, np.ndarray]:
    """Value over bound, [P] for each of CHECKS: what is certainly reached over what the theorem allows anywhere.

    The rounding of the value is taken off, so a ratio above 1 is a violation and not noise.
    """
    assert largest.duffin_schaeffer is not None
    sigma = np.abs(omega).max()
    sum_a = coef_bound(z, omega)
    reached = {order: np.maximum(largest.size[order] - largest.error[order], 0.0) for order in ORDERS}
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


def thinned(values: np.ndarray) -> np.ndarray:
    """At most POINTS of the values, evenly picked."""
    return values[:: max(1, -(-values.size // POINTS))]


def rounded(values: np.ndarray) -> list[float]:
    """For files that are drawn from: six digits."""
    return [float(f"{x:.6g}") for x in np.asarray(values).ravel()]
