"""The paper's own sizes: what each recipe would cost, everything checked that needs no weights, commands to run it.

For each recipe its configuration, its frequencies and real rows are made: positions and tokens of documents of the full
length. With a checkpoint (and data) of one's own these are used; without, the shape by name and the shipped sample.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.config import LabConfig
from benchmarks.lab.matrix import BASES, check_keys
from endprompt.config import ExtendConfig, check_config
from endprompt.files import write_text
from endprompt.runs import RunDirectory

MODEL = "llama3-8b"
KEYS = {"kind", "gpus", "device", "questions", "score"}
#: Stands for Llama 3's end-of-turn token where the tokenizer at hand has none.
STAND_IN = {"EP_2": "text:<|endoftext|>"}


@dataclass(frozen=True)
class Plan:
    """A recipe with what it would take. tokens_per_s: of all GPUs together."""

    name: str
    questions: tuple[int, ...]
    config: ExtendConfig
    tokens_per_s: float
    gpu_hours: float
    memory_gib: float
    fits: bool
    farthest: int
    observed: int


def run(content: Mapping[str, Any], config: LabConfig) -> int:
    """Print plan and commands, and write them into the output; returns 1 if a recipe fits no setting.

    Raises ValueError if a recipe, the checkpoint or the data cannot be used.
    """
    check_keys(content, KEYS, "paper-scale")
    model = config.model
    if model is not None and not (Path(model) / "config.json").is_file():
        raise ValueError(f"model must be a checkpoint's directory: model={model!r}")
    asked: dict[str, list[int]] = {}
    for question, names in content["questions"].items():
        for name in names:
            asked.setdefault(name, []).append(int(question))
    gpus, device = int(content["gpus"]), str(content["device"])
    rows = sample_rows(config)
    plans = [
        plan(name, tuple(questions), config, gpus, device, rows)
        for name, questions in asked.items()
        if chosen(name, questions, config.only)
    ]
    if not plans:
        raise ValueError(f"only leaves no recipe: only={config.only}")
    print(table(plans, gpus, device))
    if not config.dry_run:
        directory = RunDirectory(config.output, config)
        write_text(directory.path / "commands.sh", commands(plans, config, content, gpus))
        print(f"\ncommands: {directory.path / 'commands.sh'}")
    print(f"\n{missing(config)}")
    return 0 if all(one.fits for one in plans) else 1


def chosen(name: str, questions: list[int], only: list[str]) -> bool:
    """Whether all conditions hold; here `arm` is the recipe's name. Raises ValueError for other keys."""
    import fnmatch

    for condition in only:
        key, _, values = condition.partition("=")
        if key not in ("arm", "question"):
            raise ValueError(f"only must be arm=... or question=... for paper-scale: only={condition!r}")
        wanted = values.split(",")
        held = any(str(q) in wanted for q in questions) if key == "question" else False
        if not held and not (key == "arm" and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)):
            return False
    return True


def recipe(name: str) -> dict[str, Any]:
    import yaml

    path = Path(str(files("endprompt") / "recipes" / "extend" / f"{name}.yaml"))
    if not path.is_file():
        raise ValueError(f"no recipe has this name: {name!r}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def plan(name: str, questions: tuple[int, ...], config: LabConfig, gpus: int, device: str, rows: Any) -> Plan:
    """Cost from `endprompt.plan`, and what real rows of the recipe look like. Raises ValueError if it cannot be run."""
    from endprompt.plan import PlanConfig, plans

    settings = recipe(name)
    trainer = ExtendConfig(**settings, model=config.model or MODEL, data=config.data or ["DATA"], output=name)
    check_config(trainer)
    row_tokens = trainer.row_tokens or 8192
    method = "longlora" if trainer.attention == "shifted" else "full" if row_tokens == trainer.target else "endprompt"
    best = plans(
        PlanConfig(
            model=config.model or MODEL,
            method=method,
            target=trainer.target,
            row_tokens=row_tokens,
            gpus=gpus,
            device=device,
            tokens=int(trainer.tokens or 0),
            rows=trainer.rows,
            optimizer="adamw",
        )
    )[0]
    farthest, observed = rows(trainer, row_tokens)
    return Plan(
        name, questions, trainer, best.tokens_per_s, best.gpu_hours, best.total_gib, best.fits, farthest, observed
    )


def sample_rows(config: LabConfig) -> Any:
    """`rows(trainer, row_tokens)`: makes a batch of two rows; (largest distance, number of distances) in them."""
    from endprompt.data import Documents, Rows, load_documents, row_spec
    from endprompt.model import extended_rope_parameters, load_config, load_tokenizer
    from endprompt.model.geometry import window_of
    from endprompt.rope import rope_parameters

    tokenizer: Any = load_tokenizer(config.model or BASES / "256")
    if config.data:
        documents = load_documents(config.data, tokenizer)
    else:
        text = (files("endprompt") / "data" / "sample.txt").read_text(encoding="utf-8")
        ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.uint32)
        offsets = np.array([0, len(ids)])
        documents = Documents(ids, offsets, offsets[1:])
    source = load_config(config.model) if config.model else None

    def rows(trainer: ExtendConfig, row_tokens: int) -> tuple[int, int]:
        window = window_of(source).window if source is not None else 8192
        options = trainer.rope_options or {}
        if source is not None:
            extended_rope_parameters(source, trainer.scaling, trainer.target, trainer.factor, **options)
        else:
            rope_parameters(trainer.scaling, 500_000.0, 128, trainer.factor or trainer.target / window, window)
            prompt = trainer.prompt
            trainer = dataclasses.replace(
                trainer, prompt=STAND_IN.get(prompt, prompt) if isinstance(prompt, str) else prompt
            )
        made = Rows(documents, row_spec(trainer, row_tokens, tokenizer))
        seen = np.zeros(trainer.target, dtype=bool)
        farthest = 0
        for index in range(2):
            positions = made.row(index)[1]
            if positions.max() >= trainer.target:
                raise ValueError(f"a row's positions must be below the target: {positions.max()} {trainer.target=}")
            farthest = max(farthest, int(positions.max() - positions.min()))
            seen |= distances(positions, trainer.target)
        return farthest, int(seen.sum())

    return rows


def distances(positions: np.ndarray, target: int) -> np.ndarray:
    """Which distances 0..target-1 two tokens of a row have: where the autocorrelation of their places is not 0."""
    places = np.zeros(2 * target)
    places[positions] = 1.0
    spectrum = np.fft.rfft(places)
    return np.fft.irfft(spectrum * spectrum.conj(), 2 * target)[:target] > 0.5


def table(plans: list[Plan], gpus: int, device: str) -> str:
    width = max(len(one.name) for one in plans)
    lines = [
        f"{'recipe':<{width}}  {'questions':<13}  {'tokens':>8}  {'row':>6}  {'GiB':>5}  {'fits':<4}  {'tokens/s':>9}  "
        f"{'GPU-hours':>9}  {'farthest pair':>13}  {'distances in 2 rows':>19}"
    ]
    for one in plans:
        asked = ",".join(map(str, one.questions))
        tokens, row_tokens = (one.config.tokens or 0) / 1e9, one.config.row_tokens or 0
        lines.append(
            f"{one.name:<{width}}  {asked:<13}  {tokens:>7.2g}B  {row_tokens:>6}  "
            f"{one.memory_gib:>5.0f}  {'yes' if one.fits else 'no':<4}  {one.tokens_per_s:>9,.0f}  "
            f"{one.gpu_hours:>9.1f}  {one.farthest:>13,}  {one.observed:>19,}"
        )
    total = sum(one.gpu_hours for one in plans)
    lines.append(f"{len(plans)} trainings, {total:,.0f} GPU-hours on {gpus} {device} (endprompt plan), scoring apart")
    return "\n".join(lines)


def commands(plans: list[Plan], config: LabConfig, content: Mapping[str, Any], gpus: int) -> str:
    """A shell script: each training by torchrun, resumable, and its scores."""
    model, data = config.model or "MODEL", config.data or ["DATA"]
    lengths = ",".join(map(str, content["score"]["lengths"]))
    lines = ["#!/bin/sh", "# A training that was cut off goes on by adding --resume to its line.", "set -e"]
    for one in plans:
        output = str(Path(config.output) / one.name)
        extend = ["torchrun", f"--nproc-per-node={gpus}", "-m", "endprompt.cli", "extend", "--recipe", one.name]
        extend += ["--model", model, "--data", *data, "--output", output]
        samples = str(content["score"]["samples"])
        score = [
            "endprompt",
            "score",
            output,
            "--lengths",
            lengths,
            "--samples",
            samples,
            "--output",
            f"{output}-score",
        ]
        lines += ["", shlex.join(extend), shlex.join(score)]
    return "\n".join(lines) + "\n"


def missing(config: LabConfig) -> str:
    """What has to be brought before the commands can run."""
    wanted = []
    if config.model is None:
        wanted.append("the weights: a checkpoint of Llama-3-8B, as --model DIRECTORY (shape and sample text stood in)")
    if not config.data:
        wanted.append("the training text: JSONL, Parquet or a shard of endprompt prepare, as --data FILE ...")
    wanted.append("for scoring: RULER's essays, SQuAD and HotpotQA, as --data-dir of endprompt score")
    return "\n".join(["what is missing:", *(f"- {one}" for one in wanted)])
