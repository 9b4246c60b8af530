"""RULER's second edition in `endprompt score`: a cell a task and length; the answer comes on top of the length."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.ruler import v2
from benchmarks.scoring.config import SAMPLES
from benchmarks.scoring.evaluate import MeanSuite
from benchmarks.scoring.units import Asker, Unit, asked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class RulerV2(MeanSuite):
    generator = v2.GENERATOR

    def units(self, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Unit]:
        """Raises ValueError for unknown tasks, lengths without room for the answer, and what `v2.samples` does."""
        config, asker = self.config, Asker(self.config, model_config, tokenizer)
        names = list(v2.TASKS) if config.task_names == ["all"] else config.task_names
        if unknown := [name for name in names if name not in v2.TASKS] or not names:
            raise ValueError(f"tasks of suite ruler-v2 must be all, or of {', '.join(v2.TASKS)}: {unknown}")
        new, n = config.max_new_tokens or v2.NEW_TOKENS, v2.SAMPLES if config.samples == SAMPLES else config.samples
        asker.check_room(max(config.length_list), new)
        made, own = [], (n, config.seed, config.data_dir)
        for length in config.length_list:
            for task in names:
                found = v2.samples(task, lambda text: len(asker.reader.ids([text])[0]), length, *own)
                samples = [asker.sample(asked(text), golds, new) for text, golds in found]
                about = v2.TASKS[task]
                columns = {"data_sha256": v2.library(about["kind"], config.data_dir).sha256 or None}
                score = partial(share, task)
                made.append(asker.unit(task, length, about["match"], samples, score, v2.GENERATOR, **columns))
        return made


def share(task: str, sample: dict[str, Any], answer: str) -> float:
    return v2.score(task, answer, sample["outputs"])


SUITE = RulerV2
