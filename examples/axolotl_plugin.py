"""Extend a checkpoint in axolotl: its plugin. In the YAML file, with this folder on PYTHONPATH:

plugins: [axolotl_plugin.EndPromptPlugin]
endprompt: {scheme: pose, target: 65536, scaling: yarn, row_tokens: 8192}
sequence_len: 1000000
sample_packing: false
flash_attention: false

axolotl drops documents longer than sequence_len; the collator cuts them to rows of row_tokens.
"""

from __future__ import annotations

import functools
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.loaders.utils import load_model_config
from pydantic import BaseModel

from endprompt.collate import PositionalCollator, prepare_model

MODEL = ("scaling", "factor", "window", "attention", "rope_options")  # what prepare_model takes beside the target


class EndPromptArgs(BaseModel):
    """The key of the YAML file."""

    endprompt: dict[str, Any]


class EndPromptPlugin(BasePlugin):
    """Prepares the model before LoRA wraps it, and lays the rows out."""

    def get_input_args(self) -> str:
        return "axolotl_plugin.EndPromptArgs"

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        given = dict(cfg.endprompt)
        # a longer sequence_len stands there as the window by now, and the factor would be reckoned from it
        model.config.max_position_embeddings = load_model_config(cfg).max_position_embeddings
        prepare_model(model, target=given["target"], **{key: given[key] for key in MODEL if key in given})

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> tuple[Any, dict[str, Any]]:
        if cfg.sample_packing or cfg.eval_sample_packing:
            raise ValueError("a position scheme gives a row's tokens their positions: sample_packing must be false")
        settings = {key: value for key, value in dict(cfg.endprompt).items() if key not in MODEL}
        return functools.partial(collator, settings), {}


def collator(settings: dict[str, Any], tokenizer: Any, **of_axolotl: Any) -> PositionalCollator:
    """axolotl hands over how its own collators pad; rows are padded to the longest of the batch."""
    return PositionalCollator(tokenizer, **settings)
