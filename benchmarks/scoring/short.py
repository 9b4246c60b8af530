"""Short-text tasks: lm-eval's own, with the settings that the long-context literature uses. Data come from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from endprompt.results import result_row

if TYPE_CHECKING:
    from benchmarks.scoring.config import ScoreConfig

# task: (examples in front, metric as lm-eval names it)
SETTINGS = {
    "mmlu": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "humaneval": (0, "pass@1,create_test"),
}


def made_rows(config: ScoreConfig, lm: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row a task, as each is done. humaneval runs generated code: it must be asked for by name.

    Raises ValueError for an unknown task, and if the data are neither in the hub's cache nor to be had.
    """
    from lm_eval.evaluator import simple_evaluate

    from benchmarks.scoring.checkpoint import method_of
    from benchmarks.scoring.config import SAMPLES
    from benchmarks.scoring.recording import no_environment_report

    for task in names:
        shots, metric = SETTINGS[task]
        code = task == "humaneval"
        if code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        try:
            with no_environment_report():
                results = simple_evaluate(
                    model=lm,
                    tasks=[task],
                    num_fewshot=shots,
                    limit=None if config.samples == SAMPLES else config.samples,
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
        if results is None:
            continue
        own = results["results"][task]
        stderr = own.get(metric.replace(",", "_stderr,"))
        yield result_row(
            suite="short",
            task=task,
            metric=metric.split(",")[0],
            value=100 * own[metric],
            stderr=100 * stderr if isinstance(stderr, float) else None,
            n=own.get("sample_len"),
            model=config.model_name,
            method=method_of(config),
            seed=config.seed,
            shots=shots,
            chat=config.chat,
            **{name: value for name in ("date", "template_args") if (value := getattr(config, name))},
        )


def task_names(config: ScoreConfig) -> list[str]:
    if config.task_names == ["all"]:
        return [task for task in SETTINGS if task != "humaneval"]
    for task in config.task_names:
        if task not in SETTINGS:
            raise ValueError(f"unknown short-text task {task!r}; tasks: {', '.join(SETTINGS)}")
    return config.task_names
