"""RULER in `endprompt score`: a cell a task and length."""

from __future__ import annotations

import shutil
from typing import Any

from benchmarks import ruler, summary
from benchmarks.ruler import cache, tasks
from benchmarks.scoring.checkpoint import window_of
from benchmarks.scoring.evaluate import SampleSuite
from benchmarks.scoring.predictions import Entries, read_run
from benchmarks.scoring.units import Asker, Unit, about, needed, predicted
from endprompt.results import result_row, write_rows
from endprompt.runs import RunDirectory


class Ruler(SampleSuite):
    generator = tasks.GENERATOR

    def units(self, asker: Asker) -> list[Unit]:
        """Samples from the cache. Raises ValueError for unknown tasks, and lengths over the window."""
        config = self.config
        names = list(ruler.TASKS) if config.task_names == ["all"] else config.task_names
        for name in names:
            tasks.check_task(name)
            tasks.check_writable(name, asker.reader)
        if not names:
            raise ValueError("tasks must name at least one task, or be all")
        asked = 1 if config.beyond_window or config.prepare_only else max(config.length_list)
        window = window_of(config, asker.model_config, asked)
        over = [length for length in config.length_list if length > window]
        if over and not config.beyond_window and not config.prepare_only:
            less = f", less {config.thought_tokens} tokens of thought" if config.thought_tokens else ""
            raise ValueError(
                f"lengths must be at most the window {window}{less}: {over} (beyond_window allows longer ones)"
            )
        wanted = [(task, length) for length in config.length_list for task in names]
        settings = (config.samples, config.seed, config.data_dir, config.options, config.cache_dir)
        units = [ruler_unit(cell) for cell in cache.cells(wanted, asker.tokenizer, *settings)]
        for unit in units:
            unit.columns |= config.asked_in_chat
            if needed(unit) > window and not config.beyond_window and not config.prepare_only:
                raise ValueError(
                    f"{unit.name}: prompt and generation must be at most the window {window}, and edition "
                    f"{config.edition} keeps too little room for the answer: {needed(unit)} (beyond_window allows it)"
                )
        return units

    def summarise(self, out: RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str) -> None:
        common = {"suite": "ruler", **about(self.config, settings)}
        write_rows(out.path / "summary.jsonl", [result_row(**common, **one) for one in summary.ruler_summary(made)])
        entries = read_run(self.config.directory, settings)
        needles = [entry for unit in units for entry in found_by_depth(entries, unit)]
        write_rows(out.path / "depth.jsonl", [common | one for one in summary.depth_table(needles)])

    def table(self, made: list[dict[str, Any]]) -> str:
        return summary.table(made, shutil.get_terminal_size().columns)


def ruler_unit(cell: ruler.Cell) -> Unit:
    recipe, options = cell.recipe, cell.options
    metric = "string_match_part" if ruler.SPECS[recipe["task"]].metric == "any" else "string_match_all"
    kept, length = recipe["max_new_tokens"], recipe["length"]
    filled = [(tokens + kept) / length for _, tokens in recipe["samples"]]
    columns = {
        "haystack": recipe["haystack"],
        "haystack_sha256": recipe["haystack_sha256"],
        "fill": round(sum(filled) / len(filled), 5),
        "max_new_tokens": kept,
        "edition": options.edition,
        "chat": options.chat,
        "chat_layout": options.layout,
        "generator": recipe["generator"],
        **{name: value for name in ("date", "template_args") if (value := getattr(options, name))},
    }
    if recipe["questions"] is not None:
        columns |= {"questions": recipe["questions"]["count"], "questions_whole": recipe["questions"]["whole"]}
    family = ruler.SPECS[recipe["task"]].family
    columns |= {"shots": options.shots} if family in ("vt", "cwe") else {}
    columns |= {"hops": options.hops} if family == "vt" else {}
    task, kept = recipe["task"], (recipe["samples_sha256"], recipe["characters"], recipe["prompts"])
    return Unit(f"{task}@{length}", task, length, "ruler", metric, cell, found_share, columns, *kept)


def found_share(sample: dict[str, Any], prediction: str) -> float:
    return ruler.score(sample["task"], prediction, sample["outputs"])


def found_by_depth(entries: Entries, unit: Unit) -> list[dict[str, Any]]:
    """Per sample with needles: length, depth and whether each answer is in the prediction."""
    return [
        {
            "length": unit.length,
            "depth": sample["depth"],
            "found": [answer.lower() in tasks.clean(prediction).lower() for answer in sample["outputs"]],
        }
        for sample, prediction in predicted(entries, unit)
        if sample["depth"]
    ]


SUITE = Ruler
