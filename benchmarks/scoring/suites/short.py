"""Short-text tasks: lm-eval's own, with the settings that the long-context literature uses. Data come from the hub."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks import chat
from benchmarks.scoring.checkpoint import method_of
from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.suite import Rows, Suite
from benchmarks.scoring.units import Asker, Unit
from endprompt.results import result_row
from endprompt.runs import RunDirectory

# task: (examples in front, metric as lm-eval names it)
SETTINGS = {
    "mmlu": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "humaneval": (0, "pass@1,create_test"),
}


class Short(Suite):
    generator = f"lm-eval {version('lm_eval')}, 2"  # 2: texts whose frequencies depend on their length go one by one

    def __init__(self, config: ScoreConfig):
        super().__init__(config)
        every = [task for task in SETTINGS if task != "humaneval"]
        self.names = every if config.task_names == ["all"] else config.task_names
        if unknown := [name for name in self.names if name not in SETTINGS]:
            raise ValueError(f"unknown short-text task {unknown[0]!r}; tasks: {', '.join(SETTINGS)}")
        self.day: datetime.date | None = None

    @property
    def asked(self) -> str:
        return f"seed={self.config.seed} samples={self.config.samples}"

    def units(self, asker: Asker) -> list[Unit]:
        if self.config.chat:  # lm-eval makes the prompts
            arguments, self.day = chat.settled(asker.tokenizer, self.config.date, self.config.template_args)
            self.model_args = {"chat_template_args": arguments}
        return [Unit(task, task, None, "short", SETTINGS[task][1].split(",")[0]) for task in self.names]

    def evaluate(self, units: Sequence[Unit], lm: Any, settings: str, begin: Callable[[], RunDirectory | None]) -> Rows:
        """A row as soon as its task is done; without one there is no directory."""
        made = {}
        with chat.clock_at(self.day):
            for unit in units:
                if row := made_row(self.config, lm, unit.task):
                    made[unit.task] = {**row, "run_sha256": settings}
                    if out := begin():
                        out.add([made[unit.task]])
        return made


def made_row(config: ScoreConfig, lm: Any, task: str) -> dict[str, Any] | None:
    """The row of a task, None on other processes than the first. humaneval runs generated code: it must be asked for by
    name. Raises ValueError for an unknown task, and if the data are neither in the hub's cache nor to be had."""
    from lm_eval.evaluator import simple_evaluate

    from benchmarks.scoring.recording import no_environment_report
    from endprompt import distributed

    shots, metric = SETTINGS[task]
    code = task == "humaneval"
    if code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    cut: set[str] = getattr(lm, "cut", set())
    cut.clear()
    try:
        with no_environment_report():
            results = simple_evaluate(
                model=lm,
                tasks=[task],
                num_fewshot=shots,
                limit=config.limit,
                apply_chat_template=config.chat,
                fewshot_as_multiturn=config.chat,
                fewshot_random_seed=config.seed,
                bootstrap_iters=0 if task == "mmlu" else 1000,
                log_samples=False,
                confirm_run_unsafe_code=code,
            )
    except (OSError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the data of {task} come from the hub and are not to be had: {first}") from error
    truncated = sum(distributed.gathered(len(cut)))
    if results is None:
        return None
    own = results["results"][task]
    stderr = own.get(metric.replace(",", "_stderr,"))
    return result_row(
        suite="short",
        task=task,
        metric=metric.split(",")[0],
        value=100 * own[metric],
        stderr=100 * stderr if isinstance(stderr, float) else None,
        n=own.get("sample_len"),
        n_truncated=truncated,
        model=config.model_name,
        method=method_of(config),
        seed=config.seed,
        shots=shots,
        chat=config.chat,
        backend=config.backend,
        attn=config.attn if config.backend == "hf" else None,
        dtype=config.dtype,
        **{name: value for name in ("date", "template_args", "backend_args") if (value := getattr(config, name))},
    )


SUITE = Short
