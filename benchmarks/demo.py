"""The demo: a small base model is extended 8-fold on this machine's CPU, verified, scored and drawn.

base -> three arms trained for real -> bounds on the weights of all four -> RULER through lm-eval -> rows -> figures.
Each step leaves its files behind and is not done again by a second run of the same output.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from analysis.config import VerifyConfig
from analysis.verify import verify
from benchmarks import report, scoring
from benchmarks.base import documents
from benchmarks.config import DemoConfig, ReportConfig
from benchmarks.scoring import checkpoint
from endprompt import train
from endprompt.config import ExtendConfig
from endprompt.data import row_spec
from endprompt.distributed import say
from endprompt.fast.available import bfloat16_matmuls
from endprompt.files import aside, sole_use
from endprompt.model import load_tokenizer
from endprompt.results import append_rows, read_rows
from endprompt.runs import RunDirectory

BASE = Path(__file__).parent / "base" / "256"
WINDOW, TARGET = 256, 2048
MIXTURE = {"text": 4.0, **dict.fromkeys(documents.RETRIEVAL_KINDS, 1.0)}
DOCUMENTS = 4000
# A row holds the end prompt too: a document's question and answer must fit in what is left of it.
LONGEST = WINDOW - 56
RETRIEVAL = ("niah_single_1", "niah_single_2")
TASKS = (*RETRIEVAL, "niah_multikey_1", "vt")
LENGTHS = (256, 1024, 2048)


class Arm(NamedTuple):
    """One way to extend the base. why: what it is in the comparison."""

    name: str
    why: str
    scheme: str
    scaling: str
    prompt: str = "none"


ARMS = (
    Arm("control", "interpolation and short training, no end prompt", "contiguous", "linear"),
    Arm("paper", "the paper's method: a fixed end prompt at the far end", "endprompt", "linear", "EP_1"),
    Arm("recall", "an end prompt that must be read from the context", "endprompt", "yarn", "recall"),
)


def demo(config: DemoConfig) -> int:
    """Run it all; returns 1 if a bound is violated on any checkpoint."""
    with sole_use(config.output):
        return steps(config)


def steps(config: DemoConfig) -> int:
    started = time.perf_counter()
    run = Path(config.output)
    directory = RunDirectory(run, config)
    tokenizer: Any = load_tokenizer(BASE)
    data = run / "documents.jsonl"
    settings = run / "documents.json"
    made = json.dumps({"seed": config.seed, "documents": DOCUMENTS, "longest": LONGEST})
    if not (data.is_file() and settings.is_file() and settings.read_text(encoding="utf-8") == made):
        title(1, "documents", f"{DOCUMENTS:,} of {WINDOW} tokens, half of them questions in RULER's manner")
        documents.write_documents(data, DOCUMENTS, tokenizer, config.seed + 1, WINDOW, MIXTURE, longest=LONGEST)
        settings.write_text(made, encoding="utf-8")

    title(2, "extend", f"window {WINDOW} to {TARGET}, {config.steps} steps of 16 rows an arm, rows of {WINDOW} tokens")
    checkpoints = {"base": BASE}
    if not fast_bfloat16():
        say("this CPU has no bfloat16 instructions: trained in float32, so scores may differ from the README's")
    terminals = {}  # tokens of each arm's end prompt
    for arm in ARMS:
        prompt = row_spec(arm_config(arm, run / arm.name, data, config), WINDOW, tokenizer).prompt
        terminals[arm.name] = prompt.longest if prompt else 0
        say(f"-- {arm.name}: {arm.why} ({arm.scheme}, prompt {arm.prompt}, {arm.scaling})")
        checkpoints[arm.name] = train.extend(arm_config(arm, run / arm.name, data, config))

    title(3, "verify", "smoothness bounds of every head, on real queries and keys")
    holds = True
    for name, path in checkpoints.items():
        found = verify(verify_config(name, path, run, terminals.get(name, max(terminals.values()))))
        worst = min(found.shares.values())
        say(f"-- {name}: share of pairs within their bounds {worst:.4f}{'' if found.holds else '  VIOLATED'}")
        holds &= found.holds
    if not holds:
        say("a certified bound is violated: see the rows in " + str(run / "verify"))

    title(4, "score", f"RULER through lm-eval, {config.samples} samples a cell, lengths {', '.join(map(str, LENGTHS))}")
    rows: list[dict[str, Any]] = []
    for name, path in checkpoints.items():
        say(f"-- {name}")
        lengths = (LENGTHS[0], LENGTHS[-1]) if name == "base" else LENGTHS
        rows += scoring.score(score_config(name, path, run, lengths, config))

    collect(run, rows, checkpoints)
    title(5, "figures", f"{run / 'figures'}")
    draw = [sys.executable, "-m", "endprompt.cli", "figures", "--results", str(run), "--output", str(run / "figures")]
    drawn = subprocess.run(draw, capture_output=True, text=True)
    if drawn.returncode:
        raise ValueError(f"the figures could not be drawn: {drawn.stderr.strip()}")
    seconds = time.perf_counter() - started
    directory.log(seconds=round(seconds, 1))
    table(rows)
    say(f"\n{seconds / 60:.1f} minutes; rows: {directory.results}; picture: {run / 'figures' / PICTURE}")
    page = report.report(ReportConfig([str(run)]))
    if not config.open:
        say(f"open in a browser: {page.resolve().as_uri()}")
    print(page)
    if config.open:
        report.show(page)
    return 0 if holds else 1


PICTURE = "score_against_length.png"


def fast_bfloat16() -> bool:
    return torch.cuda.is_available() or bfloat16_matmuls()


def arm_config(arm: Arm, output: Path, data: Path, config: DemoConfig) -> ExtendConfig:
    """The arm's training; it goes on where an interrupted one was, and a finished one is left as it is."""
    begun = output.exists() or aside(output).exists()
    method: dict[str, Any] = {"target": TARGET, "scheme": arm.scheme, "scaling": arm.scaling, "prompt": arm.prompt}
    method |= {"rows": 16, "steps": config.steps, "completion_weight": 10.0, "seed": config.seed}
    method |= {"lr": 1e-3, "warmup": 20, "schedule": "linear", "decay": 0.3, "autocast": fast_bfloat16()}
    again: dict[str, Any] = {"resume": begun and not config.overwrite, "overwrite": config.overwrite}
    files: dict[str, Any] = {"model": str(BASE), "data": [str(data)], "output": str(output)}
    return ExtendConfig(**files, **method, **again, save_every=50, keep=1)


def verify_config(name: str, path: Path, run: Path, terminal: int) -> VerifyConfig:
    """terminal: tokens of the end prompt that the arm was trained with, 0 for the control."""
    method = checkpoint.method_of(score_config(name, path, run, LENGTHS, DemoConfig()))
    row: dict[str, Any] = {"scheme": "endprompt" if terminal else "contiguous", "prompt": terminal}
    row |= {"context": WINDOW - terminal, "target": TARGET, "against": None if name == "base" else str(BASE)}
    return VerifyConfig(str(path), **row, pairs=64, output=str(run / "verify" / name), method=method, formats=("png",))


def score_config(name: str, path: Path, run: Path, lengths: Sequence[int], config: DemoConfig) -> scoring.ScoreConfig:
    return scoring.ScoreConfig(
        str(path),
        tasks=list(TASKS),
        lengths=list(lengths),
        samples=config.samples,
        seed=config.seed,
        max_new_tokens=30,  # RULER keeps 128 for an answer of 9 tokens: half of this model's window
        shots=0,
        hops=3,
        edition="lab-2026",
        beyond_window=name == "base",
        dtype="float32",
        device="cpu",
        name=name,
        output=str(run / "score" / name),
        cache_dir=str(run / "samples"),
        overwrite=config.overwrite,
    )


def collect(run: Path, rows: list[dict[str, Any]], checkpoints: dict[str, Path]) -> None:
    """results.jsonl of the run: all scores, and what verify found, written anew."""
    results = run / "results.jsonl"
    results.unlink(missing_ok=True)
    append_rows(results, [{**row, "window": WINDOW, "target": TARGET} for row in rows])
    for name in checkpoints:
        append_rows(results, read_rows(run / "verify" / name / "results.jsonl"))


def table(rows: list[dict[str, Any]]) -> None:
    """Scores by method and length on stdout, each task's mean and the range of its interval."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=f"RULER, {rows[0]['n']} samples a cell: percent [95% interval]", title_justify="left")
    made.add_column("method")
    made.add_column("length", justify="right")
    for task in TASKS:
        made.add_column(task.removeprefix("niah_"), justify="right")
    cells = {(row["method"], row["length"], row["task"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        for length in LENGTHS:
            found = [cells.get((method, length, task)) for task in TASKS]
            if any(found):
                shown = [f"{r['value']:.0f} [{r['ci95'][0]:.0f}, {r['ci95'][1]:.0f}]" if r else "" for r in found]
                made.add_row(method, str(length), *shown, end_section=length == LENGTHS[-1])
    plain = False if os.environ.get("NO_COLOR") else None
    Console(width=None if sys.stdout.isatty() else 100, force_terminal=plain).print(made)


def title(number: int, name: str, what: str) -> None:
    say(f"\n[{number}/5] {name}: {what}")
