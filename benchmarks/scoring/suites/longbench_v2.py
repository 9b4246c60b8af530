"""LongBench v2 in `endprompt score`: one cell, without length; averages by difficulty, length and domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import chat, summary
from benchmarks.longbench import v2
from benchmarks.longbench.cache import cached_fits
from benchmarks.ruler.cache import default_directory, tokenizer_sha256
from benchmarks.ruler.cell import samples_sha256, text_sha256
from benchmarks.scoring.checkpoint import window_of
from benchmarks.scoring.compare import read_run
from benchmarks.scoring.config import SAMPLES
from benchmarks.scoring.evaluate import SampleSuite
from benchmarks.scoring.summaries import about
from benchmarks.scoring.units import Unit, predicted
from endprompt.results import read_rows, result_row, write_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from endprompt.runs import RunDirectory


class LongBenchV2(SampleSuite):
    generator = v2.GENERATOR

    def units(self, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Unit]:
        """Raises what `v2.load_documents` and `Prompter.fit` do."""
        config = self.config
        if config.task_names not in (["all"], [v2.TASK]):
            raise ValueError(f"tasks of suite longbench-v2 must be all: tasks={config.tasks!r}")
        window, documents = window_of(config, model_config), v2.load_documents(config.data_dir)
        template = chat.renderer(tokenizer, *config.templated) if config.chat else None
        prompter = v2.QuestionPrompter(
            v2.TASK, tokenizer, window, config.prompt_length, template, max_new_tokens=config.max_new_tokens
        )
        n = len(documents.items) if config.samples == SAMPLES else config.samples
        directory = config.cache_dir or default_directory()
        fits = cached_fits(prompter, documents, n, tokenizer_sha256(tokenizer), directory)
        samples = prompter.samples(documents.items[:n], fits)
        filled = [(sample["length"] + sample["max_new_tokens"]) / window for sample in samples]
        columns = {
            "window": window,
            "prompt_length": config.prompt_length,
            "fill": round(sum(filled) / len(filled), 5),
            "max_new_tokens": prompter.new_tokens,
            "chat": config.chat,
            "date": config.date,
            **config.asked_in_chat,
            "data_sha256": documents.sha256,
            "questions_whole": len(samples) == v2.QUESTIONS,
            "generator": v2.GENERATOR,
        }
        unit = Unit(v2.TASK, v2.TASK, None, v2.TASK, "accuracy", samples, v2.score, columns)
        unit.prompts = [text_sha256(sample["input"]) for sample in samples]
        unit.sha256 = samples_sha256(samples)
        unit.characters = sum(len(sample["input"]) for sample in samples)
        unit.n_truncated = sum(bool(sample["truncated"]) for sample in samples)
        unit.readings = {"compensated": v2.compensated}
        return [unit]

    def summarise(self, out: RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str) -> None:
        found = predicted(read_run(self.config.directory, settings), units[0])
        groups: dict[str, list[float]] = {name: [] for names in v2.GROUPS.values() for name in names}
        for sample, answer in found:
            for name in (*sample["groups"], sample["domain"]):
                groups.setdefault(name, []).append(100 * v2.score(sample, answer))
        common = {"suite": v2.TASK, "metric": "accuracy", **about(self.config, settings)}
        rows = []
        for name, scores in groups.items():
            if scores:
                ci95, kind = summary.interval(scores, self.config.seed)
                spread = summary.standard_error(scores)
                value = sum(scores) / len(scores)
                rows.append(
                    result_row(task=name, value=value, n=len(scores), ci95=ci95, ci=kind, stderr=spread, **common)
                )
        write_rows(out.path / "summary.jsonl", rows)

    def table(self, made: list[dict[str, Any]]) -> str:
        rows = [*made, *read_rows(self.config.directory / "summary.jsonl")]
        width = max(len(row["task"]) for row in rows)
        return "\n".join(f"{row['task']:<{width}} {summary.scored(row):>18} {row['n']:5}" for row in rows)


SUITE = LongBenchV2
