"""Models: load any RoPE decoder of transformers, extend its window, attend over jumped positions, export.

Transformers' own classes do the work, so an export is a plain `save_pretrained` directory that AutoModelForCausalLM,
lm-eval and vLLM read as it is. What is ours is the causal-only attention and the check of the frequencies.

Legend: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from endprompt import distributed, flash4, length_rope, origin
from endprompt.geometry import (  # noqa: F401 (handed on: they are of the model to everyone else)
    RopeGeometry,
    Window,
    check_frequencies,
    check_whole_attention,
    extended_config,
    extended_rope_parameters,
    rope_geometry,
    window_of,
)
from endprompt.rows import parse_object
from endprompt.text import vocabulary
from endprompt.weights import promise_nothing, settle

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "causal_only_"


# ---------------------------------------------------------------------------------------------------------------------
# Attention
#
# With position_ids given, no mask and no cache, transformers reads a jump in the positions as the border of a packed
# document: the end prompt would not see the context, in training only. An attention that is registered without a mask
# function gets no mask at all, so these do the causal part themselves: token t attends to 0..t, whatever the positions
# say. They know no padding: rows must be full, or padded on the right with the loss masked.


def causal_only_sdpa(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """torch's scaled_dot_product_attention, causal; on CUDA the backend is chosen by `training_attention`."""
    _refuse(query_BHTD, key_BGTD, attention_mask, kwargs)
    out_BHTD = F.scaled_dot_product_attention(
        query_BHTD,
        key_BGTD,
        value_BGTD,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query_BHTD.shape[1] != key_BGTD.shape[1],
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


def causal_only_eager(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain matrix products with a triangular mask and a float32 softmax: the reference for the others.

    softcap: scores are softcap * tanh(score / softcap), as in Gemma 2. s_aux: float [H], one more score of each head
    that is no token's and takes its share of the weights, the sink of GPT-OSS.
    """
    _refuse(query_BHTD, key_BGTD, attention_mask, kwargs)
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


def causal_only_flex(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """torch's flex_attention with a causal block mask."""
    from torch.nn.attention.flex_attention import flex_attention

    _refuse(query_BHTD, key_BGTD, attention_mask, kwargs)
    if dropout:
        raise ValueError(f"flex attention has no dropout: {dropout=}")
    out_BHTD = flex_attention(
        query_BHTD,
        key_BGTD,
        value_BGTD,
        block_mask=_causal_block_mask(query_BHTD.shape[2], query_BHTD.device),
        scale=scaling,
        enable_gqa=query_BHTD.shape[1] != key_BGTD.shape[1],
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


def causal_only_cudnn(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """cuDNN's attention and no other: an error where cuDNN has no kernel, such as on a CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if query_BHTD.device.type != "cuda":
        raise ValueError("attention=cudnn needs a CUDA device; sdpa runs everywhere")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return causal_only_sdpa(module, query_BHTD, key_BGTD, value_BGTD, attention_mask, **kwargs)


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
    ) -> tuple[torch.Tensor, None]:
        _refuse(query_BHTD, key_BGTD, attention_mask, kwargs)
        if dropout:
            raise ValueError(f"{name} is for training without dropout: {dropout=}")
        # its layout is B T H D, and it takes fewer key/value heads than query heads as they are
        query, key, value = (x.transpose(1, 2) for x in (query_BHTD, key_BGTD, value_BGTD))
        if name == "flash_attention_4":
            return flash4.attend(query, key, value, scaling), None
        return _flash_kernel(name, query, key, value, scaling).contiguous(), None

    return attention


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
HARMLESS = frozenset({"position_ids", "cache_position", "num_items_in_batch", "use_cache", "return_dict"})
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


# ---------------------------------------------------------------------------------------------------------------------
# Loading and export


def checkpoint_path(path: str | Path, *, weights: bool = True) -> Path:
    """The directory of a checkpoint, which may be given as `endprompt.origin` has it.

    weights: those of a hub's model are wanted too. Raises ValueError if it is missing, unfinished, or not a checkpoint.
    """
    directory = origin.directory_of(path, weights=weights)
    if directory.name.endswith(".partial"):
        raise ValueError(f"this directory belongs to an unfinished run: model={str(path)!r}")
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory}: the folder holds an adapter (adapter_config.json): merge it first")
    if not (directory / "config.json").is_file():
        raise ValueError(f"a checkpoint directory must hold config.json: model={str(path)!r}")
    return directory


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The checkpoint's config. Raises ValueError if it or `generation_config.json` cannot be read."""
    from transformers import AutoConfig

    directory = checkpoint_path(path, weights=False)
    generation = directory / "generation_config.json"
    if generation.exists():  # transformers passes over one that it cannot read, and the end tokens in it are gone
        parse_object(generation.read_bytes(), str(generation))
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever a damaged file makes its code run into
        message = " ".join(str(error).split())
        raise ValueError(f"{directory / 'config.json'}: transformers cannot read it: {message}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    directory = checkpoint_path(path, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises Exception itself
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            message = "it needs Python code of its own (auto_map of tokenizer_config.json), which is not run"
        raise ValueError(f"{directory}: no tokenizer can be loaded from it: {message}") from error
    # Nothing of ours cuts text by this limit; with it, transformers warns of every text longer than the window.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
    config: PretrainedConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, its RoPE checked against our own frequencies, and without memory.

    attention: any name that transformers knows (stock ones for generation, `causal_only_*` for training).
    config: one changed by the caller, such as a scaled one. Raises ValueError as `checkpoint_path` and `rope_geometry`.
    """
    directory = checkpoint_path(path)
    config = load_config(directory, trust_remote_code=trust_remote_code) if config is None else config
    model, report = load_report(
        directory, directory, config=config, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
    )
    settle(model, report, directory)
    check_frequencies(model)
    length_rope.rows_alone(model)
    model.to(device=torch.device(device))
    return model.eval()


def load_report(
    source: Path | None, directory: Path, *, config: PretrainedConfig, dtype: str, attention: str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """(the model as transformers loads it, its report of the weights); nothing of either is checked yet.

    source: the checkpoint, None for a `state_dict` among the options. Raises ValueError in one line, with the folder.
    """
    from transformers import AutoModelForCausalLM

    rope_geometry(config)
    if attention.startswith(PREFIX):
        register_causal_only()
    wanted = {"dtype": torch_dtype(dtype), "attn_implementation": attention}
    try:
        with quiet():
            kind: Any = AutoModelForCausalLM
            if source is None:
                with torch.device("meta"):
                    kind = type(AutoModelForCausalLM.from_config(config, **wanted))
            return kind.from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                **wanted,
                **options,
            )
    except Exception as error:  # as in load_config
        reason = str(error)
        if attention.startswith(PREFIX):
            if isinstance(error, KeyError) and error.args == (attention,):
                reason = (
                    f"{config.model_type} has attention classes of its own, which know stock attentions only: this "
                    "family cannot be trained with the causal-only attentions"
                )
            elif "does not support an attention implementation through" in reason:
                name = attention.removeprefix(PREFIX)
                reason = f"{config.model_type} takes no attention of torch's: {name!r}; attention=eager is taken"
        raise ValueError(f"{directory}: the checkpoint does not load: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for the milliseconds of a load or a save, no tables of what was loaded, settings as they were."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def new_model(config: PretrainedConfig, *, seed: int, dtype: str, attention: str, device: str) -> PreTrainedModel:
    """A model with random weights: the start of a base model, or of a measurement of speed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), attn_implementation=attention)
    check_frequencies(model)
    length_rope.rows_alone(model)
    return model


def check_builds(config: PretrainedConfig) -> None:
    """Make the model of a config without its weights, which takes a second at most for any size.

    Raises ValueError if transformers makes none of it, or one whose RoPE is not what the config says.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # its own may be one of no arithmetic
    except Exception as error:  # whatever the family's own code runs into
        where = f"{config.name_or_path}: " if config.name_or_path else ""
        message = " ".join(str(error).split())
        raise ValueError(f"{where}transformers makes no model of this config: {message}") from error
    check_frequencies(model)


def whole_weights(model: PreTrainedModel, dtype: str, keep: bool = True) -> dict[str, torch.Tensor]:
    """All weights on the CPU in `dtype`, tied ones once.

    Sharded ones are gathered, so every process must call it; those that need no result say keep=False.
    """
    wanted = torch_dtype(dtype)
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name in own:
            gathered = distributed.whole(tensor.detach())
            if keep:
                weights[name] = gathered.to("cpu", wanted)
    return weights


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    dtype: str,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a standard checkpoint: safetensors, config with the new window and stock attention, tokenizer.

    weights: default those of the model, in `dtype`. The live model and its config stay as they are.
    """
    live = model.config
    model.config = config = copy.deepcopy(live)
    config._attn_implementation = "sdpa"
    config.use_cache = True
    try:
        forget_the_source(model, tokenizer)
        with quiet():
            model.save_pretrained(directory, state_dict=whole_weights(model, dtype) if weights is None else weights)
    finally:
        model.config = live
    config.dtype = torch_dtype(dtype)  # save_pretrained writes the dtype of the live model, which may be a wider one
    config.save_pretrained(directory)
    tokenizer.model_max_length = window_of(config, needed=config.max_position_embeddings).window
    tokenizer.save_pretrained(directory)


#: Keys of a config that name files of the checkpoint that was read; of a tokenizer's only the first.
CODE_KEYS = ("auto_map", "custom_pipelines")


def forget_the_source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take out of both configs what points at Python files of the source, where transformers' own classes are used.

    Layers that predict further tokens are counted as 0 where the model that was trained has none of them.
    """
    if type(model).__module__.startswith("transformers."):
        for key in CODE_KEYS:
            if hasattr(model.config, key):
                delattr(model.config, key)
        promise_nothing(model)
    if type(tokenizer).__module__.startswith("transformers."):
        tokenizer.init_kwargs.pop("auto_map", None)


def torch_dtype(name: str) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}: dtype={name!r}")
    return names[name]


def check_vocabulary(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer can emit ids that the model has no embedding for."""
    if (least := vocabulary(tokenizer)) > model_config.vocab_size:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer is of another vocabulary: it has {len(tokenizer)} entries, the "
            f"model's vocab_size is {model_config.vocab_size}, and its largest id is {least - 1}"
        )
