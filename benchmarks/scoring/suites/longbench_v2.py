"""LongBench v2 in `endprompt score`: one cell, without length; averages by difficulty, length and domain."""

from __future__ import annotations

from typing import Any

from benchmarks import summary
from benchmarks.longbench import v2
from benchmarks.scoring.evaluate import SampleSuite
from benchmarks.scoring.predictions import read_run
from benchmarks.scoring.suites.longbench import unit_of
from benchmarks.scoring.units import Asker, Unit, about, predicted
from endprompt.results import read_rows, result_row, write_rows
from endprompt.runs import RunDirectory


class LongBenchV2(SampleSuite):
    generator = v2.GENERATOR

    def units(self, asker: Asker) -> list[Unit]:
        """Raises what `v2.load_documents` and `Prompter.fit` do."""
        config = self.config
        if config.task_names not in (["all"], [v2.TASK]):
            raise ValueError(f"tasks of suite longbench-v2 must be all: tasks={config.tasks!r}")
        window, documents = asker.window, v2.load_documents(config.data_dir)
        options: dict[str, Any] = {"chat_template": asker.template, "max_new_tokens": config.max_new_tokens}
        prompter = v2.QuestionPrompter(v2.TASK, asker.tokenizer, window, config.prompt_length, **options)
        n = config.limit or len(documents.items)
        columns: dict[str, Any] = {
            "questions_whole": min(n, len(documents.items)) == v2.QUESTIONS,
            "generator": v2.GENERATOR,
        }
        unit = unit_of(asker, prompter, documents, n, "accuracy", v2.score, **columns)
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
