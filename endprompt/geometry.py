"""What RoPE does in a checkpoint, and its config for a longer window."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from endprompt import rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class RopeGeometry:
    """What RoPE does in a checkpoint.

    head_dim: of q and k; rotary_dim: its rotated part (smaller with partial rotary).
    layout: "half" pairs (j, j + rotary_dim/2), "interleaved" pairs (2j, 2j+1).
    window: max_position_embeddings. parameters: the whole `rope_parameters`.
    """

    head_dim: int
    rotary_dim: int
    layout: str
    window: int
    parameters: dict[str, Any]

    def frequencies(self, length: int | None = None) -> rope.Frequencies:
        """(radians per token, float64 (rotary_dim/2,); attention factor), recomputed from the config."""
        return rope.frequencies_of(self.parameters, self.head_dim, self.window, length)


#: Families of transformers that rotate neighbouring pairs.
INTERLEAVED = frozenset({"cohere", "cohere2", "glm", "glm4", "gptj", "ernie4_5", "helium"})


def rope_geometry(config: PretrainedConfig) -> RopeGeometry:
    """What the config says. Raises ValueError for no RoPE, ALiBi, multimodal sections or per-layer frequencies."""
    try:
        return _rope_geometry(config)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        where = f"{config.name_or_path}: " if config.name_or_path else ""
        raise ValueError(f"{where}{error}") from error


def _rope_geometry(config: PretrainedConfig) -> RopeGeometry:
    kind = config.model_type
    if getattr(config, "alibi", False) or kind in ("bloom", "mpt"):
        raise ValueError(f"this model uses ALiBi, not RoPE: model_type={kind!r}")
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ValueError(f"the checkpoint has no RoPE (its config has no rope_parameters): model_type={kind!r}")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(
            f"layers with different RoPE frequencies are not supported: {kind} has rope_parameters for "
            f"{', '.join(sorted(parameters))}"
        )
    if parameters.get("mrope_section"):
        raise ValueError(f"multimodal RoPE sections are not supported: mrope_section={parameters['mrope_section']}")
    if parameters.get("rope_theta") is None:
        raise ValueError(f"rope_parameters must hold rope_theta: {parameters}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so the rotated part of a head must be even: {head_dim=} {rotary_dim=}")
    layout = "interleaved" if kind in INTERLEAVED else "half"
    return RopeGeometry(head_dim, rotary_dim, layout, int(config.max_position_embeddings), dict(parameters))


def extended_rope_parameters(
    config: PretrainedConfig, scaling: str, target: int, factor: float | None = None, **options: Any
) -> dict[str, Any]:
    """The whole `rope_parameters` for a window of `target`; keys of the model's own (partial rotary) are kept.

    factor: default target / window. options: the scaling's own (beta_fast of yarn, low_freq_factor of llama3,
    short_factor and long_factor of longrope, which default to `rope.longrope_start`).
    A checkpoint that is scaled already is extended again only by its own linear or yarn scaling, where the factors
    multiply. Raises ValueError if the target is not above the window.
    """
    geometry = rope_geometry(config)
    if target <= geometry.window:
        raise ValueError(f"the target must be above the checkpoint's window: {target=} window={geometry.window}")
    factor = target / geometry.window if factor is None else factor
    original = geometry.window
    kind = geometry.parameters.get("rope_type", "default")
    if kind != "default":
        if kind != scaling or kind not in ("linear", "yarn"):
            raise ValueError(
                f"this checkpoint is scaled by {kind!r} already; only linear and yarn can be extended again, by the "
                f"same scaling: {scaling=}"
            )
        factor *= geometry.parameters["factor"]
        original = int(geometry.parameters.get("original_max_position_embeddings") or original)
        kept = ("beta_fast", "beta_slow", "truncate") if kind == "yarn" else ()
        options = {key: geometry.parameters[key] for key in kept if key in geometry.parameters} | options
    if scaling == "longrope" and not {"short_factor", "long_factor"} & set(options):
        options |= rope.longrope_start(geometry.rotary_dim, factor)
    own = {key: value for key, value in geometry.parameters.items() if key == "partial_rotary_factor"}
    base = geometry.parameters["rope_theta"]
    return rope.rope_parameters(scaling, base, geometry.rotary_dim, factor, original, **options) | own


def extended_config(
    config: PretrainedConfig, scaling: str, target: int, factor: float | None = None, **options: Any
) -> PretrainedConfig:
    """A copy of the config with the new window and the whole `rope_parameters`; arguments as above.

    With `dynamic` the stated window stays: transformers scales beyond max_position_embeddings and not before.
    """
    check_whole_attention(config, target)
    extended = copy.deepcopy(config)
    extended.rope_parameters = extended_rope_parameters(config, scaling, target, factor, **options)
    if scaling != "dynamic":
        extended.max_position_embeddings = target
    if hasattr(extended, "original_max_position_embeddings"):  # Phi-3's own field, which goes before rope_parameters
        original = extended.rope_parameters.get("original_max_position_embeddings")
        extended.original_max_position_embeddings = original or extended.max_position_embeddings
    try:
        extended.validate_rope()
    except ValueError as error:
        raise ValueError(f"{config.model_type} does not take this scaling: {scaling=}: {error}") from error
    return extended


def check_whole_attention(config: PretrainedConfig, target: int) -> None:
    """Raises ValueError if layers attend within a sliding window below the target: no extension would reach further."""
    width = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if width is not None and slides and width < target:
        raise ValueError(
            f"the checkpoint's layers see only a sliding window, which must not be below the target: "
            f"sliding_window={width} {target=}; set sliding_window to null in its config.json to attend to all"
        )


def check_frequencies(model: PreTrainedModel) -> None:
    """The model's own float32 inverse frequencies and attention factor must equal ours, computed from its config.

    Raises ValueError with the largest relative difference if they do not.
    """
    geometry = rope_geometry(model.config)
    ours, attention_factor = geometry.frequencies()
    found = False
    for name, module in model.named_modules():
        buffer = getattr(module, "inv_freq", None)
        if not isinstance(buffer, torch.Tensor):
            continue
        found = True
        theirs = buffer.detach().double().cpu().numpy()
        scale = float(getattr(module, "attention_scaling", 1.0))
        if theirs.shape != ours.shape:
            raise ValueError(f"{name}: the model has {theirs.size} RoPE frequencies, its config gives {ours.size}")
        difference = float(np.max(np.abs(theirs - ours) / ours))
        if difference > 1e-5 or abs(scale - attention_factor) > 1e-6:
            raise ValueError(
                f"{name}: the model's RoPE differs from its config's: frequencies by {difference:.1e} (relative), "
                f"attention factor {scale} against {attention_factor}"
            )
    if not found:
        raise ValueError(f"no RoPE module found in {type(model).__name__}")
