"""Question 7 of the lab, its estimates and verdicts."""

from __future__ import annotations

from paper_figures import questions
from paper_figures.data import Frames
from paper_figures.table import Table

TITLE = questions.title(7)
INPUTS = questions.INPUTS


def build(frames: Frames) -> Table:
    return questions.build(frames, 7)
