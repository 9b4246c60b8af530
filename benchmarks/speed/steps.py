"""Seconds of small training steps and of scoring passes on one GPU, by how they are launched; and that losses agree.

    python3 -m benchmarks.speed.steps '{"output": "runs/step-speed", "steps": 50}'

The project's two bases on rows of their own window: as written, with compiled layers, as one CUDA graph, and as one
CUDA graph of compiled layers; `again` is a second run that finds the recording of the first. Text is random words:
speed does not depend on it. Only rows whose losses are those of the steps as written count as a result.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab import predict
from endprompt import distributed, train
from endprompt.config import ExtendConfig
from endprompt.data import Rows, load_documents, row_spec
from endprompt.distributed import say
from endprompt.model import extended_config, load_config, load_model, load_tokenizer, training_attention
from endprompt.results import result_row
from endprompt.runs import RunDirectory
from endprompt.train import loop

BASES = Path(__file__).parents[1] / "base"
#: base: rows of a step, learning rate
SHAPES = {"256": (16, 1e-3), "512": (32, 5e-4)}
MODES = ("none", "layers", "graph", "graph+layers")
WORDS = ("the", "sky", "is", "blue", "and", "grass", "grows", "where", "old", "rivers", "bend", "under", "a", "bridge")


@dataclass
class SpeedConfig:
    """Args:
    output: run directory
    bases: of benchmarks/base
    modes: values of `compile`
    steps: steps of each run, of which the first five are not timed
    fold: target over window
    samples: prompts of a scoring pass
    device: cuda or cpu (a rehearsal, its numbers mean nothing)
    """

    output: str = "runs/step-speed"
    bases: list[str] = field(default_factory=lambda: list(SHAPES))
    modes: list[str] = field(default_factory=lambda: list(MODES))
    steps: int = 50
    fold: int = 8
    samples: int = 256
    device: str = "cuda"


def main(argv: list[str]) -> int:
    config = SpeedConfig(**json.loads(argv[0]) if argv else {})
    out = RunDirectory(config.output, vars(config))
    failed = 0
    for base in config.bases:
        text = out.path / f"text-{base}.jsonl"
        write_text(text, int(base))
        reference: list[float] = []
        runs = [(mode, name) for mode in config.modes for name in (mode, f"{mode}, again")]
        for mode, name in runs:
            if name != mode and not mode.startswith("graph"):
                continue
            try:
                found, losses = steps(config, base, mode, text)
            except Exception as error:  # the other modes are still measured
                failed += 1
                say(f"{base:>4} {name:<20} FAILED {type(error).__name__}: {str(error).splitlines()[0][:300]}")
                traceback.print_exc()
                continue
            reference = reference or losses
            found["loss difference"] = max(abs(a - b) for a, b in zip(losses, reference))
            add(out, base, f"step {name}", found)
        try:
            add(out, base, "scoring", scoring(config, base))
        except Exception as error:
            failed += 1
            say(f"{base:>4} scoring FAILED {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            traceback.print_exc()
    return 1 if failed else 0


def add(out: RunDirectory, base: str, task: str, found: dict[str, float]) -> None:
    say(f"{base:>4} {task:<24} " + ", ".join(f"{metric} {value:.4g}" for metric, value in found.items()))
    about: dict[str, Any] = {"suite": "speed", "length": None, "model": base, "method": "speed", "seed": 0, "n": 1}
    out.add([result_row(task=task, metric=metric, value=value, **about) for metric, value in found.items()])


def write_text(path: Path, window: int) -> None:
    draw = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(draw.choice(WORDS, 8 * window))}) + "\n")


def steps(config: SpeedConfig, base: str, mode: str, text: Path) -> tuple[dict[str, float], list[float]]:
    """(seconds until the fifth step is done, milliseconds of a later one; the losses) of one run."""
    rows, rate = SHAPES[base]
    began = time.perf_counter()
    settings = ExtendConfig(
        model=str(BASES / base),
        data=[str(text)],
        output="none",
        target=int(base) * config.fold,
        prompt="EP_1",
        rows=rows,
        steps=config.steps,
        lr=rate,
        autocast=True,
        compile=mode,
        device=config.device,
    )
    source = load_config(settings.model)
    model_config = extended_config(source, settings.scaling, settings.target)
    attention = training_attention(settings.attention)
    model = load_model(settings.model, attention=attention, device=config.device, config=model_config)
    tokenizer = load_tokenizer(settings.model)
    spec = row_spec(settings, int(base), tokenizer)
    data = Rows(load_documents(settings.data, tokenizer), spec)
    loaded = time.perf_counter()
    trainer = train.Trainer(settings, model, data, config.steps, None, distributed.World(device=config.device))
    batches = [trainer.batch(step) for step in range(config.steps)]
    losses = []
    wait = torch.cuda.synchronize if config.device == "cuda" else lambda: None
    ready = time.perf_counter()
    for step, batch in enumerate(batches):
        losses.append(trainer.train_step(batch, loop.learning_rate(settings, step, config.steps))[0])
        if step == 4:
            wait()
            set_up = time.perf_counter()
    wait()
    ended = time.perf_counter()
    found = {
        "ms a step": 1000 * (ended - set_up) / (config.steps - 5),
        "set-up s": set_up - ready,
        "loading s": loaded - began,
        "ms a batch of rows": 1000 * (ready - loaded) / config.steps,
    }
    return found, [float(loss) for loss in losses]


def scoring(config: SpeedConfig, base: str) -> dict[str, float]:
    """Seconds of a pass over prompts at the target length, 30 new tokens each, in bfloat16; none ends early."""
    model: Any = load_model(BASES / base, dtype="bfloat16", device=config.device)
    tokenizer = load_tokenizer(BASES / base)
    draw = np.random.default_rng(0)
    length = int(base) * config.fold
    lengths = draw.integers(length - 80, length - 30, config.samples)
    samples = [{"input_ids": draw.integers(1, 4000, n), "max_new_tokens": 30} for n in lengths]
    prompts = [sample["input_ids"].tolist() for sample in samples]
    wait = torch.cuda.synchronize if config.device == "cuda" else lambda: None

    def timed(work: Any) -> float:
        wait()
        began = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - began

    predict.predict(model, tokenizer, samples[:8], new_tokens=4)
    found = {
        "seconds a pass": timed(lambda: predict.predict(model, tokenizer, samples)),
        "seconds, later pass": timed(lambda: predict.predict(model, tokenizer, samples)),
        "seconds of prompts": timed(lambda: predict.predict(model, tokenizer, samples, new_tokens=1)),
        "held-out loss s": timed(lambda: predict.losses(model, tokenizer, prompts[:64], length // 2)),
    }
    if config.device == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
