"""Commands of this package. Heavy imports stay inside the functions, so that `endprompt --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.score import ScoreConfig


def score(config: ScoreConfig) -> int | None:
    """Score a checkpoint on RULER, LongBench or short-text tasks through lm-eval.

    Result rows go to the output directory; the table of scores is printed. With --compare or --show nothing is run.
    """
    from benchmarks import compare, summary
    from benchmarks import score as scoring

    if config.compare is not None:
        print(compare.compared(compare.compare(config.compare, config.checkpoint, config.seed)))
        return None
    if config.show is not None:
        given = Path(config.checkpoint)
        run = given if list(given.glob("predictions*.jsonl")) else config.directory
        print(compare.shown(compare.show(run, config.show, config.wrong)))
        return None
    made = scoring.score(config)
    if made and config.suite == "ruler":
        print(summary.table(made))
    elif made and config.suite == "longbench":
        from benchmarks import longbench_summary
        from endprompt import rows

        print(longbench_summary.table([*made, *rows.read_rows(config.directory / "summary.jsonl")]))
    else:
        for row in made:
            print(f"{row['task']:<12} {row['value']:6.2f}")
    return None


@dataclass
class TasksPathConfig:
    """`endprompt tasks-path` has no settings."""


def tasks_path(config: TasksPathConfig) -> int | None:
    """Print the folder of task files for plain lm-eval: lm_eval --include_path "$(endprompt tasks-path)"."""
    print(Path(__file__).parent / "tasks")
    return None
