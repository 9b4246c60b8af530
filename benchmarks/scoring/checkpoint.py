"""The checkpoint that is scored: its configuration, window, method and hash."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.scoring.config import ScoreConfig
from endprompt import results

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def read_checkpoint(config: ScoreConfig) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer. Raises ValueError if there is no such checkpoint, or a server does not serve it."""
    from endprompt import model
    from endprompt.model.weights import stored_tensors

    if config.backend == "server":
        from benchmarks.scoring import server

        return server.config_of(config), model.load_tokenizer(config.checkpoint)
    loaded = model.load_config(config.checkpoint, trust_remote_code=config.trust_remote_code)
    if not config.prepare_only:
        stored_tensors(Path(config.checkpoint))  # names the file that is missing or cut off
    return loaded, model.load_tokenizer(config.checkpoint)


def check_model(config: ScoreConfig, model_config: PretrainedConfig) -> list[str]:
    """What loading the model would refuse, found without its weights: before samples are built, in a moment. Returns a
    line of each thing about the weights that the user should know. A checkpoint with code of its own, or with quantized
    weights, is tried when it loads."""
    from transformers import GenerationConfig

    from benchmarks.scoring.generate import check_settings
    from endprompt.model import shares
    from endprompt.model.geometry import named

    own = not type(model_config).__module__.startswith("transformers.")
    if config.backend != "hf" or own or getattr(model_config, "quantization_config", None):
        return []
    if (Path(config.checkpoint) / "generation_config.json").is_file():
        with named(model_config):
            check_settings(GenerationConfig.from_pretrained(config.checkpoint))
    try:
        return shares.check_weights(config.checkpoint, dtype="float32", attention=config.attn, config=model_config)
    except ValueError as error:
        raise ValueError(str(error).replace("attention must", "attn must").replace("attention=", "attn=")) from error


def window_of(config: ScoreConfig, model_config: PretrainedConfig, needed: int | None = None) -> int:
    """Tokens that the checkpoint reads, less those of thoughts; a question of its config that `needed` tokens do not
    touch is not asked."""
    from endprompt.model import geometry

    stated = None if config.backend == "server" else config.window  # a server's is settled already
    return geometry.window_of(model_config, stated, needed).window - config.thought_tokens


def method_of(config: ScoreConfig) -> str:
    """The method's name: as set, else the trainer's note in the checkpoint, else "base"."""
    if config.method:
        return config.method
    return str(results.recorded(config.checkpoint).get("method", "base"))
