"""Multimodal checkpoints: their text model is taken out, extended like any other, and put back; the rest stays.

What else the checkpoint holds (vision tower, projector) is written again tensor for tensor, byte for byte.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endprompt import origin
from endprompt.files import read_object, sha256_of, write_text
from endprompt.model.geometry import named
from endprompt.model.load import checkpoint_path, load_config
from endprompt.model.weights import INDEX, Stored, open_tensors, sampled_sha256, stored_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: How files name the text model's weights beside others, as a pattern and what transformers' text class calls them.
NAMES = (
    (r"^language_model\.(model\.|lm_head\.)", r"\1"),
    (r"^(model\.)language_model\.|^(?=lm_head\.)", r"\1"),
    (r"^", ""),
)
#: Keys of a text config that an extension writes, and those of older configs that would go before them.
CHANGED = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "head_dim")
#: Files beside the weights: configs, tokenizers, templates.
BESIDE = (".json", ".jinja", ".model", ".txt")
OLDER = ("rope_scaling", "rope_theta", "rope_local_base_freq")
#: Text models that transformers has inside wrappers alone, and the family of the same weights whose RoPE theirs is on
#: text, where a token's places in time, height and width are one.
STAND_INS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
PLACES = ("mrope_section", "mrope_interleaved", "type")


def is_wrapper(config: PretrainedConfig) -> bool:
    """Whether the config is of a model around a text model with RoPE."""
    text = config.get_text_config()
    return text is not config and bool(getattr(text, "rope_parameters", None))


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a wrapper's text model by itself, of a family that has a causal model; others as they are."""
    if not is_wrapper(config):
        return config
    from transformers import CONFIG_MAPPING

    text = copy.deepcopy(config.get_text_config())
    text.name_or_path = config.name_or_path
    if (family := STAND_INS.get(text.model_type)) is None:
        return text
    keys = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    parameters = {key: value for key, value in keys["rope_parameters"].items() if key not in PLACES}
    kind = parameters["rope_type"]
    keys["rope_parameters"] = parameters | {"rope_type": "default" if kind == "mrope" else kind}
    made = CONFIG_MAPPING[family].from_dict(keys)
    made.name_or_path = config.name_or_path
    return made


def text_checkpoint(path: str | Path) -> Path:
    """The directory of what was typed, of a wrapper its text model's. Raises ValueError as `checkpoint_path`."""
    directory = checkpoint_path(path)
    config = load_config(directory)
    return text_of(directory, config) if is_wrapper(config) else directory


def text_of(directory: Path, config: PretrainedConfig) -> Path:
    """The directory of the text model alone, made once a checkpoint in the cache. Raises ValueError if transformers has
    no causal model of it, or the files name its weights in no known way.
    """
    beside = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix in BESIDE)
    digest = sha256_of(sampled_sha256(directory).encode(), *(path.read_bytes() for path in beside))
    made = origin.cache_folder() / "text" / digest[:16] / origin.name_of(directory)
    with named(config):
        return origin.made_once(made, functools.partial(_take_out, directory, config))


def _take_out(directory: Path, config: PretrainedConfig, made: Path) -> dict[str, Any]:
    """Write the text model of a wrapper into a folder; its note."""
    from safetensors.torch import save_file

    stored = stored_tensors(directory)
    renamed = text_names(config, stored)
    text = text_config(config)
    text.architectures = None
    text.dtype = config.dtype or text.dtype
    if "lm_head.weight" not in renamed.values():
        text.tie_word_embeddings = True
    if quantized := getattr(config, "quantization_config", None):
        text.quantization_config = quantized
    made.mkdir(parents=True)
    for path in directory.iterdir():
        if path.is_file() and path.suffix in BESIDE and path.name not in ("config.json", INDEX):
            shutil.copy(path, made)
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(_by_file(renamed, stored).items()):
        file = f"model-{number:05}.safetensors"
        with open_tensors(path) as source:
            save_file({renamed[name]: source.get_tensor(name) for name in names}, made / file, {"format": "pt"})
        places |= {renamed[name]: file for name in names}
    write_text(made / INDEX, json.dumps({"metadata": {}, "weight_map": places}))
    text.save_pretrained(made)
    return dict(origin.about(directory)) | {"text_model_of": origin.name_of(directory)}


def _by_file(renamed: Mapping[str, str], stored: Mapping[str, Stored]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name in renamed:
        files.setdefault(stored[name].path, []).append(name)
    return files


def text_names(config: PretrainedConfig, stored: Mapping[str, Stored]) -> dict[str, str]:
    """What transformers' text model calls each of the stored tensors that are its own: stored name -> its name."""
    import torch
    from transformers import AutoModelForCausalLM

    text = text_config(config)
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"transformers has no causal model of this checkpoint's text model alone: {text.model_type}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(text))
    wanted = {name for name, _ in model.named_parameters()}
    tied = {"lm_head.weight"}
    for pattern, ours in NAMES:
        renamed = {name: re.sub(pattern, ours, name) for name in stored if re.search(pattern, name)}
        found = {name: new for name, new in renamed.items() if new in wanted | tied}
        head = any(name.endswith("lm_head.weight") for name in stored.keys() - found.keys())
        if wanted - set(found.values()) <= tied and not head:
            return found
    raise ValueError(f"the files name the weights of the text model ({text.model_type}) in no way that is known here")


def put_back(work: Path, wrapper: Path, config: PretrainedConfig) -> None:
    """Make of an extended text model in `work` the whole checkpoint: its weights in the place of the wrapper's
    (config), whose config says the new window and frequencies; every tensor that is not the text model's has the bytes
    that it had.
    """
    import safetensors
    from safetensors.torch import save_file

    stored, made = stored_tensors(wrapper), stored_tensors(work)
    renamed = text_names(config, stored)
    embeddings = next(name for name in made if name.endswith("embed_tokens.weight"))
    total, files = 0, _by_file(dict.fromkeys(stored, ""), stored)
    for path, names in files.items():
        tensors = {}
        with open_tensors(path) as file:
            about = file.metadata()
            for name in names:
                new = renamed.get(name)
                if new is None:
                    tensors[name] = file.get_tensor(name)
                else:
                    place = new if new in made else embeddings  # a head that is tied
                    with safetensors.safe_open(made[place].path, framework="pt") as own:
                        tensors[name] = own.get_tensor(place)
        save_file(tensors, work / f"{path.name}.whole", about or {"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    for path in {one.path for one in made.values()}:
        path.unlink()
    (work / INDEX).unlink(missing_ok=True)
    for path in files:
        os.replace(work / f"{path.name}.whole", work / path.name)
    if (wrapper / INDEX).is_file():
        index = read_object(wrapper / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_text(work / INDEX, json.dumps(index, indent=2) + "\n")
    whole, text = read_object(wrapper / "config.json"), read_object(work / "config.json")
    key = next(name for name, value in vars(config).items() if value is config.get_text_config())
    place = whole.get(key, whole)  # Qwen2-VL's has the text model's keys beside the others
    for name in OLDER:
        place.pop(name, None)
    own = getattr(config.get_text_config(), "rope_parameters", None) or {}
    text["rope_parameters"] |= {name: own[name] for name in PLACES[:2] if name in own}
    place.update({name: text[name] for name in CHANGED if name in text})
    write_text(work / "config.json", json.dumps(whole, indent=2) + "\n")
    for path in wrapper.iterdir():  # what processors of images read, and the wrapper's own generation config
        there = (work / path.name).exists() and path.name != "generation_config.json"
        if path.is_file() and path.suffix in BESIDE and path.name != INDEX and not there:
            shutil.copy(path, work)
