"""Learning rates by arm: chosen by the held-out loss in one run, taken over by another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from endprompt.config import ExtendConfig
from endprompt.files import read_object, write_text


def rate_key(arm: str, settings: Mapping[str, Any]) -> str:
    return f"{arm}+{settings.get('scaling', ExtendConfig.scaling)}"


def read_rates(path: str | None) -> dict[str, float]:
    """Learning rates by arm and scaling. Raises ValueError naming file and entry for what is no rate."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"rates must be a file that a run of the rates has written: rates={path!r}")
    found = read_object(path)
    for key, value in found.items():
        if not isinstance(value, float) or not value > 0:
            raise ValueError(f"{path}: {key} must be a learning rate above 0: {value!r}")
    return found


def write_rates(path: Path, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of arms that were trained at several rates the one with the lowest held-out loss at the target, mean over seeds.

    Nothing but the loss is looked at. Nothing is written where no arm has several rates.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["suite"] == "lab" and row["task"] == "loss" and row["length"] == row["target"] and row.get("lr"):
            arm = row["arm"].partition("@")[0]
            found.setdefault(arm, {}).setdefault(float(row["lr"]), []).append(float(row["value"]))
    best = {
        arm: min(by_rate, key=lambda rate: sum(by_rate[rate]) / len(by_rate[rate]))
        for arm, by_rate in found.items()
        if len(by_rate) > 1
    }
    if best:
        write_text(path, json.dumps(best, indent=2) + "\n")
    return best
