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
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import chat, fingerprint, lm_eval_results, ruler, summary, vllm_backend
from benchmarks.compare import Entries, read_run
from benchmarks.settled import settled
from endprompt import origin, rows

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
        checkpoint: checkpoint directory, GGUF file, or a hub's ORG/NAME (@REVISION).
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
        edition: state of RULER's tasks: 2025 (its repository's), 2024 (the paper's tables, its samples to the byte),
            2025-ruler (the repository's samples to the byte), lab-2026 (what the project's own bases were trained on).
        chat_layout: with chat: one-turn, or ruler (cwe's example in a turn of its own, the answer prefix after a
            space); the editions that repeat RULER's samples have ruler, the others one-turn, if not given.
        prompt_length: LongBench: cut prompts over so many tokens; published tables have 3500 for a window of 4k.
        chat: wrap prompts in the tokenizer's chat template.
        date: day that a chat template which reads one is given, YYYY-MM-DD; that of the output's first start if not
            given.
        template_args: further arguments of the chat template, such as enable_thinking=false, as NAME=VALUE,NAME=VALUE.
        window: of the checkpoint, in tokens, where its config leaves open whether it is stated before or after scaling.
        beyond_window: allow lengths over the checkpoint's window; nothing is cut off, the model sees the whole prompt.
        backend: hf or vllm.
        backend_args: further arguments of the backend's model, as key=value,key=value.
        batch_size: prompts that run together at most (hf; vLLM schedules by itself, see its max_num_seqs); memory may
            ask for fewer.
        whole_answers: let answers go on when their RULER score is settled (hf; vLLM's always do).
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
    edition: Literal["2025", "2024", "2025-ruler", "lab-2026"] = "2025"
    chat_layout: Literal["one-turn", "ruler"] | None = None
    prompt_length: int | None = None
    chat: bool = False
    date: str | None = None
    template_args: str = ""
    window: int | None = None
    beyond_window: bool = False
    backend: Literal["hf", "vllm"] = "hf"
    backend_args: str = ""
    batch_size: int = 32
    whole_answers: bool = False
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
        if self.prompt_length is not None and self.suite != "longbench":
            raise ValueError(f"prompt_length is for suite longbench, not {self.suite}: {self.prompt_length}")
        if self.json and self.compare is None and self.show is None:
            raise ValueError("json is for compare and show; the rows of a run are in its results.jsonl: json=True")
        if self.date is not None:
            chat.parse_day(self.date)
        if self.template_args and not self.chat:
            raise ValueError(f"template_args are for a chat template, they need chat: {self.template_args!r}")
        unread = {"enable_thinking", "chat_template_args"} | ({"think_end_token"} if self.backend == "hf" else set())
        for part in self.backend_args.split(","):
            if (name := part.partition("=")[0].strip()) in unread:
                raise ValueError(f"backend_args {name!r} is read by no prompt made here; template_args are: {part!r}")

    @property
    def model_name(self) -> str:
        return self.name or origin.name_of(self.checkpoint)

    @property
    def directory(self) -> Path:
        return Path(self.output) if self.output else Path("runs", "score", self.model_name)

    @property
    def answers(self) -> str | None:
        """Where RULER's answers end beside stop tokens, as the rows name it."""
        if self.suite != "ruler":
            return None
        return "whole" if self.whole_answers or self.backend != "hf" else "until settled"

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
        names = ("max_new_tokens", "haystack_text", "chat", "shots", "hops", "date", "template_args")
        return ruler.Options(**{name: getattr(self, name) for name in (*names, "edition", "chat_layout")})


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
    prompts: Sequence[str] = ()  # the hash of each
    readings: dict[str, Callable[[dict[str, Any], str], float]] = field(default_factory=dict)  # columns of the row


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Result rows of all cells asked for, in order; those already in the output are taken from there.

    Raises ValueError (nothing was loaded yet) for unknown tasks, impossible lengths, missing data, a checkpoint that
    cannot be read.
    """
    if config.suite == "short":
        from benchmarks import short

        short.task_names(config)
    directory = origin.directory_of(config.checkpoint, weights=not config.prepare_only, code=config.trust_remote_code)
    config = dataclasses.replace(config, checkpoint=str(directory))
    model_config, tokenizer = read_checkpoint(config)
    config = settle_date(config, tokenizer)
    units = prepare(config, model_config, tokenizer) if config.suite != "short" else []
    if config.prepare_only:
        keep_day(config)
        return []
    return run(config, units, model_config, tokenizer)


def settle_date(config: ScoreConfig, tokenizer: PreTrainedTokenizerBase) -> ScoreConfig:
    """The configuration with the day that its prompts are made for: as set, else the output's own, else today."""
    if not config.chat:
        return dataclasses.replace(config, date=None)

    def day() -> str:
        kept = None if config.overwrite else fingerprint.read_day(config.directory)
        return kept or chat.today(tokenizer)

    return dataclasses.replace(config, date=chat.day_read(tokenizer, config.date, config.template_args, day))


def keep_day(config: ScoreConfig) -> None:
    """Write down the day of the output's prompts, at its first start: a later one goes on with it."""
    path = config.directory / fingerprint.DAY
    if config.date is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text(path, config.date + "\n")


def read_checkpoint(config: ScoreConfig) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer. Raises ValueError if there is no such checkpoint."""
    from endprompt import model

    loaded = model.load_config(config.checkpoint, trust_remote_code=config.trust_remote_code)
    if not config.prepare_only:
        check_weights(Path(config.checkpoint))
    return loaded, model.load_tokenizer(config.checkpoint)


def check_weights(directory: Path) -> None:
    """Reads the heads of a checkpoint's weight files, which takes milliseconds where loading takes minutes.

    Raises ValueError if there are none, or one is missing, cut short or no tensor file.
    """
    from endprompt import weights

    if not any(directory.glob("*.safetensors*")):
        raise ValueError(f"{directory}: the checkpoint does not load: it has no weights (*.safetensors)")
    weights.stored_tensors(directory)


def window_of(config: ScoreConfig, model_config: PretrainedConfig, needed: int | None = None) -> int:
    """Tokens that the checkpoint reads; a question of its config that `needed` tokens do not touch is not asked."""
    from endprompt import model

    return model.window_of(model_config, config.window, needed).window


# ------------------------------------------------------------------------------------------------------------- units


def prepare(config: ScoreConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Unit]:
    """The cells with their samples, RULER's from the cache."""
    if config.suite == "longbench":
        from benchmarks import longbench

        return longbench.units(config, window_of(config, model_config), tokenizer)
    from benchmarks import cache

    names = list(ruler.TASKS) if config.task_names == ["all"] else config.task_names
    for name in names:
        ruler.check_task(name)
    if not names:
        raise ValueError("tasks must name at least one task, or be all")
    asked = 1 if config.beyond_window or config.prepare_only else max(config.length_list)
    window = window_of(config, model_config, asked)
    over = [length for length in config.length_list if length > window]
    if over and not config.beyond_window and not config.prepare_only:
        raise ValueError(
            f"lengths must be at most the checkpoint's window {window}: {over} (beyond_window allows longer ones)"
        )
    wanted = [(task, length) for length in config.length_list for task in names]
    settings = (config.samples, config.seed, config.data_dir, config.options, config.cache_dir)
    units = [ruler_unit(cell) for cell in cache.cells(wanted, tokenizer, *settings)]
    for unit in units:
        if needed(unit) > window and not config.beyond_window and not config.prepare_only:
            raise ValueError(
                f"{unit.name}: prompt and generation must be at most the checkpoint's window {window}, and edition "
                f"{config.edition} keeps too little room for the answer: {needed(unit)} (beyond_window allows it)"
            )
    return units


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
        "edition": options.edition,
        "chat": options.chat,
        "chat_layout": options.layout,
        "generator": recipe["generator"],
        **{name: value for name in ("date", "template_args") if (value := getattr(options, name))},
    }
    if recipe["questions"] is not None:
        columns |= {"questions": recipe["questions"]["count"], "questions_whole": recipe["questions"]["whole"]}
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
        recipe["prompts"],
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
        if config.overwrite and rank == 0:
            start_again(config.directory)
        if rank == 0:
            keep_day(config)
            rows.drop_cut_line(config.directory / "results.jsonl")
        work = score_short if config.suite == "short" else score_units
        return work(config, units, model_config, tokenizer, rank)


def start_again(directory: Path) -> None:
    """Remove what earlier runs left; other processes look there after the model is loaded, which waits for all."""
    for path in [*directory.glob("predictions*.jsonl"), *(directory / name for name in RESULT_FILES)]:
        path.unlink(missing_ok=True)


def score_short(
    config: ScoreConfig,
    units: list[Unit],
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
) -> list[dict[str, Any]]:
    """lm-eval's own tasks: a row as soon as its task is done."""
    from benchmarks import short

    made_by = fingerprint.fingerprint(config, model_config)
    names = short.task_names(config)
    done, renamed = earlier_rows(config, made_by.sha256, ("suite", "task"), {name: ("short", name) for name in names})
    waiting = [name for name in names if name not in done]
    lm = (
        load(config, window_of(config, model_config, needed=1), 1, model_config, tokenizer) if waiting else None
    )  # texts of all lengths
    out: rows.RunDirectory | None = None
    if renamed and rank == 0:
        out = fingerprint.begin(config.directory, config, made_by, computes=bool(waiting))
        out.add(renamed)
    _, day = chat.settled(tokenizer, config.date, config.template_args) if config.chat else ({}, None)
    with chat.clock_at(day):
        for row in short.made_rows(config, lm, waiting):
            out = out or fingerprint.begin(config.directory, config, made_by, computes=True)
            done[row["task"]] = {**row, "run_sha256": made_by.sha256}
            out.add([done[row["task"]]])
    made = [done[name] for name in names if name in done]
    if rank == 0 and made:
        if out is None:
            fingerprint.begin(config.directory, config, made_by, computes=False)
        lm_eval_results.write(config.directory, made, config.checkpoint, config.backend)
    return made


def score_units(
    config: ScoreConfig,
    units: list[Unit],
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rank: int,
) -> list[dict[str, Any]]:
    directory = config.directory
    for unit in units:
        if not unit.sha256:
            unit.sha256 = ruler.samples_sha256(unit.samples)
            unit.characters = sum(len(sample["input"]) for sample in unit.samples)
            unit.prompts = [ruler.text_sha256(sample["input"]) for sample in unit.samples]
    made_by = fingerprint.fingerprint(config, model_config)
    done, renamed = finished(config, units, made_by.sha256)
    waiting = [unit for unit in units if unit.name not in done]
    out = fingerprint.begin(directory, config, made_by, computes=bool(waiting)) if rank == 0 else None
    if out is not None and renamed:
        out.add(renamed)
    if waiting:
        longest = max(needed(unit) for unit in units)
        lm = load(config, longest, min(shortest_prompt(unit) for unit in units), model_config, tokenizer)
        from benchmarks.backend import Progress

        own = sum(-(-len(unit.samples) // lm.world_size) for unit in waiting)  # the first process takes the remainder
        progress = Progress(own, quiet=config.quiet or lm.rank != 0)
        for group in groups(waiting):
            done |= evaluate(config, group, lm, made_by.sha256, progress, out)
    made = [done[unit.name] for unit in units if unit.name in done]
    if out is not None:
        write_summary(config, out, made, units, made_by.sha256)
        lm_eval_results.write(directory, made, config.checkpoint, config.backend)
    return made


RESULT_FILES = ("results.jsonl", "summary.jsonl", "depth.jsonl", "log.jsonl", fingerprint.RUNS, fingerprint.DAY)


def needed(unit: Unit) -> int:
    """Window that the unit's longest prompt and its generation take."""
    if isinstance(unit.samples, ruler.Cell):
        recipe = unit.samples.recipe  # a prompt of RULER's own making may be over its length
        longest = max(tokens for _, tokens in recipe["samples"])
        return max(recipe["length"], longest + recipe["max_new_tokens"])
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
    from lm_eval.utils import simple_parse_args_string

    extra = simple_parse_args_string(config.backend_args) if config.backend_args else {}
    if config.suite == "short" and config.chat:  # lm-eval makes the prompts
        extra["chat_template_args"] = chat.settled(tokenizer, config.date, config.template_args)[0]
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

    try:
        with quiet():
            return LongContextLM(
                pretrained=config.checkpoint,
                tokenizer=tokenizer,
                max_length=max(needed, window_of(config, model_config, needed)),
                dtype=config.dtype,
                device=fingerprint.device_of(config.device),
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

    if isinstance(lm, backend.LongContextLM):
        lm.settled = settled if config.answers == "until settled" else None
    recording = backend.RecordingLM(lm, predictions, chunk, progress, note)
    tasks = [backend.SampleTask(unit.name, unit.samples, unit.score, unit.prompts) for unit in units]
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
    entries = read_run(config.directory, settings) if any(unit.readings for unit in units) else {}
    for unit in units:
        texts = predicted(entries, unit) if unit.readings else []
        for name, reading in unit.readings.items():
            unit.columns[name] = 100 * sum(reading(sample, text) for sample, text in texts) / len(texts)
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
        **({"answers": config.answers} if config.answers else {}),
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


def finished(
    config: ScoreConfig, units: Sequence[Unit], settings: str
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """`earlier_rows` of the units: of the same samples, with all their predictions there."""
    columns = ("suite", "task", "length", "samples_sha256", "n", "max_new_tokens", "seed")
    limits = {unit.name: unit.columns["max_new_tokens"] for unit in units}
    known = set() if config.overwrite else read_run(config.directory, settings).keys()
    wanted = {
        unit.name: (unit.suite, unit.task, unit.length, unit.sha256, len(unit.samples), limits[unit.name], config.seed)
        for unit in units
        if known >= {(unit.name, i, prompt, limits[unit.name]) for i, prompt in enumerate(unit.prompts)}
    }
    return earlier_rows(config, settings, columns, wanted)


def earlier_rows(
    config: ScoreConfig, settings: str, columns: Sequence[str], wanted: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(rows of this very run that the output has, those of them that it has under another name alone, renamed).

    wanted: values of the columns by which each row is known.
    """
    path = config.directory / "results.jsonl"
    found = rows.read_rows(path) if path.is_file() and not config.overwrite else []
    names = {"model": config.model_name, "method": method_of(config)}
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for old in sorted(found, key=lambda row: names.items() <= row.items()):  # those of this name after the others
        if old.get("run_sha256") == settings:
            known[tuple(old.get(column) for column in columns)] = old
    done = {name: {**known[key], **names} for name, key in wanted.items() if key in known}
    return done, [row for name, row in done.items() if row != known[wanted[name]]]


def rows_of(checkpoint: str | Path, run: str | Path) -> list[dict[str, Any]]:
    """The rows of a finished run that were scored on this very checkpoint, the latest of each task and length.

    Raises ValueError if the run has none: the checkpoint's configuration and weights must be those of the rows.
    """
    from endprompt import model

    directory = Path(run)
    results = directory / "results.jsonl"
    if not results.is_file():
        raise ValueError(f"{run} must be the output of `endprompt score`: it has no results.jsonl")
    known = fingerprint.runs(directory)
    if not known:
        raise ValueError(f"{directory}: scored before runs told their checkpoint ({fingerprint.RUNS}): score it again")
    config = model.load_config(str(checkpoint))
    settings = known[-1]["run_sha256"]
    found = {}
    if known[-1]["fingerprint"].get("checkpoint") == fingerprint.checkpoint_sha256(str(checkpoint), config):
        of_run = [row for row in rows.read_rows(results) if row.get("run_sha256") == settings]
        found = {(row["suite"], row["task"], row["length"]): row for row in of_run}
    if not found:
        raise ValueError(f"{results}: none of its rows was scored on {checkpoint} as it is now")
    return sorted(found.values(), key=lambda row: (row["suite"], row["task"], row["length"] or 0))


# ----------------------------------------------------------------------------------------------------------- summary


def write_summary(
    config: ScoreConfig, out: rows.RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str
) -> None:
    """Averages, and RULER's heat map, of the cells of this call, each file written whole."""
    about: dict[str, Any] = {"model": config.model_name, "method": method_of(config), "seed": config.seed}
    about["run_sha256"] = settings
    entries = read_run(config.directory, settings)
    if config.suite == "longbench":
        from benchmarks import longbench_summary

        scored = {
            unit.task: [{**s, "score": 100 * unit.score(s, text)} for s, text in predicted(entries, unit)]
            for unit in units
        }
        write_lines(out.path / "summary.jsonl", longbench_summary.summary_rows(scored, **about))
        return
    averages = [rows.result_row(suite="ruler", **about, **entry) for entry in summary.ruler_summary(made)]
    write_lines(out.path / "summary.jsonl", averages)
    needles = [entry for unit in units for entry in found_by_depth(entries, unit)]
    write_lines(out.path / "depth.jsonl", [{"suite": "ruler", **about, **one} for one in summary.depth_table(needles)])


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    rows.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


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
    """(sample, prediction) of each sample of a unit that was answered; RULER's samples without their prompt."""
    limit = unit.columns["max_new_tokens"]
    found = []
    for i, prompt in enumerate(unit.prompts):
        if entry := entries.get((unit.name, i, prompt, limit)):
            sample = unit.samples.sample(i, whole=False) if isinstance(unit.samples, ruler.Cell) else unit.samples[i]
            found.append((sample, entry["prediction"]))
    return found
