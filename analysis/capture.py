"""Spectra of a model's own query-key pairs, taken layer by layer while it reads a text.

For the time of one forward pass two functions of the model's source file are wrapped: `apply_rotary_pos_emb`, which
sees q and k after any q/k norm and before RoPE, and the attention function, which sees what the model really
multiplies. So grouped queries, norms, fused projections and partial rotary need no case of their own, and every
spectrum is checked against the model's own logit at its own distance. One layer's q and k are held at a time.

Legend: H query heads, G key heads, T tokens, P pairs, D head dim, R rotated part of it, n = R/2 frequencies.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from analysis.spectra import spectrum_from_qk
from endprompt.model import RopeGeometry, rope_geometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRATA = ("near", "far", "first")


@dataclass(frozen=True)
class Pairs:
    """Places (query m, key n <= m) in a text, and the stratum of each; int64 [P] and an array of STRATA indices [P]."""

    query: np.ndarray
    key: np.ndarray
    stratum: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        return self.query - self.key


@dataclass(frozen=True)
class LayerSpectra:
    """Spectra of one layer.

    z: complex128 [H, P, n], rotated part; constant: float64 [H, P], what the part of the head that RoPE leaves alone
    adds to S at every distance (0 without partial rotary). scaling: S * attention_factor^2 * scaling is the logit.
    error: largest |S - the model's own| over sum a, at the pairs' own distances.
    """

    layer: int
    z: np.ndarray
    constant: np.ndarray
    scaling: float
    error: float


def choose_pairs(tokens: int, number: int, seed: int) -> Pairs:
    """Stratified pairs: near (distance below T/8), far (at least T/2), and any query with the first token.

    A pure function of its arguments, the same for all layers and heads. Raises ValueError if there are too few tokens.
    """
    if tokens < 16:
        raise ValueError(f"the text must have at least 16 tokens to choose near, far and first pairs: {tokens=}")
    if number < 3:
        raise ValueError(f"pairs must be at least 3, one for each stratum: pairs={number}")
    rng = np.random.default_rng([seed, tokens, number])
    sizes = [number - 2 * (number // 3), number // 3, number // 3]
    near = rng.integers(1, tokens // 8, size=sizes[0])
    far = rng.integers(tokens // 2, tokens, size=sizes[1])
    first = rng.integers(1, tokens, size=sizes[2])
    distance = np.concatenate([near, far, first])
    key = rng.integers(0, tokens - distance)
    key[sizes[0] + sizes[1] :] = 0
    return Pairs(key + distance, key, np.repeat(np.arange(3), sizes))


def capture(
    model: PreTrainedModel, input_ids: Any, pairs: Pairs, consume: Callable[[LayerSpectra], None], length: int = 0
) -> RopeGeometry:
    """Run the model over a text [T] and hand each layer's spectra to `consume`, which should not keep all of them.

    length: tokens that the model believes to read, where its scaling depends on it (default T). Returns the geometry.
    Raises ValueError if a weight gives a value that is not finite, if the model's source has not the two functions, or
    if S differs from the model's own logit by more than its dtype explains (a wrong layout or frequency).
    """
    geometry = rope_geometry(model.config)
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=model.device)[None]
    omega, attention_factor = geometry.frequencies(length or ids.shape[1])
    query, key = (torch.as_tensor(x, device=model.device) for x in (pairs.query, pairs.key))
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    seen = []

    def on_attention(layer: int, q_HTD: torch.Tensor, k_GTD: torch.Tensor, scaling: float) -> None:
        if len(before) != 1:
            raise ValueError(f"layer {layer}: expected one application of RoPE before its attention, saw {len(before)}")
        (q0_HTR, k0_GTR) = before.pop()
        group = q_HTD.shape[0] // k_GTD.shape[0]
        rotary = geometry.rotary_dim
        q0, k0 = _pick(q0_HTR[..., :rotary], query), _pick(k0_GTR[..., :rotary], key).repeat(group, axis=0)
        q1, k1 = _pick(q_HTD, query), _pick(k_GTD, key).repeat(group, axis=0)
        z = spectrum_from_qk(q0, k0, geometry.layout)
        constant = np.sum(q1[..., rotary:] * k1[..., rotary:], axis=-1)
        turned = z * np.exp(1j * np.multiply.outer(pairs.distance, omega))
        ours = attention_factor**2 * turned.real.sum(-1) + constant
        theirs = np.sum(q1 * k1, axis=-1)
        size = attention_factor**2 * np.abs(z).sum(-1) + np.abs(q1[..., rotary:] * k1[..., rotary:]).sum(-1)
        error = float(np.max(np.abs(ours - theirs) / np.maximum(size, np.finfo(np.float32).tiny)))
        allowed = logit_tolerance(q_HTD.dtype, float(omega.max()), int(pairs.query.max()))
        if not error <= allowed:
            raise ValueError(
                f"layer {layer}: S(m - n) differs from the model's own logit by {error:.1e} of sum a, more than "
                f"{allowed:.1e}: layout {geometry.layout!r} or the frequencies are not the model's"
            )
        consume(LayerSpectra(layer, z, constant / attention_factor**2, scaling, error))
        seen.append(layer)

    with torch.no_grad(), _wrapped(model, before, on_attention):
        model.base_model(input_ids=ids, use_cache=False)
    if not seen:
        raise ValueError(f"no attention layer of {type(model).__name__} could be read")
    return geometry


def logit_tolerance(dtype: torch.dtype, sigma: float, position: int) -> float:
    """What rounding explains of |S - the model's logit| / sum a: q, k, cos, sin in dtype, angles in float32."""
    angle = 4 * sigma * position * torch.finfo(torch.float32).eps
    return 16 * torch.finfo(dtype).eps + angle


def _pick(x_HTD: torch.Tensor, places: torch.Tensor) -> np.ndarray:
    return x_HTD[:, places].double().cpu().numpy()


@contextlib.contextmanager
def _wrapped(model: PreTrainedModel, before: list[Any], on_attention: Callable[..., None]) -> Iterator[None]:
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
    sources = {sys.modules[type(m).__module__] for m in layers}
    name = model.config._attn_implementation
    with contextlib.ExitStack() as stack:
        for source in sources:
            rotate = getattr(source, "apply_rotary_pos_emb", None)
            functions = getattr(source, "ALL_ATTENTION_FUNCTIONS", None)
            if rotate is None or functions is None:
                raise ValueError(
                    f"q and k cannot be captured: {source.__name__} has no apply_rotary_pos_emb or does not use "
                    "transformers' attention interface"
                )
            attend = functions.get_interface(name, getattr(source, "eager_attention_forward", None))

            def record(q: torch.Tensor, k: torch.Tensor, *args: Any, _rotate: Any = rotate, **kwargs: Any) -> Any:
                before.append((q[0], k[0]))
                return _rotate(q, k, *args, **kwargs)

            def watch(module: Any, query: Any, key: Any, *args: Any, _attend: Any = attend, **kwargs: Any) -> Any:
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                on_attention(module.layer_idx, query[0], key[0], float(scaling))
                return _attend(module, query, key, *args, **kwargs)

            setattr(source, "apply_rotary_pos_emb", record)  # noqa: B010
            stack.callback(setattr, source, "apply_rotary_pos_emb", rotate)
            functions[name] = watch  # an entry of this instance, above the class-wide one of the same name
            stack.callback(functions.pop, name, None)
        yield
