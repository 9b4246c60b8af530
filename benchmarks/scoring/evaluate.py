"""Units through lm-eval's `simple_evaluate`: predictions as they come, then a row a unit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.scoring import vllm
from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.predictions import read_run
from benchmarks.scoring.suite import Rows, Suite
from benchmarks.scoring.units import Unit, mean_rows, needed, predicted, row
from endprompt.results import write_rows

if TYPE_CHECKING:
    from benchmarks.scoring.recording import Progress
    from endprompt.runs import RunDirectory

# Prompt text held by one call of simple_evaluate, in characters: bounds the memory whatever the number of cells.
CALL_CHARACTERS = 150_000_000


class SampleSuite(Suite):
    """A suite whose units have their samples here."""

    def evaluate(self, units: Sequence[Unit], lm: Any, settings: str, begin: Callable[[], RunDirectory | None]) -> Rows:
        from benchmarks.scoring.recording import Progress

        own = sum(-(-len(unit.samples) // lm.world_size) for unit in units)  # the first process takes the remainder
        progress = Progress(own, quiet=self.config.quiet or lm.rank != 0)
        made: Rows = {}
        for group in groups(units):
            made |= evaluate(self.config, group, lm, settings, progress, begin())
        return made


class MeanSuite(SampleSuite):
    """A suite whose summary is the mean over its tasks at each length."""

    def summarise(self, out: RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str) -> None:
        write_rows(out.path / "summary.jsonl", mean_rows(self.config, made, settings))


def groups(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that share one call of simple_evaluate: many short cells, or one of long prompts."""
    out: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not out or size + unit.characters > CALL_CHARACTERS:
            out, size = [*out, []], 0
        out[-1].append(unit)
        size += unit.characters
    return out


def evaluate(
    config: ScoreConfig, units: Sequence[Unit], lm: Any, settings: str, progress: Progress, out: RunDirectory | None
) -> Rows:
    """Rows of one group of units, appended to the results; on processes other than the first there are none."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from benchmarks.scoring import hf
    from benchmarks.scoring.recording import Predictions, RecordingLM, no_environment_report
    from benchmarks.tasks.sample_task import SampleTask

    began, before = time.perf_counter(), (progress.tokens, progress.made)
    predictions = Predictions(config.directory, settings, lm.rank)
    longest = max(needed(unit) for unit in units)
    chunk = config.batch_size if config.backend == "hf" else vllm.chunk(longest)
    by_name = {unit.name: unit for unit in units}

    def note(task: str, sample: dict[str, Any], prediction: str) -> dict[str, Any]:
        kept: dict[str, Any] = {key: sample[key] for key in ("outputs", "length", "depth") if key in sample}
        return {"score": 100 * by_name[task].score(sample, prediction), **kept}

    if isinstance(lm, hf.LongContextLM):
        lm.settles = config.answers == "until settled"
    thoughts = {unit.name: config.thought_tokens for unit in units if config.thinks and unit.columns["chat"]}
    recording = RecordingLM(lm, predictions, chunk, progress, note, thoughts)
    tasks = [SampleTask(unit.name, unit.samples, unit.score, unit.prompts) for unit in units]
    unseeded = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    options: dict[str, Any] = {"bootstrap_iters": 0, "log_samples": False, **unseeded}
    with no_environment_report():
        simple_evaluate(recording, tasks=tasks, task_manager=TaskManager(include_defaults=False), **options)
    counts = (progress.tokens - before[0], progress.made - before[1])
    of_all = lm.gather_object(counts, dst=0) if lm.world_size > 1 else [counts]
    if out is None:
        return {}
    entries = read_run(config.directory, settings) if thoughts or any(unit.readings for unit in units) else {}
    for unit in units:
        if unit.name in thoughts:
            keys = ((unit.name, i, prompt, unit.columns["max_new_tokens"]) for i, prompt in enumerate(unit.prompts))
            unit.columns["n_unfinished"] = sum(entries[key].get("unfinished", False) for key in keys)
        texts = predicted(entries, unit) if unit.readings else []
        for name, reading in unit.readings.items():
            unit.columns[name] = 100 * sum(reading(sample, text) for sample, text in texts) / len(texts)
    made = {unit.name: row(config, unit, task.scores, settings) for unit, task in zip(units, tasks)}
    out.add(made.values())
    read, answered = map(sum, zip(*of_all))
    seconds = round(time.perf_counter() - began, 3)
    cost = {"seconds": seconds, "prompt_tokens": read, "answer_tokens": answered, "gpus": gpus(config, lm.world_size)}
    out.log(cells=list(made), run=settings, **cost)
    return made


def gpus(config: ScoreConfig, processes: int) -> int | None:
    """GPUs that a run takes; a server's are not known."""
    from lm_eval.utils import simple_parse_args_string

    from benchmarks.scoring.fingerprint import device_of

    extra = simple_parse_args_string(config.backend_args) if config.backend_args else {}
    each = int(extra.get("tensor_parallel_size", 1)) * int(extra.get("data_parallel_size", 1))
    if config.backend == "server":
        return None
    return processes * each if device_of(config.device).startswith("cuda") else 0
