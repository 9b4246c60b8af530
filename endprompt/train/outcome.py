"""What a run leaves behind: written after the last step, and tried without its weights before the first.

A dtype that no export has, a generation config that transformers refuses to save, a tokenizer that cannot be written or
a disk that is too small must not be found out when the training is done.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endprompt.config import EXPORT_DTYPES, ExtendConfig
from endprompt.files import write_text
from endprompt.model import export
from endprompt.model.load import torch_dtype
from endprompt.model.quantized import numel
from endprompt.results import RECORD
from endprompt.shapes import GIB
from endprompt.train.card import write_card
from endprompt.train.optimizers import state_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_dtype(config: ExtendConfig, source_dtype: Any) -> str:
    """The finished checkpoint's dtype: as set, else the source's, else the training's. ValueError: no export has it."""
    name = config.export_dtype or str(source_dtype or config.dtype).removeprefix("torch.")
    if name not in (*EXPORT_DTYPES, "float64"):
        raise ValueError(
            f"{config.model}: a run cannot be written in the checkpoint's dtype; set export_dtype to one of "
            f"{', '.join(EXPORT_DTYPES)}: dtype={name!r}"
        )
    return name


def write(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    weights: dict[str, torch.Tensor],
    about: Mapping[str, Any],
) -> None:
    """A standard checkpoint with the run's record (`about`) and its card."""
    export(model, tokenizer, directory, dtype, weights)
    write_text(directory / RECORD, json.dumps(about, indent=2) + "\n")
    write_card(directory)


def rehearse(
    work: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str, about: Mapping[str, Any]
) -> None:
    """`write` without weights into a folder that is gone afterwards. Raises ValueError: model, what was not written."""
    limit = tokenizer.model_max_length
    try:
        with tempfile.TemporaryDirectory(dir=work, prefix="rehearsal-") as name:
            write(Path(name), model, tokenizer, dtype, {}, about)
    except Exception as error:  # transformers raises whatever its classes run into
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{about['model']}: a run on this checkpoint could not be written: {reason}") from error
    finally:
        tokenizer.model_max_length = limit


def check_room(
    work: Path,
    config: ExtendConfig,
    steps: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    dtype: str,
    processes: int = 1,
) -> None:
    """Raises ValueError if the disk has too little room for the export and the training states at their most."""
    result = sum(map(numel, model.parameters())) * torch_dtype(dtype).itemsize
    state = sum(parameter.nbytes for parameter in model.parameters()) + state_bytes(optimizer)
    last = processes > 1 and bool(config.eval_data)  # several processes save before each evaluation
    every = [config.save_every, config.eval_every if last else 0]
    saved = len({step for n in every if n for step in range(n, steps, n)}) + last
    # the oldest state goes when the next one is whole, and the others when the export is
    most = max(min(saved, config.keep + 1) * state, min(saved, config.keep) * state + result)
    there = sum(path.stat().st_size for path in work.glob("states/*/*"))
    free = shutil.disk_usage(work).free
    if most - there > free:
        raise ValueError(
            f"the disk has too little room for this run: {(most - there) / GIB:,.3g} GiB needed and "
            f"{free / GIB:,.3g} GiB free: the export takes {result / GIB:,.3g} GiB in {dtype}, a training state "
            f"{state / GIB:,.3g} GiB: output={config.output!r} save_every={config.save_every} keep={config.keep}"
        )
