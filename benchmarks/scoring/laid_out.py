"""Keys and values of a batch laid out once, and the attention that reads them without repeating heads.

transformers' own cache is made anew by every token, and its attention repeats keys and values wherever a mask is
given: at 65,536 tokens a step then moves many times the cache's bytes. Here each layer's cache is allocated for the
whole answer and written in place, the group's heads read one key head together, and a step does the same work on
tensors of the same shapes, so it can be recorded.

A row's tokens lie in its first places, one after the other. A sliding layer keeps of the prompt what its window can
still reach, at the end of its first `window` - 1 places, and the answer after them.

On CUDA kernels of our own (`endprompt.fast`) do what a step is full of and memory's speed does not explain: norms, RoPE
and SwiGLU of the families that they know, and attention over those places alone that a row has. A row that is over
costs no reads there.

Legend: B rows, b those of one forward pass, T tokens of the pass, S places, H heads, G key/value heads, D head dim
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from endprompt.fast.available import triton_kernels
from endprompt.fast.layers import FAMILIES, rms_norm, swiglu
from endprompt.model.attention import HARMLESS, HARMLESS_VALUES, kernels_first

NAME = "endprompt_laid_out"
FLASH4_WIDTHS = STEP_WIDTHS = (64, 128)
STEP_HEADS = 96  # rows times key heads: with more cuDNN's kernel is the faster one (docs/speed.md)
STEP_KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# Elements of a mask that a part of a prompt is attended under at once.
MASK_ELEMENTS = 2**28
BLOCK = 1024


class Unfit(Exception):
    """The model asks for something that this attention does not do."""


class Scene:
    """Which rows and places the forward pass at hand is about; of all layers. prompt: the pass reads prompts, tokens
    `start` and on of the rows `rows`; else it is a step of all rows."""

    def __init__(self, lengths_B: torch.Tensor, places: int, new_tokens: int, windows: list[int | None]):
        self.device = lengths_B.device
        self.lengths_B, self.places, self.new_tokens = lengths_B, places, new_tokens
        self.prompt, self.rows, self.start, self.last = True, slice(None), 0, True
        # a window that no row outgrows is none
        self.windows = [w if w is not None and w < places else None for w in windows]
        self.step_1 = torch.zeros(1, dtype=torch.long, device=self.device)
        self.skips = False  # whether the last attention read nothing for rows that are over
        self._lay_out()

    def _lay_out(self) -> None:
        rows = len(self.lengths_B)
        self.rows_B = torch.arange(rows, device=self.device)
        self.positions_B = self.lengths_B + self.step_1
        self.live_B = torch.ones(rows, dtype=torch.long, device=self.device)
        self.slots, self.spans, self.masks, self._arange = {}, {}, {}, {}
        for window in dict.fromkeys(self.windows):
            places = self.width(window)
            self.slots[window] = torch.zeros(rows, dtype=torch.long, device=self.device)
            self.spans[window] = torch.zeros(2, rows, dtype=torch.long, device=self.device)
            self.masks[window] = torch.zeros(rows, 1, 1, places, dtype=torch.bool, device=self.device)
            self._arange[window] = torch.arange(places, device=self.device)
        self._aim()

    def width(self, window: int | None) -> int:
        """Places of a layer."""
        return self.places if window is None else -(-(window - 1 + self.new_tokens) // 64) * 64

    def _aim(self) -> None:
        """Where the step's tokens are written and what they see. In place: a recording holds these tensors."""
        torch.add(self.lengths_B, self.step_1, out=self.positions_B)
        for window, mask_B11S in self.masks.items():
            place_S, (begin_B, end_B) = self._arange[window], self.spans[window]
            if window is None:
                torch.mul(self.positions_B + 1, self.live_B, out=end_B)
                self.slots[None].copy_(self.positions_B)
                mask_B11S.copy_((place_S <= self.positions_B[:, None])[:, None, None])
                continue
            self.slots[window].copy_((self.step_1 + (window - 1)).expand_as(self.slots[window]))
            torch.maximum(self.step_1, (window - 1) - self.lengths_B, out=begin_B)
            torch.mul(self.step_1 + window, self.live_B, out=end_B)
            inside_S = (place_S >= self.step_1) & (place_S <= self.step_1 + (window - 1))
            real_BS = place_S >= (window - 1) - self.lengths_B[:, None]
            mask_B11S.copy_((inside_S & real_BS)[:, None, None])

    def advance(self) -> None:
        self.step_1.add_(1)
        self._aim()

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows go on, in this order."""
        self.lengths_B = self.lengths_B[rows]
        self._lay_out()


class Layer(CacheLayerMixin):
    """Keys and values [B, G, S, D] of one layer."""

    is_sliding = False

    def __init__(self, scene: Scene, window: int | None):
        super().__init__()
        self.scene, self.window = scene, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros: places that are still empty are masked, and must not hold NaN."""
        shape = (len(self.scene.lengths_B), key_states.shape[1], self.scene.width(self.window))
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.scene.prompt:
            return self._fill(self.keys, key_states), self._fill(self.values, value_states)
        rows_B, slot_B = (x.to(self.keys.device) for x in (self.scene.rows_B, self.scene.slots[self.window]))
        if self.keys.shape == self.values.shape and triton_kernels(self.keys):
            from endprompt.fast import decode

            decode.keep(key_states.contiguous(), value_states.contiguous(), self.keys, self.values, slot_B)
            return self.keys, self.values
        self.keys[rows_B, :, slot_B] = key_states[:, :, 0]
        self.values[rows_B, :, slot_B] = value_states[:, :, 0]
        return self.keys, self.values

    def _fill(self, whole_BGSD: torch.Tensor, new_bGTD: torch.Tensor) -> torch.Tensor:
        """Stores a part of the prompts; returns all that the part may look at."""
        scene, tokens = self.scene, new_bGTD.shape[2]
        held_bGSD = whole_BGSD[scene.rows]
        if self.window is None:
            held_bGSD[:, :, scene.start : scene.start + tokens] = new_bGTD
            return held_bGSD[:, :, : scene.start + tokens] if scene.start else new_bGTD
        keep = self.window - 1
        if scene.start == 0 and scene.last:  # rows of several lengths: each one's last tokens
            index_bS = scene.lengths_B[scene.rows, None] - keep + torch.arange(keep, device=scene.device)
            index_bS = index_bS.clamp(min=0).to(new_bGTD.device)
            index = index_bS[:, None, :, None].expand(-1, new_bGTD.shape[1], -1, new_bGTD.shape[3])
            held_bGSD[:, :, :keep] = new_bGTD.gather(2, index)
            return new_bGTD
        before = min(keep, scene.start)  # a part of one row
        seen_bGTD = torch.cat([held_bGSD[:, :, keep - before : keep], new_bGTD], dim=2)
        after = min(keep, seen_bGTD.shape[2])
        held_bGSD[:, :, keep - after : keep] = seen_bGTD[:, :, seen_bGTD.shape[2] - after :]
        return seen_bGTD

    def bytes_a_token(self) -> int:
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (self.keys, self.values) if x is not None)

    def keep_rows(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys = self.keys[rows]
            self.values = self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # no mask is made of it

    def get_seq_length(self) -> int:
        return self.scene.start if self.scene.prompt else 1

    def get_max_length(self) -> int:
        return self.scene.width(self.window)

    get_max_cache_shape = get_max_length


class LaidOut(Cache):
    """The cache of a batch."""

    def __init__(self, scene: Scene):
        self.own = [Layer(scene, window) for window in scene.windows]
        super().__init__(layers=list(self.own))
        self.scene = scene

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Only these rows go on. Layer by layer, so that one layer's copy at most is held beside."""
        self.scene.keep(rows)
        for layer in self.own:
            layer.keep_rows(rows)


# ----------------------------------------------------------------------------------------------------------- attention

_scene: ContextVar[Scene | None] = ContextVar("scene", default=None)


def attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [B, T, H, D] of the scene at hand. Raises Unfit for what it cannot do."""
    scene = _scene.get()
    if scene is None or attention_mask is not None or is_causal is False:
        raise Unfit("its attention takes a mask of its own")
    for name, value in kwargs.items():
        known = name in HARMLESS or name == "use_cache" or any(value is one for one in HARMLESS_VALUES.get(name, ()))
        if value is not None and not known:
            raise Unfit(f"its attention takes {name}")
    window = scene.windows[module.layer_idx]  # type: ignore[index]
    if sliding_window is not None and sliding_window < scene.places and sliding_window != window:
        raise Unfit(f"a layer's window is {sliding_window}, and its config says {window}")
    if scene.prompt:
        out_BHTD = of_prompt(query_BHTD, key_BGSD, value_BGSD, scaling, window)
    else:
        mask_B11S, span_2B = (kept[window].to(query_BHTD.device) for kept in (scene.masks, scene.spans))
        scene.skips = takes_step(query_BHTD, key_BGSD, value_BGSD)
        if scene.skips:
            from endprompt.fast import decode

            scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
            out = decode.attend(query_BHTD[:, :, 0].contiguous(), key_BGSD, value_BGSD, span_2B[0], span_2B[1], scale)
            return out[:, None], None
        out_BHTD = of_step(query_BHTD, key_BGSD, value_BGSD, scaling, mask_B11S)
    return out_BHTD.transpose(1, 2).contiguous(), None


def of_step(
    query_BH1D: torch.Tensor,
    key_BGSD: torch.Tensor,
    value_BGSD: torch.Tensor,
    scaling: float | None,
    mask_B11S: torch.Tensor,
) -> torch.Tensor:
    """[B, H, 1, D]: one token of each row, keys and values not repeated. With a mask and grouped heads torch's own
    order of kernels ends at the plain one, which repeats and converts all keys; cuDNN's reads them at the memory's
    speed. Elsewhere the heads of a group are queries of their key head."""
    batch, heads, _, width = query_BH1D.shape
    groups = key_BGSD.shape[1]
    if heads == groups or takes_cudnn(query_BH1D, key_BGSD, value_BGSD, mask_B11S):
        with kernels_first(query_BH1D.device, STEP_KERNELS):
            return F.scaled_dot_product_attention(
                query_BH1D, key_BGSD, value_BGSD, attn_mask=mask_B11S, scale=scaling, enable_gqa=heads != groups
            )
    folded = query_BH1D.reshape(batch, groups, heads // groups, width)
    out = F.scaled_dot_product_attention(folded, key_BGSD, value_BGSD, attn_mask=mask_B11S, scale=scaling)
    return out.reshape(batch, heads, 1, -1)


def takes_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether our own kernel attends to a cache."""
    few = key.shape[0] * key.shape[1] <= STEP_HEADS and query.shape[1] <= 16 * key.shape[1]
    wide = query.shape[-1] in STEP_WIDTHS and key.shape == value.shape and key.dtype == query.dtype
    return wide and few and triton_kernels(query) is not None


def takes_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether cuDNN has a kernel for grouped heads under this mask."""
    if not query.is_cuda:
        return False
    parts = torch.backends.cuda.SDPAParams(query, key, value, mask, 0.0, False, query.shape[1] != key.shape[1])
    return torch.backends.cuda.can_use_cudnn_attention(parts)


def of_prompt(
    query_bHTD: torch.Tensor,
    key_bGSD: torch.Tensor,
    value_bGSD: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """[b, H, T, D]: causal attention of the last T of S tokens, each seeing at most the last `window` ones."""
    tokens, seen = query_bHTD.shape[2], key_bGSD.shape[2]
    heads, groups = query_bHTD.shape[1], key_bGSD.shape[1]
    if tokens == seen and (window is None or seen <= window):
        if takes_flash4(query_bHTD, value_bGSD):
            from endprompt.fast import flash4

            query, key, value = (x.transpose(1, 2) for x in (query_bHTD, key_bGSD, value_bGSD))
            return flash4.attend(query, key, value, scaling).transpose(1, 2)
        return F.scaled_dot_product_attention(
            query_bHTD, key_bGSD, value_bGSD, is_causal=tokens > 1, scale=scaling, enable_gqa=heads != groups
        )
    block = max(BLOCK, window) if window else max(64, min(BLOCK, MASK_ELEMENTS // seen))
    outs = []
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        place_T = torch.arange(seen - tokens + first, seen - tokens + last, device=query_bHTD.device)
        left, right = max(0, seen - tokens + first - (window or seen) + 1), seen - tokens + last
        place_S = torch.arange(left, right, device=query_bHTD.device)
        mask_TS = place_S <= place_T[:, None]
        if window:
            mask_TS &= place_S > place_T[:, None] - window
        # with a mask only ungrouped heads have a kernel that holds no logits
        keys, values = (x[:, :, left:right].repeat_interleave(heads // groups, 1) for x in (key_bGSD, value_bGSD))
        query = query_bHTD[:, :, first:last]
        outs.append(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask_TS, scale=scaling))
    return torch.cat(outs, dim=2)


def takes_flash4(query: torch.Tensor, value: torch.Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and value.shape[-1] == query.shape[-1] in FLASH4_WIDTHS and flash4_installed()


@functools.cache
def flash4_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute.interface") is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def attending(model: Any, scene: Scene) -> Iterator[None]:
    """Within it the model's attention is ours, about this scene, and so are norms, RoPE and SwiGLU that we have."""
    found = model.config._attn_implementation
    token = _scene.set(scene)
    model.set_attn_implementation(NAME)
    try:
        if model.config._attn_implementation != NAME:
            raise Unfit("its attention cannot be set")
        with contextlib.ExitStack() as stack:
            for owner, name, ours in fused(model):
                stack.enter_context(mock.patch.object(owner, name, ours))
            yield
    finally:
        model.set_attn_implementation(found)
        _scene.reset(token)


# ------------------------------------------------------------------------------------------------------------- kernels


def fused(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, function with a kernel) of what the families' layers call by name; each has the plain way in it."""
    if triton_kernels(next(model.parameters())) is None:
        return
    kinds = {type(module) for module in model.modules()}
    for kind in kinds:
        family = next((name for name in FAMILIES if kind.__name__ == f"{name}RMSNorm"), None)
        if family is not None:
            source = sys.modules[kind.__module__]
            yield kind, "forward", functools.partialmethod(_norm, plain=kind.forward)
            yield source, "apply_rotary_pos_emb", functools.partial(_rotate, source.apply_rotary_pos_emb)
            mlp = getattr(source, f"{family}MLP")
            if mlp in kinds and model.config.get_text_config().hidden_act == "silu":
                yield mlp, "forward", functools.partialmethod(_mlp, plain=mlp.forward)


def _cast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) or torch.is_grad_enabled()


def _norm(module: Any, x: torch.Tensor, plain: Callable[..., torch.Tensor]) -> torch.Tensor:
    if _cast(x) or x.dtype != module.weight.dtype:
        return plain(module, x)
    return rms_norm(x.reshape(-1, x.shape[-1]), module.weight, module.variance_epsilon)[0].view(x.shape)


def _mlp(module: Any, x: torch.Tensor, plain: Callable[..., torch.Tensor]) -> Any:
    if _cast(x):
        return plain(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(swiglu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))


def _rotate(plain: Callable[..., Any], query: Any, key: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """Of [B, heads, T, D], in memory [B, T, heads, D], as layers make and return it."""
    kernels, width = triton_kernels(query), query.shape[-1]
    if _cast(query) or unsqueeze_dim != 1 or cos.shape[-1] != width or cos.dtype != query.dtype:
        return plain(query, key, cos, sin, unsqueeze_dim)
    heads = (x.transpose(1, 2).contiguous() for x in (query, key))
    return tuple(x.transpose(1, 2) for x in kernels.rotate(*heads, cos.contiguous(), sin.contiguous()))


AttentionInterface.register(NAME, attention)  # without a mask function on purpose: no mask is made
