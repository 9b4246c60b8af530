"""What a run trains: a checkpoint with new frequencies, its rows, and how it comes onto a device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endprompt.config import ExtendConfig, check_config, method_name, mixture
from endprompt.data import Documents, Mixture, Rows, RowSpec, load_documents
from endprompt.data.rows import row_spec
from endprompt.distributed import say
from endprompt.model import (
    extended_config,
    load_config,
    load_model,
    load_tokenizer,
    rope_geometry,
    shares,
    training_attention,
    wrapper,
)
from endprompt.model.geometry import window_of
from endprompt.model.kinds import described, layer_kinds
from endprompt.model.load import check_builds, check_tokens, check_vocabulary, checkpoint_path
from endprompt.model.packed import apart_attention
from endprompt.model.weights import stored_dtype
from endprompt.results import recorded
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """model_config: with the new frequencies. source_dtype: of its config or its files. window: own, in tokens."""

    config: ExtendConfig
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    spec: RowSpec
    source_dtype: Any
    window: int
    wrapper: tuple[Path, PretrainedConfig] | None = None

    @property
    def method(self) -> str:
        """`method` of result rows; of a checkpoint that is tuned at its own window that of its extension, `@tuned`."""
        if self.config.target > self.window:
            return method_name(self.config)
        directory = self.wrapper[0] if self.wrapper else self.config.model
        return f"{recorded(directory).get('method', 'base')}@tuned"

    @property
    def options(self) -> dict[str, Any]:
        return {"dtype": self.config.dtype, "attention": attention_of(self.config), "config": self.model_config}

    def load(self, device: str) -> PreTrainedModel:
        """The model with its weights on a device."""
        return load_model(self.config.model, device=device, **self.options)

    def to_fill(self) -> PreTrainedModel:
        """The model for several processes: its weights on meta, each process will read its share of them."""
        return shares.model_to_fill(self.config.model, **self.options)

    @property
    def paths(self) -> list[str]:
        """What is trained on, without its weights."""
        return [source.path for source in mixture(self.config.data)] or self.config.data

    def rows(self) -> Rows | Mixture:
        """The rows of the run, of a mixture where the sources have weights."""
        if sources := mixture(self.config.data):
            return Mixture(sources, lambda path: self.documents([path]), self.spec)
        return Rows(self.documents(self.config.data), self.spec)

    def documents(self, paths: list[str]) -> Documents:
        """What is trained or evaluated on. Raises ValueError if the model has no embedding for one of its tokens."""
        found = load_documents(paths, self.tokenizer, chat_loss=self.config.chat_loss)
        check_tokens(found.tokens, self.model_config, self.tokenizer, ", ".join(paths))
        return found

    def check_weights(self) -> list[str]:
        """Check the checkpoint's weights before there is work to lose; what the user should know of them."""
        return shares.check_weights(self.config.model, **self.options)


def attention_of(config: ExtendConfig) -> str:
    """transformers' name of the attention that a run trains with. Raises ValueError for what it lacks."""
    name = training_attention(config.attention)
    return apart_attention(config.attention) if config.short_documents == "apart" else name


def to_extend(config: ExtendConfig) -> Checkpoint:
    """The checkpoint that a configuration extends. Raises ValueError for what can't be, before any weight is read."""
    check_config(config)
    attention_of(config)  # says what this one lacks
    directory = checkpoint_path(config.model)
    source, whole = load_config(directory), None
    if wrapper.is_wrapper(source):
        whole = directory, source
        if config.adapter != "merged":
            raise ValueError(f"a multimodal checkpoint is written with its updates merged: adapter={config.adapter!r}")
        directory = wrapper.text_of(*whole)
        source = load_config(directory)
        say(f"{whole[0]}: its text model ({source.model_type}) is extended and put back, the rest stays as it is")
    config = dataclasses.replace(config, model=str(directory))
    rope_geometry(source)  # says what a model without RoPE is before its window is asked for
    window = window_of(source, config.window).window
    options = {"window": window} | (config.rope_options or {})
    new_config = extended_config(source, config.scaling, config.target, config.factor, **options)
    check_builds(new_config, attention_of(config))
    before, after = (rope_geometry(c).parameters.get("factor") for c in (source, new_config))
    if len(layer_kinds(new_config)) > 1:
        for line in described(new_config, config.target, config.scaling):
            say(line)
    if (before or 1) != 1 and config.scaling != "none":
        say(f"the checkpoint is scaled by {before:g} already; the factors multiply: {before:g} becomes {after:g}")
    tokenizer = load_tokenizer(config.model)
    for note in (*check_vocabulary(source, tokenizer), *Reader(tokenizer).notes(documents_end=True)):
        say(note)
    dtype = source.dtype or stored_dtype(Path(config.model))
    return Checkpoint(config, new_config, tokenizer, row_spec(config, window, tokenizer), dtype, window, whole)
