"""Attention kernels for training: causal, by row order and not by positions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from endprompt.fast import flash4

PREFIX = "causal_only_"


def _causal_only(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An attention of transformers' signature from a kernel of (query BHTD, key BGTD, value BGTD, scaling, dropout).

    What else the kernel takes comes by name; anything more is refused. Output [B, T, H, D], and the weights or None.
    """
    own = frozenset(inspect.signature(kernel).parameters)

    @functools.wraps(kernel)
    def attention(
        module: torch.nn.Module,
        query_BHTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        _refuse(query_BHTD, key_BGTD, attention_mask, {key: item for key, item in kwargs.items() if key not in own})
        given = {key: item for key, item in kwargs.items() if key in own}
        made: tuple[torch.Tensor, torch.Tensor | None] = kernel(
            query_BHTD, key_BGTD, value_BGTD, scaling, dropout, **given
        )
        return made

    return attention


@_causal_only
def causal_only_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
) -> tuple[torch.Tensor, None]:
    """torch's scaled_dot_product_attention, causal; on CUDA the backend is chosen by `training_attention`."""
    grouped = query.shape[1] != key.shape[1]
    out_BHTD = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


@_causal_only
def causal_only_eager(
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain matrix products with a triangular mask and a float32 softmax: the reference for the others.

    softcap: scores are softcap * tanh(score / softcap), as in Gemma 2. s_aux: float [H], one more score of each head
    that is no token's and takes its share of the weights, the sink of GPT-OSS.
    """
    group = query_BHTD.shape[1] // key_BGTD.shape[1]
    key_BHTD, value_BHTD = (x.repeat_interleave(group, dim=1) for x in (key_BGTD, value_BGTD))
    tokens = query_BHTD.shape[2]
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    hidden_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=query_BHTD.device).triu(1)
    logits_BHTT = query_BHTD @ key_BHTD.transpose(2, 3) * scale
    if softcap is not None:
        logits_BHTT = softcap * torch.tanh(logits_BHTT / softcap)
    logits_BHTT = logits_BHTT.masked_fill(hidden_TT, -math.inf)
    if s_aux is not None:
        sink_BHT1 = s_aux.to(logits_BHTT.dtype).view(1, -1, 1, 1).expand(*logits_BHTT.shape[:3], 1)
        logits_BHTT = torch.cat([logits_BHTT, sink_BHT1], dim=-1)
    weights_BHTT = logits_BHTT.softmax(-1, dtype=torch.float32)[..., :tokens].to(query_BHTD.dtype)
    weights_BHTT = F.dropout(weights_BHTT, dropout)
    return (weights_BHTT @ value_BHTD).transpose(1, 2).contiguous(), weights_BHTT


@_causal_only
def causal_only_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
) -> tuple[torch.Tensor, None]:
    """torch's flex_attention with a causal block mask."""
    from torch.nn.attention.flex_attention import flex_attention

    if dropout:
        raise ValueError(f"flex attention has no dropout: {dropout=}")
    mask, grouped = _causal_block_mask(query.shape[2], query.device), query.shape[1] != key.shape[1]
    out_BHTD = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out_BHTD.transpose(1, 2).contiguous(), None


def causal_only_cudnn(
    module: torch.nn.Module, query_BHTD: torch.Tensor, *given: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """cuDNN's attention and no other: an error where cuDNN has no kernel, such as on a CPU."""
    if query_BHTD.device.type != "cuda":
        raise ValueError("attention=cudnn needs a CUDA device; sdpa runs everywhere")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return causal_only_sdpa(module, query_BHTD, *given, **kwargs)


#: Packages of the flash kernels: the module that holds `flash_attn_func`, and how it is installed.
FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": (
        "flash_attn_interface",
        'pip install "git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper" --no-build-isolation',
    ),
    "flash_attention_4": ("flash_attn.cute", 'pip install "flash-attn-4[cu13]"'),
}


def _flash_function(name: str) -> Callable[..., Any]:
    """`flash_attn_func` of the package. Raises ValueError with the line that installs it."""
    module, install = FLASH_PACKAGES[name]
    try:
        return importlib.import_module(module).flash_attn_func
    except (ImportError, AttributeError) as error:
        raise ValueError(f"attention={name} needs a package that does not load ({error}): {install}") from error


def _causal_only_flash(name: str) -> Callable[..., Any]:
    """The package's kernel called with causal=True: no positions reach it, so it cannot look for borders."""

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
    ) -> tuple[torch.Tensor, None]:
        if dropout:
            raise ValueError(f"{name} is for training without dropout: {dropout=}")
        # its layout is B T H D, and it takes fewer key/value heads than query heads as they are
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if name == "flash_attention_4":
            return flash4.attend(query, key, value, scaling), None
        return _flash_kernel(name, query, key, value, scaling).contiguous(), None

    return _causal_only(kernel)


@torch.compiler.disable
def _flash_kernel(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    out = _flash_function(name)(query, key, value, softmax_scale=scaling, causal=True)
    return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp beside it


def causal_only_shifted(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Shifted sparse attention of LongLoRA (Chen et al. 2023, arXiv:2309.12307), for training only.

    The row is cut into 4 groups and tokens attend within theirs; for the second half of the heads the borders are moved
    by half a group, and nothing wraps around: the halves at both ends are groups of their own. Of an odd number of
    heads the first half is the smaller one, as in the authors' code.
    Raises ValueError if the row has no 8 equal parts or there is one head alone.
    """
    heads, groups, tokens = query_BHTD.shape[1], key_BGTD.shape[1], query_BHTD.shape[2]
    if tokens % 8 or heads < 2:
        raise ValueError(f"shifted attention needs tokens in 8 equal parts and two heads or more: {tokens=} {heads=}")
    if groups % 2 and groups != heads:  # the border of the halves may cut through the query heads of one key head
        key_BGTD, value_BGTD = (x.repeat_interleave(heads // groups, dim=1) for x in (key_BGTD, value_BGTD))
        groups = heads
    half = tokens // 8
    plain_borders = [(0, 2 * half), (2 * half, 4 * half), (4 * half, 6 * half), (6 * half, 8 * half)]
    moved_borders = [(0, half), (half, 3 * half), (3 * half, 5 * half), (5 * half, 7 * half), (7 * half, 8 * half)]
    parts = []
    plain = slice(heads // 2), slice(groups // 2)
    moved = slice(heads // 2, heads), slice(groups // 2, groups)
    for (of_heads, of_groups), borders in ((plain, plain_borders), (moved, moved_borders)):
        outs = [
            causal_only_sdpa(
                module,
                query_BHTD[:, of_heads, start:end],
                key_BGTD[:, of_groups, start:end],
                value_BGTD[:, of_groups, start:end],
                attention_mask,
                **kwargs,
            )[0]
            for start, end in borders
        ]
        parts.append(torch.cat(outs, dim=1))
    return torch.cat(parts, dim=2), None


_block_masks: dict[tuple[int, str], Any] = {}


def _causal_block_mask(tokens: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    key = (tokens, str(device))
    if key not in _block_masks:
        _block_masks[key] = create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, tokens, device=str(device))
    return _block_masks[key]


#: Keyword arguments of an attention function that change nothing about a causal row, whatever they hold ...
HARMLESS = frozenset(
    {"position_ids", "cache_position", "num_items_in_batch", "use_cache", "return_dict", "loss_weights", "weight_total"}
)

#: ... and those that change nothing if they hold one of these.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_router_logits": (False,),
}

#: What eager takes and the others do not.
EAGER_ONLY = {"softcap": "soft-capping of attention scores", "s_aux": "attention sinks"}


def _refuse(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, kwargs: Mapping[str, Any]) -> None:
    """What a causal-only attention cannot express is an error, not a different model.

    Raises ValueError for a cache, a mask of the model's own, and every keyword argument that is not known to be
    harmless: families hand over what their attention has beside the plain one by such arguments.
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError("causal-only attention is for training rows without a cache; generate with a stock backend")
    if mask is not None:
        raise ValueError("causal-only attention takes no mask, and this model's attention has one of its own")
    for name, value in kwargs.items():
        if value is None or name in HARMLESS or any(value is one for one in HARMLESS_VALUES.get(name, ())):
            continue
        if name == "sliding_window":
            if query.shape[2] > value:
                raise ValueError(
                    f"causal-only attention has no sliding window: window={value} is below the row's {query.shape[2]}"
                )
            continue
        shown = f"{name}={value}" if isinstance(value, (bool, int, float, str)) else name
        if name in EAGER_ONLY:
            raise ValueError(f"this attention has no {EAGER_ONLY[name]} ({shown}): attention=eager has")
        raise ValueError(f"causal-only attention does not know what this model gives its attention: {shown}")


ATTENTIONS: dict[str, Callable[..., Any]] = {
    "sdpa": causal_only_sdpa,
    "eager": causal_only_eager,
    "flex": causal_only_flex,
    "cudnn": causal_only_cudnn,
    **{name: _causal_only_flash(name) for name in FLASH_PACKAGES},
    "shifted": causal_only_shifted,
}


def register_causal_only() -> None:
    """Make the causal-only attentions known to transformers, without a mask function on purpose."""
    from transformers import AttentionInterface

    for name, function in ATTENTIONS.items():
        AttentionInterface.register(registered_name(name), function)


def registered_name(name: str) -> str:
    """transformers' name of a causal-only attention: it takes any with "flash" in it for one of its own packages."""
    return PREFIX + name.replace("flash_attention_", "fa")


def training_attention(name: str) -> str:
    """transformers' name of a causal-only attention; registers it.

    Raises ValueError for an unknown name or a missing package.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}: attention={name!r}")
    if name in FLASH_PACKAGES:
        _flash_function(name)
    register_causal_only()
    return registered_name(name)


def attention_backends(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """torch's kernels on CUDA in the order that training wants them.

    cuDNN's gradients are summed in no fixed order, so where runs must repeat torch's own flash kernel comes first.
    """
    if torch.are_deterministic_algorithms_enabled():
        return kernels_first(device, (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
    return kernels_first(device)


FASTEST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)  # cuDNN's attention is about twice as fast as torch's own flash kernel on Hopper GPUs


def kernels_first(
    device: torch.device, order: Sequence[SDPBackend] = FASTEST
) -> contextlib.AbstractContextManager[None]:
    """On CUDA, scaled_dot_product_attention takes the first of these kernels that can do it, and no other."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    made: contextlib.AbstractContextManager[None] = sdpa_kernel(list(order), set_priority=True)
    return made
