"""One cell: extend the base by the project's own trainer, score it, take the losses and the predictions, make rows."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis import measures, observability
from benchmarks import summary
from benchmarks.base import documents
from benchmarks.lab import material, predict
from benchmarks.lab.cost import train_flops
from benchmarks.lab.matrix import Answer, Cell
from benchmarks.scoring import generate
from endprompt import origin, results, train
from endprompt.config import prompt_names
from endprompt.data import Rows, load_documents, row_spec
from endprompt.files import aside, drop_cut_line, sha256_of, sound_lines
from endprompt.model import extended_config, load_config, load_model, rope_geometry
from endprompt.positions import PIECES, TEXT_WHOLE
from endprompt.results import append_rows, result_row

NOISE = 0.1  # standard deviation of an observed score in the predicted gap RMS, as `endprompt positions` has it
COUNTED_ROWS = 64  # rows whose pairs are counted where positions are drawn
COUNTED_PAIRS = 2**24  # pairs of all these rows together, at most
VERIFIED_PAIRS = 16


@dataclass(frozen=True)
class Workplace:
    """Where and on what cells run. batch_tokens: tokens of prompts that are scored at once."""

    output: Path
    cache: Path
    device: str
    compile: str = "none"
    deterministic: bool = True
    jobs: int = 1
    keep_checkpoints: bool = False
    batch_tokens: int = predict.BATCH_TOKENS

    def compile_of(self, cell: Cell) -> str:
        """A recorded step of compiled layers for what a graph can hold, else nothing. On an H200 such a step takes 1.3
        ms where a plain one takes 20; a worker compiles a shape once, in seconds."""
        if self.compile != "auto":
            return self.compile
        plain = not cell.settings.get("lora_rank") and cell.settings.get("attention", "sdpa") == "sdpa"
        plain = plain and cell.config([], "").scaling not in ("dynamic", "longrope")
        return "graph+layers" if self.device == "cuda" and plain else "none"


def run(cell: Cell, place: Workplace) -> Answer:
    """Train and measure one cell. Its checkpoint is deleted unless it is to be kept."""
    made = Answer()
    checkpoint = place.output / "checkpoints" / cell.name
    about: dict[str, Any] = {}
    computed = (place.device, place.compile, str(place.deterministic))  # the cell's hash leaves out how
    begun = Begun(place.output / "unfinished" / f"{cell.name}.jsonl", sha256_of(cell.sha256, *computed))
    with made.phase("train"):
        if cell.trained and not ("train" in begun.done and (checkpoint / results.RECORD).is_file()):
            begun.forget()
            shutil.rmtree(checkpoint, ignore_errors=True)
            shutil.rmtree(aside(checkpoint), ignore_errors=True)
            data = [str(part.path(place.cache)) for part in material.parts(cell)]
            how = {"device": place.device, "compile": place.compile_of(cell), "deterministic": place.deterministic}
            train.extend(cell.config(data, str(checkpoint), **how))
            begun.add("train")
        if cell.trained:
            about = json.loads((checkpoint / results.RECORD).read_text(encoding="utf-8"))
    with made.phase("load"):
        model = load(cell, checkpoint, place.device)
    columns = columns_of(cell, place, about, str(model.dtype).removeprefix("torch."))
    with made.phase("score"):
        found = generate.way(model)  # once: it takes as long as a task of few samples
        for item in material.samples(cell):
            key = f"{item.task}@{item.length}"
            if key not in begun.done:
                begun.add(key, **scored(cell, item, model, found, place, columns))
            made.rows += begun.done[key]["rows"]
            made.scores += begun.done[key]["scores"]
    with made.phase("loss"):
        if (text := material.held_out(cell)) is not None:
            made.rows += held_out_rows(cell, columns, model, text.read(place.cache), place.batch_tokens)
        for length in sorted({cell.window, cell.target}) if text is None else ():
            limits = {"rows": cell.scoring.loss_rows, "max_batch_tokens": place.batch_tokens}
            loss = predict.losses(model, [held_out(cell.model)], length, **limits)
            made.rows.append(row(cell, columns, suite="lab", task="loss", length=length, metric="loss", value=loss))
    del model
    if cell.verified and cell.trained:
        with made.phase("verify"):
            made.rows.append(verified(cell, checkpoint, columns))
    if not place.keep_checkpoints:
        shutil.rmtree(checkpoint, ignore_errors=True)
    begun.forget()
    for one in made.rows:
        one["cell_rows"] = len(made.rows)
    return made


class Begun:
    """What an interrupted attempt at a cell has done already, by key: its training, and the tasks that were scored. The
    file names the cell and how it is computed by a hash; lines of another, or one that was cut off, count for nothing.
    """

    def __init__(self, path: Path, sha256: str):
        self.path, self.sha256 = path, sha256
        lines = [line for _, _, line in sound_lines(path) if line] if path.is_file() else []
        self.done: dict[str, Any] = {
            line["key"]: line for line in lines if line.get("key") and line.get("cell") == sha256
        }

    def add(self, key: str, **line: Any) -> None:
        self.done[key] = {"cell": self.sha256, "key": key, **line}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_cut_line(self.path)
        append_rows(self.path, [self.done[key]])

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.done = {}


def held_out_rows(
    cell: Cell, columns: Mapping[str, Any], model: Any, text: np.ndarray, batch_tokens: int
) -> list[dict[str, Any]]:
    """Rows of the loss on given held-out text: by length, and at the longest by position (`bins` ranges, by their end).
    text (rows, tokens): the same beginnings at every length."""
    found = []
    values: dict[str, Any] = {"suite": "lab", "metric": "loss", "n": len(text)}
    for length in sorted(length for length in cell.lengths if length <= cell.target):
        mean = predict.position_losses(model, text[:, :length], max_batch_tokens=batch_tokens)
        found.append(row(cell, columns, task="loss", length=length, value=float(mean.mean()), **values))
    for part in np.array_split(np.arange(len(mean)), cell.scoring.bins) if cell.scoring.bins else ():
        about = {"task": "loss_by_position", "length": int(part[-1]) + 2, "first": int(part[0]) + 1}
        found.append(row(cell, columns, **about, value=float(mean[part].mean()), **values))
    return found


def load(cell: Cell, checkpoint: Path, device: str) -> Any:
    """The model to score: bfloat16 on a GPU, float32 on a CPU."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    path, config = (checkpoint, None) if cell.trained else (cell.model, extended(cell))
    return load_model(path, dtype=dtype, attention="sdpa", device=device, config=config, loss=predict.loss_sum)


def extended(cell: Cell) -> Any:
    config, source = cell.config([], ""), load_config(cell.model)
    return extended_config(source, config.scaling, cell.target, config.factor, **(config.rope_options or {}))


def scored(
    cell: Cell,
    item: material.Samples | material.SetSamples,
    model: Any,
    found: generate.Way,
    place: Workplace,
    columns: Mapping[str, Any],
) -> dict[str, Any]:
    samples, about = read_samples(item, place.cache)
    options: dict[str, Any] = {"max_batch_tokens": place.batch_tokens, "whole": item.WHOLE, "found": found}
    texts = predict.predict(model, material.tokenizer_of(cell.model), samples, **options)
    percent = [item.percent(one, text) for text, one in zip(texts, samples, strict=True)]
    ci95, kind = summary.interval(percent, item.seed)
    suite, metric = item.scale()
    place_of: dict[str, Any] = {"suite": suite, "task": item.task, "length": item.length}
    score: dict[str, Any] = {"value": sum(percent) / len(percent), "stderr": summary.standard_error(percent)}
    score |= {"ci95": ci95, "ci": kind, "metric": metric, "n": len(percent), "samples_sha256": about["sha256"]}
    score |= {key: value for key, value in about.items() if key != "sha256"}
    score |= {"edition": getattr(item, "edition", None), "max_new_tokens": samples[0]["max_new_tokens"]}
    score["empty"] = 100 * sum(not text.strip() for text in texts) / len(texts)
    keys = {"cell": cell.sha256, "base": cell.base, "fold": cell.fold, "arm": cell.arm, "method": cell.method}
    line = {**keys, "seed": cell.seed, **place_of, "scores": [round(value, 2) for value in percent]}
    depths = [one["depth"][0] if len(one.get("depth", ())) == 1 else None for one in samples]
    line |= {"depths": depths} if None not in depths else {}
    return {"rows": [row(cell, columns, **place_of, **score)], "scores": [line]}


read_samples = functools.lru_cache(maxsize=256)(material.Prompts.read)


@functools.cache
def held_out(model: str) -> list[int]:
    """Tokens of the sample text's second half, which no document is made of."""
    prose = documents.Prose.from_sentences(documents.sample_haystack_sentences(), material.tokenizer_of(model))
    return [int(token) for token in prose.ids]


def row(cell: Cell, columns: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    return result_row(model=f"base {cell.base}", method=cell.method, seed=cell.seed, **values, **columns)


def columns_of(cell: Cell, place: Workplace, about: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    settings = cell.settings
    columns: dict[str, Any] = {
        **{key: getattr(cell, key) for key in ("base", "window", "target", "fold", "arm")},
        "scaling": settings.get("scaling", "linear"),
        "steps": cell.steps,
        "questions": list(cell.questions),
        "bernstein_constant": bernstein_constant(cell),
        "device": torch.cuda.get_device_name() if place.device == "cuda" else "cpu",
        "dtype": dtype,
        "jobs": place.jobs,
        "deterministic": place.deterministic,
        "cell": cell.sha256,
    }
    if source := origin.told(origin.about(cell.model)):
        columns["origin"] = source
    if cell.sources:
        columns |= {"sources": dict(cell.sources), "retrieval": cell.retrieval}
    if not cell.trained:
        return columns
    config = cell.config([], "")
    tokenizer = material.tokenizer_of(cell.model)
    spec = row_spec(config, cell.window, tokenizer)
    return columns | {
        "scheme": config.scheme,
        "prompt": "/".join(prompt_names(config)) or None,
        "prompt_weight": spec.prompt_weight if spec.prompt else None,
        "prompt_tokens": spec.prompt.longest if spec.prompt else 0,
        "anchors": config.anchors if config.scheme == "anchors" else None,
        "recall_span": config.recall_span if set(prompt_names(config)) & {"recall", "recall-2", "question"} else None,
        "pieces": PIECES if "sentences" in config.scheme else None,
        **{key: getattr(config, key) for key in ("lr", "attention", "lora_rank")},
        "lora_alpha": config.lora_alpha if config.lora_rank else None,
        "row_tokens": cell.row_tokens,
        "rows": cell.rows,
        "train_tokens": about["tokens"],
        "train_flops": train_flops(cell),
        "gpu_seconds": about["seconds"],
        "final_loss": about["final_loss"],
        "text_whole": config.scheme in TEXT_WHOLE,
        "gap_rms": predicted_gap_rms(cell, place, spec),
    }


def frequencies(cell: Cell) -> tuple[np.ndarray, float]:
    """(radians per token of the extended model, float64; attention factor)."""
    return rope_geometry(extended(cell)).frequencies(cell.target)


def bernstein_constant(cell: Cell) -> float:
    """Highest frequency, radians per token, times the attention factor squared: bounds |S'| for scores of size 1."""
    return measures.smoothness(*frequencies(cell))


def predicted_gap_rms(cell: Cell, place: Workplace, spec: Any) -> float:
    """Predicted error of the score at the distances that no short row has, from the pairs of rows as they are trained.
    In units of the score's own root mean square; `reference_gap` is the same for all arms of a base and target."""
    omega, _ = frequencies(cell)
    rows = observability.gram_weighted(omega, pair_counts(cell, place, spec)), cell.row_tokens
    return measures.gap_error(omega, rows, observability.reference_gap(cell.window, cell.target), NOISE)


def pair_counts(cell: Cell, place: Workplace, spec: Any) -> np.ndarray:
    """Mean number of pairs of a row at each distance, float64 (target,)."""
    n = cell.row_tokens
    counts = np.zeros(cell.target)
    if spec.scheme == "contiguous":
        counts[:n] = np.arange(n, 0, -1)
        return counts
    data = [str(part.path(place.cache)) for part in material.parts(cell)[:1]]
    rows = Rows(load_documents(data, material.tokenizer_of(cell.model)), spec)
    lower = np.tril_indices(n)
    fewer = min(COUNTED_ROWS, max(2, COUNTED_PAIRS // n**2))
    for index in range(fewer):
        positions = rows.row(index)[1]
        counts += np.bincount((positions[:, None] - positions)[lower], minlength=cell.target)
    return counts / fewer


def verified(cell: Cell, checkpoint: Path, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Share of query-key pairs within all of verify's bounds, on the cell's own weights."""
    from analysis.config import VerifyConfig
    from analysis.findings import Findings
    from analysis.scene import prepare, read_layers

    prompt = int(columns["prompt_tokens"])
    scheme: dict[str, Any] = {"scheme": "endprompt" if prompt else "contiguous", "context": cell.window - prompt}
    scheme["prompt"] = prompt
    scene = prepare(VerifyConfig(str(checkpoint), against=cell.model, pairs=VERIFIED_PAIRS, **scheme))
    findings = Findings(scene)
    read_layers(str(checkpoint), scene, lambda layer: findings.add(layer, None))
    within = np.stack([np.stack(list(layer["within"].values())).all(axis=0) for layer in findings.layers])
    worst = max(max(layer["worst"].values()) for layer in findings.layers)
    found = {"value": 100.0 * float(within.mean()), "n": within.size, "largest_over_bound": worst}
    return row(cell, columns, suite="lab", task="verify", length=cell.target, metric="share_within_bounds", **found)
