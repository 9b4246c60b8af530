"""LongBench in `endprompt score`: a cell a set, without length."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import chat
from benchmarks.longbench import TASKS, averages, dataset_of, load_documents, metrics, prompts
from benchmarks.longbench.cache import cached_fits
from benchmarks.longbench.samples import score, select
from benchmarks.ruler.cache import default_directory, tokenizer_sha256
from benchmarks.ruler.cell import samples_sha256, text_sha256
from benchmarks.scoring.checkpoint import window_of
from benchmarks.scoring.compare import read_run
from benchmarks.scoring.evaluate import SampleSuite
from benchmarks.scoring.summaries import about
from benchmarks.scoring.units import Unit, predicted
from endprompt.results import read_rows, write_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from endprompt.runs import RunDirectory


class LongBench(SampleSuite):
    generator = prompts.GENERATOR

    def units(self, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Unit]:
        """All data are read before any model. Raises what `load_documents` and `Prompter.fit` do."""
        config = self.config
        window = window_of(config, model_config)
        template = chat.renderer(tokenizer, *config.templated) if config.chat else None
        directory = config.cache_dir or default_directory()
        tokenizer_hash = tokenizer_sha256(tokenizer)
        # All files are read, and so checked, before the first prompt is made; texts are let go set by set.
        found = {task: load_documents(task, config.data_dir) for task in select(config.task_names)}
        made = []
        for task in list(found):
            rules, documents = dataset_of(task), found.pop(task)
            prompter = prompts.Prompter(
                task,
                tokenizer,
                window,
                prompt_length=config.prompt_length,
                chat_template=template,
                max_new_tokens=config.max_new_tokens,
            )
            fits = cached_fits(prompter, documents, config.samples, tokenizer_hash, directory)
            samples = prompter.samples(documents.items[: config.samples], fits)
            filled = [(sample["length"] + sample["max_new_tokens"]) / window for sample in samples]
            columns = {
                "category": rules.category,
                "language": rules.language,
                "window": window,
                "prompt_length": config.prompt_length,
                "fill": round(sum(filled) / len(filled), 5),
                "max_new_tokens": prompter.new_tokens,
                "chat": config.chat and rules.chat,
                "date": config.date if config.chat and rules.chat else None,
                **(config.asked_in_chat if rules.chat else {}),
                "data_sha256": documents.sha256,
                "generator": prompts.GENERATOR,
            }
            suite = "longbench" if task in TASKS else "longbench_e"
            unit = Unit(task, task, None, suite, rules.metric, samples, partial(share, task), columns)
            unit.prompts = [text_sha256(sample["input"]) for sample in samples]
            unit.sha256 = samples_sha256(samples)
            unit.characters = sum(len(sample["input"]) for sample in samples)
            unit.n_truncated = sum(bool(sample["truncated"]) for sample in samples)
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
    """The score of a sample's prediction, in [0, 1]."""
    return score(task, prediction, sample["outputs"], sample["all_classes"]) / 100


SUITE = LongBench
