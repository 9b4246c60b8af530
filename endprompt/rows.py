"""Result rows and run directories: the one definition of what a number carries with it.

A run directory holds `config.yaml` (resolved), `environment.json` (git revision, versions, device), `results.jsonl`
(one row a line), `log.jsonl`, and what the run made. A missing value is an absent row, never -1 and never 0.
This module imports nothing of the project and no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1
REQUIRED = (
    "suite",
    "task",
    "length",
    "metric",
    "value",
    "stderr",
    "ci95",
    "n",
    "n_truncated",
    "model",
    "method",
    "seed",
    "samples_sha256",
)
PACKAGES = ("torch", "transformers", "lm_eval", "numpy", "scipy", "tokenizers", "safetensors", "triton", "datasets")


def result_row(
    *,
    suite: str,
    task: str,
    metric: str,
    value: float,
    model: str,
    method: str,
    seed: int | None,
    length: int | None = None,
    stderr: float | None = None,
    ci95: tuple[float, float] | list[float] | None = None,
    n: int | None = None,
    n_truncated: int = 0,
    samples_sha256: str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One row of results. Scores are percent; `method` is `base` for an unextended model.

    `seed` is None for an estimate over several seeds. `extra` adds columns (haystack, scheme, device ...). Raises
    ValueError if the value is not finite or lies outside its own interval.
    """
    if not math.isfinite(value):
        raise ValueError(f"a result must be finite (leave the row out instead): {suite=} {task=} {metric=} {value=}")
    if ci95 is not None:
        lo, hi = float(ci95[0]), float(ci95[1])
        slack = 1e-9 * max(1.0, abs(lo), abs(hi))
        if not lo - slack <= value <= hi + slack:
            raise ValueError(f"a result must lie in its interval: {suite=} {task=} {metric=} {value=} ci95={[lo, hi]}")
        ci95 = [lo, hi]
    return {
        "schema": SCHEMA,
        "suite": suite,
        "task": task,
        "length": length,
        "metric": metric,
        "value": float(value),
        "stderr": stderr,
        "ci95": ci95,
        "n": n,
        "n_truncated": n_truncated,
        "model": model,
        "method": method,
        "seed": seed,
        "samples_sha256": samples_sha256,
        **extra,
    }


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file, whole lines only, flushed to the disk before it returns."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash cut the line before off: leave it to be reported, do not glue onto it
                file.write(b"\n")
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | os.PathLike[str], required: tuple[str, ...] = REQUIRED) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file. Raises ValueError naming file, line and column if one is broken."""
    rows = []
    for number, row in read_json_lines(path):
        missing = [key for key in required if key not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: a row of results must have the columns {missing}")
        rows.append(row)
    return rows


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line. Raises ValueError naming file and line if one is not an object."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                start = line.strip()[:60]
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}): {start!r}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object, got {type(row).__name__}")
            yield number, row


def sha256_of(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def git_revision() -> str | None:
    """Revision of the checkout this code runs from, with `-dirty` if tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        if head.returncode != 0:
            return os.environ.get("ENDPROMPT_REVISION")
        state = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("ENDPROMPT_REVISION")
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """Provenance: revision, Python, package versions, device. Reads torch only if it is imported already."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device: dict[str, Any] = {"machine": platform.machine(), "cpu_count": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device["gpu"] = torch.cuda.get_device_name()
        device["cuda"] = torch.version.cuda
    return {
        "revision": git_revision(),
        "python": platform.python_version(),
        "packages": versions,
        "device": device,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class RunDirectory:
    """A run's directory: made once, config and environment written at the start, rows and log appended as they come."""

    def __init__(self, path: str | os.PathLike[str], config: Any = None):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.results = self.path / "results.jsonl"
        if config is not None:
            write_yaml(self.path / "config.yaml", config)
        write_text(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")

    def log(self, **record: Any) -> None:
        append_rows(self.path / "log.jsonl", [{"time": round(time.time(), 3), **record}])

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_rows(self.results, rows)


def write_yaml(path: str | os.PathLike[str], config: Any) -> None:
    import yaml

    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    write_text(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def plain(value: Any) -> Any:
    """The value in terms of YAML's own types (paths as strings, tuples as lists)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file complete or not at all: written aside, flushed, renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
