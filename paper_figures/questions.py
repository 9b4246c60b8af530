"""The lab's seven questions as tables and as a page, from the rows that `benchmarks.lab.verdicts` writes."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from paper_figures.inputs import Frames, Inputs
from paper_figures.names import QUESTIONS, SCALINGS, short_length
from paper_figures.table import Row, Section, Table, Value

#: The columns of an estimate that the tables and the page read, beyond those of every row.
COLUMNS = (
    "question",
    "family",
    "labels",
    "base",
    "fold",
    "scaling",
    "scores",
    "primary",
    "p_holm",
    "verdict",
    "sentence",
    "source",
    "claim",
    "agrees",
    "pareto_share",
    "train_tokens",
    "gpu_seconds",
    "against",
)
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
METRICS = {
    "score_difference": "",
    "interaction_fold": "how much larger than at",
    "interaction_scaling": "how much larger than with",
}


def title(number: int) -> str:
    return f"Question {number}: {QUESTIONS[number]}"


@dataclass(frozen=True)
class Question:
    """The table of one question: TITLE, INPUTS and build(frames) -> Table, as the module of a figure has them."""

    number: int
    INPUTS = INPUTS

    @property
    def TITLE(self) -> str:
        return title(self.number)

    def build(self, frames: Frames) -> Table:
        return build(frames, self.number)


TABLES = {f"question_{number}": Question(number) for number in QUESTIONS}


def build(frames: Frames, number: int) -> Table:
    rows = estimates(frames, number)
    costs = rows["metric"].str.startswith("score_by")
    sections = [*compared(rows[~costs])]
    if number == 6:
        sections = [*cost_sections(rows[costs]), *sections]
    return Table(
        name=f"question_{number}",
        caption=f"{QUESTIONS[number]} Measured here, small scale: mean RULER scores over {TASKS_OF[number]}.",
        first="arm, or two arms compared" if number == 6 else "arms compared",
        columns=["first", "second", "estimate", "low", "high", "p (Holm)", "seeds", "verdict"],
        sections=sections,
        note=" ".join([RULE, *[COSTS] * (number == 6), *claims(frames, number)["sentence"]]),
        digits=1,
    )


TASKS_OF = {number: "four tasks at the target length" for number in QUESTIONS} | {
    7: "four tasks, and loss, inside the window, after and before"
}


def estimates(frames: Frames, number: int) -> pd.DataFrame:
    """The estimates of one question that tables show: at the target length (question 7: at the window)."""
    rows = frames["lab-question"].reindex(columns=dict.fromkeys([*frames["lab-question"].columns, *COLUMNS]))
    rows = rows[(rows["task"] == f"q{number}") & (rows["metric"] != "claim")]
    return rows[rows["primary"].astype(bool)]


def claims(frames: Frames, number: int) -> pd.DataFrame:
    rows = frames["lab-question"].reindex(columns=dict.fromkeys([*frames["lab-question"].columns, *COLUMNS]))
    return rows[(rows["task"] == f"q{number}") & (rows["metric"] == "claim")]


def compared(rows: pd.DataFrame) -> list[Section]:
    """A section for each kind of comparison at one base, fold and scaling."""
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
    return Row(" against ".join(names(row)), [*ends, *values, p, f"{row['n']:.0f}", row["verdict"]], origin(row))


def cost_sections(rows: pd.DataFrame) -> list[Section]:
    """Question 6: the arms in the Pareto set by training tokens and by GPU-seconds, with what they cost.

    first, second: million training tokens and GPU-seconds. p stands for the share of the resamples in the set.
    """
    sections = []
    for (metric, base, fold), group in rows.groupby(["metric", "base", "fold"], sort=False):
        lines = []
        for row in group.sort_values("value", ascending=False, kind="stable").to_dict("records"):
            cost = [f"{row['train_tokens'] / 1e6:.2f}", f"{row['gpu_seconds']:.1f}"]
            values = [number(row[key], 1, sign="") for key in ("value", "lo", "hi")]
            share = f"{row['pareto_share']:.2f}"
            name = f"{row['labels'][0]}, {SCALINGS.get(row['scaling'], row['scaling'])}"
            if row["pareto_share"] >= PARETO_SHOWN:
                lines.append(Row(name, [*cost, *values, share, f"{row['n']:.0f}", row["verdict"]], origin(row)))
        by = metric.removeprefix("score_by_")
        heading = f"best by {'training tokens' if by == 'tokens' else 'GPU-seconds'}: base {base}, {fold:.0f}-fold"
        sections.append(Section(heading, lines, best=False))
    return sections


#: Arms that are in the Pareto set in fewer of the resamples than this are not listed.
PARETO_SHOWN = 0.05


def setting(row: dict) -> str:
    if row["base"] == "all":
        return "all bases and folds"
    scaling = "all scalings" if row["scaling"] == "all" else SCALINGS.get(row["scaling"], row["scaling"])
    if row["family"] == "YaRN against PI":
        scaling = "both scalings"
    return f"base {row['base']}, {row['fold']:.0f}-fold, {scaling}, at {short_length(row['length'])}"


def number(value: float | None, digits: int, sign: str = "+") -> str | None:
    return None if value is None or value != value else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no -0.0


def origin(row: dict) -> str:
    return f"measured: {row['origin']}"


def findings(frames: Frames, number: int) -> list[tuple[str, str, str, str]]:
    """(said by, claim, what was found, whether it holds) of each claim; the second and third make its sentence."""
    return [
        (row["source"], row["claim"], row["sentence"].partition("; this ")[0], HOLDS[row["agrees"]])
        for row in claims(frames, number).to_dict("records")
    ]


HOLDS = {"agrees": "holds", "does not agree": "does not hold", "not decided": "not decided"}


def side_by_side(frames: Frames, number: int) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, heads, lines) for each base and fold: a line for two arms that are compared, a column a scaling."""
    rows = estimates(frames, number)
    found = []
    for (base, fold), group in rows.groupby(["base", "fold"], sort=False, dropna=False):
        several = group["scaling"].nunique() > 1
        scalings = list(dict.fromkeys(group["scaling"]))
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for row in group[~group["metric"].str.startswith("score_by")].to_dict("records"):
            key = (kind(row), " against ".join(names(row)))
            lines.setdefault(key, {})[row["scaling"]] = cell(row)
        heads = ["compared", "arms", *(SCALINGS.get(s, "all" if s == "all" else s) for s in scalings)]
        body = [[*key, *(cells.get(s, "") for s in scalings)] for key, cells in lines.items()]
        target = "" if base == "all" else f", {fold:.0f}-fold to {group['target'].iloc[0]:.0f}"
        where = "All bases and folds" if base == "all" else f"Base {base}{target}"
        seeds = sorted({f"{n:.0f}" for n in group["n"]}, key=int)
        count = seeds[0] if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        if lines:
            found.append((f"{where}, {count} seeds", heads if several else [*heads[:2], "estimate"], body))
    return found


def kind(row: dict) -> str:
    """What is compared: the family, and for an interaction what it is larger than."""
    if row["metric"] == "loss_difference":
        return "loss on held-out text, nats per token"
    what = METRICS.get(row["metric"])
    return f"{row['family']}, {what} {row['against']}" if what else row["family"]


def names(row: dict) -> list[str]:
    """The arms compared; the first alone where the second is the same, or the base."""
    arms = list(dict.fromkeys(row["labels"]))
    return arms[:1] if row["metric"] == "rank_correlation" or row["family"] == "after against before" else arms


def digits_of(row: dict) -> int:
    return 3 if row["metric"] == "loss_difference" else 2 if row["metric"] == "rank_correlation" else 1


def cell(row: dict) -> str:
    """`+6.0 [+4.0, +8.0] helps`"""
    low, high = (number(row[key], digits_of(row)) for key in ("lo", "hi"))
    span = f" [{low}, {high}]" if low else ""
    return f"{number(row['value'], digits_of(row))}{span} {row['verdict']}"
