"""What is written when cells are finished: averages, effective lengths, needles by depth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ruler, summary
from benchmarks.ruler.tasks import clean
from benchmarks.scoring import fingerprint
from benchmarks.scoring.checkpoint import method_of
from benchmarks.scoring.compare import Entries, read_run
from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.units import Unit
from endprompt import files, runs
from endprompt.results import read_rows, result_row

# --------------------------------------------------------------------------------------------------------------- run


def rows_of(checkpoint: str | Path, run: str | Path) -> list[dict[str, Any]]:
    """The rows of a finished run that were scored on this very checkpoint, the latest of each task and length.

    Raises ValueError if the run has none: the checkpoint's configuration and weights must be those of the rows.
    """
    from endprompt import model

    directory = Path(run)
    results = directory / "results.jsonl"
    if not results.is_file():
        raise ValueError(f"{run} must be the output of `endprompt score`: it has no results.jsonl")
    known = fingerprint.runs(directory)
    if not known:
        raise ValueError(f"{directory}: scored before runs told their checkpoint ({fingerprint.RUNS}): score it again")
    config = model.load_config(str(checkpoint))
    settings = known[-1]["run_sha256"]
    found = {}
    if known[-1]["fingerprint"].get("checkpoint") == fingerprint.checkpoint_sha256(str(checkpoint), config):
        of_run = [row for row in read_rows(results) if row.get("run_sha256") == settings]
        found = {(row["suite"], row["task"], row["length"]): row for row in of_run}
    if not found:
        raise ValueError(f"{results}: none of its rows was scored on {checkpoint} as it is now")
    return sorted(found.values(), key=lambda row: (row["suite"], row["task"], row["length"] or 0))


# ----------------------------------------------------------------------------------------------------------- summary


def write_summary(
    config: ScoreConfig, out: runs.RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str
) -> None:
    """Averages, and RULER's heat map, of the cells of this call, each file written whole."""
    about: dict[str, Any] = {"model": config.model_name, "method": method_of(config), "seed": config.seed}
    about["run_sha256"] = settings
    entries = read_run(config.directory, settings)
    if config.suite == "longbench":
        from benchmarks.longbench.averages import summary_rows

        scored = {
            unit.task: [{**s, "score": 100 * unit.score(s, text)} for s, text in predicted(entries, unit)]
            for unit in units
        }
        write_lines(out.path / "summary.jsonl", summary_rows(scored, **about))
        return
    averages = [result_row(suite="ruler", **about, **entry) for entry in summary.ruler_summary(made)]
    write_lines(out.path / "summary.jsonl", averages)
    needles = [entry for unit in units for entry in found_by_depth(entries, unit)]
    write_lines(out.path / "depth.jsonl", [{"suite": "ruler", **about, **one} for one in summary.depth_table(needles)])


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def found_by_depth(entries: Entries, unit: Unit) -> list[dict[str, Any]]:
    """Per sample with needles: length, depth and whether each answer is in the prediction."""
    return [
        {
            "length": unit.length,
            "depth": sample["depth"],
            "found": [answer.lower() in clean(prediction).lower() for answer in sample["outputs"]],
        }
        for sample, prediction in predicted(entries, unit)
        if sample["depth"]
    ]


def predicted(entries: Entries, unit: Unit) -> list[tuple[dict[str, Any], str]]:
    """(sample, prediction) of each sample of a unit that was answered; RULER's samples without their prompt."""
    limit = unit.columns["max_new_tokens"]
    found = []
    for i, prompt in enumerate(unit.prompts):
        if entry := entries.get((unit.name, i, prompt, limit)):
            sample = unit.samples.sample(i, whole=False) if isinstance(unit.samples, ruler.Cell) else unit.samples[i]
            found.append((sample, entry["prediction"]))
    return found
