"""What tells one suite of tasks from another: its units, what is made of their rows, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.scoring.config import ScoreConfig

if TYPE_CHECKING:
    from benchmarks.scoring.units import Asker, Unit
    from endprompt.runs import RunDirectory

Rows = dict[str, dict[str, Any]]  # a unit's name → its row


class Suite:
    """The tasks of one run. generator: their version. model_args: further arguments of the lm-eval model."""

    generator: str

    def __init__(self, config: ScoreConfig):
        """Raises ValueError for settings that no run can use, before anything is read."""
        self.config = config
        self.model_args: dict[str, Any] = {}

    @property
    def asked(self) -> str:
        """What prompts depend on beside the settings that the fingerprint has, where they are not hashed one by one."""
        return ""

    def units(self, asker: Asker) -> list[Unit]:
        raise NotImplementedError

    def evaluate(self, units: Sequence[Unit], lm: Any, settings: str, begin: Callable[[], RunDirectory | None]) -> Rows:
        """Rows of the units, written down as they are made; `begin` gives the directory, None but in one process."""
        raise NotImplementedError

    def summarise(self, out: RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str) -> None:
        """Write what is over all cells of this call: averages, depths."""

    def table(self, made: list[dict[str, Any]]) -> str:
        return "\n".join(f"{row['task']:<12} {row['value']:6.2f}" for row in made)


#: Groups of lm-eval that are suites by a name of their own.
GROUPS = {"babilong": "babilong_longctx", "infinitebench": "infinitebench"}


def suite_of(config: ScoreConfig) -> Suite:
    name = "lm_eval" if config.suite in GROUPS else config.suite.partition(":")[0].replace("-", "_")
    found: type[Suite] = importlib.import_module(f"benchmarks.scoring.suites.{name}").SUITE
    return found(config)
