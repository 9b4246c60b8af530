"""A checkpoint read in shares: each process reads its rows of each weight, so that no process ever holds the model.

First transformers loads numbers that stand for the files' tensors and take no memory, so that names, ties and faults
are what it makes of them; then the model is sharded, then `read_shares` reads what this process keeps: model /
processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endprompt.distributed import World, by_main, say, whole
from endprompt.files import write_text
from endprompt.model.geometry import check_frequencies
from endprompt.model.length_rope import rows_alone
from endprompt.model.load import checkpoint_path, load_model, load_report, torch_dtype
from endprompt.model.weights import INDEX, WHOLE, Stored, open_tensors, same_values, settle, stored_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check_weights(path: str | Path, *, dtype: str, attention: str, config: PretrainedConfig) -> list[str]:
    """What `load_model` would say (returned, a line each) and refuse, by the files' heads: before any work."""
    directory = checkpoint_path(path)
    _, notes, _ = _stand_in(directory, stored_tensors(directory), dtype, attention, config)
    return notes


def model_to_fill(path: str | Path, *, dtype: str, attention: str, config: PretrainedConfig) -> PreTrainedModel:
    """The checkpoint's model with its weights still on meta, its RoPE checked; arguments and errors as of `load_model`.
    A checkpoint whose tensors are put together or taken apart to make the model's (experts in files of their own) is
    loaded whole by transformers, which knows how, and a line says so.
    """
    from transformers import GenerationConfig

    directory = checkpoint_path(path)
    stored = stored_tensors(directory)
    model, _, sources = _stand_in(directory, stored, dtype, attention, config)
    if sources is None:
        loaded = load_model(directory, dtype=dtype, attention=attention, config=config)
        say(
            f"{directory}: its files hold the weights in other parts than the model: every process has read all of them"
        )
        return loaded
    for name, buffer in model.named_buffers():
        if name in sources:
            with open_tensors(stored[sources[name]].path) as file:
                value = file.get_tensor(sources[name]).to(buffer.dtype)
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._buffers[last] = value
    empty: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in empty:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    empty[id(parameter)] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
                module._parameters[name] = empty[id(parameter)]
    model._stored = {name: (sources[name], stored[sources[name]].path) for name in sources}
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    check_frequencies(model)
    rows_alone(model)
    return model


def _stand_in(
    directory: Path, stored: dict[str, Stored], dtype: str, attention: str, config: PretrainedConfig
) -> tuple[Any, list[str], dict[str, str] | None]:
    """(the model from one number a tensor, what to say, each weight's tensor; None if some are put together of
    several).
    """
    from transformers.core_model_loading import WeightConverter

    # not a number: so no two are equal, and transformers ties none of those that the files have both
    numbers = {name: torch.full((), torch.nan, dtype=torch_dtype(dtype)) for name in stored}
    model, report = load_report(
        None,
        directory,
        config=config,
        dtype=dtype,
        attention=attention,
        state_dict={name: number.expand(stored[name].shape) for name, number in numbers.items()},
    )
    by_place = {number.untyped_storage().data_ptr(): name for name, number in numbers.items()}
    sources: dict[str, str] = {}
    whole = any(isinstance(one, WeightConverter) for one in model._weight_conversions or [])
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        source = by_place.get(tensor.untyped_storage().data_ptr())
        if source is None and name in stored and tensor.dtype != torch_dtype(dtype):
            source = name  # a weight that the family keeps in a dtype of its own
        if source is not None:
            sources[name] = source
        elif isinstance(tensor, torch.nn.Parameter):
            whole = True
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    twice = [
        (target, source)
        for target, source in tied.items()
        if target in sources and source in sources and sources[target] != sources[source]
    ]
    if twice and all(same_values(stored[sources[a]], stored[sources[b]], (sources[a], sources[b])) for a, b in twice):
        model.all_tied_weights_keys = tied
        model.tie_weights()
        sources |= {target: sources[source] for target, source in twice}
    return model, settle(model, report, directory), None if whole else sources


def read_shares(model: torch.nn.Module, device: str) -> None:
    """Give a sharded model's weights on meta this process's rows of the checkpoint; real ones (LoRA's), ties stay."""
    from torch.distributed.tensor import DTensor

    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(parameter.is_meta for parameter in parameters.values()):
        return
    places: dict[str, tuple[str, Path]] = model._stored  # type: ignore[assignment]
    filled: dict[str, torch.nn.Parameter] = {}
    tied: dict[int, list[str]] = {}  # the names of each parameter
    for name, one in parameters.items():
        tied.setdefault(id(one), []).append(name)
    with contextlib.ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for names in tied.values():
            parameter: Any = parameters[names[0]]
            if not parameter.is_meta:
                continue
            # peft puts a weight that has an update into a layer of its own
            stored, path = places[names[0].replace(".base_layer.", ".")]
            if path not in opened:
                opened[path] = stack.enter_context(open_tensors(path))
            local = parameter.to_local()
            mesh = parameter.device_mesh
            start = mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size())  # as `shard_starts` counts
            if local.numel():
                share = opened[path].get_slice(stored)[start : start + local.shape[0]]
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


#: Bytes of a file of weights, as transformers cuts them.
LARGEST = 50 * 10**9
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def as_they_are(model: Any) -> bool:
    """Whether a checkpoint holds the model's weights by their own names, so that it can be written one by one."""
    return not (getattr(model, "_weight_conversions", None) or model._keys_to_ignore_on_save)


def stream_weights(model: torch.nn.Module, dtype: str, directory: Path, here: World) -> None:
    """Write a sharded model's weights into safetensors files (and their index), each gathered when it is written, so
    that no process ever holds more than one. Every process must call it. Raises ValueError on every process if the main
    one cannot write.
    """
    wanted = torch_dtype(dtype)
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    tensors = {name: tensor for name, tensor in sorted(model.state_dict().items()) if name in own}
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.numel() * wanted.itemsize > LARGEST and parts[-1]:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.numel() * wanted.itemsize
    names = [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))] if parts[1:] else [WHOLE]
    by_main(here, lambda: directory.mkdir(parents=True, exist_ok=True))
    for file_name, part in zip(names, parts):
        head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in part:
            start, end = end, end + tensors[name].numel() * wanted.itemsize
            head[name] = {"dtype": DTYPES[dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        opened: list[Any] = []
        failed: Exception | None = None
        with contextlib.ExitStack() as stack:
            by_main(here, functools.partial(_open, directory / file_name, stack, opened))
            pieces: list[str | None] = [None, *part]
            for piece in pieces:
                gathered = None if piece is None else whole(tensors[piece].detach())
                try:
                    for file in opened if not failed else ():
                        if gathered is None:
                            file.write(len(text).to_bytes(8, "little") + text)
                        else:
                            file.write(gathered.to("cpu", wanted).contiguous().reshape(-1).view(torch.uint8).numpy())
                except (OSError, RuntimeError, MemoryError) as error:  # the others gather on, and so must this one
                    failed = error
        by_main(here, functools.partial(_raise, failed))
    if parts[1:]:
        places = {name: file_name for file_name, part in zip(names, parts) for name in part}
        total = sum(tensor.numel() for tensor in tensors.values()) * wanted.itemsize
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        by_main(here, lambda: write_text(directory / INDEX, index + "\n"))


def _open(path: Path, stack: contextlib.ExitStack, into: list[Any]) -> None:
    into.append(stack.enter_context(path.open("wb")))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
