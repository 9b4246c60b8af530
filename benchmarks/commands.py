"""Commands of this package. Heavy imports stay inside the functions, so that `endprompt --help` is fast."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.config import (
    CardConfig,
    ChatConfig,
    CompareConfig,
    DemoConfig,
    FetchConfig,
    GenerateConfig,
    ReportConfig,
    TasksPathConfig,
)
from benchmarks.lab.config import LabConfig
from benchmarks.scoring import ScoreConfig


def json_lines(found: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in found)


@contextlib.contextmanager
def going_on(flags: dict[str, bool]) -> Iterator[None]:
    """Ctrl-C says with which flags, beside its own, the command goes on where it was."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(flags) from None


def score(config: ScoreConfig) -> int | None:
    """Score a checkpoint, or a model behind a server, on long-context suites and lm-eval's tasks.

    Result rows go to the output directory; the table of scores is printed. With --compare or --show nothing is run.
    """
    from benchmarks import scoring
    from benchmarks.scoring import predictions, suite

    if config.compare is not None:
        return compare(CompareConfig([config.compare, config.checkpoint], json=config.json))
    if config.show is not None:
        given = Path(config.checkpoint)
        run = given if list(given.glob("predictions*.jsonl")) else config.directory
        found = predictions.show(run, config.show, config.wrong)
        print(json_lines(found) if config.json else predictions.shown(found))
        return None
    with going_on({"overwrite": False} if config.overwrite else {}):
        made = scoring.score(config)
    if made:
        print(suite.suite_of(config).table(made))
        print(f"rows: {config.directory / 'results.jsonl'}", file=sys.stderr)
    return None


def card(config: CardConfig) -> int | None:
    """Write the checkpoint's model card anew, with its scores, and upload the checkpoint if asked."""
    from benchmarks.scoring import fingerprint
    from endprompt.train.card import push, read_record, write_card

    read_record(Path(config.checkpoint))
    found = [row for run in config.results for row in fingerprint.rows_of(config.checkpoint, run)]
    print(write_card(config.checkpoint, found))
    if config.push_to_hub is not None:
        print(push(config.checkpoint, config.push_to_hub))
    return None


def demo(config: DemoConfig) -> int | None:
    """Extend the small base model 8-fold on this CPU, verify it, score it, draw the figures, print one table."""
    from benchmarks import demo as work

    with going_on({}):
        return work.demo(config)


def lab(config: LabConfig) -> int | None:
    """Replicate: train and score a matrix of methods, scalings, steps and seeds, and answer the seven questions."""
    from benchmarks.lab import runner

    with going_on({"overwrite": False} if config.overwrite else {}):
        return runner.lab(config)


def fetch(config: FetchConfig) -> int | None:
    """Bring the files that a suite needs from their hosts: resumed, checked by sha256, nothing overwritten."""
    from benchmarks import originals

    with going_on({}):
        return 0 if originals.fetch(config.suites, config.data_dir, config.only.replace(",", " ").split()) else 1


def generate(config: GenerateConfig) -> int | None:
    """Ask a checkpoint about long texts, or let it continue them; greedy, written as it comes."""
    from benchmarks import talk

    talk.generate(config)
    return None


def chat(config: ChatConfig) -> int | None:
    """Talk with a checkpoint, about files if some are given; its window, and what fills it, are said."""
    from benchmarks import talk

    talk.converse(config)
    return None


def report(config: ReportConfig) -> int | None:
    """One page of HTML from finished runs: scores, losses, bounds, comparison, provenance; it loads nothing."""
    from benchmarks import report as work

    page = work.report(config)
    print(page)
    if config.open:
        work.show(page)
    return None


def compare(config: CompareConfig) -> int | None:
    """Compare finished scorings: scores, effective lengths, paired differences, costs, published tables beside them."""
    from benchmarks.report import board

    made, found = board.compare(config)
    print(json_lines(found) if config.json else "\n\n".join(table.text() for table in made))
    return None


def tasks_path(config: TasksPathConfig) -> int | None:
    """Print the folder of task files for plain lm-eval: lm_eval --include_path "$(endprompt tasks-path)"."""
    print(Path(__file__).parent / "tasks")
    return None
