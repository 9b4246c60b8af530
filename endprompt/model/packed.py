"""Attention kernels for rows of several documents, each of which begins at position 0 and attends within itself.

Legend: B rows, T tokens, H query heads, G key/value heads, D head dim, N = B T.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from endprompt.model.attention import ATTENTIONS, FLASH_PACKAGES, _refuse, registered_name


def documents_of(positions_BT: torch.Tensor) -> torch.Tensor:
    """Which document of its row each token is of, int64 (B, T) from 0."""
    return (positions_BT == 0).cumsum(-1) - 1


_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what all layers of a forward pass make of the same positions


@torch.compiler.disable
def _once(positions_BT: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> Any:
    found = _seen.get(positions_BT, {})
    if make not in found:
        _seen[positions_BT] = found | {make: make(positions_BT)}
    return _seen[positions_BT][make]


def seen_mask(positions_BT: torch.Tensor) -> torch.Tensor:
    """bool (B, 1, T, T): whether a token sees another, of the same document and not behind it."""
    documents_BT = documents_of(positions_BT)
    return (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]).tril()


def _block_mask(positions_BT: torch.Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    documents_BT, (rows, tokens) = documents_of(positions_BT), positions_BT.shape

    def seen(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

    return create_block_mask(seen, rows, None, tokens, tokens, device=str(positions_BT.device))


def _borders(positions_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(int32 where each document of all rows begins, and the end of the last; tokens of the longest)."""
    starts = positions_BT == 0
    ends = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=positions_BT.numel())
    return ends.to(torch.int32), int(ends.diff().max())


def _flash(name: str, query: Any, key: Any, value: Any, borders: Any, scaling: Any, dropout: float) -> torch.Tensor:
    """The package's kernel for sequences of other lengths, all documents of all rows end to end."""
    if dropout:
        raise ValueError(f"{name} is for training without dropout: {dropout=}")
    varlen = importlib.import_module(FLASH_PACKAGES[name][0]).flash_attn_varlen_func
    (ends, longest), (rows, _, tokens, _) = borders, query.shape
    query_NHD, key_NGD, value_NGD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    options = {"softmax_scale": scaling, "causal": True}
    out = varlen(query_NHD, key_NGD, value_NGD, ends, ends, longest, longest, **options)
    return (out[0] if isinstance(out, tuple) else out).unflatten(0, (rows, tokens)).contiguous()


#: What keeps documents apart, by the names of `endprompt.model.attention`: its kernel's mask, or where documents begin.
APART = {
    "sdpa": seen_mask,
    "eager": seen_mask,
    "flex": _block_mask,
    "flash_attention_2": _borders,
    "flash_attention_3": _borders,
}


def check_apart(name: str) -> None:
    """Raises ValueError naming those that can if an attention keeps no documents apart."""
    if name not in APART:
        raise ValueError(
            f"short_documents=apart keeps the documents of a row apart, which attention={name} cannot: attention must "
            f"be one of {', '.join(APART)}"
        )


def apart_attention(name: str) -> str:
    """transformers' name of the attention that keeps documents apart; registers it. Errors as of `check_apart`."""
    from transformers import AttentionInterface

    check_apart(name)

    def attention(
        module: torch.nn.Module,
        query_BHTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        _refuse(query_BHTD, key_BGTD, attention_mask, kwargs)
        if position_ids is None:
            raise ValueError(
                "this model gives its attention no positions, so documents of a row cannot be kept apart: "
                "short_documents must be drop or pack: short_documents='apart'"
            )
        made, parts = _once(position_ids, APART[name]), (query_BHTD, key_BGTD, value_BGTD)
        if name in FLASH_PACKAGES:
            return _flash(name, *parts, made, scaling, dropout), None
        return ATTENTIONS[name].__wrapped__(*parts, scaling, dropout, mask=made)[0], None  # type: ignore[attr-defined]

    registered = registered_name(f"apart_{name}")
    AttentionInterface.register(registered, attention)
    return registered
