"""Settings of the commands `card`, `demo`, `fetch`, `report` and `tasks-path`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CardConfig:
    """Settings of `endprompt card`.

    Args:
        checkpoint: directory that `endprompt extend` wrote.
        results: run directories of `endprompt score` on this checkpoint.
        push_to_hub: upload the checkpoint to this repository, OWNER/NAME, after its name is typed once more.
    """

    checkpoint: str
    results: list[str] = field(default_factory=list)
    push_to_hub: str | None = None


@dataclass
class DemoConfig:
    """Settings of `endprompt demo`.

    Args:
        output: run directory; a second run of the same one does only what is missing.
        seed: of the training documents, positions and samples.
        steps: training steps of each arm.
        samples: samples of each task and length.
        overwrite: start again.
        open: open the report in a browser at the end.
    """

    output: str = "runs/demo"
    seed: int = 0
    steps: int = 150
    samples: int = 32
    overwrite: bool = False
    open: bool = False


@dataclass
class FetchConfig:
    """Settings of `endprompt fetch`.

    Args:
        suites: ruler (essays, SQuAD, HotpotQA, word list; 60 MB), longbench (its 21 sets and LongBench-E; 114 MB).
        data_dir: folder that they come into, for the data_dir of `endprompt score`.
    """

    suites: list[str]
    data_dir: str = "data"


@dataclass
class ReportConfig:
    """Settings of `endprompt report`.

    Args:
        runs: run directories (of extend, score, verify, demo, lab), or files of result rows.
        output: the page; report.html in the first run if not given.
        reference: method that the others are compared with; the first contiguous one if not given.
        open: open the page in a browser.
    """

    runs: list[str]
    output: str | None = None
    reference: str | None = None
    open: bool = False


@dataclass
class TasksPathConfig:
    """`endprompt tasks-path` has no settings."""
