"""Whether a model computes what transformers computes, found by numbers and not by a family's name: whatever a family
has beside the plain decoder (a sink, a cap, a scale, a mask of its own) and we would leave out is an error before any
work.

Loss and last logits of one short row are compared with transformers' own forward: once at load (`check_loaded`), and
for training, also at jumped positions (`check_forward`). Legend: B batch, T tokens, D hidden size, V vocabulary, K last
tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from endprompt.model.attention import (
    BY_POSITION,
    PREFIX,
    attention_backends,
    eager_by_position,
    narrow_layers,
    plain_name,
    registered_name,
    training_attention,
)
from endprompt.model.geometry import said
from endprompt.model.length_rope import RowsAlone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from endprompt.train.objective import Objective

#: Tokens of the row that is compared; fewer where the window is smaller, so that no position is beyond it.
TOKENS = 48

#: Its last tokens, whose logits are compared. By their median: in half precision an expert may be chosen otherwise.
LAST = 9

_plain: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


def plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just `hidden @ head.T`: no bias, no cap, no scale, nothing cut off. Tried once a model: its
    own forward is run with a decoder and a head that hand out known numbers of all sizes up to 1000, so neither the
    weights nor where they are matter. A head that cannot be tried so counts as not plain.
    """
    if model not in _plain:
        _plain[model] = _logits_are_products(model)
    return _plain[model]


@torch.no_grad()
def _logits_are_products(model: PreTrainedModel) -> bool:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Hidden(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:  # what single families take beside the hidden states
            return None

    base, head = model.base_model, model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if base is model or weight is None or weight.ndim != 2 or getattr(head, "bias", None) is not None:
        return False
    entries, size = weight.shape
    hidden_BTD = torch.linspace(-1000, 1000, 2 * size).to(weight.dtype).view(1, 2, size)
    logits_BTV = hidden_BTD[..., torch.arange(entries) % size]

    def project(hidden: torch.Tensor) -> torch.Tensor:
        if not torch.equal(hidden.to(hidden_BTD.dtype), hidden_BTD):
            raise ValueError("the head is not given the decoder's hidden states")
        return logits_BTV.clone()

    with (
        _forward(base, lambda *_, **__: Hidden(last_hidden_state=hidden_BTD.clone())),
        _forward(head, project),
    ):
        try:
            out = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
            return torch.equal(out.to(logits_BTV.dtype), logits_BTV)
        except Exception:  # whatever a family's own code does with numbers that it did not make
            return False


@contextlib.contextmanager
def _forward(module: torch.nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Another forward of one module meanwhile."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


#: Why a family whose attention is no function that can be exchanged is not trained.
ITS_OWN = "its attention is its own and cannot be chosen: this family cannot be trained"

#: (last logits [K, V] in float64, mean loss in nats)
Numbers = tuple[torch.Tensor, float]


@torch.no_grad()
def check_loaded(
    model: PreTrainedModel, loss: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
) -> None:
    """Raises ValueError if loss or last logits of a model as it is loaded are not those of transformers' own forward.
    loss: of model and ids [1, T], the sum over the tokens, where it is made otherwise than from the model's logits. A
    checkpoint's own code has nothing to be compared with.
    """
    if not type(model).__module__.startswith("transformers."):
        return
    ids = _rows(model)[:1]
    weights = torch.ones_like(ids, dtype=torch.float32)
    weights[:, 0] = 0
    attention, kind = model.config._attn_implementation, model.config.model_type
    try:
        found = _numbers(model(input_ids=ids, use_cache=False).logits, ids, weights)
        if loss is not None:
            found = found[0], float(loss(model, ids)) / (ids.shape[1] - 1)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config may ask for what the family's code does not do
        raise ValueError(f"{kind}: the model's forward pass of a short row fails: {said(error)}") from error
    with transformers_own(model):
        expected, nudged = (_theirs(model, ids, weights, nudge=nudge) for nudge in (0.0, torch.finfo(model.dtype).eps))
    allowed = tolerance(expected[0], nudged[0], model.config.get_text_config().num_hidden_layers, model.dtype)
    _compare(found, expected, allowed, f"{kind}: this model, loaded with attention {attention}, does not compute what")


@torch.no_grad()
def check_forward(objective: Objective, *, bfloat16: bool = False) -> None:
    """Raises ValueError if training's loss or last logits of a short row are not those of transformers' own forward.
    bfloat16: whether products are made in it. The attention `shifted` is another one on purpose, `sdpa` stands for it;
    a model with a stock attention is left as it is. Every process of a sharded model must call this.
    """
    model, kind = objective.model, objective.model.config.model_type
    attention = model.config._attn_implementation
    if not attention.startswith(PREFIX):
        return
    rows, context = _rows(model), objective.context
    tokens = rows.shape[1] - rows.shape[1] % (context.size if context else 1)
    row, other = rows[:, :tokens].split(1)
    contiguous = torch.arange(tokens, device=row.device)[None]
    jump = max([tokens // 4, *(kind.reach or 0 for kind in narrow_layers(model.config))])
    if getattr(model.config, "attn_temperature_tuning", False):  # Llama 4's own goes by place: up to here that is equal
        jump = max(0, min(jump, int(model.config.floor_scale) - tokens - 1))
    jumped = contiguous + (contiguous >= tokens // 2) * jump
    dtype = torch.bfloat16 if bfloat16 else model.dtype
    places = {"contiguous positions": contiguous, "positions with a jump": jumped}
    weights = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.5], device=row.device).repeat(-(-tokens // 5))[None, :tokens]

    def within(work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return objective(row, row, weights, instead=work)

    training = model.training
    model.eval()
    why = "transformers' own eager forward pass of it fails"
    try:
        with transformers_own(model):
            if model.config._attn_implementation != "eager":  # both would be without a mask, and not causal
                raise ValueError(ITS_OWN)
            expected = {
                where: _theirs(model, row, weights, None if where.startswith("cont") else positions, within=within)
                for where, positions in places.items()
            }
            nudged, _ = _theirs(model, row, weights, nudge=torch.finfo(dtype).eps, within=within)
        why = "its own code reads the attention mask (to choose what a token attends to), and they make none"
        if attention == registered_name("shifted"):
            model.set_attn_implementation(training_attention("sdpa"))
        with attention_backends(row.device):
            found = {where: _ours(objective, row, positions, weights) for where, positions in places.items()}
            elsewhere, _ = _ours(objective, other, jumped, weights)
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's own code does without the mask that it is used to
        raise ValueError(
            f"{kind}: this family cannot be trained with the causal-only attentions: {why} ({said(error)})"
        ) from error
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    layers = model.config.get_text_config().num_hidden_layers
    allowed = tolerance(expected["contiguous positions"][0], nudged, layers, dtype)
    for where, numbers in found.items():
        given = f"{where}, attention={plain_name(attention)}"
        _compare(numbers, expected[where], allowed, f"{kind}: training ({given}) does not compute what")
    if torch.equal(found["positions with a jump"][0], elsewhere):
        raise ValueError(
            f"{kind}: tokens after a jump of the positions do not see those before it "
            f"(attention={plain_name(attention)}): this family cannot be trained at jumped positions"
        )


def _rows(model: PreTrainedModel) -> torch.Tensor:
    """Two rows of fixed tokens within every window of the config, [2, T]: they end alike, after another first half."""
    text = model.config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    several = [vars(text), parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    keys = ("max_position_embeddings", "original_max_position_embeddings")
    windows = [int(one[key]) for one in several for key in keys if one.get(key)]
    tokens = min([TOKENS, *(3 * window // 4 for window in windows)])
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, text.vocab_size, (2, tokens))).to(model.device)
    ids[1, tokens // 2 :] = ids[0, tokens // 2 :]
    return ids


@contextlib.contextmanager
def transformers_own(model: PreTrainedModel) -> Iterator[None]:
    """In it RoPE modules are of transformers' classes, attention is eager if it can be, masked by position as ours."""
    attention = model.config._attn_implementation
    masks = eager_by_position() if attention.endswith(BY_POSITION) else contextlib.nullcontext()
    ours = {module: type(module) for module in model.modules() if isinstance(module, RowsAlone)}
    try:
        for module, kind in ours.items():
            family: Any = kind.__mro__[2]
            module.__class__ = family
        with contextlib.suppress(ValueError):
            model.set_attn_implementation("eager")
        with masks:
            yield
    finally:
        for module, kind in ours.items():
            module.__class__ = kind
        model.set_attn_implementation(attention)


def tolerance(expected: torch.Tensor, nudged: torch.Tensor, layers: int, dtype: torch.dtype) -> float:
    """What rounding can do to logits and loss: largest difference of one logit. nudged: the logits with each number of
    the embeddings moved by one unit in the last place. Two ways to compute the same differ by about that much in each
    layer, independently, and once more in the head.
    """
    unit = torch.finfo(dtype).eps * float(expected.abs().max())
    return 2 * layers**0.5 * float((nudged - expected).abs().max()) + 8 * unit


def _compare(found: Numbers, expected: Numbers, allowed: float, said: str) -> None:
    apart = float((found[0] - expected[0]).abs().amax(-1).median())
    loss_apart = abs(found[1] - expected[1])
    if not bool(expected[0].isfinite().all()):
        raise ValueError(
            f"{said.partition(':')[0]}: the logits of a short row are not finite numbers, in transformers' own forward "
            "pass too: a weight of the checkpoint is none, or the dtype is too narrow for it"
        )
    if bool(expected[0].max() == expected[0].min()):
        raise ValueError(
            f"{said.partition(':')[0]}: all logits of a short row are the same number, in transformers' own forward "
            "pass too: weights of the checkpoint are zero"
        )
    # a loss is summed up in float32; what is not a number does not agree
    if not (apart <= allowed and loss_apart <= allowed + 8 * torch.finfo(torch.float32).eps * expected[1]):
        raise ValueError(
            f"{said} transformers does: the last logits differ by up to {apart:.1e}, the loss by {loss_apart:.1e}, and "
            f"rounding explains {allowed:.1e}"
        )


def _numbers(logits_1TV: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Numbers:
    logits = logits_1TV[0].to(ids.device).double()
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return logits[-LAST:], float((losses * weights[0, 1:]).sum() / weights.sum())


def _ours(objective: Objective, ids: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> Numbers:
    """As training makes them."""
    model, context = objective.model, objective.context
    loss = objective(ids, positions, weights)
    if context:
        loss = context.total(loss)

    def last() -> torch.Tensor:
        plain, given = plain_head(model), objective.given(ids, positions)
        made = model.base_model(**given)[0] if plain else model(**given).logits
        made = (context.whole(made) if context else made)[0, -LAST:]
        return F.linear(made, model.get_output_embeddings().weight) if plain else made

    return objective(ids, positions, weights, instead=last).double(), float(loss) / float(weights.sum())


def _theirs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor | None = None,
    nudge: float = 0.0,
    within: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = lambda work: work(),
) -> Numbers:
    """By the model's own logits. positions: None for those that the model takes by itself; with others a mask of ones
    says that the row is one document. nudge: relative, up and down by turns, of the embeddings. within: where the
    weights are whole.
    """
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if positions is not None:
        given |= {"position_ids": positions, "attention_mask": torch.ones_like(ids)}

    def move(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        signs = 1 - 2 * (torch.arange(out.shape[-1], device=out.device) % 2)
        return out * (1 + nudge * signs).to(out.dtype)

    hook = model.get_input_embeddings().register_forward_hook(move) if nudge else contextlib.nullcontext()
    with hook:
        return _numbers(within(lambda: model(**given).logits), ids, weights)
