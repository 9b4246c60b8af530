"""Checkpoints as the trainer sees them: RoPE geometry, attention, loading and export, LoRA, shares."""

from endprompt.model.attention import ATTENTIONS, register_causal_only, training_attention
from endprompt.model.geometry import RopeGeometry, extended_config, extended_rope_parameters, rope_geometry
from endprompt.model.load import export, load_config, load_model, load_tokenizer, new_model

__all__ = [
    "ATTENTIONS",
    "RopeGeometry",
    "export",
    "extended_config",
    "extended_rope_parameters",
    "load_config",
    "load_model",
    "load_tokenizer",
    "new_model",
    "register_causal_only",
    "rope_geometry",
    "training_attention",
]
