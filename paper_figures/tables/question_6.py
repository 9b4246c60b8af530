"""Question 6 of the lab, its estimates and verdicts."""

from __future__ import annotations

from paper_figures import questions
from paper_figures.data import Frames
from paper_figures.table import Table

TITLE = questions.title(6)
INPUTS = questions.INPUTS


def build(frames: Frames) -> Table:
    return questions.build(frames, 6)
