"""The lab's seven questions as tables and as a page, from the rows that `benchmarks.lab.verdicts` writes."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from paper_figures.inputs import Frames, Inputs
from paper_figures.names import QUESTIONS, SCALINGS, short_length
from paper_figures.table import Row, Section, Table, Value

#: The columns of an estimate that the tables and the page read, beyond those of every row.
COLUMNS = ("question", "family", "labels", "base", "fold", "scaling", "scores", "primary", "p_holm", "verdict",
           "sentence", "source", "claim", "agrees", "pareto_share", "train_tokens", "gpu_seconds",
           "against")  # fmt: skip
INPUTS = Inputs(rows={"lab-question": ("question", "family", "labels", "verdict", "sentence")}, needs_rows=True)
RULE = (
    "A difference is taken seed by seed: arms of one training seed share documents, their order and samples; 95% "
    "intervals by Student's t over the seeds. Helps or hurts: the interval is free of 0, the mean is 5 points or more, "
    "and p (Holm, over the comparisons of one kind) is below 0.05. No difference: the interval lies within 5 points of "
    "0 on both sides. Not decided: anything else. Both fail: both score below 5 percent."
)
COSTS = (
    "In the sections of the best, first is million training tokens, second GPU-seconds, estimate the score, and p the "
    "share of resamples of seeds in which the arm is in the Pareto set."
)
INTERACTIONS = {"interaction_fold": "how much larger than at", "interaction_scaling": "how much larger than with"}


@dataclass(frozen=True)
class Question:
    """The table of one question: TITLE, INPUTS and build(frames) -> Table, as the module of a figure has them."""

    number: int
    INPUTS = INPUTS

    @property
    def TITLE(self) -> str:
        return f"Question {self.number}: {QUESTIONS[self.number]}"

    def build(self, frames: Frames) -> Table:
        number = self.number
        rows, said = of_question(frames, number)
        costs = rows["metric"].str.startswith("score_by")
        tasks = "four tasks at the target length"
        if number == 7:
            tasks = "four tasks, and loss, inside the window, after and before"
        return Table(
            name=f"question_{number}",
            caption=f"{QUESTIONS[number]} Measured here, small scale: mean RULER scores over {tasks}.",
            first="arm, or two arms compared" if number == 6 else "arms compared",
            columns=["first", "second", "estimate", "low", "high", "p (Holm)", "seeds", "verdict"],
            sections=[*(cost_sections(rows[costs]) if number == 6 else []), *compared(rows[~costs])],
            note=" ".join([RULE, *[COSTS] * (number == 6), *said["sentence"]]),
            digits=1,
        )


TABLES = {f"question_{number}": Question(number) for number in QUESTIONS}


def of_question(frames: Frames, number: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the estimates of a question that tables show, at the target length or, of 7, at the window; its claims)."""
    rows = frames["lab-question"]
    rows = rows[rows["task"] == f"q{number}"].reindex(columns=dict.fromkeys([*rows.columns, *COLUMNS]))
    claims = rows["metric"] == "claim"
    return rows[~claims & rows["primary"].astype(bool)], rows[claims]


def compared(rows: pd.DataFrame) -> list[Section]:
    sections: dict[str, list[Row]] = {}
    for row in rows.to_dict("records"):
        sections.setdefault(f"{kind(row)}: {setting(row)}", []).append(line(row))
    return [Section(heading, lines, best=False) for heading, lines in sections.items()]


def line(row: dict) -> Row:
    """One estimate. first, second: the scores of both arms, or at the fewest and the most steps."""
    digits = digits_of(row)
    scores = row["scores"] if isinstance(row["scores"], list) and not row["metric"].startswith("interaction") else []
    ends: list[Value] = [f"{score:.{digits}f}" for score in (scores[0], scores[-1])] if scores else [None, None]
    values = [number(row[key], digits) for key in ("value", "lo", "hi")]
    p = None if pd.isna(row["p_holm"]) else f"{row['p_holm']:.4f}"
    cells = [*ends, *values, p, f"{row['n']:.0f}", row["verdict"]]
    return Row(" against ".join(names(row)), cells, f"measured: {row['origin']}")


def cost_sections(rows: pd.DataFrame) -> list[Section]:
    """Question 6: the arms in the Pareto set by training tokens and by GPU-seconds, with what they cost. first, second:
    million training tokens and GPU-seconds. p stands for the share of the resamples in the set."""
    sections = []
    for (metric, base, fold), group in rows.groupby(["metric", "base", "fold"], sort=False):
        lines = []
        for row in group.sort_values("value", ascending=False, kind="stable").to_dict("records"):
            cost = [f"{row['train_tokens'] / 1e6:.2f}", f"{row['gpu_seconds']:.1f}"]
            values = [number(row[key], 1, sign="") for key in ("value", "lo", "hi")]
            share = f"{row['pareto_share']:.2f}"
            name = f"{row['labels'][0]}, {SCALINGS.get(row['scaling'], row['scaling'])}"
            cells = [*cost, *values, share, f"{row['n']:.0f}", row["verdict"]]
            lines += [Row(name, cells, f"measured: {row['origin']}")] if row["pareto_share"] >= PARETO_SHOWN else []
        by = metric.removeprefix("score_by_")
        heading = f"best by {'training tokens' if by == 'tokens' else 'GPU-seconds'}: base {base}, {fold:.0f}-fold"
        sections.append(Section(heading, lines, best=False))
    return sections


PARETO_SHOWN = 0.05  # arms that are in the Pareto set in fewer of the resamples than this are not listed


def setting(row: dict) -> str:
    if row["base"] == "all":
        return "all bases and folds"
    scaling = "all scalings" if row["scaling"] == "all" else SCALINGS.get(row["scaling"], row["scaling"])
    if row["family"] == "YaRN against PI":
        scaling = "both scalings"
    return f"base {row['base']}, {row['fold']:.0f}-fold, {scaling}, at {short_length(row['length'])}"


def number(value: float | None, digits: int, sign: str = "+") -> str | None:
    return None if value is None or value != value else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no -0.0


def kind(row: dict) -> str:
    """What is compared: the family, and for an interaction what it is larger than."""
    if row["metric"] == "loss_difference":
        return "loss on held-out text, nats per token"
    what = INTERACTIONS.get(row["metric"])
    return f"{row['family']}, {what} {row['against']}" if what else row["family"]


def names(row: dict) -> list[str]:
    """The arms compared; the first alone where the second is the same, or the base."""
    arms = list(dict.fromkeys(row["labels"]))
    return arms[:1] if row["metric"] == "rank_correlation" or row["family"] == "after against before" else arms


def digits_of(row: dict) -> int:
    return 3 if row["metric"] == "loss_difference" else 2 if row["metric"] == "rank_correlation" else 1
