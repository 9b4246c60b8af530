"""Kinds of layers: how far each layer of a checkpoint sees, and which RoPE it has.

The one definition that scaling, the check of frequencies, training's attention, export, `verify` and `plan` read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Kinds of layers that attend, by transformers' names, and the config's key of how many tokens back they see.
REACH = {
    "full_attention": None,
    "hybrid": None,  # with a recurrent state beside it
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
#: Kinds that do not attend: no position reaches them.
STILL = ("linear_attention", "conv", "moe", "mlp")
#: Families whose code gives no RoPE to layers that see everything beside layers that slide. No key of theirs says so.
UNTURNED = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1")


@dataclass(frozen=True)
class LayerKind:
    """Layers that see equally far and turn by the same frequencies. name: of the kind in layer_types; layers: their
    numbers; reach: tokens that a query sees, its own included and by position, None for all before it (in chunks: those
    of its chunk). parameters: their own of `rope_parameters`, None without RoPE. head_dim: of q and k.
    """

    name: str
    layers: tuple[int, ...]
    reach: int | None
    parameters: Mapping[str, Any] | None
    head_dim: int

    def sees(self, target: int) -> bool:
        """Whether these layers attend to everything in a row of so many tokens."""
        return self.name not in STILL and (self.reach is None or self.reach >= target)

    def __str__(self) -> str:
        who = f"layer{'s' * (len(self.layers) > 1)} {spelled(self.layers)} ({self.name})"
        if self.name in STILL:
            return f"{who}: no attention"
        sees = "everything"
        if self.reach is not None:
            chunks = REACH.get(self.name) == "attention_chunk_size"
            sees = f"{'chunks' if chunks else 'a sliding window'} of {self.reach:,} tokens"
        return f"{who}: attention to {sees}{'' if self.parameters else ', no RoPE'}"


def by_kind(parameters: Mapping[str, Any] | None) -> bool:
    """Whether `rope_parameters` hold a set for each kind of layer."""
    return any(isinstance(value, Mapping) for value in (parameters or {}).values())


def layer_kinds(config: PretrainedConfig) -> tuple[LayerKind, ...]:
    """A text model's kinds of layers, by first place. Raises ValueError for a sliding window that is not stated."""
    given: Any = getattr(config, "rope_parameters", None)
    stated = getattr(config, "layer_types", None)
    width = getattr(config, "sliding_window", None)
    slides = width and getattr(config, "use_sliding_window", True)
    names = stated or ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    turned = getattr(config, "no_rope_layers", None) or [1] * len(names)
    if len(turned) != len(names):
        raise ValueError(f"no_rope_layers must say it of each of {len(names)} layers: {len(turned)} given")
    grouped: dict[tuple[str, bool], list[int]] = {}
    for layer, name in enumerate(names):
        has = bool(turned[layer]) and name not in STILL
        if config.model_type in UNTURNED and REACH.get(name, "") is None and width and not _forced(config, layer):
            has = False
        grouped.setdefault((name, has), []).append(layer)
    by_name: Any = config.per_layer_config if stated and getattr(config, "is_heterogeneous", False) else None
    kinds = []
    for (name, has), layers in grouped.items():
        key = REACH.get(name)
        reach = getattr(config, key, None) if key else None
        if key and not reach:
            raise ValueError(
                f"layer_types has {name} and {key} is {reach}: state {key}, or write full_attention for {name} in "
                "layer_types, so that these layers see everything"
            )
        parameters = (given.get(name) if by_kind(given) else given) if has else None
        own = config if by_name is None else by_name[name]
        kinds.append(LayerKind(name, tuple(layers), reach, parameters, head_dim_of(own)))
    return tuple(kinds)


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _forced(config: PretrainedConfig, layer: int) -> bool:
    """Cohere 2 MoE turns its dense layers at the front, whatever they see."""
    dense = (getattr(config, "mlp_layer_types", None) or ["sparse"] * (layer + 1))[layer] == "dense"
    return dense and getattr(config, "prefix_dense_sliding_window_pattern", None) == 1


def scaled_kind(kinds: Iterable[LayerKind]) -> LayerKind | None:
    """The kind whose frequencies an extension scales: with RoPE, and the one that sees everything if there is one."""
    turning = [kind for kind in kinds if kind.parameters]
    return min(turning, key=lambda kind: kind.reach is not None, default=None)


def check_layers(config: PretrainedConfig, target: int, scaling: str | None = None) -> None:
    """Raises ValueError if no layer sees a target, a kind is unknown, or a scaling changes only layers that slide."""
    kinds = layer_kinds(config)
    if unknown := [kind for kind in kinds if kind.name not in (*REACH, *STILL)]:
        raise ValueError(f"layers {spelled(unknown[0].layers)} are of a kind that is not known here: {unknown[0].name}")
    attending = [kind for kind in kinds if kind.name not in STILL]
    if attending and not any(kind.sees(target) for kind in attending):
        key, kind = REACH[attending[0].name], attending[0]
        how = f"set {key} to null in its config.json"
        if getattr(config, "layer_types", None):
            how = f"write full_attention for {kind.name} in layer_types of its config.json"
        raise ValueError(
            f"all layers that attend see only a window below the target, and no extension passes through them: "
            f"{key}={kind.reach} {target=}; {how} to attend to all"
        )
    if scaling not in (None, "none") and not any(kind.parameters and kind.sees(target) for kind in attending):
        raise ValueError(
            f"the layers that see everything have no RoPE, so {scaling=} would change none but those that slide: "
            "scaling must be none"
        )


def described(config: PretrainedConfig, target: int, scaling: str = "") -> list[str]:
    """A line for each kind of layer: what it sees, and whether an extension to a target changes its frequencies."""
    kinds = layer_kinds(config)
    main, shared = scaled_kind(kinds), not by_kind(config.rope_parameters)
    lines = []
    for kind in kinds:
        what = "leaves their frequencies"
        if kind.parameters is None:
            what = "changes nothing in them"
        elif scaling != "none" and (kind is main or shared):
            more = "" if kind.sees(target) else " too, since the config has one set for all layers"
            what = f"scales their frequencies{more}"
        lines.append(f"{kind}; an extension {what}")
    return lines


def spelled(layers: Iterable[int]) -> str:
    """Numbers as short as they can be written: `0-4, 6`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(map(str, part)) for part in parts)
