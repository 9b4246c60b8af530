"""What a checkpoint's files hold against what the model takes: one reading for one process and for many.

transformers decides what a weight is called, which are tied, missing or of another shape, and which it leaves out; what
is a fault and what is not is decided here, from its report.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from endprompt.files import check_fetched, parse_object, read_object, sha256_of
from endprompt.model.attention import PREFIX

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: Tensors that old checkpoints hold and every model computes by itself: frequencies, causal masks, positions.
COMPUTED = re.compile(
    r"(^|\.)((original_)?inv_freq|(attn|attention|self_attn)\.(masked_)?bias|masked_bias|position_ids)$"
)
#: Weights of multi-token prediction, by the names that single families give them, and the keys that count its layers.
PREDICTION = re.compile(r"(^|[._])(mtp|nextn)")
PREDICTION_LAYER = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
PROMISE = re.compile(r"num.*(mtp|nextn)|(mtp|nextn).*num")


class Stored(NamedTuple):
    """Where a tensor is, its shape, and its dtype as safetensors calls it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of a safetensors checkpoint, of one file or several with an index, by the files' heads. Raises
    ValueError where there is none, one is missing or is no tensor file, or the index names none, or one of another
    folder.
    """
    index = directory / INDEX
    if not any(os.path.lexists(directory / name) for name in (WHOLE, INDEX)):
        raise ValueError(f"{directory}: the checkpoint does not load: it has no weights ({WHOLE}, or {INDEX})")
    paths = {directory / WHOLE}
    if not (directory / WHOLE).is_file() and os.path.lexists(index):
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{index}: must name a file for every weight: weight_map")
        for name, place in places.items():
            if not isinstance(place, str) or Path(place).name != place:
                raise ValueError(f"{index}: weight_map[{name!r}] must be a file of the same folder: {place!r}")
        paths = {directory / place for place in places.values()}
    found: dict[str, Stored] = {}
    for path in sorted(paths):
        with open_tensors(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found |= {name: Stored(path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    return found


def open_tensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        check_fetched(path)
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.parent}: the checkpoint does not load: {path.name}: {error}") from error


def stored_dtype(directory: Path) -> str | None:
    """torch's name of the dtype that most of a checkpoint's numbers have in its files; None for one of no export."""
    sizes: Counter[str] = Counter()
    for stored in stored_tensors(directory).values():
        sizes[stored.dtype] += math.prod(stored.shape)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    return names.get(max(sizes, key=lambda dtype: sizes[dtype])) if sizes else None


def sampled_sha256(directory: Path, taken: int = 4096) -> str:
    """Hash of every tensor's name, shape and dtype and of so many bytes in its middle: in no time, of any size."""
    parts: list[str | bytes] = []
    for path in sorted({stored.path for stored in stored_tensors(directory).values()}):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            for name, about in sorted(parse_object(file.read(size), str(path)).items()):
                parts.append(f"{name} {about}")
                if "data_offsets" in about:
                    start, end = about["data_offsets"]
                    file.seek(8 + size + max(start, (start + end - taken) // 2))
                    parts.append(file.read(min(taken, end - start)))
    return sha256_of(*parts)


def settle(model: PreTrainedModel, report: Mapping[str, Any], directory: Path | None = None) -> list[str]:
    """What transformers' loading report and the loaded model say; a line each of what the user should know. A head that
    stands beside the embeddings is not called tied in the model's config any more. directory: of a local checkpoint,
    for names that transformers leaves out unreported. Raises ValueError for weights that are missing, that the model
    does not have, or of other shapes.
    """
    where = "" if directory is None else f"{directory}: "
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{where}the checkpoint does not load: {name} is {tuple(stored)}, the model's is {tuple(expected)}"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{where}the checkpoint lacks {len(missing)} of the model's weights, such as {missing[0]}")
    known = {name for name in report["unexpected_keys"] if not COMPUTED.search(name)}
    predicting = predictions(model.config, known)
    if unknown := sorted(known - predicting):
        raise ValueError(
            f"{where}the checkpoint holds {len(unknown)} weights that the model does not have, such as {unknown[0]}"
        )
    ignored = re.compile("|".join(f"({p})" for p in model._keys_to_ignore_on_load_unexpected or []) or r"(?!)")
    own = model.state_dict()
    stored_names = stored_tensors(directory) if directory is not None else {}
    left_out = predicting | {
        name for name in stored_names if ignored.search(name) and name not in own and not COMPUTED.search(name)
    }
    whole = {name for name, value in own.items() if not value.is_floating_point()}
    ends = {name.rpartition(".")[2] for name in whole}  # a family may rename what it loads (DeepSeek-V4's tables)
    for name, stored in sorted(stored_names.items()):
        table = name in whole if name in own else name.rpartition(".")[2] in ends
        if not ("F" in stored.dtype or table or name in left_out or COMPUTED.search(name)):
            raise ValueError(
                f"{where}weights must be floating-point numbers, and {name} is {stored.dtype}: quantized weights need "
                "quantization_config in config.json"
            )
    notes, trains = [], model.config._attn_implementation.startswith(PREFIX)
    if left_out:
        what = "of multi-token prediction " if left_out == predictions(model.config, left_out) else ""
        notes.append(
            f"{len(left_out)} weights {what}are left out, such as {min(left_out)}: {type(model).__name__} has no place "
            f"for them{', and what is written will not hold them' if trains else ''}"
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = head is not None and getattr(head, "weight", None) is not getattr(embeddings, "weight", None)
    if apart and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        notes.append(
            "config.json says tie_word_embeddings, but the files hold a head that differs from the embeddings: "
            "it stays a weight of its own, as in transformers"
            f"{', and what is written says tie_word_embeddings false' if trains else ''}"
        )
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    return notes


def predictions(config: PretrainedConfig, names: Iterable[str]) -> set[str]:
    """Those of the names that are weights of multi-token prediction, in modules or layers behind the last."""
    names = set(names)
    values = config.get_text_config().to_dict()
    layers = int(values.get("num_hidden_layers") or 0)
    promised = sum(v for k, v in values.items() if PROMISE.search(k) and isinstance(v, int) and v > 0)
    numbers = {name: int(m[1]) for name in names if (m := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    behind = {n for n in numbers.values() if layers <= n < layers + promised}
    behind |= {n for name, n in numbers.items() if n >= layers and PREDICTION_LAYER.search(name)}
    return {name for name in names if numbers.get(name) in behind or PREDICTION.search(name)}


def promise_nothing(model: PreTrainedModel) -> None:
    """Counts of layers for multi-token prediction become 0 in the config of a model that has none."""
    if any(PREDICTION.search(name) for name, _ in model.named_parameters()):
        return
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if PROMISE.search(key) and isinstance(value, int) and value > 0:
                setattr(part, key, 0)


def same_values(one: Stored, other: Stored, names: tuple[str, str], rows: int = 4096) -> bool:
    """Whether two stored tensors hold the same numbers; they are read in parts, up to the first difference."""
    if one.shape != other.shape:
        return False
    with open_tensors(one.path) as left, open_tensors(other.path) as right:
        parts = left.get_slice(names[0]), right.get_slice(names[1])
        return all(
            torch.equal(*(part[start : start + rows] for part in parts)) for start in range(0, one.shape[0], rows)
        )
