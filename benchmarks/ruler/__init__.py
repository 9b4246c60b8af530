"""RULER's 13 tasks: samples that fill a token budget exactly."""

from benchmarks.ruler.cell import Cell, build_samples
from benchmarks.ruler.tasks import SPECS, TASKS, Options, score

__all__ = ["SPECS", "TASKS", "Cell", "Options", "build_samples", "score"]
