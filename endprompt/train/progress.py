"""What a person sees of a run: a bar or plain lines, speed against the device's peak, TensorBoard, Weights & Biases.

FLOPs of a token = 4 P + 2 P' + 6 A T. P: parameters that multiply (all matrices but the input embedding, which is
looked up), P': those of them that train, A: layers x heads x head_dim, T: tokens of a row, of which causal attention
sees half on average and shifted sparse attention 15/128 (then 6 A T 15/64). Recomputation is not counted. MFU =
tokens/s x FLOPs of a token / the device's dense bfloat16 peak by its datasheet.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endprompt.distributed import World, say
from endprompt.model.quantized import numel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Dense bfloat16 FLOP/s by datasheet, by a part of the device's name.
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}

REPORTS = ("tensorboard", "wandb")


def flops_per_token(model: PreTrainedModel, tokens: int) -> float:
    """FLOPs of one token's forward and backward pass in a causal row of `tokens`, as the module's docstring counts."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() > 1 and (p is head or p is not embedding)]
    every, trained = (
        sum(numel(p) for p in matrices if kind(p)) for kind in (lambda p: True, lambda p: p.requires_grad)
    )
    seen = 15 / 64 if str(getattr(config, "_attn_implementation", "")).endswith("shifted") else 1
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim * tokens * seen
    return 4 * every + 2 * trained + attention


def device_peak(device: torch.device) -> float | None:
    """FLOP/s of a known GPU, None for any other device."""
    if device.type != "cuda":
        return None
    return next((peak for part, peak in PEAKS.items() if part in torch.cuda.get_device_name(device)), None)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, None for any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@contextlib.contextmanager
def progress(first: int, last: int, here: World) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """`advance(step, values)`: a bar on a terminal, a plain line every few seconds elsewhere, or with NO_COLOR set."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not here.main:
        yield lambda step, values: None
    elif not console.is_terminal or console.no_color:
        started, shown = time.monotonic(), [0.0]

        def line(step: int, values: dict[str, float]) -> None:
            now = time.monotonic()
            if now - shown[0] >= 5 or step == last:
                shown[0] = now
                left = (now - started) / max(step - first, 1) * (last - step)
                say(f"step {step}/{last}  {described(values)}  {clock(left)} left")

        yield line
    else:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=last, completed=first, values="")
            yield lambda step, values: bar.update(task, completed=step, values=described(values))


def described(values: dict[str, float]) -> str:
    """`loss 2.3456  12,345 tokens/s  MFU 61%  80.1 GiB`, as far as known."""
    parts = [f"loss {values.get('loss', math.nan):.4f}", f"{values.get('tokens_per_s', 0):,.0f} tokens/s"]
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.0f}%")
    if "peak_gib" in values:
        parts.append(f"{values['peak_gib']:.1f} GiB")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def check_reports(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is unknown, or not installed, with the line that installs it."""
    for name in names:
        if name not in REPORTS:
            raise ValueError(f"report must be one of {', '.join(REPORTS)}: report={name!r}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"report={name} needs a package ({error}): pip install {name}") from error


@contextlib.contextmanager
def reporters(
    names: Sequence[str], directory: Path, config: dict[str, Any], step: int = 0
) -> Iterator[list[Callable[[int, dict], None]]]:
    """`report(step, values)` of each tracker, in a folder of its own below the directory; they are closed at the end.
    step: where a resumed run goes on, whatever it had reported beyond that.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with contextlib.ExitStack() as trackers:
        yield [trackers.enter_context(makers[name](directory, config, step)) for name in names]


@contextlib.contextmanager
def _tensorboard(directory: Path, config: dict[str, Any], step: int) -> Iterator[Callable[[int, dict], None]]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None) as writer:

        def report(step: int, values: dict) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        yield report


@contextlib.contextmanager
def _wandb(directory: Path, config: dict[str, Any], step: int) -> Iterator[Callable[[int, dict], None]]:
    import wandb

    # `auto`: a run that was cut off is taken up under its own name
    run = wandb.init(project="endprompt", dir=str(directory), config=config, resume="auto" if step else None)
    ended = 1
    try:
        yield lambda step, values: run.log(values, step=step)
        ended = 0
    finally:
        run.finish(exit_code=ended)  # before the folder that it writes to gets its final name
