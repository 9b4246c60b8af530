"""Whether training computes what transformers computes, found by numbers and not by a family's name.

`plain_head` tries what a model does to its logits. `check_forward` compares loss and last logits of one short row, at
contiguous and at jumped positions, with transformers' own forward. Whatever a family has beside the plain decoder (a
sink, a cap, a scale, a mask of its own) and training would leave out is an error before the first step.

Legend: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from endprompt.model import rope_geometry, training_attention
from endprompt.model.attention import PREFIX, registered_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from endprompt.train.objective import Objective

#: Tokens of the row that is compared; fewer where the window is smaller, so that no position is beyond it.
TOKENS = 48

# ---------------------------------------------------------------------------------------------------------------------
# The head

_plain: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


def plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just `hidden @ head.T`: no bias, no cap, no scale, nothing cut off. Tried once a model.

    The model's own forward is run with a decoder and a head that hand out known numbers of all sizes up to 1000, so
    neither the weights nor where they are matter. A head that cannot be tried so counts as not plain.
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


# ---------------------------------------------------------------------------------------------------------------------
# The whole forward

_checked: set[str] = set()


@torch.no_grad()
def check_forward(objective: Objective, *, bfloat16: bool = False) -> None:
    """Raises ValueError if training's loss or last logits of a short row are not those of transformers' own forward.

    bfloat16: whether products are made in it. The attention `shifted` is another one on purpose, `sdpa` stands for it;
    a model with a stock attention is left as it is. Every process of a sharded model must call this. Models of one
    configuration are checked once.
    """
    model, config = objective.model, objective.model.config
    device = next(model.parameters()).device.type
    attention = config._attn_implementation
    if not attention.startswith(PREFIX):
        return
    name = training_attention("sdpa") if attention == registered_name("shifted") else attention
    values = config.to_dict() | {"_name_or_path": None}
    key = json.dumps([values, attention, str(model.dtype), bfloat16, device], sort_keys=True, default=str)
    if key in _checked:
        return
    geometry = rope_geometry(config)
    original = geometry.parameters.get("original_max_position_embeddings") or geometry.stated
    tokens = min(TOKENS, 3 * min(int(original), geometry.stated) // 4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.get_text_config().vocab_size, (2, tokens)))
    ids = ids.to(next(model.parameters()).device)
    ids[1, tokens // 2 :] = ids[0, tokens // 2 :]  # the second row: another context before the jump
    row, other = ids[:1], ids[1:]
    contiguous = torch.arange(tokens, device=ids.device)[None]
    jumped = contiguous + (contiguous >= tokens // 2) * (tokens // 4)
    dtype = torch.bfloat16 if bfloat16 else model.dtype
    places = {"contiguous positions": contiguous, "positions with a jump": jumped}
    training = model.training
    model.eval()
    try:
        model.set_attn_implementation(name)
        found = {where: _ours(objective, row, positions) for where, positions in places.items()}
        elsewhere, _ = _ours(objective, other, jumped)
        model.set_attn_implementation("eager")
        if model.config._attn_implementation != "eager":  # both would be without a mask, and not causal
            raise ValueError("its attention is its own and cannot be chosen: this family cannot be trained")
        expected = {where: _theirs(objective, row, positions) for where, positions in places.items()}
        nudged, _ = _theirs(objective, row, contiguous, nudge=torch.finfo(dtype).eps)
    except (ValueError, torch.OutOfMemoryError) as error:
        if isinstance(error, ValueError):
            raise ValueError(f"{config.model_type}: {error}") from error
        raise
    except Exception as error:  # whatever a family's own code does without the mask that it is used to
        raise ValueError(
            f"{config.model_type}: this family cannot be trained with the causal-only attentions, its own code fails "
            f"without a mask: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    for where, (logits, loss) in found.items():
        theirs, their_loss = expected[where]
        allowed = tolerance(
            expected["contiguous positions"][0], nudged, config.get_text_config().num_hidden_layers, dtype
        )
        apart, loss_apart = float((logits - theirs).abs().max()), abs(loss - their_loss)
        # a loss is summed up in float32; what is not a number does not agree
        if not (apart <= allowed and loss_apart <= allowed + 8 * torch.finfo(torch.float32).eps * their_loss):
            raise ValueError(
                f"{config.model_type}: training does not compute this model as transformers does ({where}, attention="
                f"{attention.removeprefix(PREFIX)}): the last logits differ by up to {apart:.1e}, the loss by "
                f"{loss_apart:.1e}, and rounding explains {allowed:.1e}"
            )
    if torch.equal(found["positions with a jump"][0], elsewhere):
        raise ValueError(
            f"{config.model_type}: tokens after a jump of the positions do not see those before it "
            f"(attention={attention.removeprefix(PREFIX)}): this family cannot be trained at jumped positions"
        )
    _checked.add(key)


def tolerance(expected: torch.Tensor, nudged: torch.Tensor, layers: int, dtype: torch.dtype) -> float:
    """What rounding can do to logits and loss: largest difference of one logit.

    nudged: the logits with each number of the embeddings moved by one unit in the last place. Two ways to compute the
    same differ by about that much in each layer, independently, and once more in the head.
    """
    unit = torch.finfo(dtype).eps * float(expected.abs().max())
    return 2 * layers**0.5 * float((nudged - expected).abs().max()) + 8 * unit


def _weights(tokens: int, device: torch.device) -> torch.Tensor:
    """Weights of all kinds, [1, T]: 0, whole and in between; the first token has none."""
    weights = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.5], device=device).repeat(-(-tokens // 5))
    return weights[None, :tokens]


def _ours(objective: Objective, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(last logits [V] in float64, mean loss) as training makes them."""
    model = objective.model
    weights = _weights(ids.shape[1], ids.device)
    loss = objective(ids, positions, weights)

    def last() -> torch.Tensor:
        if not plain_head(model):
            return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -1]
        hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        return F.linear(hidden[0, -1], model.get_output_embeddings().weight)

    return objective(ids, positions, weights, instead=last).double(), float(loss) / float(weights.sum())


def _theirs(
    objective: Objective, ids: torch.Tensor, positions: torch.Tensor, nudge: float = 0.0
) -> tuple[torch.Tensor, float]:
    """The same by the model's own logits.

    Contiguous positions are those that the model takes by itself. With jumped ones a mask of ones says that the row is
    one document. nudge: relative, up and down by turns, of the embeddings.
    """
    model = objective.model
    weights = _weights(ids.shape[1], ids.device)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if int(positions[0, -1]) >= ids.shape[1]:
        given |= {"position_ids": positions, "attention_mask": torch.ones_like(ids)}

    def move(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        signs = 1 - 2 * (torch.arange(out.shape[-1], device=out.device) % 2)
        return out * (1 + nudge * signs).to(out.dtype)

    hook = model.get_input_embeddings().register_forward_hook(move) if nudge else contextlib.nullcontext()
    with hook:
        logits = objective(ids, ids, weights, instead=lambda: model(**given).logits)[0].double()
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return logits[-1], float((losses * weights[0, 1:]).sum() / weights.sum())
