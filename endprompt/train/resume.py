"""Which run an output belongs to, and whether one may go on from a state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from endprompt.config import ExtendConfig, check_output
from endprompt.data import Rows
from endprompt.files import parse_object
from endprompt.results import RECORD
from endprompt.runs import plain
from endprompt.train import states as checkpoint


def finished_before(output: Path, config: ExtendConfig) -> bool:
    """Whether a resumed run ended after all: its output is whole and of the same configuration.

    With `overwrite` an output beside an unfinished run is the one that this run is to replace.
    """
    record = output / RECORD
    replaced = config.overwrite and output.with_name(output.name + ".partial").exists()
    if not (config.resume and record.is_file()) or replaced:
        return False
    saved = parse_object(record.read_bytes(), str(record)).get("config")
    if not isinstance(saved, dict):
        raise ValueError(f"{record}: must hold the run's configuration, an object `config`")
    return all(saved.get(key) == value for key, value in identity(config).items())


def check_claim(output: Path, work: Path, config: ExtendConfig) -> None:
    """Refuse to mix runs: a finished output needs `overwrite`, an unfinished one `resume` (or `overwrite`)."""
    check_output(config.output, config.overwrite, RECORD, "run")
    if config.resume and not work.exists():
        raise ValueError(f"there is no unfinished run to resume: {work} does not exist")
    if not (config.resume or config.overwrite) and work.exists() and checkpoint.states(work / "states"):
        raise ValueError(f"an unfinished run has states in {work}; set resume to go on, or overwrite to start again")


def check_identity(config: ExtendConfig, rows: Rows, about: dict[str, Any]) -> None:
    """Refuse a state of another configuration, or of data that have changed since."""
    ours, saved = identity(config), about.get("config", {})
    different = sorted(key for key in ours if saved.get(key) != ours[key])
    if different:
        key = different[0]
        raise ValueError(
            f"resume needs the configuration that the run was started with: {key}={ours[key]!r}, the state has "
            f"{saved.get(key)!r} ({', '.join(different)} differ)"
        )
    if about.get("documents") != rows.documents.fingerprint():
        raise ValueError(f"resume needs the documents that the run was started with: data={config.data} have changed")


def identity(config: ExtendConfig) -> dict[str, Any]:
    """What must agree between a run and the state it resumes from."""
    free = {"output", "resume", "overwrite", "micro_rows", "log_every", "save_every", "keep", "device", "compile"}
    free |= {"report", "divergence", "checkpointing", "deterministic", "fused"}
    free |= {key for key in vars(config) if key.startswith("eval_")}
    return {key: plain(value) for key, value in dataclasses.asdict(config).items() if key not in free}
