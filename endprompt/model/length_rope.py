"""RoPE whose frequencies depend on the length (`dynamic`, `longrope`): each row by its own length, without memory.

transformers chooses one set of frequencies a call, by the farthest position of all rows, and `dynamic` keeps the set of
the longest call so far: a row's angles then depend on the rows beside it and on what ran before. Here they are a pure
function of that row's positions, by transformers' own rule, code and float32 for a sequence of that length: its
farthest position + 1, so padding must not carry positions beyond the row's last token. A step of generation gets the
set of the length reached, while cached keys keep theirs, as `generate()` of that prompt alone; within `reading` a row
is such a prompt with its answer. `longrope` takes `long_factor` beyond the original window for the whole row, so a row
at positions of the target trains the frequencies that the target will be read with. Legend: B rows, T tokens.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

KINDS = ("dynamic", "longrope")


def rows_alone(model: torch.nn.Module) -> int:
    """Let RoPE modules whose frequencies depend on the length treat each row alone, once and for all; how many do."""
    found = [module for module in model.modules() if length_kinds(module)]
    for module in found:
        if not isinstance(module, RowsAlone):
            family: Any = type(module)
            module.__class__ = _rows_alone(family)
    return len(found)


def length_kinds(module: torch.nn.Module) -> set[str]:
    """Which scalings of a RoPE module, of all its kinds of layers, depend on the length; empty for other modules."""
    named = getattr(module, "rope_type", None)
    kinds = named.values() if isinstance(named, dict) else [named]
    return {kind for kind in kinds if kind in KINDS}


class RowsAlone(torch.nn.Module):
    """Comes before a RoPE class of transformers, whose forward without its update is called for one row at a time."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """The class's own result, a tensor or a tuple of them, for x's device and dtype and position_ids_BT.
        layer_type: in models that have frequencies by the kind of layer. Raises ValueError for positions of another
        shape, such as those of images.
        """
        family: Any = type(self).__mro__[2]
        plain = functools.partial(inspect.unwrap(family.forward), self)  # without transformers' update
        options = {} if layer_type is None else {"layer_type": layer_type}
        named: Any = self.rope_type
        kind = named if layer_type is None else named[layer_type]
        if kind not in KINDS:
            return plain(x, position_ids, **options)
        if position_ids.ndim != 2:
            raise ValueError(f"{kind} frequencies need one position a token: position_ids {tuple(position_ids.shape)}")
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        kept = self._buffers[name]
        tokens = position_ids.shape[1]
        prompt, rows = min(_prompt.get() or tokens, tokens), []
        try:
            for positions_T in position_ids:
                parts = []
                for part_T in positions_T.split([prompt, *[1] * (tokens - prompt)]):
                    self._buffers[name] = self._frequencies(kind, part_T.max() + 1, x.device, layer_type)
                    parts.append(plain(x, part_T[None], **options))
                rows.append(_joined(parts, dim=1))
        finally:
            self._buffers[name] = kept
        return _joined(rows, dim=0)

    def _frequencies(
        self, kind: str, length: torch.Tensor, device: torch.device, layer_type: str | None
    ) -> torch.Tensor:
        """Radians per token of a sequence of that length (a scalar tensor), float32 (D/2,): those of a fresh module."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config: Any = self.config
        prefix, parameters = "", config.rope_parameters
        if layer_type is not None:
            prefix, parameters = f"{layer_type}_", parameters[layer_type]
        beyond: Any
        scaled = functools.partial(ROPE_INIT_FUNCTIONS[kind], config, device, layer_type=layer_type)
        if kind == "dynamic":
            window, beyond = config.max_position_embeddings, scaled(seq_len=length)[0]
        else:
            window = parameters["original_max_position_embeddings"]
            beyond = getattr(self, f"{prefix}long_inv_freq", None)  # constant; by transformers' name and its rule
            if beyond is None:
                beyond = scaled(seq_len=window + 1)[0]
            beyond = beyond.to(device)
            setattr(self, f"{prefix}long_inv_freq", beyond)
        return torch.where(length > window, beyond, getattr(self, f"{prefix}original_inv_freq").to(device))


def _joined(parts: list[Any], dim: int) -> Any:
    """Tensors put together, or tuples of them one by one."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim)
    return tuple(torch.cat(each, dim) for each in zip(*parts))


_prompt: ContextVar[int | None] = ContextVar("prompt", default=None)


@contextlib.contextmanager
def reading(prompt: int) -> Iterator[None]:
    """Within it rows are read as a prompt of so many tokens, and an answer that is generated token by token."""
    token = _prompt.set(prompt)
    try:
        yield
    finally:
        _prompt.reset(token)


@functools.cache
def _rows_alone(family: type[torch.nn.Module]) -> type[RowsAlone]:
    return type(family.__name__, (RowsAlone, family), {"__module__": family.__module__})
