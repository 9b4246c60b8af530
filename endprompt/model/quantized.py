"""The linear matrices of the decoder layers in NF4 under LoRA, their scales quantised once more: QLoRA (Dettmers et al.
2023, arXiv:2305.14314), by bitsandbytes. Products are made with what they stand for, in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_machine(device: str) -> None:
    """Raises ValueError if a matrix in 4 bits cannot be made and multiplied on this device."""
    try:
        layer = four_bit(torch.nn.Linear(64, 64, bias=False), device)
        layer(torch.ones(2, 64, device=device))
    except Exception as error:  # a missing package, a build for other devices: each says it in its own way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"quantize='4bit' needs the package bitsandbytes (pip install bitsandbytes) with kernels for this device: "
            f"device={device!r}: {reason}"
        ) from error


def four_bit(linear: torch.nn.Linear, device: str) -> Any:
    """The same layer on a device with its matrix in NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
        )
    matrix: Any = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    made.weight = matrix.to(device)
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return made


def quantize(model: PreTrainedModel, layers: Iterable[torch.nn.Module], device: str) -> None:
    """Bring a model onto a device layer by layer, the layers' linear matrices in 4 bits: never is it there whole."""
    for layer in layers:
        for path, module in list(layer.named_modules()):
            if type(module) is torch.nn.Linear:
                layer.set_submodule(path, four_bit(module, device))
        layer.to(device)
    whole: Any = model
    whole.to(device=device)
    whole.is_loaded_in_4bit = True  # what peft asks for


def unpacked(tensor: torch.Tensor) -> torch.Tensor:
    """What a matrix in 4 bits stands for, in the dtype that it had; any other tensor as it is."""
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    whole: torch.Tensor = dequantize_4bit(tensor.data, state)
    return whole


def numel(tensor: torch.Tensor) -> int:
    """Elements of a tensor, of one in 4 bits those that it stands for."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else int(state.shape.numel())
