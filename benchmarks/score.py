"""Score a checkpoint: samples, lm-eval's `simple_evaluate`, result rows. Resumable, with errors before any model loads.

config -> cells (task x length) -> samples -> lm-eval -> predictions as they come -> rows

A run directory holds `predictions*.jsonl` (appended), `results.jsonl` (a row a cell), `summary.jsonl` (averages,
effective length), `depth.jsonl` (heat map), `results_DATE.json` (the rows as lm-eval writes them), `config.yaml`,
`environment.json`, `log.jsonl`. A cell whose row is there already, made with the same checkpoint, samples and settings,
is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import lm_eval_results, ruler, summary, vllm_backend
from benchmarks.compare import read_predictions
from endprompt import rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from benchmarks.backend import Progress

# Prompt text held by one call of simple_evaluate, in characters: bounds the memory whatever the number of cells.
CALL_CHARACTERS = 150_000_000
SAMPLES = 500  # RULER's own number


@dataclass
class ScoreConfig:
    """Settings of `endprompt score`.

    Args:
        checkpoint: checkpoint directory, or a model id of the hub.
        suite: ruler, longbench or short (lm-eval's own mmlu, gsm8k, hellaswag, humaneval).
        tasks: names separated by commas, or all.
        lengths: token budgets separated by commas (RULER): prompt and generation together.
        samples: samples a task and length (short: all documents unless a number is set).
        seed: seed of the samples.
        data_dir: folder with RULER's essays, SQuAD, HotpotQA, or the LongBench sets.
        haystack_text: text file for the essay haystack, instead of RULER's essays.
        max_new_tokens: tokens kept for generation, instead of RULER's number (for very small windows).
        shots: worked examples in front of vt and cwe, 0 or 1; RULER has 1.
        hops: assignments after the first in a chain of vt; RULER has 4.
        chat: wrap prompts in the tokenizer's chat template.
        beyond_window: allow lengths over the checkpoint's window; nothing is cut off, the model sees the whole prompt.
        backend: hf or vllm.
        backend_args: further arguments of the backend's model, as key=value,key=value.
        batch_size: prompts that run together at most (hf; vLLM schedules by itself, see its max_num_seqs).
        attn: attention implementation of transformers.
        dtype: float32, bfloat16, float16, or auto (the checkpoint's own).
        device: cpu, cuda, cuda:1, or auto.
        output: run directory; runs/score/<checkpoint's name> if not given.
        name: the model's name in the rows; the checkpoint's name if not given.
        method: the method's name in the rows; read from the checkpoint's endprompt.json, else base.
        cache_dir: folder of the sample cache; ~/.cache/endprompt/ruler if not given.
        prepare_only: build the samples and stop, without a model.
        overwrite: start again, instead of going on where an earlier run of the same output was.
        show: print the predictions of one task of a finished run (its directory, or the checkpoint it scored) and stop.
        wrong: with show, only those that score under 100.
        compare: compare this run with the one given in place of the checkpoint (run directories) and stop.
        json: with compare or show, print one JSON object a line instead of a table.
        trust_remote_code: let a checkpoint bring its own code.
        quiet: no progress line.
    """

    checkpoint: str
    suite: Literal["ruler", "longbench", "short"] = "ruler"
    tasks: str | list[str] = "all"
    lengths: str | int | list[int] = "4096"
    samples: int = SAMPLES
    seed: int = 0
    data_dir: str | None = None
    haystack_text: str | None = None
    max_new_tokens: int | None = None
    shots: int = 1
    hops: int = ruler.VT_HOPS
    chat: bool = False
    beyond_window: bool = False
    backend: Literal["hf", "vllm"] = "hf"
    backend_args: str = ""
    batch_size: int = 8
    attn: str = "sdpa"
    dtype: str = "auto"
    device: str = "auto"
    output: str | None = None
    name: str | None = None
    method: str | None = None
    cache_dir: str | None = None
    prepare_only: bool = False
    overwrite: bool = False
    show: str | None = None
    wrong: bool = False
    compare: str | None = None
    json: bool = False
    trust_remote_code: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: {self.batch_size}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1: {self.samples}")
        if self.json and self.compare is None and self.show is None:
            raise ValueError("json is for compare and show; the rows of a run are in its results.jsonl: json=True")

    @property
    def model_name(self) -> str:
        return self.name or Path(self.checkpoint).name or self.checkpoint

    @property
    def directory(self) -> Path:
        return Path(self.output) if self.output else Path("runs", "score", self.model_name)

    @property
    def task_names(self) -> list[str]:
        names = self.tasks.split(",") if isinstance(self.tasks, str) else list(self.tasks)
        return [name.strip() for name in names if name.strip()]

    @property
    def length_list(self) -> list[int]:
        raw = self.lengths
        parts = raw.split(",") if isinstance(raw, str) else [raw] if isinstance(raw, int) else list(raw)
        try:
            lengths = [int(part) for part in parts]
        except ValueError:
            raise ValueError(f"lengths must be whole numbers separated by commas: {raw!r}") from None
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be positive: {raw!r}")
        return sorted(set(lengths))

    @property
    def options(self) -> ruler.Options:
        return ruler.Options(self.max_new_tokens, self.haystack_text, self.chat, self.shots, self.hops)


@dataclass
class Unit:
    """One cell to score: an lm-eval task over its samples, and how its row is made."""

    name: str  # unique: task@length
    task: str
    length: int | None
    suite: str
    metric: str
    samples: Sequence[dict[str, Any]]
    score: Callable[[dict[str, Any], str], float]  # in [0, 1]
    columns: dict[str, Any]
    sha256: str = ""
    characters: int = 0


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Result rows of all cells asked for, in order; those already in the output are taken from there.

    Raises ValueError (nothing was loaded yet) for unknown tasks, impossible lengths, missing data, a checkpoint that
    cannot be read.
    """
    if config.suite == "short":
        return score_short(config)
    model_config, tokenizer = read_checkpoint(config)
    units = prepare(config, model_config, tokenizer)
    if config.prepare_only:
        return []
    return run(config, units, model_config, tokenizer)


def score_short(config: ScoreConfig) -> list[dict[str, Any]]:
    from benchmarks import short

    short.task_names(config)
    model_config, tokenizer = read_checkpoint(config)
    window = window_of(model_config)
    lm = load(config, window, 1, model_config, tokenizer)  # the tasks have texts of all lengths
    settings = run_sha256(config, model_config)
    made = [{**row, "run_sha256": settings} for row in short.score(config, lm)]
    if made:
        rows.RunDirectory(config.directory, config).add(made)
        lm_eval_results.write(config.directory, settings, config.checkpoint, config.backend)
    return made


def read_checkpoint(config: ScoreConfig) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer. Raises ValueError if there is no such checkpoint."""
    from endprompt import model

    if not Path(config.checkpoint).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", config.checkpoint):
        from transformers import AutoConfig, AutoTokenizer

        trust = config.trust_remote_code
        try:
            return (
                AutoConfig.from_pretrained(config.checkpoint, trust_remote_code=trust),
                AutoTokenizer.from_pretrained(config.checkpoint, trust_remote_code=trust),
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint {config.checkpoint!r} is no directory, and the hub gives no such model: {first}"
            ) from None
    loaded = model.load_config(config.checkpoint, trust_remote_code=config.trust_remote_code)
    if not config.prepare_only:
        check_weights(Path(config.checkpoint))
    return loaded, model.load_tokenizer(config.checkpoint)


def check_weights(directory: Path) -> None:
    """Reads the heads of a checkpoint's weight files, which takes milliseconds where loading takes minutes.

    Raises ValueError if there are none, or one is missing, cut short or no tensor file.
    """
    from endprompt import shares

    if not any(directory.glob("*.safetensors*")):
        raise ValueError(f"{directory}: the checkpoint does not load: it has no weights (*.safetensors)")
    shares.stored_shapes(directory)


def window_of(model_config: PretrainedConfig) -> int:
    window = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if not window:
        raise ValueError("the checkpoint's config must give its window: max_position_embeddings")
    return int(window)


# ------------------------------------------------------------------------------------------------------------- units


def prepare(config: ScoreConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Unit]:
    """The cells with their samples, RULER's from the cache."""
    if config.suite == "longbench":
        from benchmarks import longbench

        return longbench.units(config, window_of(model_config), tokenizer)
    from benchmarks import cache

    names = list(ruler.TASKS) if config.task_names == ["all"] else config.task_names
    for name in names:
        ruler.check_task(name)
    if not names:
        raise ValueError("tasks must name at least one task, or be all")
    window = window_of(model_config)
    over = [length for length in config.length_list if length > window]
    if over and not config.beyond_window and not config.prepare_only:
        raise ValueError(
            f"lengths must be at most the checkpoint's window {window}: {over} (beyond_window allows longer ones)"
        )
    wanted = [(task, length) for length in config.length_list for task in names]
    settings = (config.samples, config.seed, config.data_dir, config.options, config.cache_dir)
    return [ruler_unit(cell) for cell in cache.cells(wanted, tokenizer, *settings)]


def ruler_unit(cell: ruler.Cell) -> Unit:
    recipe, options = cell.recipe, cell.options
    metric = "string_match_part" if ruler.SPECS[recipe["task"]].metric == "any" else "string_match_all"
    kept, length = recipe["max_new_tokens"], recipe["length"]
    filled = [(tokens + kept) / length for _, tokens in recipe["samples"]]
    columns = {
        "haystack": recipe["haystack"],
        "haystack_sha256": recipe["haystack_sha256"],
        "fill": round(sum(filled) / len(filled), 5),
        "max_new_tokens": kept,
        "chat": options.chat,
        "generator": recipe["generator"],
    }
    if ruler.SPECS[recipe["task"]].family in ("vt", "cwe"):
        columns["shots"] = options.shots
    if ruler.SPECS[recipe["task"]].family == "vt":
        columns["hops"] = options.hops
    return Unit(
        f"{recipe['task']}@{length}",
        recipe["task"],
        length,
        "ruler",
        metric,
        cell,
        found_share,
        columns,
        recipe["samples_sha256"],
        recipe["characters"],
    )


def found_share(sample: dict[str, Any], prediction: str) -> float:
    return ruler.score(sample["task"], prediction, sample["outputs"])


# --------------------------------------------------------------------------------------------------------------- run


def run(
    config: ScoreConfig, units: list[Unit], model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Rows of the units. The model is loaded only if one of them has no row yet."""
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.nullcontext() if rank else rows.sole_use(config.directory):
        return score_units(config, units, model_config, tokenizer, rank)


def score_units(
    config: ScoreConfig,
    units: list[Unit],
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
) -> list[dict[str, Any]]:
    directory = config.directory
    if config.overwrite and rank == 0:
        for path in [*directory.glob("predictions*.jsonl"), *(directory / name for name in RESULT_FILES)]:
            path.unlink(missing_ok=True)
    for unit in units:
        if not unit.sha256:
            unit.sha256 = ruler.samples_sha256(unit.samples)
            unit.characters = sum(len(sample["input"]) for sample in unit.samples)
    settings = run_sha256(config, model_config)
    out = rows.RunDirectory(directory, config) if rank == 0 else None
    done = finished(directory, units, settings)
    waiting = [unit for unit in units if unit.name not in done]
    if waiting:
        longest = max(needed(unit) for unit in units)
        lm = load(config, longest, min(shortest_prompt(unit) for unit in units), model_config, tokenizer)
        from benchmarks.backend import Progress

        own = sum(-(-len(unit.samples) // lm.world_size) for unit in waiting)  # the first process takes the remainder
        progress = Progress(own, quiet=config.quiet or lm.rank != 0)
        for group in groups(waiting):
            done |= evaluate(config, group, lm, settings, progress, out)
    made = [done[unit.name] for unit in units if unit.name in done]
    if out is not None and config.suite == "ruler":
        write_summary(config, out, made, units)
    elif out is not None:
        write_longbench_summary(config, out, units)
    if out is not None:
        lm_eval_results.write(directory, settings, config.checkpoint, config.backend)
    return made


RESULT_FILES = ("results.jsonl", "summary.jsonl", "depth.jsonl", "log.jsonl")


def needed(unit: Unit) -> int:
    """Window that the unit's longest prompt and its generation take."""
    if unit.length is not None:
        return unit.length
    return max(sample["length"] + sample["max_new_tokens"] for sample in unit.samples)


def shortest_prompt(unit: Unit) -> int:
    """Tokens of the unit's shortest prompt."""
    if isinstance(unit.samples, ruler.Cell):  # without rendering any
        return min(tokens for _, tokens in unit.samples.recipe["samples"])
    return min(sample["length"] for sample in unit.samples)


def groups(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that share one call of simple_evaluate: many short cells, or one of long prompts."""
    out: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not out or size + unit.characters > CALL_CHARACTERS:
            out.append([])
            size = 0
        out[-1].append(unit)
        size += unit.characters
    return out


def load(
    config: ScoreConfig,
    needed: int,
    shortest: int,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """The lm-eval model, for prompts of `shortest` tokens or more that with their generation take `needed` at most.

    Raises ValueError if it does not load.
    """
    import torch
    from lm_eval.utils import simple_parse_args_string

    extra = simple_parse_args_string(config.backend_args) if config.backend_args else {}
    if config.backend == "vllm":
        options = vllm_backend.engine_options(model_config, max(needed, int(extra.get("max_model_len", 0))), shortest)
        return vllm_backend.load(
            config.checkpoint,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            **{**options, **extra},
        )
    from benchmarks.backend import LongContextLM
    from endprompt.model import quiet

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with quiet():
            return LongContextLM(
                pretrained=config.checkpoint,
                tokenizer=tokenizer,
                max_length=max(needed, window_of(model_config)),
                dtype=config.dtype,
                device=device,
                batch_size=config.batch_size,
                attn_implementation=config.attn,
                trust_remote_code=config.trust_remote_code,
                **extra,
            )
    except Exception as error:  # transformers raises whatever a damaged file makes its code run into
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{config.checkpoint}: the checkpoint does not load: {first}") from error


def evaluate(
    config: ScoreConfig,
    units: Sequence[Unit],
    lm: Any,
    settings: str,
    progress: Progress,
    out: rows.RunDirectory | None,
) -> dict[str, dict[str, Any]]:
    """Rows of one group of units, appended to the results; on processes other than the first there are none."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from benchmarks import backend

    began, before = time.perf_counter(), progress.tokens
    predictions = backend.Predictions(config.directory, settings, lm.rank)
    longest = max(needed(unit) for unit in units)
    chunk = config.batch_size if config.backend == "hf" else vllm_backend.chunk(longest)
    by_name = {unit.name: unit for unit in units}

    def note(task: str, sample: dict[str, Any], prediction: str) -> dict[str, Any]:
        kept: dict[str, Any] = {key: sample[key] for key in ("outputs", "length", "depth") if key in sample}
        return {"score": 100 * by_name[task].score(sample, prediction), **kept}

    recording = backend.RecordingLM(lm, predictions, chunk, progress, note)
    tasks = [backend.SampleTask(unit.name, unit.samples, unit.score) for unit in units]
    with backend.no_environment_report():
        simple_evaluate(
            model=recording,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    if out is None:
        return {}
    made = {unit.name: row(config, unit, task.scores, settings) for unit, task in zip(units, tasks)}
    out.add(made.values())
    out.log(cells=list(made), seconds=round(time.perf_counter() - began, 3), prompt_tokens=progress.tokens - before)
    return made


def row(config: ScoreConfig, unit: Unit, scores: Sequence[float], settings: str) -> dict[str, Any]:
    percent = [100 * value for value in scores]
    ci95, kind = summary.interval(percent, config.seed)
    return rows.result_row(
        suite=unit.suite,
        task=unit.task,
        length=unit.length,
        metric=unit.metric,
        value=sum(percent) / len(percent),
        stderr=summary.standard_error(percent),
        ci95=ci95,
        n=len(percent),
        n_truncated=sum(bool(sample.get("truncated")) for sample in unit.samples) if unit.suite != "ruler" else 0,
        model=config.model_name,
        method=method_of(config),
        seed=config.seed,
        samples_sha256=unit.sha256,
        ci=kind,
        backend=config.backend,
        attn=config.attn if config.backend == "hf" else None,
        dtype=config.dtype,
        run_sha256=settings,
        **unit.columns,
    )


def method_of(config: ScoreConfig) -> str:
    """The method's name: as set, else the trainer's note in the checkpoint, else "base"."""
    if config.method:
        return config.method
    note = Path(config.checkpoint) / "endprompt.json"
    if note.is_file():
        return str(rows.parse_object(note.read_bytes(), str(note)).get("method", "base"))
    return "base"


def finished(directory: Path, units: Sequence[Unit], settings: str) -> dict[str, dict[str, Any]]:
    """Rows that the output already has for these units: same samples, same checkpoint and settings."""
    path = directory / "results.jsonl"
    if not path.is_file():
        return {}
    found = {
        (old["suite"], old["task"], old["length"], old["samples_sha256"], old["n"]): old
        for old in rows.read_rows(path)
        if old.get("run_sha256") == settings
    }
    done = {}
    for unit in units:
        key = (unit.suite, unit.task, unit.length, unit.sha256, len(unit.samples))
        if key in found:
            done[unit.name] = found[key]
    return done


def rows_of(checkpoint: str | Path, run: str | Path) -> list[dict[str, Any]]:
    """The rows of a finished run that were scored on this very checkpoint, the latest of each task and length.

    Raises ValueError if the run has none: the checkpoint's configuration and weights must be those of the rows.
    """
    import yaml

    from endprompt import model

    directory = Path(run)
    about = directory / "config.yaml"
    if not (about.is_file() and (directory / "results.jsonl").is_file()):
        raise ValueError(f"{run} must be the output of `endprompt score`: it has no config.yaml and results.jsonl")
    try:
        known = yaml.safe_load(about.read_text(encoding="utf-8"))
        config = ScoreConfig(**{**known, "checkpoint": str(checkpoint)})
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{about}: must be the configuration of `endprompt score`: {error}") from None
    model_config = model.load_config(str(checkpoint))
    digests: dict[tuple[str, str, str], str] = {}
    found = {}
    for row in rows.read_rows(directory / "results.jsonl"):
        key = (row.get("backend", config.backend), row.get("attn") or config.attn, row.get("dtype", config.dtype))
        if key not in digests:
            backend, attn, dtype = key
            own = dataclasses.replace(config, backend=backend, attn=attn, dtype=dtype)
            digests[key] = run_sha256(own, model_config)
        if row.get("run_sha256") == digests[key]:
            found[(row["suite"], row["task"], row["length"])] = row
    if not found:
        raise ValueError(f"{directory / 'results.jsonl'}: none of its rows was scored on {checkpoint} as it is now")
    return sorted(found.values(), key=lambda row: (row["suite"], row["task"], row["length"] or 0))


def run_sha256(config: ScoreConfig, model_config: PretrainedConfig) -> str:
    """Hash of all that a prediction depends on beside its prompt."""
    about = {
        "checkpoint": checkpoint_sha256(config.checkpoint, model_config),
        "backend": config.backend,
        "backend_args": config.backend_args,
        "attn": config.attn if config.backend == "hf" else None,
        "dtype": config.dtype,
    }
    return rows.sha256_of(json.dumps(about, sort_keys=True))


def checkpoint_sha256(checkpoint: str, model_config: PretrainedConfig) -> str:
    """Hash of a checkpoint's configuration and weights: of each weight file its size, head and samples across it."""
    directory = Path(checkpoint)
    if not directory.is_dir():
        revision = getattr(model_config, "_commit_hash", None)
        return rows.sha256_of(checkpoint, str(revision))
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".model", ".jinja") and path.name != "endprompt.json":
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(path.name.encode() + struct.pack("<Q", size))
            with open(path, "rb") as file:
                for part in range(64):
                    file.seek(max(0, size - 65536) * part // 63)
                    digest.update(file.read(65536))
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- summary


def write_summary(config: ScoreConfig, out: rows.RunDirectory, made: list[dict[str, Any]], units: list[Unit]) -> None:
    """Averages and heat map of the cells of this call, each file written whole."""
    about: dict[str, Any] = {
        "suite": "ruler",
        "model": config.model_name,
        "method": method_of(config),
        "seed": config.seed,
    }
    averages = [rows.result_row(**about, **entry) for entry in summary.ruler_summary(made)]
    write_lines(out.path / "summary.jsonl", averages)
    entries = read_predictions(config.directory)
    scored = [entry for unit in units for entry in found_by_depth(entries, unit)]
    write_lines(out.path / "depth.jsonl", [{**about, **cell} for cell in summary.depth_table(scored)])


def write_longbench_summary(config: ScoreConfig, out: rows.RunDirectory, units: list[Unit]) -> None:
    """LongBench's averages by name."""
    from benchmarks import longbench_summary

    entries = read_predictions(config.directory)
    scored = {
        unit.task: [{**sample, "score": 100 * unit.score(sample, text)} for sample, text in predicted(entries, unit)]
        for unit in units
    }
    about = {"model": config.model_name, "method": method_of(config), "seed": config.seed}
    write_lines(out.path / "summary.jsonl", longbench_summary.summary_rows(scored, **about))


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    rows.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


Entries = dict[tuple[str, int], dict[str, Any]]


def found_by_depth(entries: Entries, unit: Unit) -> list[dict[str, Any]]:
    """Per sample with needles: length, depth and whether each answer is in the prediction."""
    return [
        {
            "length": unit.length,
            "depth": sample["depth"],
            "found": [answer.lower() in ruler.clean(prediction).lower() for answer in sample["outputs"]],
        }
        for sample, prediction in predicted(entries, unit)
        if sample["depth"]
    ]


def predicted(entries: Entries, unit: Unit) -> list[tuple[dict[str, Any], str]]:
    """(sample, prediction) of a unit's predictions on disk; RULER's samples without their prompt."""
    by_index = {index: e["prediction"] for (task, index), e in entries.items() if task == unit.name}
    kept = [(i, text) for i, text in sorted(by_index.items()) if i < len(unit.samples)]
    if isinstance(unit.samples, ruler.Cell):
        return [(unit.samples.sample(i, whole=False), text) for i, text in kept]
    return [(unit.samples[i], text) for i, text in kept]
