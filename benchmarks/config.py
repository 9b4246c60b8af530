"""Settings of the commands `card`, `chat`, `compare`, `demo`, `fetch`, `generate`, `report` and `tasks-path`."""

from dataclasses import dataclass, field
from typing import Literal

from benchmarks import summary


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
class AskConfig:
    """Settings of `endprompt chat` and `endprompt generate`.

    Checkpoint:
        checkpoint: checkpoint directory, GGUF file, or a hub's ORG/NAME (@REVISION).
        window: of the checkpoint, in tokens, where its config leaves open whether it is stated before or after scaling.
        dtype: float32, bfloat16, float16, or auto: the checkpoint's own, but float32 instead of bfloat16 on a CPU that
            has no instructions for it.
        device: cpu, cuda, cuda:1, or auto.
        attn: attention implementation of transformers.

    Prompt:
        file: text files that are asked about, with an empty line between; - is standard input (generate).
        system: system message.
        cut: part of the texts to leave out if they are longer than the window; without it that is an error.
        max_new_tokens: tokens of an answer at most, beside the prompt in the window; 512 if not given, in small
            windows a quarter of it.
        date: day that a chat template which reads one is given, YYYY-MM-DD; today if not given.
        template_args: further arguments of the chat template, such as enable_thinking=false, as NAME=VALUE,NAME=VALUE.
    """

    checkpoint: str
    window: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"

    file: list[str] = field(default_factory=list)
    system: str | None = None
    cut: Literal["start", "middle", "end"] | None = None
    max_new_tokens: int | None = None
    date: str | None = None
    template_args: str = ""


@dataclass
class ChatConfig(AskConfig):
    """Settings of `endprompt chat`.

    Prompt:
        forget: leave out the oldest turns when the window is full, instead of asking to clear the conversation.
    """

    forget: bool = False


@dataclass
class GenerateConfig(AskConfig):
    """Settings of `endprompt generate`.

    Prompt:
        ask: question behind the texts; without one they are continued as they stand.
        plain: do not use the checkpoint's chat template.
    """

    ask: str | None = None
    plain: bool = False


@dataclass
class FetchConfig:
    """Settings of `endprompt fetch`.

    Args:
        suites: ruler (essays, SQuAD, HotpotQA, word list; 60 MB), longbench (its 21 sets and LongBench-E; 114 MB),
            longbench-v2 (465 MB), ruler-v2 (MMLU, HotpotQA), mrcr, babilong (3.1 GB), infinitebench (2.5 GB).
        data_dir: folder that they come into, for the data_dir of `endprompt score`.
        only: files whose kind begins so, such as 4k,32k of babilong; default all.
    """

    suites: list[str]
    data_dir: str = "data"
    only: str = ""


@dataclass
class ReportConfig:
    """Settings of `endprompt report`.

    Args:
        runs: run directories (of extend, score, verify, demo, lab), or files of result rows.
        output: the page; report.html in the first run if not given.
        open: open the page in a browser.
    """

    runs: list[str]
    output: str | None = None
    open: bool = False


@dataclass
class CompareConfig:
    """Settings of `endprompt compare`.

    Args:
        runs: run directories of `endprompt score`.
        reference: run that the others are compared with, by its name in the table or its directory; the first if not
            given.
        board: published tables to stand beside the runs, separated by commas: ruler, longbench, helmet.
        page: file for a page of HTML with the same tables, which sort, and a picture; it loads nothing and can be
            hosted as it is.
        model_index: file for the run's scores as the front matter of a model card.
        threshold: percent that an effective length needs; RULER has what Llama-2-7B scores at 4K.
        json: print the differences, one JSON object a line, instead of tables.
    """

    runs: list[str]
    reference: str | None = None
    board: str | None = None
    page: str | None = None
    model_index: str | None = None
    threshold: float = summary.THRESHOLD
    json: bool = False


@dataclass
class TasksPathConfig:
    """`endprompt tasks-path` has no settings."""
