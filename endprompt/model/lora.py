"""LoRA with trained embeddings and norms, as LongLoRA trains (Chen et al. 2023, arXiv:2309.12307), made by peft. Its
shifted sparse attention is the attention `shifted`. An export has the updates merged, and attends to everything.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endprompt import origin
from endprompt.files import read_object
from endprompt.model.load import decoder_layers
from endprompt.model.weights import open_tensors, sampled_sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Attention projections by the names that transformers' decoders give them (Phi-3 has the first three in one).
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
#: What peft calls the files of an adapter.
SETTINGS, UPDATES = "adapter_config.json", "adapter_model.safetensors"


def targets_of(model: PreTrainedModel, group: str) -> list[str]:
    """The names of a group's matrices: attention (its projections), mlp (the other linear ones), or all of them."""
    linear: set[str] = set()
    attention: set[str] = set()
    for layer in decoder_layers(model):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if isinstance(module, torch.nn.Linear):
                linear.add(name)
                attention |= {name} & set(PROJECTIONS)
    return sorted({"attention": attention, "mlp": linear - attention, "all": linear}[group])


def add_lora(
    model: PreTrainedModel, rank: int, alpha: int, also: Sequence[str], seed: int, group: str = "attention"
) -> None:
    """Freeze all but LoRA updates of a group's matrices, and parameters named in `also`. ValueError: no such matrix."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = targets_of(model, group)
    if not targets:
        what = f"of the projections {PROJECTIONS}" if group == "attention" else f"of lora_targets={group!r}"
        raise ValueError(f"lora_rank={rank}: {type(model).__name__} has none {what}")
    torch.manual_seed(seed)
    with _real([module for name, module in model.named_modules() if name.rpartition(".")[2] in targets]):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # beside a matrix in 4 bits peft leaves them in float32
            parameter.data = parameter.data.to(model.dtype)
        parameter.requires_grad_("lora_" in name or any(word in name for word in also))


def write_adapter(
    directory: Path,
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    base: str,
    rank: int,
    alpha: int,
    base_sha256: str,
) -> None:
    """The updates, and what trained whole beside them, as peft reads them; with the config that has the new window.
    weights: of the model with its updates, not merged. base: what the adapter is for, base_sha256 its `sampled_sha256`.
    Load the base with the config of this folder: peft alone would give it the old frequencies.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    targets = {name.split(".lora_A.")[0].rpartition(".")[2] for name in weights if ".lora_A." in name}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    tensors = {name.replace(".default.", "."): weight for name, weight in weights.items() if ".lora_" in name}
    tensors |= {name: weights[name] for name in trained}
    head = model.get_output_embeddings()
    embeddings = next((name for name in trained if name.endswith("embed_tokens.weight")), None)
    if embeddings and head is not None and head.weight is model.get_input_embeddings().weight:
        tensors["lm_head.weight"] = weights[embeddings].clone()  # peft's copy of the embeddings is tied to nothing
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in tensors if ".lora_" not in name})
    about = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets), modules_to_save=modules or None)
    about.base_model_name_or_path, about.task_type, about.inference_mode = base, "CAUSAL_LM", True
    directory.mkdir(parents=True, exist_ok=True)
    about.save_pretrained(str(directory))
    made = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(made, directory / UPDATES, {"format": "pt", "base_sha256": base_sha256})


def check_adapter(adapter: Path, checkpoint: Path, config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Raises ValueError, before anything is loaded, for a folder that is no adapter of peft's, one whose weights are
    not those that it would add to the checkpoint's model, and one of ours for other weights or other frequencies.
    Adapters of others name their base and no more: another name is said on stderr.
    """
    for name in (SETTINGS, UPDATES):
        if not (adapter / name).is_file():
            raise ValueError(f"an adapter must be a folder with {SETTINGS} and {UPDATES}: {adapter} has no {name}")
    with open_tensors(adapter / UPDATES) as file:
        base = (file.metadata() or {}).get("base_sha256")
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if base not in (None, sampled_sha256(checkpoint)):
        raise ValueError(f"{adapter}: the adapter was trained on another base, whose weights are not {checkpoint}'s")
    try:
        own, added, known = _added(adapter, config, trust_remote_code)
    except Exception as error:  # peft raises whatever its code runs into
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{adapter}: the adapter does not fit {checkpoint}: {reason}") from error
    wanted = added | {name: stored[name] for name in stored.keys() & known - added.keys()}  # it may hold these, too
    for name in sorted(wanted.keys() | stored.keys()):
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"{adapter}: the adapter is of another model or rank: by {SETTINGS} and {checkpoint} the shape of "
                f"{name} is {wanted.get(name)}, the file has {stored.get(name)}"
            )
    for key in ("rope_parameters", "max_position_embeddings") if own else ():
        ours, theirs = (getattr(one.get_text_config(), key, None) for one in (own, config))
        if ours != theirs:
            raise ValueError(
                f"{adapter}: the adapter was trained with {key}={ours}, and {checkpoint} has {theirs}: give its base "
                "the config.json of the adapter's folder"
            )
    named = read_object(adapter / SETTINGS).get("base_model_name_or_path")
    if base is None and named and origin.name_of(named) != origin.name_of(checkpoint):
        print(f"{adapter}: the adapter is for {named} by its {SETTINGS}, and goes onto {checkpoint}", file=sys.stderr)


def _added(adapter: Path, config: PretrainedConfig, trust_remote_code: bool) -> tuple[Any, dict[str, Any], set[str]]:
    """(config that lies beside an adapter or None, shapes of the weights that peft reads of it, all names)."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    about: Any = PeftConfig.from_pretrained(str(adapter))
    about.init_lora_weights = False  # others compute with the base's weights, which are not there
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        model = get_peft_model(base, about)
    added = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = AutoConfig.from_pretrained(adapter) if (adapter / "config.json").is_file() else None
    return own, {name: tuple(weight.shape) for name, weight in added.items()}, set(model.state_dict())


@contextlib.contextmanager
def _real(layers: Sequence[Any]) -> Iterator[None]:
    """Weights on meta are one repeated number on the CPU meanwhile: peft makes its own where those of the layer are,
    and on meta the first values of the updates, which no checkpoint has, would be lost.
    """
    unread = {layer: layer.weight for layer in layers if layer.weight.is_meta}
    for layer, weight in unread.items():
        layer.weight = torch.nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    yield
    for layer, weight in unread.items():
        layer.weight = weight


def merge(weights: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The weights with W + scale * B A for each W with an update, in float32, rounded once; scale is alpha / rank."""
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            merged[name] = weight
            continue
        before, after = name.split(".base_layer.")
        if after == "weight":
            a, b = (weights[f"{before}.lora_{part}.default.weight"].float() for part in "AB")
            weight = (weight.float() + scale * (b @ a)).to(weight.dtype)
        merged[f"{before}.{after}"] = weight
    return merged
