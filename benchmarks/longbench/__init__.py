"""LongBench: sets, prompts, metrics, averages."""

from benchmarks.longbench.prompts import Prompter
from benchmarks.longbench.samples import build_samples, score, select
from benchmarks.longbench.sets import TASKS, TASKS_E, Documents, dataset_of, load_documents

__all__ = [
    "TASKS",
    "TASKS_E",
    "Documents",
    "Prompter",
    "build_samples",
    "dataset_of",
    "load_documents",
    "score",
    "select",
]
