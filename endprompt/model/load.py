"""Models: load any RoPE decoder of transformers, extend its window, attend over jumped positions, export.

Transformers' own classes do the work, so an export is a plain `save_pretrained` directory that AutoModelForCausalLM,
lm-eval and vLLM read as it is.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from endprompt import distributed, files, origin
from endprompt.model import length_rope, quantized
from endprompt.model.attention import (
    PREFIX,
    NotAttended,
    attention_for,
    mask_by_position,
    plain_name,
    register_causal_only,
)
from endprompt.model.geometry import check_frequencies, check_no_text, named, rope_geometry, said, window_of
from endprompt.model.parity import ITS_OWN, check_loaded
from endprompt.model.weights import promise_nothing, sampled_sha256, settle, stored_tensors
from endprompt.text import vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def checkpoint_path(path: str | Path, *, weights: bool = True) -> Path:
    """The directory of a checkpoint, which may be given as `endprompt.origin` has it. weights: those of a hub's model
    are wanted too. Raises ValueError if it is missing, unfinished, or not a checkpoint.
    """
    directory = origin.directory_of(path, weights=weights)
    if directory.name.endswith(".partial"):
        raise ValueError(f"this directory belongs to an unfinished run: model={str(path)!r}")
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory}: the folder holds an adapter (adapter_config.json): merge it first")
    if not os.path.lexists(directory / "config.json"):
        raise ValueError(f"a checkpoint directory must hold config.json: model={str(path)!r}")
    check_files(directory, CONFIG)
    return directory


#: Files of a checkpoint beside its weights. One that transformers cannot read it passes over, or names no file.
CONFIG = ("config.json", "generation_config.json")
TOKENIZER = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "chat_template.jinja", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)


def check_files(directory: Path, names: Iterable[str]) -> None:
    """Raises ValueError naming the file if one of these that is there is none, cannot be read, or is damaged."""
    for path in (directory / name for name in names):
        if not os.path.lexists(path):
            continue
        data = files.read_whole(path)
        if path.suffix != ".model" and data.startswith(codecs.BOM_UTF8):
            raise ValueError(f"{path}: begins with a byte order mark, which transformers does not read: leave it out")
        if path.suffix == ".json":
            files.parse_object(data, str(path))
        elif path.suffix != ".model":
            files.decode(data, str(path))


def identity(path: str | Path, config: PretrainedConfig) -> dict[str, Any]:
    """What another checkpoint in the same place would not have: the keys of its (extended) config, and `weights`, a
    hash of every tensor's name, shape and dtype and of the bytes in its middle."""
    keys = json.loads(config.to_json_string(use_diff=False))
    kept = {key: value for key, value in keys.items() if key not in ("transformers_version", "_name_or_path")}
    return {**kept, "weights": sampled_sha256(checkpoint_path(path))}


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The checkpoint's config. Raises ValueError if it or `generation_config.json` cannot be read."""
    from transformers import AutoConfig

    directory = checkpoint_path(path, weights=False)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever a damaged file makes its code run into
        message = " ".join(str(error).split()).replace("TypeError: ", "")
        raise ValueError(f"{directory / 'config.json'}: transformers cannot read it: {message}") from error
    with named(config):
        check_no_text(getattr(config, "rope_parameters", None) or {})
    return config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises ValueError if there is none."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    directory = checkpoint_path(path, weights=False)
    check_files(directory, TOKENIZER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises Exception itself
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            message = "it needs Python code of its own (auto_map of tokenizer_config.json), which is not run"
        elif (directory / "tokenizer.json").is_file():
            try:
                Tokenizer.from_file(str(directory / "tokenizer.json"))
            except Exception as own:
                message = f"tokenizer.json: {own}"
        raise ValueError(f"{directory}: no tokenizer can be loaded from it: {message}") from error
    # Nothing of ours cuts text by this limit; with it, transformers warns of every text longer than the window.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
    config: PretrainedConfig | None = None,
    trust_remote_code: bool = False,
    loss: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, its RoPE checked against our own frequencies, and without memory.
    attention: any name that transformers knows (stock ones for generation, `causal_only_*` for training). config: one
    changed by the caller, such as a scaled one. loss: as of `check_loaded`. Raises ValueError as `checkpoint_path`,
    `rope_geometry` and `check_loaded`.
    """
    directory = checkpoint_path(path)
    config = load_config(directory, trust_remote_code=trust_remote_code) if config is None else config
    rope_geometry(config)
    model, report = load_report(
        directory, directory, config=config, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
    )
    notes = settle(model, report, directory)
    check_frequencies(model)
    length_rope.rows_alone(model)
    model.to(device=torch.device(device)).eval()
    if not attention.startswith(PREFIX):  # training says them, and compares its own forward, before it reads the data
        for note in notes:
            distributed.say(f"{directory}: {note}")
        check_loaded(model, loss)
    return model


def load_report(
    source: Path | None, directory: Path, *, config: PretrainedConfig, dtype: str, attention: str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """(the model as transformers loads it, its report of the weights); nothing of either is checked yet. source: the
    checkpoint, None for a `state_dict` among the options. Raises ValueError with the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if source is not None:
        stored_tensors(source)  # names the file that is missing or cut off
    if attention.startswith(PREFIX):
        register_causal_only()
        with named(config):
            attention = attention_for(config, attention)
    wanted = {"dtype": torch_dtype(dtype), "attn_implementation": attention}
    try:
        with quiet():
            kind: Any = AutoModelForCausalLM
            if source is None:
                with torch.device("meta"), no_init_weights():
                    kind = type(AutoModelForCausalLM.from_config(config, **wanted))
            model, report = kind.from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                **wanted,
                **options,
            )
        if attention.startswith(PREFIX):
            mask_by_position(model)
        return model, report
    except Exception as error:  # as in load_config
        reason, name = said(error), plain_name(attention)
        family: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
        if isinstance(error, KeyError) and error.args == (attention,):
            reason = (
                f"{config.model_type} has attention classes of its own, which know stock attentions only: this "
                "family cannot be trained with the causal-only attentions"
            )
        elif "does not support an attention implementation through" in reason:
            reason = f"{config.model_type} takes no attention of torch's, attention must be eager: attention={name!r}"
            if name != attention and not family._can_set_attn_implementation():
                reason = f"{config.model_type}: {ITS_OWN}"
        raise ValueError(f"{directory}: the checkpoint does not load: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for the milliseconds of a load or a save, no tables of what was loaded, settings as they were."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def new_model(config: PretrainedConfig, *, seed: int, dtype: str, attention: str, device: str) -> PreTrainedModel:
    """A model with random weights: the start of a base model, or of a measurement of speed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    attention = attention_for(config, attention)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), attn_implementation=attention)
    if attention.startswith(PREFIX):
        mask_by_position(model)
    check_frequencies(model)
    length_rope.rows_alone(model)
    return model


def check_builds(config: PretrainedConfig, attention: str = "") -> None:
    """Make the model of a config without its weights, which takes a second at most for any size. attention: a
    causal-only one, which is given what the model gives it, without numbers. Raises ValueError if transformers makes no
    model of it, one whose RoPE is not what the config says, or one that asks for what this attention has not.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # its own may be one of no arithmetic
    except Exception as error:  # whatever the family's own code runs into
        where = f"{config.name_or_path}: " if config.name_or_path else ""
        raise ValueError(f"{where}transformers makes no model of this config: {said(error)}") from error
    check_frequencies(model)
    if not attention:
        return
    with named(config):
        if not type(model)._can_set_attn_implementation():
            raise ValueError(f"{config.model_type}: {ITS_OWN}")
        name = attention_for(config, attention)
        model.to("meta")
        mask_by_position(model)
        row = torch.zeros(1, 8, dtype=torch.int64, device="meta")
        try:
            model.set_attn_implementation(name)
            with torch.no_grad():
                model.base_model(input_ids=row, position_ids=row, use_cache=False)
        except NotAttended as error:
            raise ValueError(f"{config.model_type}: {error}") from error
        except (
            Exception
        ):  # what needs numbers (a choice of experts) or a mask is seen with the weights, by check_forward
            return


def whole_weights(model: PreTrainedModel, dtype: str, keep: bool = True) -> dict[str, torch.Tensor]:
    """All weights on the CPU in `dtype`, tied ones once. Sharded ones are gathered, so every process must call it;
    those that need no result say keep=False. Raises ValueError on every process if the main one has no room for them.
    """
    wanted = torch_dtype(dtype)
    names = list(model.state_dict())  # comes first: FSDP2 shards here what a forward pass has left gathered
    own = dict((*model.named_parameters(), *model.named_buffers()))
    weights, failed = {}, ""
    for name in names:
        if name in own:
            gathered = distributed.whole(quantized.unpacked(own[name]).detach())
            try:
                if keep and not failed:
                    weights[name] = gathered.to("cpu", wanted)
            except (RuntimeError, MemoryError) as error:  # the others gather on, and so must this one
                weights, failed = {}, " ".join(str(error).split())[:300] or type(error).__name__
    if failed := distributed.from_main(failed):
        raise ValueError(f"the host's memory is too small for all weights in {dtype}: {failed}")
    return weights


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    dtype: str,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a standard checkpoint: safetensors, config with the new window and stock attention, tokenizer. weights:
    default those of the model, in `dtype`. The live model and its config stay as they are.
    """
    live = model.config
    model.config = config = copy.deepcopy(live)
    config._attn_implementation = "sdpa"
    config.use_cache = True
    try:
        forget_the_source(model, tokenizer)
        with quiet():
            model.save_pretrained(directory, state_dict=whole_weights(model, dtype) if weights is None else weights)
    finally:
        model.config = live
    config.dtype = torch_dtype(dtype)  # save_pretrained writes the dtype of the live model, which may be a wider one
    config.save_pretrained(directory)
    tokenizer.model_max_length = window_of(config, needed=config.max_position_embeddings).window
    tokenizer.save_pretrained(directory)


#: Keys of a config that name files of the checkpoint that was read; of a tokenizer's only the first.
CODE_KEYS = ("auto_map", "custom_pipelines")


def forget_the_source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take out of both configs what points at Python files of the source, where transformers' own classes are used;
    layers that predict further tokens count as 0 where the model that was trained has none of them.
    """
    if type(model).__module__.startswith("transformers."):
        for key in CODE_KEYS:
            if hasattr(model.config, key):
                delattr(model.config, key)
        promise_nothing(model)
    if type(tokenizer).__module__.startswith("transformers."):
        tokenizer.init_kwargs.pop("auto_map", None)


def torch_dtype(name: str) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}: dtype={name!r}")
    return names[name]


def check_vocabulary(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A line on added tokens without an embedding, if any (`check_tokens` finds them). ValueError: if others lack."""
    size, added = model_config.get_text_config().vocab_size, tokenizer.get_added_vocab()
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= size}
    if set(beyond) - set(added):
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer is of another vocabulary: it has {len(tokenizer)} entries, the "
            f"model's vocab_size is {size}, and its largest id is {vocabulary(tokenizer) - 1}"
        )
    if not beyond:
        return []
    first = min(beyond, key=lambda token: beyond[token])
    return [
        f"{tokenizer.name_or_path}: the model has no embedding for {len(beyond)} of its tokenizer's added tokens, such "
        f"as {first} ({beyond[first]}, vocab_size={size}): a text with one is refused"
    ]


def check_tokens(ids: Any, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises ValueError if ids, a list or an array of any length, have one that the model has no embedding for."""
    size = model_config.get_text_config().vocab_size
    for start in range(0, len(ids) if vocabulary(tokenizer) > size else 0, 2**24):
        if (largest := int(np.max(ids[start : start + 2**24]))) >= size:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{where}: the model has no embedding for token {largest}, {token!r}: its vocab_size is {size}"
            )


def decoder_layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The decoder layers, in order. Raises ValueError for a model that keeps them elsewhere."""
    layers = getattr(model.base_model, "layers", None)
    if isinstance(layers, torch.nn.ModuleList):  # beside those of an encoder of images, say
        yield from layers
        return
    lists = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.ModuleList)}
    lists = {name: one for name, one in lists.items() if name.rpartition(".")[2] in ("layers", "blocks", "h")}
    if not lists:
        raise ValueError(f"cannot find the decoder layers of {type(model).__name__}: no list of layers, blocks or h")
    for name, one in lists.items():
        if not any(name.startswith(f"{other}.") for other in lists):
            yield from one
