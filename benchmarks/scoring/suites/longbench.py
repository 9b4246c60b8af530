"""LongBench in `endprompt score`: a cell a set, without length."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.longbench import TASKS, averages, dataset_of, load_documents, metrics, prompts
from benchmarks.longbench.samples import score, select
from benchmarks.longbench.sets import Documents
from benchmarks.scoring.evaluate import SampleSuite
from benchmarks.scoring.predictions import read_run
from benchmarks.scoring.units import Asker, Score, Unit, about, predicted
from endprompt.results import read_rows, write_rows
from endprompt.runs import RunDirectory


def unit_of(
    asker: Asker,
    prompter: prompts.Prompter,
    documents: Documents,
    n: int | None,
    metric: str,
    score: Score,
    **columns: Any,
) -> Unit:
    """The cell of a set, the first n of its documents cut to the window by `prompter`."""
    items = documents.items[:n]
    samples = prompter.samples(items, prompter.fit(items))
    filled = sum((sample["length"] + sample["max_new_tokens"]) / asker.window for sample in samples)
    columns |= {"prompt_length": asker.config.prompt_length, "data_sha256": documents.sha256}
    fill = round(filled / len(samples), 5)
    return asker.unit(prompter.task, None, metric, samples, score, fill=fill, **columns)


class LongBench(SampleSuite):
    generator = prompts.GENERATOR

    def units(self, asker: Asker) -> list[Unit]:
        """All data are read before any model. Raises what `load_documents` and `Prompter.fit` do."""
        config = self.config
        options: dict[str, Any] = {"chat_template": asker.template, "max_new_tokens": config.max_new_tokens}
        # All files are read, and so checked, before the first prompt is made; texts are let go set by set.
        found = {task: load_documents(task, config.data_dir) for task in select(config.task_names)}
        made = []
        for task in list(found):
            rules, documents = dataset_of(task), found.pop(task)
            columns: dict[str, Any] = {
                "category": rules.category,
                "language": rules.language,
                "generator": prompts.GENERATOR,
            }
            prompter = prompts.Prompter(task, asker.tokenizer, asker.window, config.prompt_length, **options)
            score, wrapped = partial(share, task), config.chat and rules.chat
            unit = unit_of(asker, prompter, documents, config.samples, rules.metric, score, chat=wrapped, **columns)
            unit.suite = "longbench" if task in TASKS else "longbench_e"
            if rules.metric == "code_similarity":
                # Publishers had the one or the other, by what was installed beside fuzzywuzzy: points apart.
                unit.readings = {
                    "code_similarity_difflib": unit.score,
                    "code_similarity_levenshtein": levenshtein_share,
                }
            made.append(unit)
        return made

    def summarise(self, out: RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str) -> None:
        entries = read_run(self.config.directory, settings)
        scored = {
            unit.task: [{**s, "score": 100 * unit.score(s, text)} for s, text in predicted(entries, unit)]
            for unit in units
        }
        write_rows(out.path / "summary.jsonl", averages.summary_rows(scored, **about(self.config, settings)))

    def table(self, made: list[dict[str, Any]]) -> str:
        return averages.table([*made, *read_rows(self.config.directory / "summary.jsonl")])


def levenshtein_share(sample: Mapping[str, Any], prediction: str) -> float:
    return max(metrics.code_similarity_levenshtein(prediction, answer) for answer in sample["outputs"])


def share(task: str, sample: Mapping[str, Any], prediction: str) -> float:
    return score(task, prediction, sample["outputs"], sample["all_classes"]) / 100


SUITE = LongBench
