"""A checkpoint read in shares: each process reads its rows of each weight, so that no process ever holds the model.

First the model is built without weights (on torch's meta device, buffers such as RoPE's frequencies are real), then it
is sharded, then `read_shares` reads what this process keeps. Host memory of a process is model / processes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endprompt.length_rope import rows_alone
from endprompt.model import (
    check_frequencies,
    checkpoint_path,
    load_model,
    quiet,
    register_causal_only,
    torch_dtype,
)
from endprompt.progress import say
from endprompt.rows import parse_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def model_to_fill(path: str | Path, *, dtype: str, attention: str, config: PretrainedConfig) -> PreTrainedModel:
    """The checkpoint's model with its weights still on meta, its RoPE checked; arguments as of `load_model`.

    A checkpoint whose files name the weights otherwise than the model does is loaded whole by transformers, which knows
    how, and a line says so. Raises ValueError for files that are damaged, or of a model of other shapes.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    directory = checkpoint_path(path)
    register_causal_only()
    with quiet(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), attn_implementation=attention)
    model.tie_weights()  # on meta each name has got a weight of its own
    shapes = stored_shapes(directory)
    if not all(set(names) & set(shapes) for names in names_of_weights(model).values()):
        whole = load_model(directory, dtype=dtype, attention=attention, config=config)
        say(f"{directory}: its files name the weights otherwise than the model: every process has read all of them")
        return whole
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in shapes and shapes[name] != tuple(parameter.shape):
            raise ValueError(
                f"{directory}: the checkpoint does not load: {name} is {shapes[name]}, the model's is "
                f"{tuple(parameter.shape)}"
            )
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    check_frequencies(model)
    rows_alone(model)
    return model


def read_shares(model: torch.nn.Module, path: str | Path, device: str) -> None:
    """Give a sharded model's weights that are on meta their values: this process's rows, read from the checkpoint.

    Weights that are real (those of LoRA) stay. Tied weights stay tied.
    """
    from torch.distributed.tensor import DTensor

    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(parameter.is_meta for parameter in parameters.values()):
        return
    files = weight_files(checkpoint_path(path))
    filled: dict[str, torch.nn.Parameter] = {}
    with contextlib.ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for names in names_of_weights(model).values():
            parameter: Any = parameters[names[0]]
            if not parameter.is_meta:
                continue
            # peft puts a weight that has an update into a layer of its own
            stored = next(name for name in (n.replace(".base_layer.", ".") for n in names) if name in files)
            if files[stored] not in opened:
                opened[files[stored]] = stack.enter_context(_open(files[stored]))
            local = parameter.to_local()
            mesh = parameter.device_mesh
            # the first dimension is cut as torch.chunk cuts: all shares are equal, the last ones may be less or nothing
            start = mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size())
            if local.numel():
                share = opened[files[stored]].get_slice(stored)[start : start + local.shape[0]]
            else:
                share = torch.empty(local.shape)
            whole = DTensor.from_local(
                share.to(device, parameter.dtype),
                mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            value = torch.nn.Parameter(whole, requires_grad=parameter.requires_grad)
            filled |= dict.fromkeys(names, value)
    model.load_state_dict(filled, strict=False, assign=True)


def names_of_weights(model: torch.nn.Module) -> dict[int, list[str]]:
    """The names of each parameter: tied ones have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def weight_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors checkpoint, of one file or several with an index.

    Raises ValueError where a file is missing or is no tensor file, or the index names none, or one of another folder.
    """
    index = directory / INDEX
    if (directory / WHOLE).is_file() or not index.is_file():
        with _open(directory / WHOLE) as file:
            return dict.fromkeys(file.keys(), directory / WHOLE)
    places = parse_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: must name a file for every weight: weight_map")
    for name, place in places.items():
        if not isinstance(place, str) or Path(place).name != place:
            raise ValueError(f"{index}: weight_map[{name!r}] must be a file of the same folder: {place!r}")
    return {name: directory / place for name, place in places.items()}


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the checkpoint's files, by their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(weight_files(directory).values())):
        with _open(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.parent}: the checkpoint does not load: {path.name}: {error}") from error
