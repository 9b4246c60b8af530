"""Rows of finished runs, and the files that are written when cells are finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.scoring import fingerprint
from benchmarks.scoring.checkpoint import method_of
from benchmarks.scoring.config import ScoreConfig
from endprompt.results import read_rows


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


def about(config: ScoreConfig, settings: str) -> dict[str, Any]:
    """The columns that all rows of a call share."""
    named = {"model": config.model_name, "method": method_of(config)}
    return {**named, "seed": config.seed, "run_sha256": settings}
