"""Spectra of a model's own query-key pairs, taken layer by layer while it reads a text.

For one forward pass two functions of the model's source file are wrapped: its rotation, which sees q and k after any
q/k norm and before RoPE, and the attention function, which sees what the model really multiplies. Which components make
a pair is measured by unit vectors, so grouped queries, norms, fused projections, partial rotary and the order of pairs
need no case of their own, and every spectrum is checked against the model's own logit. One layer is held at a time.
Legend: H query heads, G key heads, T tokens, P pairs, D head dim, R rotated part of it, n = R/2 frequencies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from endprompt.model import RopeGeometry, rope_geometry
from endprompt.model.geometry import frequencies_by_layer

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
    error: largest |S - the model's own| over sum a, at the pairs' own distances. q, k: complex128 [H, P, n], [G, P, n]
    of the pairs' places before RoPE; still_q, still_k: float64 [H, P, m], [G, P, m], what RoPE leaves alone.
    """

    layer: int
    z: np.ndarray
    constant: np.ndarray
    scaling: float
    error: float
    q: np.ndarray
    k: np.ndarray
    still_q: np.ndarray
    still_k: np.ndarray


def choose_pairs(tokens: int, number: int, seed: int) -> Pairs:
    """Stratified pairs: near (distance below T/8), far (at least T/2), and any query with the first token; a pure
    function of its arguments, the same for all layers and heads. Raises ValueError if there are too few tokens.
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
    model: PreTrainedModel,
    input_ids: Any,
    pairs: Pairs,
    consume: Callable[[LayerSpectra], None],
    length: int = 0,
    without_rope: list[int] | None = None,
) -> RopeGeometry:
    """Run the model over a text [T] and hand each layer's spectra to `consume`, which should not keep all of them.
    Returns the geometry of the layers that an extension scales.

    Each layer is held against its own set of frequencies. length: tokens that the model believes to read, where its
    scaling depends on it (default T). without_rope: gets the layers that turn nothing, which are left out. Raises
    ValueError if a value is not finite, if the model's source has not the two functions, if its score is no function of
    the distance, or if S differs from the model's own logit by more than its dtype explains.
    """
    geometry = rope_geometry(model.config)
    sets = frequencies_by_layer(model.config, length or len(input_ids))
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=model.device)[None]
    query, key = (torch.as_tensor(x, device=model.device) for x in (pairs.query, pairs.key))
    turns: list[_Turn] = []
    seen = []

    def on_attention(layer: int, q_HTD: torch.Tensor, k_GTD: torch.Tensor, scaling: float) -> None:
        if not turns:
            if without_rope is not None and layer not in seen:  # some attend twice, to two halves of the values
                without_rope.append(layer)
            return
        if len(turns) != 1:
            raise ValueError(
                f"layer {layer}: its RoPE is applied {len(turns)} times before its attention, and verify reads one"
            )
        turn = turns.pop()
        if layer not in sets and layer >= 0:
            raise ValueError(f"layer {layer}: it turns, and by its config it has no RoPE")
        omega, attention_factor = sets.get(layer) or next(iter(sets.values()))  # -1: shared by layers (Zamba 2)
        if turn.first.size != omega.size:
            raise ValueError(
                f"layer {layer}: the model turns {turn.first.size} pairs of a head, its config gives {omega.size}"
            )
        group = q_HTD.shape[0] // k_GTD.shape[0]
        q1, k1 = _pick(q_HTD, query), _pick(k_GTD, key)
        q0, q_place = _complex(turn, turn.q, q1, query, q_HTD.dtype, layer)
        k0, k_place = _complex(turn, turn.k, k1, key, k_GTD.dtype, layer)
        if q_place != k_place:
            raise ValueError(f"layer {layer}: the rotated part of q begins at {q_place}, that of k at {k_place}")
        own_k, own_k1 = k0, k1
        k0, k1 = k0.repeat(group, axis=0), k1.repeat(group, axis=0)
        z = q0 * k0.conj()
        still = np.setdiff1d(np.arange(q1.shape[-1]), k_place + turn.place[np.concatenate([turn.first, turn.second])])
        constant = np.sum(q1[..., still] * k1[..., still], axis=-1)
        turned = z * np.exp(1j * np.multiply.outer(pairs.distance, omega))
        ours = attention_factor**2 * turned.real.sum(-1) + constant
        theirs = np.sum(q1 * k1, axis=-1)
        size = attention_factor**2 * np.abs(z).sum(-1) + np.abs(q1[..., still] * k1[..., still]).sum(-1)
        error = float(np.max(np.abs(ours - theirs) / np.maximum(size, np.finfo(np.float32).tiny)))
        # what rounding explains: of q, k, cos, sin in their dtype, of angles in float32
        angle = 4 * float(omega.max()) * int(pairs.query.max()) * torch.finfo(torch.float32).eps
        allowed = 16 * torch.finfo(q_HTD.dtype).eps + angle
        if not error <= allowed:
            raise ValueError(
                f"layer {layer}: S(m - n) differs from the model's own logit by {error:.1e} of sum a, more than "
                f"{allowed:.1e}: the config's frequencies are not the model's"
            )
        rest = q1[..., still], own_k1[..., still]
        consume(LayerSpectra(layer, z, constant / attention_factor**2, scaling, error, q0, own_k, *rest))
        seen.append(layer)

    with torch.no_grad(), _wrapped(model, turns, on_attention, tokens=ids.shape[1]):
        model.base_model(input_ids=ids, use_cache=False)
    if not seen:
        raise ValueError(f"no attention layer of {type(model).__name__} could be read")
    return geometry


def capture_tokens(model: PreTrainedModel, input_ids: Any, consume: Callable[[LayerSpectra], None]) -> RopeGeometry:
    """`capture` with every token once as a query and once as a key; q and k are in the order of the text. The pairs
    join the first token with the last, so that the model's own logits are checked at distances of all sizes.
    """
    places = np.arange(len(input_ids))

    def in_order(layer: LayerSpectra) -> None:
        consume(dataclasses.replace(layer, k=layer.k[:, ::-1], still_k=layer.still_k[:, ::-1]))

    return capture(model, input_ids, Pairs(places, places[::-1].copy(), np.zeros_like(places)), in_order)


@dataclass(frozen=True)
class _Turn:
    """One application of the model's rotation. q, k: (before, after) it, [H, T, R]. first, second: components of each
    pair, int [n]; the first turns towards the second. place: where the rotation puts each component, int [R].
    """

    q: tuple[torch.Tensor, torch.Tensor]
    k: tuple[torch.Tensor, torch.Tensor]
    first: np.ndarray
    second: np.ndarray
    place: np.ndarray


def measured_pairs(rotate: Callable[[torch.Tensor], torch.Tensor], q_BHTR: torch.Tensor) -> tuple[np.ndarray, ...]:
    """(first, second, place) as in `_Turn`, by unit vectors. Raises ValueError if the rotation does not turn pairs."""
    tokens, rotary = q_BHTR.shape[-2:]
    units = torch.eye(rotary, dtype=q_BHTR.dtype, device=q_BHTR.device)
    out = rotate(units[:, None, None].expand(-1, 1, tokens, -1).contiguous())
    start, turned = out[:, 0, 0].double().cpu().numpy(), out[:, 0, 1].double().cpu().numpy()
    place = np.abs(start).argmax(1)
    moved = turned[:, place]
    moved = moved - np.diag(np.diag(moved))
    first = np.flatnonzero((moved > 0).any(1))
    second = moved[first].argmax(1)
    pairs = np.zeros_like(moved)
    pairs[first, second], pairs[second, first] = moved[first, second], -moved[first, second]
    whole = ((start != 0).sum(1) == 1).all() and np.unique(place).size == rotary
    if not (whole and first.size and np.array_equal(pairs, moved)):
        raise ValueError("the model's rotation does not turn pairs of components, each by an angle of its own")
    return first, second, place


def _complex(
    turn: _Turn,
    turned: tuple[torch.Tensor, torch.Tensor],
    used: np.ndarray,
    places: torch.Tensor,
    dtype: torch.dtype,
    layer: int,
) -> tuple[np.ndarray, int]:
    """(pairs of q or k as complex numbers [H, P, n]; where their part of the head begins in `used` [H, P, D], what
    attention is given). A factor for each head and token between rotation and attention (a norm without weights, a
    temperature that grows with the position) is taken along, and so are heads that were repeated. Raises ValueError for
    anything else.
    """
    before, after = (_pick(x, places) for x in turned)
    if not np.isfinite(used).all():
        raise ValueError("queries and keys must be finite: found NaN or infinity")
    heads, rotary = used.shape[0], after.shape[-1]
    repeated = heads // after.shape[0]
    best: tuple[float, np.ndarray, int, np.ndarray] | None = None
    for repeat in (np.repeat, np.tile)[: 2 if repeated > 1 else 1]:
        order = repeat(np.arange(after.shape[0]), repeated)
        for begin in {0, used.shape[-1] - rotary}:
            if order.size != heads or begin < 0:
                continue
            part, given = after[order], used[..., begin : begin + rotary]
            size = np.maximum(np.abs(given).max(-1), np.finfo(np.float32).tiny)
            away, factor = np.abs(given - part).max(-1), np.ones_like(size)
            if not (away <= 4 * torch.finfo(dtype).eps * size).all():
                factor = np.sum(given * part, -1) / np.maximum(np.sum(part * part, -1), np.finfo(np.float32).tiny)
                away = np.abs(given - factor[..., None] * part).max(-1)
            error = float((away / size).max())
            if best is None or error < best[0]:
                best = (error, order, begin, factor)
    if best is None or best[0] > 16 * torch.finfo(dtype).eps:
        raise ValueError(
            f"layer {layer}: between RoPE and attention the model changes q or k by more than a factor for each head "
            "and token (a norm with weights, say): its score is no function of the distance alone"
        )
    _, order, begin, factor = best
    return factor[..., None] * (before[order][..., turn.first] + 1j * before[order][..., turn.second]), begin


def _pick(x_HTD: torch.Tensor, places: torch.Tensor) -> np.ndarray:
    return x_HTD[:, places].double().cpu().numpy()


#: Names of functions (q, k, ...) -> (q, k) that rotate, in transformers' sources.
ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")


@contextlib.contextmanager
def _wrapped(
    model: PreTrainedModel, turns: list[_Turn], on_attention: Callable[..., None], tokens: int
) -> Iterator[None]:
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
    sources = {sys.modules[type(m).__module__] for m in layers}
    implementation = model.config._attn_implementation
    measured: dict[tuple[Any, int], Any] = {}

    def recording(rotate: Callable[..., Any]) -> Callable[..., Any]:
        def record(q: torch.Tensor, k: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            def heads_first(x: torch.Tensor) -> torch.Tensor:  # some rotate before they swap heads and tokens
                return x if q.shape[2] == tokens else x.transpose(1, 2)

            def turned(x: torch.Tensor) -> torch.Tensor:
                x = heads_first(x)
                return heads_first(rotate(x, x, *args, **kwargs)[0])

            out = None if k is None else rotate(q, k, *args, **kwargs)
            if k is None or not (isinstance(out, tuple) and len(out) == 2):
                raise ValueError(
                    f"q and k cannot be captured: {rotate.__module__}.{rotate.__name__} does not turn the two together"
                )
            q1, k1 = out
            if (rotate, q.shape[-1]) not in measured:
                measured[rotate, q.shape[-1]] = measured_pairs(turned, heads_first(q))
            here = [heads_first(x)[0] for x in (q, q1, k, k1)]
            turns.append(_Turn((here[0], here[1]), (here[2], here[3]), *measured[rotate, q.shape[-1]]))
            return out

        return record

    with contextlib.ExitStack() as stack:
        for source in sources:
            names = [name for name in ROTATIONS if hasattr(source, name)]
            functions = getattr(source, "ALL_ATTENTION_FUNCTIONS", None)
            if not names or functions is None:
                raise ValueError(
                    f"q and k cannot be captured: {source.__name__} has no function {ROTATIONS[0]} or does not use "
                    "transformers' attention interface"
                )
            attend = functions.get_interface(implementation, getattr(source, "eager_attention_forward", None))

            def watch(module: Any, query: Any, key: Any, *args: Any, _attend: Any = attend, **kwargs: Any) -> Any:
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                on_attention(module.layer_idx, query[0], key[0], float(scaling))
                return _attend(module, query, key, *args, **kwargs)

            for name in names:
                stack.callback(setattr, source, name, getattr(source, name))
                setattr(source, name, recording(getattr(source, name)))
            functions[implementation] = watch  # an entry of this instance, above the class-wide one of the same name
            stack.callback(functions.pop, implementation, None)
        yield
