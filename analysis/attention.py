"""Whole rows of attention of one layer at a length and scaling that the model never saw, from its own queries and keys.

A row of N keys is made of a text of T <= N tokens: the first token at position 0, the others at the end, in between
keys drawn again at random. So N = T gives the model's own row, and a longer one fills the distance with keys of the
same kind. What a longer text would say, and what a layer hands to the next under other frequencies, is not in it.
Legend: H query heads, G key heads, T tokens, N keys, Q queries, n frequencies, m components that RoPE leaves alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

#: Queries of a row, from the second half of the text.
QUERIES = 8


@dataclass(frozen=True)
class Rows:
    """Q rows of each head: p [H, Q, N]; means over them of entropy [H], nats, and sink [H], the first token's share."""

    p: torch.Tensor
    entropy: np.ndarray
    sink: np.ndarray


def keys_of_row(tokens: int, length: int, seed: int = 0) -> np.ndarray:
    """Which token's key stands at each position, int64 [N]. Raises ValueError if the row is shorter than the text."""
    if not 2 <= tokens <= length:
        raise ValueError(f"a row must hold the whole text, of 2 tokens or more: {length=} {tokens=}")
    again = np.random.default_rng([seed, tokens, length]).integers(1, tokens, length - tokens)
    return np.concatenate([[0], again, np.arange(1, tokens)])


class Frame:
    """A length and a scaling, the same for all layers: cos and sin are made once."""

    def __init__(self, omega: np.ndarray, tokens: int, length: int, device: str = "cpu", seed: int = 0):
        self.device = torch.device(device)
        self.key = torch.as_tensor(keys_of_row(tokens, length, seed), device=self.device)
        self.query = torch.linspace(tokens // 2, tokens - 1, QUERIES).round().long().unique().to(self.device)
        self.place = length - tokens + self.query  # of a query's own token
        turn_Nn = torch.outer(
            torch.arange(length, dtype=torch.float64, device=self.device), torch.as_tensor(omega, device=self.device)
        )
        self.turn_Nn = torch.polar(torch.ones_like(turn_Nn), turn_Nn).to(torch.complex64)

    def tensor(self, values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), device=self.device).to(dtype)

    def rows(self, layer: Any, *factors: float) -> list[Rows]:
        """layer: `capture.LayerSpectra` of `capture_tokens`. factors: attention factors, rows for each; 1.0 is none."""
        q_HTn, k_GTn = (self.tensor(x, torch.complex64) for x in (layer.q, layer.k))
        rest_q, rest_k = (self.tensor(x, torch.float32) for x in (layer.still_q, layer.still_k))
        q_HQn = q_HTn[:, self.query] * self.turn_Nn[self.place]
        k_GNn = k_GTn[:, self.key] * self.turn_Nn
        score = grouped(torch.view_as_real(q_HQn).flatten(-2), torch.view_as_real(k_GNn).flatten(-2))
        rest = grouped(rest_q[:, self.query], rest_k[:, self.key]) if rest_q.shape[-1] else None
        behind = torch.arange(self.key.numel(), device=self.device) > self.place[:, None]
        made = []
        for factor in factors:
            logits = score * (factor**2 * layer.scaling)
            if rest is not None:
                logits += layer.scaling * rest
            p = torch.softmax(logits.masked_fill_(behind, -torch.inf), -1)
            entropy, sink = torch.special.entr(p).sum(-1).mean(-1), p[..., 0].mean(-1)
            made.append(Rows(p, entropy.double().cpu().numpy(), sink.double().cpu().numpy()))
        return made


def grouped(q_HQm: torch.Tensor, k_GNm: torch.Tensor) -> torch.Tensor:
    """Products of each head's queries with the keys of its group, [H, Q, N]."""
    groups = k_GNm.shape[0]
    return (q_HQm.unflatten(0, (groups, -1)).flatten(1, 2) @ k_GNm.mT).view(*q_HQm.shape[:2], -1)


def moved(before: Rows, after: Rows) -> np.ndarray:
    """Share of attention that is elsewhere than before, [H]: total variation of the same rows, mean over them. Ours."""
    return (0.5 * (before.p - after.p).abs().sum(-1).mean(-1)).double().cpu().numpy()
