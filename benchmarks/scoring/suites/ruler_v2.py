"""RULER's second edition in `endprompt score`: a cell a task and length; the answer comes on top of the length."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.ruler import v2
from benchmarks.scoring.evaluate import MeanSuite
from benchmarks.scoring.units import Asker, Unit, asked


class RulerV2(MeanSuite):
    generator = v2.GENERATOR

    def units(self, asker: Asker) -> list[Unit]:
        """Raises ValueError for unknown tasks, lengths without room for the answer, and what `v2.samples` does."""
        config, names = self.config, asker.names([*v2.TASKS])
        new, own = config.max_new_tokens or v2.NEW_TOKENS, (config.limit or v2.SAMPLES, config.seed, config.data_dir)
        asker.check_room(max(config.length_list), new)
        made = []
        for length in config.length_list:
            for task in names:
                found = v2.samples(task, lambda text: len(asker.reader.ids([text])[0]), length, *own)
                samples = [asker.sample(asked(text), golds, new) for text, golds in found]
                about = v2.TASKS[task]
                columns: dict[str, Any] = {"data_sha256": v2.library(about["kind"], config.data_dir).sha256 or None}
                score = partial(share, task)
                made.append(asker.unit(task, length, about["match"], samples, score, v2.GENERATOR, **columns))
        return made


def share(task: str, sample: dict[str, Any], answer: str) -> float:
    return v2.score(task, answer, sample["outputs"])


SUITE = RulerV2
