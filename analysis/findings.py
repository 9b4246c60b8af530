"""What verify found: shares within the bounds, maxima, curves, and the sentences and rows about them."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis import observability
from analysis.bounds import bernstein_bound, coef_bound, nonvacuous_radius, softmax_change
from analysis.capture import STRATA
from analysis.certificates import certified_max
from analysis.coverage import spell
from analysis.rank import true_sup
from analysis.scene import Scene
from analysis.spectra import derivative_spectrum, eval_score
from analysis.sweep import DUFFIN_SCHAEFFER, ORDERS, Maxima, Sweep
from endprompt import origin
from endprompt.model.kinds import spelled
from endprompt.results import recorded, result_row
from endprompt.rope import COHERENCE, base_bounds

#: A curve with more distances than this is stored as the range in each of so many bins.
CURVE_POINTS = 2048

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
    """What `verify` found. shares: bound -> share of pairs within it over all layers and heads (1.0 unless something is
    wrong). worst: bound -> largest value over bound. rows: the rows written. curves: the content of curves.json, from
    which the figures are drawn.
    """

    checkpoint: str
    shares: dict[str, float]
    worst: dict[str, float]
    rows: list[dict[str, Any]]
    curves: dict[str, Any]

    @property
    def holds(self) -> bool:
        return all(share == 1.0 for share in self.shares.values())

    def table(self) -> str:
        c = self.curves
        size = f"{c['layers']} layers x {c['heads']} heads x {c['pairs']} pairs, distances 0..{c['length'] - 1}"
        none = f"no gap: {c['scheme']} shows every distance below the target"
        lines = [f"{self.checkpoint}: {size}"]
        if c["without_rope"]:
            lines.append(f"layers without RoPE, left out: {', '.join(map(str, c['without_rope']))}")
        if c["sliding"]:
            lines.append(f"layers that slide below the target, left out: {spelled(c['sliding'])}")
        lines += [
            *c["kinds"],
            f"observed {spell(c['observed'])}; " + (f"gap {spell(c['gap'])}" if c["gap"] else none),
            f"{'bound (over the whole line)':<46}{'share within':>13}{'largest/bound':>15}",
        ]
        for name, label in CHECKS.items():
            lines.append(f"{label:<46}{self.shares[name]:>13.6f}{self.worst[name]:>15.4f}")
        lines.append(
            f"Bernstein says more than |S(d) - S(d')| <= 2 sup|S| only for |d - d'| < {c['radius']:.3g} tokens"
            + (f"; the gap is {max(hi - lo + 1 for lo, hi in c['gap'])} wide" if c["gap"] else "")
        )
        for row in self.rows:
            if row["task"] != "bounds":
                lines.append(f"{row['task'] + ': ' + row['metric']:<59}{row['value']:>15.4g}")
        return "\n".join(lines)


class Findings:
    """Collects layer by layer what the report needs; never a layer's q or k. With a pool, layers are examined there."""

    def __init__(self, scene: Scene, pool: ThreadPoolExecutor | None = None):
        self.scene, self.pool = scene, pool
        self.waiting: list[Future[None]] = []
        # the part of a head that RoPE leaves alone is a frequency of 0
        self.omega = np.append(scene.omega, 0.0)
        self.sweep = Sweep(self.omega, scene.length, device=scene.config.device)
        self.gram = {
            name: observability.gram(self.omega, segments)
            for name, segments in (("observed", scene.observed), ("gap", scene.gap))
            if segments
        }
        self.rng = np.random.default_rng([scene.config.seed, 1])
        self.layers: list[dict[str, Any]] = []

    def add(self, layer: Any, before: Any | None) -> None:
        """One layer's spectra, and the same layer's before extension."""
        heads, pairs, number = layer.z.shape
        # drawn here, so that they are a layer's own in whatever order the pool is done
        turns = self.rng.random((heads * pairs, number + 1)) if self.scene.gap else None
        if self.pool is None:
            self._examine(layer, before, turns)
        else:
            self.waiting.append(self.pool.submit(self._examine, layer, before, turns))

    def _examine(self, layer: Any, before: Any | None, random_turns: np.ndarray | None) -> None:
        scene, omega = self.scene, self.omega
        unit = layer.scaling * scene.attention_factor**2
        z = unit * np.concatenate([layer.z, layer.constant[..., None]], axis=-1)
        heads, pairs, _ = z.shape
        flat = z.reshape(heads * pairs, -1)
        bounds = checked_bounds(flat, omega)
        # of S' each pair's maximum is told; of the rest whether it is within, and the largest one over its bound
        largest = self.sweep.maxima(flat, [(kind, bound) for kind, bound in bounds.values() if kind != 1])
        ratio = bound_ratios(bounds, largest)
        energy = np.abs(flat[:, :-1]) ** 2
        turns = omega[:-1] * scene.length
        band = (turns >= CRITICAL_BAND[0]) & (turns <= CRITICAL_BAND[1])
        record: dict[str, Any] = {
            "layer": layer.layer,
            "logit_error": layer.error,
            "within": {name: value <= 1.0 for name, value in ratio.items()},
            "worst": {name: float(value.max()) for name, value in ratio.items()},
            "tightness": (largest.size[1] / np.maximum(bounds["coefficient_order1"][1], TINY)).reshape(heads, pairs),
            "tightness_bernstein": largest.size[1] / np.maximum(bounds["bernstein_order1"][1], TINY),
            "band": energy[:, band].sum(1) / np.maximum(energy.sum(1), TINY),
            "power": energy.sum(0),
            "B1": float(bounds["coefficient_order1"][1].max()),
            "curves": self.steepest(layer.layer, z),
        }
        if random_turns is not None:
            record["roughness"] = self.roughness(flat).reshape(heads, pairs)
            record["null"] = self.roughness(np.abs(flat) * np.exp(2j * np.pi * random_turns))
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
            bounds = {
                "coefficient": float(coef_bound(z, self.omega, order)),
                "bernstein": float(bernstein_bound(z, self.omega, order, supremum[1])),
                "gap_maximum": [max(ends) for ends in zip(*enclosures)],  # from below and above; none without one
            }
            orders.append({"low": rounded(low), "high": rounded(high)} | bounds)
        sum_a = orders[0]["coefficient"]
        return curve | {"distance": rounded(centre), "supremum": list(supremum), "sum_a": sum_a, "orders": orders}

    def report(self, ahead: dict[str, Any]) -> VerifyReport:
        """ahead: of `outlook`."""
        scene = self.scene
        for layer in self.waiting:
            layer.result()
        layers = sorted(self.layers, key=lambda record: record["layer"])
        shares = {name: float(np.mean([r["within"][name] for r in layers])) for name in CHECKS}
        worst = {name: max(r["worst"][name] for r in layers) for name in CHECKS}
        to_draw = [curve for r in layers for curve in r["curves"]]
        if not scene.heads:
            to_draw = [
                to_draw[place] for place in np.unique(np.linspace(0, len(to_draw) - 1, DRAWN).round().astype(int))
            ]
        with ThreadPoolExecutor() as pool:
            drawn = pool.map(self.drawn, to_draw)
            prediction = self.predict(layers)
        heads, pairs = layers[0]["tightness"].shape
        rough = {key: [r[key] for r in layers if key in r] for key in ("roughness", "null")}
        curves: dict[str, Any] = {
            "checkpoint": origin.name_of(scene.config.checkpoint),
            "against": origin.name_of(scene.config.against) if scene.config.against else None,
            "method": self.method(),
            **{key: getattr(scene.config, key) for key in ("prompt", "scheme", "noise")},
            **{key: getattr(scene, key) for key in ("length", "window", "context", "observed", "gap")},
            **{key: getattr(scene, key) for key in ("attention_factor", "without_rope", "kinds")},
            "sigma": float(scene.omega.max()),
            "radius": nonvacuous_radius(scene.omega),
            "layers": len(layers),
            "sliding": sorted(scene.sliding),
            "heads": int(heads),
            "pairs": int(pairs),
            "curves": list(drawn),
            "tightness": [rounded(np.median(r["tightness"], axis=1)) for r in layers],
            "roughness": [rounded(np.median(values, axis=1)) for values in rough["roughness"]],
            "roughness_pairs": rounded(thinned(np.ravel(rough["roughness"]))),
            "roughness_null": rounded(thinned(np.ravel(rough["null"]))),
            "prediction": prediction,
            "outlook": ahead,
        }
        rows = self.rows(layers, shares, worst, curves)
        return VerifyReport(curves["checkpoint"], shares, worst, rows, curves)

    def predict(self, layers: list[dict[str, Any]]) -> dict[str, Any]:
        """Observed against gap, for what training changed (or for S itself), beside the worst and the average case, for
        coefficients of norm 1. A pair above the worst case would break a theorem.
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
        if not (scene.gap and live.any()):
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
        seen = observability.gram(scene.omega, scene.observed), observability.size(scene.observed)
        noise = scene.config.noise * max(float(np.sqrt(power.sum() / 2)), TINY)
        unseen = observability.gram(scene.omega, scene.gap)
        result["average"] = observability.posterior_gap_rms(*seen, unseen, noise, prior=power)
        return result

    def extremal(self) -> dict[str, Any]:
        """The score of coefficient norm 1 that is next to nothing where it is observed and largest in the gap."""
        value, c = observability.worst_gap(self.gram["observed"], self.gram["gap"], EXTREMAL_EPS)
        n = c.size // 2
        d = np.arange(self.scene.length)
        low, high, centre = envelope(eval_score(c[:n] - 1j * c[n:], self.omega, d), d)
        drawn = {"distance": rounded(centre), "low": rounded(low), "high": rounded(high)}
        return {"eps": EXTREMAL_EPS, "value": value} | drawn

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
        number = sum(r["tightness"].size for r in layers)
        common: dict[str, Any] = {
            "model": origin.name_of(scene.config.checkpoint),
            "method": self.method(),
            "seed": scene.config.seed,
        }
        common |= {"length": scene.length, "samples_sha256": scene.samples, "scheme": scene.config.scheme}
        common |= {"context": scene.context, "prompt": scene.config.prompt}

        def row(task: str, metric: str, value: float, n: int | None = number, **extra: Any) -> dict[str, Any]:
            return result_row(suite="analysis", task=task, metric=metric, value=value, n=n, **common, **extra)

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
        slowest = 1 / float(scene.omega.min())
        bounds = {"base": slowest} | base_bounds(scene.length, len(layers))
        rows += [row("rope_base", name, value, n=None, coherence=COHERENCE) for name, value in bounds.items()]
        if scene.gap:
            rows += quantiles("roughness", "gap_over_observed", together("roughness"))
            rows += quantiles("roughness", "gap_over_observed_random_phase", together("null"))
        rows.append(row("roughness", "critical_band_energy_share_median", float(np.median(together("band")))))
        prediction = curves["prediction"]
        for name, value in prediction["rms"].items():
            rows.append(row(prediction["subject"], f"rms_{name}", value, against=curves["against"]))
        if "average" in prediction:
            rows.append(row(prediction["subject"], "rms_gap_undetermined", prediction["average"]))
        ahead = curves["outlook"]
        told = {f"{kind}_{e['scheme']}": e[kind] for e in ahead["schemes"] for kind in ("once", "by_pairs")}
        told |= {f"pretraining_{entry['scaling']}": entry["value"] for entry in ahead["pretraining"]}
        noise = scene.config.noise
        return rows + [row("observability", f"gap_rms_{name}", v, n=None, noise=noise) for name, v in told.items()]


def checked_bounds(z: np.ndarray, omega: np.ndarray) -> dict[str, tuple[int, np.ndarray]]:
    """(order, or DUFFIN_SCHAEFFER; what the theorem allows anywhere, [P]) of each of CHECKS."""
    sums = [coef_bound(z, omega, order) for order in ORDERS]
    bounds = {f"coefficient_order{order}": (order, sums[order]) for order in ORDERS}
    bounds |= {f"bernstein_order{order}": (order, bernstein_bound(z, omega, order, sums[0])) for order in ORDERS[1:]}
    return bounds | {"duffin_schaeffer": (DUFFIN_SCHAEFFER, bernstein_bound(z, omega, 1, sums[0]))}


def bound_ratios(bounds: dict[str, tuple[int, np.ndarray]], largest: Maxima) -> dict[str, np.ndarray]:
    """Value over bound, [P] for each of CHECKS: what is certainly reached: its rounding is taken off, so a ratio above
    1 is a violation and not noise.
    """
    ratios = {}
    for name, (kind, bound) in bounds.items():
        value = np.maximum(largest.size[kind] - largest.error[kind], 0.0)
        ratios[name] = np.divide(value, bound, out=np.where(value > 0, np.inf, 0.0), where=bound > 0)
    return ratios


def envelope(values: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lowest, highest value, middle) of each of at most CURVE_POINTS bins; the values themselves if they are fewer."""
    if values.size <= CURVE_POINTS:
        return values, values, d
    size, more = divmod(values.size, CURVE_POINTS)  # as np.array_split cuts: the first bins have one more
    first = np.arange(CURVE_POINTS) * size + np.minimum(np.arange(CURVE_POINTS), more)
    centres = np.add.reduceat(d, first) / np.diff(first, append=values.size)
    return np.minimum.reduceat(values, first), np.maximum.reduceat(values, first), centres


def thinned(values: np.ndarray) -> np.ndarray:
    """At most POINTS of the values, evenly picked."""
    return values[:: max(1, -(-values.size // POINTS))]


def rounded(values: np.ndarray) -> list[float]:
    """For files that are drawn from: six digits."""
    return [float(f"{x:.6g}") for x in np.asarray(values).ravel()]
