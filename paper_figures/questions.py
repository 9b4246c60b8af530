"""The lab's seven questions as tables and as a page, from the rows that `benchmarks.verdicts` writes."""

from __future__ import annotations

import itertools

import pandas as pd

from paper_figures.data import Frames, Inputs
from paper_figures.names import SCALINGS, short_length
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
QUESTIONS = {
    1: "Does the terminal anchor help beyond interpolation trained short?",
    2: "What happens when a fixed prompt is trained longer?",
    3: "Does it matter what the terminal tokens must predict?",
    4: "Where should the anchor be?",
    5: "Does the smoothness constant predict success?",
    6: "At what cost?",
    7: "Is the short window kept?",
}
RULE = (
    "A difference is taken seed by seed: arms of one training seed share documents, their order and samples; 95% "
    "intervals by Student's t over the seeds. Helps or hurts: the interval is free of 0, the mean is 5 points or more, "
    "and p (Holm, over the comparisons of one kind) is below 0.05. No difference: the interval lies within 5 points of "
    "0 on both sides. Not decided: anything else. Both fail: both score below 5 percent."
)
METRICS = {
    "score_difference": "",
    "interaction_fold": "how much larger than at",
    "interaction_scaling": "how much larger than with",
}


def title(number: int) -> str:
    return f"Question {number}: {QUESTIONS[number]}"


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
        note=" ".join([RULE, *claims(frames, number)["sentence"]]),
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
        what = METRICS.get(row["metric"])
        kind = f"{row['family']}, {what} {row['against']}" if what else row["family"]
        if row["metric"] == "loss_difference":
            kind = "loss on held-out text, nats per token"
        sections.setdefault(f"{kind}: {setting(row)}", []).append(line(row))
    return [Section(heading, lines, best=False) for heading, lines in sections.items()]


def line(row: dict) -> Row:
    """One estimate. first, second: the scores of both arms, or at the fewest and the most steps."""
    names = list(dict.fromkeys(row["labels"]))
    digits = 3 if row["metric"] == "loss_difference" else 2 if row["metric"] == "rank_correlation" else 1
    scores = row["scores"] if isinstance(row["scores"], list) and not row["metric"].startswith("interaction") else []
    ends: list[Value] = [f"{score:.{digits}f}" for score in (scores[0], scores[-1])] if scores else [None, None]
    if row["metric"] == "rank_correlation" or row["family"] == "after against before":
        names = names[:1]
    values = [number(row[key], digits) for key in ("value", "lo", "hi")]
    p = None if pd.isna(row["p_holm"]) else f"{row['p_holm']:.4f}"
    return Row(" against ".join(names), [*ends, *values, p, f"{row['n']:.0f}", row["verdict"]], origin(row))


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
        heading = (
            f"best by {'training tokens' if by == 'tokens' else 'GPU-seconds'}: base {base}, {fold:.0f}-fold (first: "
            "million training tokens, second: GPU-seconds, estimate: score, p: share of resamples in the Pareto set)"
        )
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
    return None if value is None or value != value else f"{value:{sign}.{digits}f}"


def origin(row: dict) -> str:
    return f"measured: {row['origin']}"


def findings(frames: Frames, number: int) -> list[tuple[str, str, str, str]]:
    """(said by, claim, what was found, whether it holds) of each claim, the sentence's own parts."""
    out = []
    for row in claims(frames, number).to_dict("records"):
        found = row["sentence"].partition("; this ")[0]
        out.append((row["source"], row["claim"], found, HOLDS[row["agrees"]]))
    return out


HOLDS = {"agrees": "holds", "does not agree": "does not hold", "not decided": "not decided"}


def undecided(frames: Frames) -> tuple[int, int]:
    """(claims that are not decided, claims)."""
    rows = list(itertools.chain.from_iterable(findings(frames, number) for number in QUESTIONS))
    return sum(row[3] == "not decided" for row in rows), len(rows)
