"""What RoPE does in a checkpoint, and its config for a longer window."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from endprompt import rope
from endprompt.model.kinds import LayerKind, by_kind, check_layers, head_dim_of, layer_kinds, scaled_kind
from endprompt.results import recorded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class RopeGeometry:
    """What RoPE does in a checkpoint. head_dim: of q and k; rotary_dim: its rotated part (smaller with partial rotary).
    stated: max_position_embeddings, in tokens; what the checkpoint can read is `window_of`'s. parameters:
    `rope_parameters` without what is null.
    """

    head_dim: int
    rotary_dim: int
    stated: int
    parameters: dict[str, Any]

    def frequencies(self, length: int | None = None) -> rope.Frequencies:
        """(radians per token, float64 (rotary_dim/2,); attention factor), recomputed from the config."""
        return rope.frequencies_of(self.parameters, self.head_dim, self.stated, length)


@dataclass(frozen=True)
class Window:
    """How far a checkpoint reads, in tokens: window = original times the factor of its scaling, or what is stated.
    original: the window before scaling; factor: 1.0 where nothing is scaled.
    """

    window: int
    original: int
    factor: float


def window_of(config: PretrainedConfig, window: int | None = None, needed: int | None = None) -> Window:
    """The window of a config, of the text model in a multimodal one: the larger of max_position_embeddings and original
    x factor.

    The original window is what the scaling states; else max_position_embeddings, from which transformers reckons
    dynamic, yarn, llama3 and longrope. Linear scaling has one formula for either reading of max_position_embeddings
    (Vicuna 16k states the window before it, others the one after it): there the checkpoint's own record decides, or
    `window`, which the user states. Where a scaling's factor is in `rope_theta` (ntk), the window is what is stated.
    needed: tokens asked for; what both readings allow is not asked about. Raises ValueError if the config has no
    window, or leaves it open.
    """
    with named(config):
        return _window_of(config.get_text_config(), window, needed)


def _window_of(text: PretrainedConfig, window: int | None, needed: int | None) -> Window:
    stated = _stated_window(text)
    parameters = getattr(text, "rope_parameters", None) or {}
    if by_kind(parameters):  # those of the layers that an extension scales
        layers = scaled_kind(layer_kinds(text))
        parameters = (layers.parameters if layers else None) or {}
    kind = parameters.get("rope_type", "default")
    original: float | None = None
    factor: float | None = None
    if kind != "default":
        original = _number(parameters.get("original_max_position_embeddings"), "original_max_position_embeddings")
        original = original or getattr(text, "original_max_position_embeddings", None)
        factor = _number(parameters.get("factor"), "factor") or stated / (original or stated)
        if factor < 1:
            raise ValueError(f"a scaling must make the window longer, its factor be at least 1: {factor=} {original=}")
    factor = factor or 1.0
    readings = {max(stated, round((original or stated) * factor)): int(original or stated)}
    if kind in ("linear", "proportional") and original is None:
        readings[stated] = round(stated / factor)
    source, unclear = str(text.name_or_path or ""), window is None and len(readings) > 1
    # an export's record says that its stated window is the one it was extended to
    if unclear and ((needed or stated + 1) <= stated or (source and recorded(source).get("target") == stated)):
        window = stated
    allowed = " or ".join(f"window={reading}" for reading in sorted(readings))
    if window is None and len(readings) > 1:
        raise ValueError(
            f"the config leaves open whether max_position_embeddings={stated} is the window before its linear scaling "
            f"by {factor:g} or after it: give {allowed}, or state original_max_position_embeddings in rope_parameters"
        )
    window = min(readings) if window is None else window
    if window not in readings:
        raise ValueError(f"the window must be one that the checkpoint's config can mean, {allowed}: {window=}")
    return Window(window, readings[window], factor)


def _stated_window(config: PretrainedConfig) -> int:
    stated = _number(getattr(config, "max_position_embeddings", None), "max_position_embeddings")
    if stated is None:
        raise ValueError("the checkpoint's config must give its window: max_position_embeddings")
    return int(stated)


def _number(value: Any, key: str) -> float | None:
    """A number of the config, None if it is not there. Raises ValueError if it is no positive number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a positive number: {key}={value!r}")
    return value


def rope_geometry(config: PretrainedConfig, kind: LayerKind | None = None) -> RopeGeometry:
    """What the config says of a kind of layers; default those that an extension scales. Raises ValueError for no RoPE,
    ALiBi, multimodal models, and kinds of layers that are not known.
    """
    with named(config):
        return _rope_geometry(config, kind)


def frequencies_by_layer(config: PretrainedConfig, length: int | None = None) -> dict[int, rope.Frequencies]:
    """The frequencies of each layer that has RoPE; length as of `RopeGeometry.frequencies`."""
    found: dict[int, rope.Frequencies] = {}
    for kind in layer_kinds(config):
        if kind.parameters:
            found |= dict.fromkeys(kind.layers, rope_geometry(config, kind).frequencies(length))
    return found


def check_no_text(parameters: Mapping[str, Any]) -> None:
    """Raises ValueError if a number of rope_parameters, of whatever kind of layer, is written as text, or one of a list
    is not positive."""
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            check_no_text(value)
        elif isinstance(value, (list, tuple)):  # longrope's divisors
            for place, number in enumerate(value):
                _number(number, f"{key}[{place}]")
        elif isinstance(value, str) and key not in ("rope_type", "type"):
            raise ValueError(f"{key} must be a number, not text: {key}={value!r}")


@contextlib.contextmanager
def named(config: PretrainedConfig) -> Iterator[None]:
    """Errors about a config say whose it is."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        where = f"{config.name_or_path}: " if config.name_or_path else ""
        said = str(error)
        if isinstance(error, AttributeError) and error.name:
            said = f"the config must state {error.name}, and it does not: model_type={config.model_type!r}"
        raise ValueError(said if said.startswith(where) else f"{where}{said}") from error


def said(error: BaseException) -> str:
    """What an error of transformers' says, in one line; a key that a table of its lacks is called what it is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"it knows no {text}" if isinstance(error, KeyError) else text


def _rope_geometry(config: PretrainedConfig, layers: LayerKind | None) -> RopeGeometry:
    kind = config.model_type
    text = config.get_text_config()
    alibi = getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi"
    if alibi or kind in ("bloom", "mpt"):
        raise ValueError(f"this model uses ALiBi, not RoPE: model_type={kind!r}")
    if text is not config and getattr(text, "rope_parameters", None):
        name = next((key for key, value in vars(config).items() if value is text), "text_config")
        raise ValueError(f"a multimodal checkpoint: its text model has the RoPE ({name}): model_type={kind!r}")
    parameters = getattr(config, "rope_parameters", None)
    if not parameters and getattr(config, "rotary_dim", None):
        raise ValueError(f"the model's RoPE is its own, not one of rope_parameters: model_type={kind!r}")
    if not parameters:
        raise ValueError(f"the checkpoint has no RoPE (its config has no rope_parameters): model_type={kind!r}")
    layers = layers or scaled_kind(layer_kinds(config))
    if layers is not None and layers.parameters is not None:
        parameters = layers.parameters
    elif by_kind(parameters):
        names = ", ".join(sorted(parameters))
        raise ValueError(f"rope_parameters has no kind of layer that is known here: {names} (model_type={kind!r})")
    parameters = {key: value for key, value in parameters.items() if value is not None}
    if parameters.get("mrope_section"):
        raise ValueError(f"multimodal RoPE sections are not supported: mrope_section={parameters['mrope_section']}")
    if parameters.get("rope_theta") is None:
        raise ValueError(f"rope_parameters must hold rope_theta: {parameters}")
    check_no_text(parameters)
    for key in ("rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"):
        _number(parameters.get(key), key)
    if parameters.get("rope_type") in ("linear", "dynamic") and "factor" not in parameters:
        raise ValueError(f"{parameters['rope_type']} scaling must state its factor: {parameters}")
    head_dim = layers.head_dim if layers else head_dim_of(config)
    if kind.startswith("hunyuan") and parameters.get("rope_type") == "dynamic" and parameters.get("alpha"):
        base = rope.ntk_base(parameters["rope_theta"], head_dim, parameters["alpha"])  # whatever the length, once
        parameters = {"rope_type": "default", "rope_theta": base}
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so the rotated part of a head must be even: {head_dim=} {rotary_dim=}")
    return RopeGeometry(head_dim, rotary_dim, _stated_window(config), parameters)


def extended_rope_parameters(
    config: PretrainedConfig,
    scaling: str,
    target: int,
    factor: float | None = None,
    *,
    window: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The whole `rope_parameters` for a window of `target`; keys that no scaling sets are carried over (rope.CARRIED),
    a scaling's own only where the same one goes on.

    factor: default target / window before any scaling. window: the checkpoint's, where its config leaves it open.
    options: the scaling's own (beta_fast of yarn, low_freq_factor of llama3, short_factor and long_factor of longrope,
    which default to `rope.longrope_start`). A checkpoint that is scaled already is extended again only by its own
    scaling, where the factors multiply; by longrope with divisors of the user's, if its own were searched for. Raises
    ValueError if the target is not above the window, or for a key that could not be right any more.
    """
    geometry = rope_geometry(config)
    with named(config):
        parameters = geometry.parameters
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", scaling) and (kind, scaling) != ("proportional", "linear"):
            again = "linear" if kind == "proportional" else kind
            known = f"it is extended again by scaling={again} alone" if kind in rope.READ else "which is not known here"
            raise ValueError(f"this checkpoint is scaled by {kind!r} already; {known}: {scaling=}")
        if unknown := rope.unknown_keys(parameters):
            raise ValueError(
                f"rope_parameters holds a key of which it is not known what an extension does to it: "
                f"{unknown[0]}={parameters[unknown[0]]!r} (rope_type={kind!r})"
            )
        now = window_of(config, window)
        if target <= now.window:
            raise ValueError(
                f"the target must be above the checkpoint's window, or equal to it with scaling=none: "
                f"{target=} window={now.window} {scaling=}"
            )
        times = now.factor * factor if factor is not None else target / now.original
        if kind == "llama3" and factor is None:  # whose factor does not follow from its window
            times = now.factor * target / now.window
        start = {key: parameters.get(key) for key in ("short_factor", "long_factor")}
        searched = kind == "longrope" and start != rope.longrope_start(geometry.rotary_dim, now.factor)
        if searched and "long_factor" not in options:
            raise ValueError(
                f"longrope's divisors were searched for a window of {now.window}: give those for {target=} as "
                f"rope_options.long_factor, {geometry.rotary_dim // 2} numbers (short_factor stays if it is not given)"
            )
        given = set(options)
        if kind != "default":
            options = rope.kept_options(parameters, times, options) | options
        if scaling == "longrope" and not searched and not {"short_factor", "long_factor"} & given:
            options |= rope.longrope_start(geometry.rotary_dim, times)
        own = {key: parameters[key] for key in rope.CARRIED if key in parameters}
        if "max_position_embeddings" in own:
            own["max_position_embeddings"] = config.max_position_embeddings if scaling == "dynamic" else target
        if "llama_4_scaling_beta" in own or kind == "linear":  # whose formula reads it, and to whom it says the window
            own |= {key: parameters[key] for key in ("original_max_position_embeddings",) if key in parameters}
        base = parameters["rope_theta"]
        made = own | rope.rope_parameters(scaling, base, geometry.rotary_dim, times, now.original, **options)
        if kind == "proportional":  # which takes linear's factor by itself
            made |= {"rope_type": kind}
        if not by_kind(config.rope_parameters):
            return made
        scaled = scaled_kind(layer_kinds(config))
        assert scaled is not None
        return {**config.rope_parameters, scaled.name: made}


def extended_config(
    config: PretrainedConfig,
    scaling: str,
    target: int,
    factor: float | None = None,
    *,
    window: int | None = None,
    **options: Any,
) -> PretrainedConfig:
    """A copy of the config with the new window and the whole `rope_parameters`; arguments as above. With `dynamic` the
    stated window stays: transformers scales beyond max_position_embeddings and not before. With `none` and the window
    itself as the target nothing of RoPE changes. A head_dim that is null is stated, because some of transformers'
    scalings read it.
    """
    with named(config):
        check_layers(config, target, scaling)
    if getattr(config, "quantization_config", None):
        where = f"{config.name_or_path}: " if config.name_or_path else ""
        raise ValueError(
            f"{where}the checkpoint's weights are quantized, and only whole ones are trained: write it in bfloat16 "
            f"first: quantization_config={config.quantization_config}"
        )
    extended = copy.deepcopy(config)
    if scaling == "none" and target == window_of(config, window).window:
        return extended
    extended.rope_parameters = extended_rope_parameters(config, scaling, target, factor, window=window, **options)
    if not getattr(config, "is_heterogeneous", False) and getattr(config, "head_dim", 0) is None:
        extended.head_dim = rope_geometry(config).head_dim
    if scaling != "dynamic":
        extended.max_position_embeddings = target
    if hasattr(extended, "original_max_position_embeddings"):  # Phi-3's own field, which goes before rope_parameters
        original = extended.rope_parameters.get("original_max_position_embeddings")
        extended.original_max_position_embeddings = original or extended.max_position_embeddings
    try:
        extended.validate_rope()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config.model_type} does not take this scaling: {scaling=}: {error}") from error
    return extended


def check_frequencies(model: PreTrainedModel) -> None:
    """Raises ValueError, with the difference, if the model's float32 frequencies or factor are not the config's."""
    config = model.config
    kinds = (
        {kind.name: kind for kind in layer_kinds(config) if kind.parameters} if by_kind(config.rope_parameters) else {}
    )
    names: dict[str, LayerKind | None] = {f"{name}_inv_freq": kind for name, kind in kinds.items()}
    names = names or {"inv_freq": None}
    found = set()
    for path, module in model.named_modules():
        for name, kind in names.items():
            buffer = getattr(module, name, None)
            if isinstance(buffer, torch.Tensor):
                found.add(name)
                scale = float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))
                _check_buffer(f"{path}: {kind.name}" if kind else path, buffer, scale, rope_geometry(config, kind))
    if not found:
        raise ValueError(f"no RoPE module found in {type(model).__name__}")
    if missing := [kinds[name.removesuffix("_inv_freq")].name for name in names if name not in found]:
        raise ValueError(f"no RoPE of {missing[0]} layers found in {type(model).__name__}")


def _check_buffer(where: str, buffer: torch.Tensor, scale: float, geometry: RopeGeometry) -> None:
    ours, attention_factor = geometry.frequencies()
    theirs = buffer.detach().double().cpu().numpy()
    theirs = theirs[: theirs.size if theirs.all() else np.argmin(theirs)]  # `proportional` ends in frequencies of 0
    if theirs.shape != ours.shape:
        raise ValueError(f"{where}: the model has {theirs.size} RoPE frequencies, its config gives {ours.size}")
    difference = float(np.max(np.abs(theirs - ours) / ours))
    if difference > 1e-5 or abs(scale - attention_factor) > 1e-6:
        unknown = ", ".join(rope.unknown_keys(geometry.parameters))
        raise ValueError(
            f"{where}: the model's RoPE differs from its config's: frequencies by {difference:.1e} (relative), "
            f"attention factor {scale} against {attention_factor}"
            + (f"; rope_parameters has keys that are not known here: {unknown}" if unknown else "")
        )
