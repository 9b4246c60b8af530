"""`endprompt predict`: measures of each scaling and scheme on a checkpoint that was not trained yet, from its queries
and keys on one text at its own frequencies, and from the pairs of a row.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from analysis import attention, measures, observability
from analysis.capture import LayerSpectra, capture_tokens
from analysis.config import PredictConfig, VerifyConfig
from analysis.outlook import SCALINGS
from analysis.scene import check_means, load, read_ids
from analysis.spectra import with_factor
from endprompt.positions import WITH_PROMPT
from endprompt.rope import Frequencies

#: Tokens of text below which rows of attention say little; a smaller window is read whole.
FEWEST = 256

#: Each measure, and what it is in a line of a table. Those of SCHEME need a scheme's pairs beside the scaling.
SCALING = {
    "smoothness": "constant of the smoothness bound, radians per token",
    "turns": "turns of the slowest frequency over the target",
    "left_range": "share of energy at frequencies whose angles leave the trained range",
    "unseen": "share of distances, by energy, at angles not seen in pretraining",
    **{f"local_change_{d}": f"change of the score over {d} distances, of its own size" for d in measures.NEAR},
    **{f"resolution_lost_{d}": f"resolution lost over {d} distances" for d in measures.NEAR},
    "distance_change": "change of the mean score over 256 distances, heads by what distance carries of them",
    "separation_lost": "loss of separation of queries and keys, target against the base's window",
    "entropy": "entropy of attention at the target less the base's in its window, nats",
    "entropy_plain": "the same without the attention factor",
    "sink_lost": "attention on the first token, the base's in its window less that at the target",
    "attention_moved": "share of attention inside the window that is elsewhere than the base's",
}
SCHEME = {
    "gap_rows": "predicted error in the gap, from the rows alone",
    "gap_pretrained": "predicted error in the gap, from pretraining and the rows",
    "gap_heads": "the same with the energies of the checkpoint's heads",
    "unseen_rows": "share of distances, by energy, at angles seen neither in pretraining nor in the rows",
}
MEASURES = SCALING | SCHEME

#: What the lines of a table go by, highest first: points a unit of each measure, fitted on half of the lab's settings.
#: It is the pair that was best there; `benchmarks.lab.theory` tests it, and a test holds these numbers to its rows.
ORDER = {"smoothness": 27.7, "gap_pretrained": -125.6}
#: Measures of a table, beside the order.
SHOWN = (*ORDER, "unseen", "local_change_16", "entropy", "gap_rows")
WORTH = """\
The order is the best pair of measures on half of the lab's settings. Its rank correlation with the score was +0.81 on
the other half (47 arms, 95% interval 0.62 to 0.90), +0.95 on SmolLM2 from 8K to 64K (12 arms, 0.74 to 1.00) and, later,
+0.80 on control arms of the lab (128 arms, 0.70 to 0.86): other seeds, 7 to 11 scalings a setting, some with the
frequencies of one and the attention factor of another. Exchanging scalings gave as much there in none of 4,000 tries; a
table of the scalings' own mean scores would reach +0.72. It orders, and says nothing of why: neither measure alone does
so well. It predicts no score, and replaces no training."""


@dataclass(frozen=True)
class Moments:
    """Means over a text of a layer's queries and keys before RoPE, and of their squares: [H, n] each."""

    q: np.ndarray
    k: np.ndarray
    power_q: np.ndarray
    power_k: np.ndarray

    @classmethod
    def of(cls, layer: LayerSpectra) -> Moments:
        group = layer.q.shape[0] // layer.k.shape[0]
        k, power_k = (x.mean(1).repeat(group, axis=0) for x in (layer.k, np.abs(layer.k) ** 2))
        return cls(layer.q.mean(1), k, (np.abs(layer.q) ** 2).mean(1), power_k)

    @property
    def energy(self) -> np.ndarray:
        return self.power_q * self.power_k

    @property
    def mean(self) -> np.ndarray:
        return self.q * self.k.conj()

    def separation(self, omega: np.ndarray, length: int) -> np.ndarray:
        return measures.separation(self.q, self.k, self.power_q, self.power_k, omega, length)


class Reading:
    """What layers of one kind give, each head with the same weight; a layer's queries and keys are let go. theta:
    frequencies of pretraining [n]. scalings: name -> (frequencies at the target [n], attention factor).
    """

    def __init__(
        self,
        theta: np.ndarray,
        scalings: Mapping[str, Frequencies],
        window: int,
        target: int,
        tokens: int,
        device: str = "cpu",
        seed: int = 0,
    ):
        if tokens < min(FEWEST, window):
            raise ValueError(f"the text must have at least {min(FEWEST, window)} tokens: tokens={tokens}")
        self.theta, self.scalings, self.window, self.target = theta, dict(scalings), window, target
        self.energy, self.heads = np.zeros(theta.size), 0
        self.kinds: list[str] = []  # a line each, where layers are of more than one

        def frame(omega: np.ndarray, length: int) -> attention.Frame:
            return attention.Frame(omega, tokens, length, device, seed)

        self.base = frame(theta, window)
        self.frames = {name: (frame(omega, window), frame(omega, target)) for name, (omega, _) in scalings.items()}
        self.found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in scalings}
        self.weights: list[np.ndarray] = []

    def add(self, layer: LayerSpectra, before: LayerSpectra | None = None) -> None:
        """A layer of the checkpoint. before: the base's own, if the checkpoint was trained since."""
        base = Moments.of(before or layer)
        now = base if before is None else Moments.of(layer)
        self.energy += (now.energy / np.maximum(now.energy.sum(-1, keepdims=True), measures.TINY)).sum(0)
        self.heads += len(now.energy)
        self.weights.append(measures.distance_share(base.energy, base.mean))
        (own,) = self.base.rows(before or layer, 1.0)
        apart = base.separation(self.theta, self.window)
        for name, (omega, factor) in self.scalings.items():
            near, far = self.frames[name]
            (inside,) = near.rows(layer, factor)
            at_target, plain = far.rows(layer, factor, 1.0) if factor != 1 else far.rows(layer, 1.0) * 2
            after = now.separation(omega, self.target)
            values = {
                "distance_change": measures.distance_change(base.mean, now.mean, self.theta, omega, measures.NEAR[-1]),
                "separation_lost": 1 - after / np.maximum(apart, measures.TINY),
                "entropy": at_target.entropy - own.entropy,
                "entropy_plain": plain.entropy - own.entropy,
                "sink_lost": own.sink - at_target.sink,
                "attention_moved": attention.moved(own, inside),
            }
            for key, value in values.items():
                self.found[name].setdefault(key, []).append(value)

    def of_scaling(self, name: str) -> dict[str, float]:
        """Every measure of SCALING. Raises ValueError if no layer was read."""
        if not self.heads:
            raise ValueError("no attention layer with RoPE could be read")
        omega, factor = self.scalings[name]
        energy, ranges = self.energy, (self.theta, omega, self.window, self.target)
        weights = np.concatenate(self.weights)
        heads = {key: np.concatenate(values) for key, values in self.found[name].items()}
        values: dict[str, Any] = {
            "smoothness": measures.smoothness(omega, factor),
            "turns": measures.turns(omega, self.target),
            "left_range": measures.left_range(energy, *ranges),
            "unseen": measures.unseen_angles(energy, *ranges),
        }
        for d in measures.NEAR:
            values[f"local_change_{d}"] = measures.local_change(energy, self.theta, omega, d)
            values[f"resolution_lost_{d}"] = measures.resolution_lost(energy, self.theta, omega, d)
        even = weights if weights.sum() > 0 else np.ones_like(weights)
        values["distance_change"] = np.average(heads.pop("distance_change"), weights=even)
        return {key: float(value) for key, value in (values | {k: v.mean() for k, v in heads.items()}).items()}

    def of_scheme(
        self, name: str, counts: np.ndarray | None, tokens: int, noise: float = 0.1, gram: np.ndarray | None = None
    ) -> dict[str, float]:
        """Every measure of SCHEME. counts: pairs of a row at each distance 0..target-1, of `tokens` tokens; None if
        nothing is trained. gram: `gram_weighted` of them, if it is known."""
        omega, _ = self.scalings[name]
        gap = observability.reference_gap(self.window, self.target)
        pretraining = (self.theta, self.window)
        observed = [] if counts is None else observability.runs(counts > 0)
        if counts is not None and gram is None:
            gram = observability.gram_weighted(omega, counts)
        rows = None if gram is None else (gram, tokens)
        return {
            "gap_rows": measures.gap_error(omega, rows, gap, noise),
            "gap_pretrained": measures.gap_error(omega, rows, gap, noise, pretraining),
            "gap_heads": measures.gap_error(omega, rows, gap, noise, pretraining, self.energy),
            "unseen_rows": float(
                measures.unseen_angles(self.energy, self.theta, omega, self.window, self.target, observed)
            ),
        }


def read(config: PredictConfig, scalings: Iterable[str] = SCALINGS, trained: Any = None) -> Reading:
    """One text through the layers of a checkpoint that an extension scales, as `endprompt.model.kinds` has it.
    scalings: by the names of `analysis.spectra.with_factor`. trained: the checkpoint once extended to the target, whose
    own layers and frequencies are measured in their place, under the name `trained`: a directory, or (directory,
    config) of weights that are to be read under another config. Raises ValueError for what cannot be predicted.
    """
    from endprompt import model as models
    from endprompt.model.geometry import extended_config, window_of
    from endprompt.model.kinds import described, layer_kinds, scaled_kind
    from endprompt.model.wrapper import text_checkpoint
    from endprompt.results import recorded

    if config.target < 1:
        raise ValueError(f"predict must know the window to extend to, in tokens: target={config.target}")
    check_means(config)
    path = str(text_checkpoint(config.checkpoint))
    settings = models.load_config(path)
    geometry = models.rope_geometry(settings)
    scaling = geometry.parameters.get("rope_type", "default")
    record = recorded(path)
    if scaling != "default" or record.get("target", 0) > record.get("window", math.inf):
        raise ValueError(
            "predict compares with the base inside its window, so it reads the checkpoint before extension: "
            f"checkpoint={config.checkpoint!r} is extended already (rope_type={scaling!r})"
        )
    if cap := getattr(settings, "attn_logit_softcapping", None):
        raise ValueError(f"predict knows attention by a plain softmax: attn_logit_softcapping={cap}")
    window = window_of(settings, config.window).window
    if config.target <= window:
        raise ValueError(f"the target must be above the checkpoint's window: target={config.target} {window=}")
    theta, _ = geometry.frequencies()
    scaled = {}
    if trained is None:
        shape = (geometry.parameters["rope_theta"], geometry.rotary_dim, config.target / window, window)
        for name in scalings:
            scaling, options = with_factor(name, *shape)
            extended = extended_config(settings, scaling, config.target, window=config.window, **options)
            scaled[name] = models.rope_geometry(extended).frequencies(config.target)
    else:
        after, extended = (trained, models.load_config(trained)) if isinstance(trained, str) else trained
        scaled["trained"] = models.rope_geometry(extended).frequencies(config.target)
    ids = read_ids(dataclasses.replace(config, checkpoint=path), settings, window)
    reading = Reading(theta, scaled, window, config.target, ids.size, config.device, config.seed)
    kind = scaled_kind(layer_kinds(settings))
    lines = described(settings, config.target)
    reading.kinds = lines if len(lines) > 1 else []

    def layers(model: Any, consume: Callable[[LayerSpectra], None]) -> None:
        if any(name.endswith("sinks") for name, _ in model.named_parameters()):
            raise ValueError(
                f"predict knows attention by a plain softmax, and this family has sinks: {settings.model_type!r}"
            )
        # layers that slide turn by frequencies of their own, and no distance beyond their window reaches them
        capture_tokens(model, ids, lambda layer: consume(layer) if kind and layer.layer in kind.layers else None)

    base: dict[int, LayerSpectra] = {}
    loaded = partial(load, config=VerifyConfig(path, dtype=config.dtype, device=config.device))
    layers(loaded(path), reading.add if trained is None else lambda layer: base.__setitem__(layer.layer, layer))
    if trained is not None:
        layers(loaded(after, settings=extended), lambda layer: reading.add(layer, base.pop(layer.layer)))
    return reading


def even_factor(config: PredictConfig, scaling: str) -> tuple[float, list[np.ndarray]]:
    """The attention factor, 1 to 2, at which a scaling's frequencies keep the entropy at the target that the base has
    in its window, before any training: of the mean over all heads, and of each head, a layer each [H]. The nearer end
    where none does.
    """
    factors = np.linspace(1, 2, 11)
    found = read(config, [f"{scaling}@{factor}" for factor in factors]).found
    layers = [np.stack(layer) for layer in zip(*(values["entropy"] for values in found.values()))]  # each [factors, H]

    def zero(entropy: np.ndarray) -> float:
        return float(np.interp(0, -entropy, factors))

    return zero(np.hstack(layers).mean(1)), [np.array([*map(zero, layer.T)]) for layer in layers]


#: Schemes that a table compares, `none` for the checkpoint as it is under the scaling.
SCHEMES = ("none", "contiguous", "endprompt", "endprompt-random", "pose")


def table(config: PredictConfig, reading: Reading) -> list[dict[str, Any]]:
    """A line a scaling and scheme with every measure; rows as long as the window. Raises ValueError if no row fits."""
    lines, pairs = [], {}
    for scheme in SCHEMES[1:]:
        prompt = config.prompt if scheme in WITH_PROMPT else 0
        pairs[scheme] = observability.pair_counts(scheme, reading.window - prompt, prompt, reading.target)
    for scaling, (omega, _) in reading.scalings.items():
        fixed = reading.of_scaling(scaling)
        grams = dict(zip(pairs, observability.gram_weighted(omega, np.stack([*pairs.values()]))))
        for scheme in SCHEMES:
            given = (reading.window, config.noise, grams.get(scheme))
            values = fixed | reading.of_scheme(scaling, pairs.get(scheme), *given)
            order = sum(points * values[key] for key, points in ORDER.items())
            about = {"target": reading.target, "scaling": scaling, "scheme": scheme, "order": order}
            lines.append(about | values)
    return lines


def report(config: PredictConfig) -> str:
    """The table, the best scaling first, and what it is worth; or every measure as lines of JSON."""
    reading = read(config)
    lines = sorted(table(config, reading), key=lambda line: -line["order"])
    if config.json:
        return "\n".join(json.dumps(line) for line in lines)
    wide = {key: max(len(key), 7) + 2 for key in ("order", *SHOWN)}
    text = ["".join([f"{'scaling':<9}{'scheme':<18}", *(f"{key:>{width}}" for key, width in wide.items())])]
    for line in lines:
        numbers = "".join(f"{line[key]:>{width}.3f}" for key, width in wide.items())
        text.append(f"{line['scaling']:<9}{line['scheme']:<18}{numbers}")
    return "\n".join([*text, *reading.kinds, "", *(f"{key}: {MEASURES[key]}" for key in SHOWN), WORTH])
