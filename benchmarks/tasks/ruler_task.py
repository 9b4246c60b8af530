"""RULER as an lm-eval task."""

import dataclasses
import functools
from typing import Any

from lm_eval.api.metrics import mean
from torch.utils.data import ConcatDataset

from benchmarks import ruler
from benchmarks.ruler import tasks
from benchmarks.tasks.sample_task import SampleTask, without_echo
from endprompt.text import Reader


class RulerTask(SampleTask):
    """A RULER task for plain lm-eval, with the samples and scores of `endprompt score`. `config` is the YAML file's,
    whose task is named `endprompt_<task>`; its metadata (lm-eval's --metadata and model arguments) give
    `max_seq_lengths` (4096), `samples` (500), `seed` (0), `data_dir`, `cache_dir`, the options of `ruler.Options`, and
    the tokenizer as `tokenizer`, `pretrained` or `model`. There is one metric a length that is run, named by it. With
    --apply_chat_template the template's tokens are part of the budget.
    """

    def __init__(self, config: dict[str, Any]):
        self.ruler_task = str(config["task"]).removeprefix("endprompt_")
        tasks.check_task(self.ruler_task)
        self.metadata = dict(config.get("metadata") or {})
        lengths = self.metadata.get("max_seq_lengths", [4096])
        self.lengths = [int(length) for length in (lengths if isinstance(lengths, list) else [lengths])]
        self.chat = bool(self.metadata.get("chat", False))
        self.configure(config["task"], self.metadata)

    @functools.cached_property
    def samples(self) -> ConcatDataset[dict[str, Any]]:  # type: ignore[override]
        """All lengths one after the other, rendered when read."""
        from transformers import AutoTokenizer

        from benchmarks.ruler import cache

        given = self.metadata
        name = next((given[key] for key in ("tokenizer", "pretrained", "model") if given.get(key)), None)
        if name is None:
            raise ValueError(f"{self.config.task} sizes its prompts by tokens: name a tokenizer in the metadata")
        tokenizer = AutoTokenizer.from_pretrained(name)
        Reader(tokenizer).check_plain()
        names = {option.name for option in dataclasses.fields(ruler.Options)}
        options = ruler.Options(**{**{k: v for k, v in given.items() if k in names}, "chat": self.chat})
        common = (int(given.get("samples", 500)), int(given.get("seed", 0)), given.get("data_dir"), options)
        wanted = [(self.ruler_task, length) for length in self.lengths]
        cells: list[Any] = [*cache.cells(wanted, tokenizer, *common, given.get("cache_dir"))]
        return ConcatDataset(cells)

    def build_all_requests(
        self,
        *,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        **kwargs: Any,
    ) -> None:
        if system_instruction:
            raise ValueError(f"{self.config.task} fills its budget exactly: a system instruction does not fit")
        self.chat = self.chat or apply_chat_template
        super().build_all_requests(**kwargs)

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        prediction = without_echo(results[0], doc["input"])
        return {str(doc["budget"]): ruler.score(self.ruler_task, prediction, doc["outputs"])}

    def aggregation(self) -> dict[str, Any]:
        return {str(length): mean for length in self.lengths}

    def higher_is_better(self) -> dict[str, bool]:
        return {str(length): True for length in self.lengths}
