"""A unit is what is scored and written at once: a task at a length, with its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmarks import chat, ruler, summary
from benchmarks.ruler.cell import samples_sha256, text_sha256
from benchmarks.scoring.checkpoint import method_of, window_of
from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.predictions import Entries
from endprompt.results import result_row
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Score = Callable[[dict[str, Any], str], float]  # sample, prediction → in [0, 1]


@dataclass
class Unit:
    """One cell to score: an lm-eval task over its samples, and how its row is made. Without samples lm-eval has them.
    n_truncated: of the samples, how many were cut. prompts: the hash of each. readings: further columns of the row,
    each another score."""

    name: str  # unique: task@length
    task: str
    length: int | None
    suite: str
    metric: str
    samples: Sequence[dict[str, Any]] = ()
    score: Score = lambda sample, prediction: 0.0
    columns: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    characters: int = 0
    prompts: Sequence[str] = ()
    n_truncated: int = 0
    readings: dict[str, Score] = field(default_factory=dict)

    def known_by(self, config: ScoreConfig) -> dict[str, Any]:
        if not self.samples:
            return {"suite": self.suite, "task": self.task}
        of_samples = {"samples_sha256": self.sha256, "n": len(self.samples), "seed": config.seed}
        limit = {"max_new_tokens": self.columns["max_new_tokens"]}
        return {"suite": self.suite, "task": self.task, "length": self.length, **of_samples, **limit}


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Asker:
    """What suites make their units of: the settings, the checkpoint's configuration and tokenizer."""

    def __init__(self, config: ScoreConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase):
        self.config, self.model_config, self.tokenizer = config, model_config, tokenizer

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.tokenizer)

    @cached_property
    def window(self) -> int:
        return window_of(self.config, self.model_config)

    @cached_property
    def template(self) -> Callable[..., str] | None:
        return chat.renderer(self.tokenizer, *self.config.templated) if self.config.chat else None

    def names(self, known: Sequence[str]) -> list[str]:
        """The tasks that are asked for. Raises ValueError for one that the suite has not."""
        names = list(known) if self.config.task_names == ["all"] else self.config.task_names
        if unknown := [name for name in names if name not in known] or not names:
            raise ValueError(f"tasks of suite {self.config.suite} must be all, or of {', '.join(known)}: {unknown}")
        return names

    def check_room(self, length: int, new_tokens: int) -> None:
        """Raises ValueError if a prompt of `length` leaves no room for its answer."""
        if length + new_tokens > self.window:
            raise ValueError(
                f"prompt and answer must be at most the window {self.window}: {length} + {new_tokens} tokens "
                "(max_new_tokens sets the answer's)"
            )

    def sample(
        self, messages: Sequence[Mapping[str, str]], outputs: Sequence[str], new_tokens: int, **more: Any
    ) -> dict[str, Any]:
        """A sample as lm-eval's model is asked; `length` counts BOS and template, too."""
        text = self.template(messages, add_generation_prompt=True) if self.template else messages[-1]["content"]
        length = len(self.reader.prompts([text])[0])
        return {"input": text, "outputs": list(outputs), "length": length, "max_new_tokens": new_tokens, **more}

    def unit(
        self, task: str, length: int | None, metric: str, samples: Sequence[dict[str, Any]], score: Score,
        generator: str, chat: bool | None = None, **columns: Any,
    ) -> Unit:  # fmt: skip
        """The cell of a task; chat: whether its prompts are wrapped, where the settings alone do not say. Raises
        ValueError for a prompt that is over the window with its answer."""
        config, new_tokens = self.config, samples[0]["max_new_tokens"]
        self.check_room(max(sample["length"] for sample in samples), new_tokens)
        chat = config.chat if chat is None else chat
        about = {"window": self.window, "max_new_tokens": new_tokens, "chat": chat, "generator": generator}
        about |= {"date": config.date if chat else None, **(config.asked_in_chat if chat else {}), **columns}
        samples = [{"index": index, **sample} for index, sample in enumerate(samples)]
        unit = Unit(f"{task}@{length}" if length else task, task, length, config.suite, metric, samples, score, about)
        unit.prompts = [text_sha256(sample["input"]) for sample in samples]
        unit.sha256 = samples_sha256(samples)
        unit.characters = sum(len(sample["input"]) for sample in samples)
        unit.n_truncated = sum(bool(sample.get("truncated")) for sample in samples)
        return unit


def about(config: ScoreConfig, settings: str) -> dict[str, Any]:
    """The columns that all rows of a call share."""
    named = {"model": config.model_name, "method": method_of(config)}
    return {**named, "seed": config.seed, "run_sha256": settings}


def mean_rows(config: ScoreConfig, made: Sequence[Mapping[str, Any]], settings: str) -> list[dict[str, Any]]:
    common = {"suite": config.suite, "metric": "mean_over_tasks", **about(config, settings)}
    cells: dict[int | None, list[float]] = {}
    for row in made:
        cells.setdefault(row["length"], []).append(row["value"])
    return [result_row(task="average", length=n, value=sum(own) / len(own), **common) for n, own in cells.items()]


def needed(unit: Unit) -> int:
    """Window that the unit's longest prompt and its generation take."""
    if isinstance(unit.samples, ruler.Cell):
        recipe = unit.samples.recipe  # a prompt of RULER's own making may be over its length
        longest = max(tokens for _, tokens in recipe["samples"])
        return max(recipe["length"], longest + recipe["max_new_tokens"])
    return max(sample["length"] + sample["max_new_tokens"] for sample in unit.samples)


def contexts_cut(requests: Sequence[tuple[Any, list[int], list[int]]], limit: int) -> set[str]:
    """Contexts that are over so many tokens with their answer: lm-eval takes what is too long off their left."""
    return {texts[0] for texts, context, answer in requests if texts and len(context) + len(answer) > limit}


def shortest_prompt(unit: Unit) -> int:
    if isinstance(unit.samples, ruler.Cell):  # without rendering any
        return min(tokens for _, tokens in unit.samples.recipe["samples"])
    return min(sample["length"] for sample in unit.samples)


def row(config: ScoreConfig, unit: Unit, scores: Sequence[float], settings: str) -> dict[str, Any]:
    percent = [100 * value for value in scores]
    ci95, kind = summary.interval(percent, config.seed)
    return result_row(
        suite=unit.suite,
        task=unit.task,
        length=unit.length,
        metric=unit.metric,
        value=sum(percent) / len(percent),
        stderr=summary.standard_error(percent),
        ci95=ci95,
        n=len(percent),
        n_truncated=unit.n_truncated,
        samples_sha256=unit.sha256,
        ci=kind,
        backend=config.backend,
        attn=config.attn if config.backend == "hf" else None,
        dtype=None if config.backend == "server" else config.dtype,
        **about(config, settings),
        **{key: value for key in ("answers", "backend_args") if (value := getattr(config, key))},
        **unit.columns,
    )


def predicted(entries: Entries, unit: Unit) -> list[tuple[dict[str, Any], str]]:
    """(sample, prediction) of each sample of a unit that was answered; RULER's samples without their prompt."""
    limit = unit.columns["max_new_tokens"]
    found = []
    for i, prompt in enumerate(unit.prompts):
        if entry := entries.get((unit.name, i, prompt, limit)):
            sample = unit.samples.sample(i, whole=False) if isinstance(unit.samples, ruler.Cell) else unit.samples[i]
            found.append((sample, entry["prediction"]))
    return found
