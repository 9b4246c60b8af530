"""Attention kernels for training: causal by the order in the row, and in layers that slide also by position.

A jump of the positions is no border: what comes after it sees what comes before it. Where a layer sees a window or
chunks alone (`kinds.LayerKind.reach`), a token sees what it would see in a row in which nothing is left out: the
family's own mask function is asked about positions instead of places, by attentions of other names (`BY_POSITION`), for
which transformers makes masks. Legend: B rows, H query heads, G key/value heads, T tokens, D head dim, n blocks of w
tokens.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from endprompt.distributed import Context
from endprompt.fast import flash4
from endprompt.model.geometry import window_of
from endprompt.model.kinds import LayerKind, layer_kinds
from endprompt.model.length_rope import length_kinds

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "causal_only_"


def _causal_only(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An attention of transformers' signature, [B, T, H, D] and the weights or None, from a kernel of (query BHTD, key
    BGTD, value BGTD, scaling, dropout). What else the kernel takes comes by name; anything more is refused.
    `by_position` is the same with the masks that `position_mask` makes.
    """
    own = frozenset(inspect.signature(kernel).parameters) - {"mask"}

    def attend(
        masked: bool,
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
        mask = attention_mask if masked else None
        others = {key: item for key, item in kwargs.items() if key not in own}
        _refuse(query_BHTD, key_BGTD, None if masked else attention_mask, others, mask is not None)
        given = {key: item for key, item in kwargs.items() if key in own and item is not None}
        query_BHTD = _tempered(module, query_BHTD)
        if (context := getattr(module, "context", None)) is not None:
            heads = [context.to_heads(x) for x in (query_BHTD, *_dealt(query_BHTD, key_BGTD, value_BGTD, context.size))]
            return context.to_tokens(kernel(*heads, scaling, dropout, **given)[0]), None
        if mask is not None:
            given["mask"] = mask
        if isinstance(mask, torch.Tensor) and mask.shape[1] > 1:
            return _in_blocks(kernel, query_BHTD, key_BGTD, value_BGTD, scaling, dropout, **given), None
        out: tuple[Any, Any] = kernel(query_BHTD, key_BGTD, value_BGTD, scaling, dropout, **given)
        return out

    attention = functools.wraps(kernel)(functools.partial(attend, False))
    attention.by_position = functools.partial(attend, True)  # type: ignore[attr-defined]
    return attention


def _dealt(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, processes: int
) -> tuple[torch.Tensor, ...]:
    """Keys and values with each head so often that every process gets as many, for the queries that read them."""
    groups = key_BGTD.shape[1]
    again = processes // math.gcd(groups, processes)
    if query_BHTD.shape[1] % (groups * again):
        again = query_BHTD.shape[1] // groups
    return tuple(x.repeat_interleave(again, dim=1) if again > 1 else x for x in (key_BGTD, value_BGTD))


def share_rows(model: PreTrainedModel, context: Context) -> None:
    """Let the model's causal-only attentions exchange heads for tokens: each process gives it a part of each row.
    Raises ValueError where places in the row matter, and for heads that the processes do not divide.
    """
    settings, attention = model.config.get_text_config(), model.config._attn_implementation
    rule, processes = f"context_parallel={context.size}", context.size
    if attention.endswith(BY_POSITION) or plain_name(attention) not in ATTENTIONS:
        raise ValueError(f"{settings.model_type} has layers that see a window alone, whose mask needs the row: {rule}")
    if any(length_kinds(module) or getattr(module, "attn_temperature_tuning", False) for module in model.modules()):
        raise ValueError(f"{settings.model_type}: rotations or queries that depend on the row's length need it: {rule}")
    if settings.num_attention_heads % processes:
        raise ValueError(
            f"the attention heads must be a multiple of the processes that share a row: {rule} "
            f"num_attention_heads={settings.num_attention_heads}"
        )
    for module in model.modules():
        module.context = context  # type: ignore[assignment]


def _tempered(module: Any, query_BHTD: torch.Tensor) -> torch.Tensor:
    """Queries that Llama 4 lets grow with the place, in layers without RoPE: by position, where positions jump."""
    positions_BT = getattr(module, "row_positions", None)
    if positions_BT is None:
        return query_BHTD

    def growth(place: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((place.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    places = torch.arange(query_BHTD.shape[2], device=query_BHTD.device)
    return query_BHTD * (growth(positions_BT) / growth(places))[:, None, :, None].to(query_BHTD.dtype)


def _in_blocks(
    kernel: Callable[..., Any],
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    scaling: float | None,
    dropout: float,
    mask: torch.Tensor,
    **given: Any,
) -> torch.Tensor:
    """With a mask [B, n, w, 2w] of n blocks of w queries, each over its block and the one before: T w work, not T^2."""
    rows, tokens = query_BHTD.shape[0], query_BHTD.shape[2]
    blocks, width = mask.shape[1:3]
    after = blocks * width - tokens
    query = F.pad(query_BHTD, (0, 0, 0, after)).unflatten(2, (blocks, width)).transpose(1, 2).flatten(0, 1)
    key, value = (
        F.pad(x, (0, 0, width, after)).unfold(2, 2 * width, width).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (key_BGTD, value_BGTD)
    )
    out, _ = kernel(query, key, value, scaling, dropout, mask=mask.flatten(0, 1)[:, None], **given)
    whole: torch.Tensor = out.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :tokens]
    return whole


@_causal_only
def causal_only_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    mask: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """torch's scaled_dot_product_attention, causal; on CUDA the backend is chosen by `training_attention`. mask: bool,
    true where a query sees a key. s_aux: as of eager. A sink is one more key in front, with a part of its own that no
    other has: the query's part beside it is 1, so its score is what it shall be, and its value is 0.
    """
    width = query.shape[-1]
    if s_aux is not None:
        scaling = width**-0.5 if scaling is None else scaling
        key, value = (_repeated(x, query) for x in (key, value))
        sink_BH1D = (s_aux.to(query.dtype) / (8 * scaling))[None, :, None, None].expand(len(query), -1, 1, 8)
        query = F.pad(query, (0, 8, 1, 0), value=1.0)  # and one more query, so that the causal triangle stays one
        key = torch.cat([F.pad(sink_BH1D, (width, 0)), F.pad(key, (0, 8))], dim=2)
        value = F.pad(value, (0, 8, 1, 0))  # kernels of CUDA want widths that are equal, and multiples of 8
        mask = None if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
    elif mask is not None:  # kernels of CUDA take masks or fewer key heads, not both
        key, value = (_repeated(x, query) for x in (key, value))
    grouped = query.shape[1] != key.shape[1]
    out_BHTD = F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    if s_aux is not None:
        out_BHTD = out_BHTD[:, :, 1:, :-8]
    return out_BHTD.transpose(1, 2).contiguous(), None


def _repeated(x_BGTD: torch.Tensor, query_BHTD: torch.Tensor) -> torch.Tensor:
    return x_BGTD.repeat_interleave(query_BHTD.shape[1] // x_BGTD.shape[1], dim=1)


@_causal_only
def causal_only_eager(
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain matrix products with a triangular mask and a float32 softmax: the reference for the others. softcap: scores
    are softcap * tanh(score / softcap), as in Gemma 2. s_aux: float [H], one more score of each head that is no token's
    and takes its share of the weights, the sink of GPT-OSS. mask: as of sdpa.
    """
    key_BHTD, value_BHTD = (_repeated(x, query_BHTD) for x in (key_BGTD, value_BGTD))
    tokens, keys = query_BHTD.shape[2], key_BHTD.shape[2]
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    hidden = torch.ones(tokens, keys, dtype=torch.bool, device=query_BHTD.device).triu(1) if mask is None else ~mask
    logits_BHTT = query_BHTD @ key_BHTD.transpose(2, 3) * scale
    if softcap is not None:
        logits_BHTT = softcap * torch.tanh(logits_BHTT / softcap)
    logits_BHTT = logits_BHTT.masked_fill(hidden, -math.inf)
    if s_aux is not None:
        sink_BHT1 = s_aux.to(logits_BHTT.dtype).view(1, -1, 1, 1).expand(*logits_BHTT.shape[:3], 1)
        logits_BHTT = torch.cat([logits_BHTT, sink_BHT1], dim=-1)
    weights_BHTT = logits_BHTT.softmax(-1, dtype=torch.float32)[..., :keys].to(query_BHTD.dtype)
    weights_BHTT = F.dropout(weights_BHTT, dropout)
    return (weights_BHTT @ value_BHTD).transpose(1, 2).contiguous(), weights_BHTT


@_causal_only
def causal_only_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    mask: Any = None,
) -> tuple[torch.Tensor, None]:
    """torch's flex_attention with a block mask, by default a causal one; softcap and s_aux as of eager."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    if dropout:
        raise ValueError(f"flex attention has no dropout: {dropout=}")
    mask = _causal_block_mask(query.shape[2], query.device) if mask is None else mask
    options: dict[str, Any] = {"block_mask": mask, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is not None:
        limit = softcap
        options["score_mod"] = lambda score, *_: limit * torch.tanh(score / limit)
    if s_aux is None:
        out_BHTD = flex_attention(query, key, value, **options)
    else:  # exp(lse) is the sum that weights are divided by, without the sink's share
        out_BHTD, aux = flex_attention(query, key, value, return_aux=AuxRequest(lse=True), **options)
        share_BHT = torch.sigmoid(aux.lse - s_aux.to(aux.lse.dtype)[None, :, None])
        out_BHTD = out_BHTD * share_BHT[..., None].to(out_BHTD.dtype)
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

    The row is cut into 4 groups and tokens attend within theirs; for the second half of the heads (the larger one of an
    odd number, as in the authors' code) the borders are moved by half a group, and nothing wraps around: the halves at
    both ends are groups of their own. Raises ValueError if the row has no 8 equal parts or there is one head alone.
    """
    heads, groups, tokens = query_BHTD.shape[1], key_BGTD.shape[1], query_BHTD.shape[2]
    if kwargs.get("s_aux") is not None:
        raise NotAttended(_lacks("s_aux", "s_aux"))
    if tokens % 8 or heads < 2:
        raise ValueError(f"shifted attention needs tokens in 8 equal parts and two heads or more: {tokens=} {heads=}")
    if groups % 2 and groups != heads:  # the border of the halves may cut through the query heads of one key head
        key_BGTD, value_BGTD = (x.repeat_interleave(heads // groups, dim=1) for x in (key_BGTD, value_BGTD))
        groups = heads
    half = tokens // 8
    parts = []
    plain = slice(heads // 2), slice(groups // 2), ((0, 2), (2, 4), (4, 6), (6, 8))
    moved = slice(heads // 2, heads), slice(groups // 2, groups), ((0, 1), (1, 3), (3, 5), (5, 7), (7, 8))
    for of_heads, of_groups, borders in (plain, moved):
        outs = [
            causal_only_sdpa(
                module,
                query_BHTD[:, of_heads, start * half : end * half],
                key_BGTD[:, of_groups, start * half : end * half],
                value_BGTD[:, of_groups, start * half : end * half],
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
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "return_dict", "output_router_logits"})
HARMLESS |= {"num_items_in_batch", "loss_weights", "weight_total"}

#: ... and those that change nothing if they hold one of these.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}

#: What some attentions take and the others do not.
NOT_ALL = {
    "softcap": ("soft-capping of attention scores", "eager or flex has"),
    "s_aux": ("attention sinks", "sdpa, eager or flex has"),
}


class NotAttended(ValueError):
    """A model asks its attention for what the one that was chosen has not."""


def _refuse(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, kwargs: Mapping[str, Any], masked: bool = False
) -> None:
    """What a causal-only attention cannot express is an error, not a different model: raises NotAttended for a cache, a
    mask of the model's own, and every keyword argument that is not known to be harmless, by which families hand over
    what their attention has beside the plain one. masked: a mask of ours says which tokens of a window are seen.
    """
    if query.shape[2] != key.shape[2]:
        raise NotAttended("causal-only attention is for training rows without a cache; generate with a stock backend")
    if mask is not None:
        raise NotAttended("causal-only attention takes no mask, and this model's attention has one of its own")
    for name, value in kwargs.items():
        if value is None or name in HARMLESS or any(value is one for one in HARMLESS_VALUES.get(name, ())):
            continue
        if name == "sliding_window":
            if not masked and query.shape[2] > value:
                raise NotAttended(
                    f"causal-only attention has no sliding window: window={value} is below the row's {query.shape[2]}"
                )
            continue
        shown = f"{name}={value}" if isinstance(value, (bool, int, float, str)) else name
        if name in NOT_ALL:
            raise NotAttended(_lacks(name, shown))
        raise NotAttended(f"causal-only attention does not know what this model gives its attention: {shown}")


def _lacks(name: str, shown: str) -> str:
    what, which = NOT_ALL[name]
    return f"this attention has no {what} ({shown}): attention={which}"


ATTENTIONS: dict[str, Callable[..., Any]] = {
    "sdpa": causal_only_sdpa,
    "eager": causal_only_eager,
    "flex": causal_only_flex,
    "cudnn": causal_only_cudnn,
    **{name: _causal_only_flash(name) for name in FLASH_PACKAGES},
    "shifted": causal_only_shifted,
}


#: Ends the names of attentions that are given masks by position.
BY_POSITION = "_by_position"
MASKED: dict[str, Callable[..., Any]] = {name: ATTENTIONS[name].by_position for name in ("sdpa", "eager", "flex")}  # type: ignore[attr-defined]


def register_causal_only() -> None:
    """Make the causal-only attentions known to transformers, those by position with their masks, others with none."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in ATTENTIONS.items():
        AttentionInterface.register(registered_name(name), function)
    for name, function in MASKED.items():
        AttentionInterface.register(registered_name(name) + BY_POSITION, function)
        AttentionMaskInterface.register(registered_name(name) + BY_POSITION, position_mask)


def registered_name(name: str) -> str:
    """transformers' name of a causal-only attention: any with "flash" or "sdpa" in it would be taken for its own."""
    return PREFIX + name.replace("flash_attention_", "fa").replace("sdpa", "torch")


def plain_name(registered: str) -> str:
    """What `--attention` calls it; transformers' own names stay."""
    name = registered.removeprefix(PREFIX).removesuffix(BY_POSITION)
    return {registered_name(known).removeprefix(PREFIX): known for known in ATTENTIONS}.get(name, name)


def training_attention(name: str) -> str:
    """transformers' name of a causal-only attention, registered. ValueError: unknown, or its package is missing."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}: attention={name!r}")
    if name in FLASH_PACKAGES:
        _flash_function(name)
    register_causal_only()
    return registered_name(name)


def narrow_layers(config: PretrainedConfig) -> list[LayerKind]:
    """The kinds of layers that see less than what the model reads."""
    reads = window_of(config, needed=config.max_position_embeddings).window
    return [kind for kind in layer_kinds(config) if kind.reach is not None and kind.reach < reads]


def attention_for(config: PretrainedConfig, registered: str) -> str:
    """The attention by position, if layers see a window or chunks alone. Raises ValueError if there is none."""
    if not registered.startswith(PREFIX) or registered.endswith(BY_POSITION):
        return registered
    narrow = narrow_layers(config)
    if not narrow:
        return registered
    name = plain_name(registered)
    if name.startswith("apart_"):
        raise ValueError(
            f"{narrow[0]}, by position, which short_documents='apart' (packed=True of prepare_model) cannot mask: "
            f"short_documents must be drop or pack: model_type={config.model_type!r}"
        )
    if name not in MASKED:
        raise ValueError(
            f"{narrow[0]}, by position, which attention={name} cannot mask: it must be one of {', '.join(MASKED)}"
        )
    return registered + BY_POSITION


_positions: ContextVar[torch.Tensor | None] = ContextVar("positions", default=None)
_stock: ContextVar[bool] = ContextVar("stock", default=False)


@contextlib.contextmanager
def eager_by_position() -> Iterator[None]:
    """Within it transformers' own eager attention of a model that `mask_by_position` knows is masked so as well."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    def mask(mask_function: Callable[..., Any], **given: Any) -> torch.Tensor:
        return eager_mask(mask_function=_by_position(mask_function, later=True), **given)

    token = _stock.set(True)
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]
        _stock.reset(token)


def _by_position(mask_function: Callable[..., Any], later: bool = False) -> Callable[..., Any]:
    """A mask function of places from one of positions. later: they are as the family's has them, else unseen."""
    positions_BT = _positions.get()
    if positions_BT is None:
        raise ValueError("attention by position is for whole training rows without a cache")
    known = positions_BT

    def seen(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        visible: torch.Tensor = mask_function(row, head, known[row, query], known[row, key])
        return visible if later else (key <= query) & visible

    return seen


def mask_by_position(model: torch.nn.Module) -> None:
    """Let a model of causal-only attention know each row's positions, where it masks by them or its queries grow."""
    decoder: Any = model.base_model

    def enter(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (_stock.get() or module.config._attn_implementation.endswith(BY_POSITION)):
            return None
        rows = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(rows.shape[1], device=rows.device)[None]
        _positions.set(positions.expand(rows.shape[:2]))
        # with a mask of ones transformers takes no jump for a border of documents
        ones = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        return args, kwargs | {"attention_mask": ones}

    def hand_on(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.self_attn.row_positions = kwargs["position_ids"]

    for layer in model.modules():
        attends: Any = getattr(layer, "self_attn", None)
        if getattr(attends, "attn_temperature_tuning", False) and not attends.use_rope:
            layer.register_forward_pre_hook(hand_on, with_kwargs=True)
    decoder.register_forward_pre_hook(enter, with_kwargs=True)
    decoder.register_forward_hook(lambda *_: _positions.set(None) and None, always_call=True)


def position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    config: PretrainedConfig,
    device: Any,
    local_size: int | None = None,
    **_: Any,
) -> Any:
    """transformers' mask interface: None for a plain causal row, else which keys a query sees, by positions: bool [B,
    1, T, T], [B, n, w, 2w] of `_in_blocks` where the window is short, or flex's block mask. mask_function: the
    family's, of (row, head, query, key), which is asked about positions; whatever it says, no later place is seen.
    Positions must rise along the row, so a key within `local_size` positions is within as many places.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return None
    seen = _by_position(mask_function)
    if plain_name(config._attn_implementation) == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        compiled = torch.device(device).type == "cuda"
        return create_block_mask(seen, batch_size, None, q_length, q_length, device=str(device), _compile=compiled)
    row, head = (torch.arange(size, device=device).view(-1, 1, 1, 1) for size in (batch_size, 1))
    place = torch.arange(q_length, device=device)
    if local_size is None or q_length <= 2 * local_size:
        return seen(row, head, place[:, None], place[None, :])
    blocks = -(-q_length // local_size)
    query = torch.arange(blocks * local_size, device=device).view(blocks, local_size, 1)
    key = torch.arange(-local_size, local_size, device=device) + query[:, :1]
    within, last = (key >= 0) & (key < q_length), q_length - 1
    visible = seen(row, head, query.clamp(max=last), key.clamp(0, last)) & within
    # what fills up the last block sees itself, and nothing is made of it
    return visible | (key == query) & (query > last)


def attention_backends(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """torch's kernels on CUDA, fastest first; its own flash first where runs repeat: cuDNN sums in no fixed order."""
    if torch.are_deterministic_algorithms_enabled():
        return kernels_first(device, (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
    return kernels_first(device)


#: cuDNN's attention is about twice as fast as torch's own flash kernel on Hopper GPUs.
FASTEST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def kernels_first(
    device: torch.device, order: Sequence[SDPBackend] = FASTEST
) -> contextlib.AbstractContextManager[None]:
    """On CUDA, scaled_dot_product_attention takes the first of these kernels that can do it, and no other."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    made: contextlib.AbstractContextManager[None] = sdpa_kernel(list(order), set_priority=True)
    return made
