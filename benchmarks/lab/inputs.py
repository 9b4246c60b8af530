"""Files of the user's that a matrix asks for by `inputs`: what they hold, and where they are.

    inputs: [documents, held_out, PaulGrahamEssays.json, squad.json, hotpotqa.json]

`documents` and `held_out` are given by the flags of these names, everything else lies in --data-dir. What was made of
them is kept in the cache folder together with their hashes (`inputs.json`), so that a run goes on from the cache alone
on a machine that has none of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.config import LabConfig
from endprompt.files import read_json_lines, read_object, remembered_sha256, write_text

KEPT = "inputs.json"
FLAGS = ("documents", "held_out")


def input_path(config: LabConfig, name: str) -> Path | None:
    """Where a file is given; None if it is not."""
    given = getattr(config, name) if name in FLAGS else config.data_dir and str(Path(config.data_dir, name))
    return Path(given) if given else None


def sources(names: Sequence[str], config: LabConfig) -> dict[str, str]:
    """The sha256 of each input, and `documents_characters`; from the files, else from the cache that they were put in.
    Raises ValueError naming what is missing and how it is given; with dry_run what is missing is left out."""
    if not names:
        return {}
    kept = config.cache_directory / KEPT
    known: dict[str, str] = read_object(kept, optional=True)
    found: dict[str, str] = {}
    for name in names:
        path = input_path(config, name)
        if path is not None and path.is_file():
            found[name] = remembered_sha256(path)
            if name == "documents" and known.get(name) != found[name]:
                known["documents_characters"] = str(sum(len(text) for text in texts(path)))
        elif path is not None and name in FLAGS:
            raise ValueError(f"{name} must be a file of JSON lines with text: {name}={str(path)!r}")
        elif name in known:
            found[name] = known[name]
        elif not config.dry_run:
            flag = name if name in FLAGS else "data_dir"
            where = f": it is not in data_dir={config.data_dir!r}" if flag == "data_dir" and config.data_dir else ""
            raise ValueError(f"this matrix needs {name}{where}, and {kept} does not have it: give {flag}")
        if name == "documents" and name in found:
            found["documents_characters"] = known["documents_characters"]
    if not config.dry_run and known != found:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({**known, **found}, indent=2) + "\n")
    return found


def texts(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines. Raises ValueError naming file and line for a record without one."""
    for number, record in read_json_lines(path):
        if not isinstance(record.get("text"), str):
            raise ValueError(f"{path}, line {number}: must hold `text`")
        yield record["text"]


def piece(path: Path, number: int, characters: int) -> list[str]:
    """The texts that begin in the number-th stretch of so many characters of all texts together."""
    found, start = [], 0
    for text in texts(path):
        if start // characters == number:
            found.append(text)
        start += len(text)
    return found


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
    Nothing but the loss is looked at. Nothing is written where no arm has several rates."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["suite"] == "lab" and row["task"] == "loss" and row["length"] == row["target"] and row.get("lr"):
            arm = row["arm"].partition("@")[0]
            found.setdefault(arm, {}).setdefault(float(row["lr"]), []).append(float(row["value"]))
    several = {arm: by_rate for arm, by_rate in found.items() if len(by_rate) > 1}
    best = {arm: min(own, key=lambda rate: sum(own[rate]) / len(own[rate])) for arm, own in several.items()}
    if best:
        write_text(path, json.dumps(best, indent=2) + "\n")
    return best
