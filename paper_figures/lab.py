"""A lab's rows: one training for every base, fold, arm and seed, told apart by the columns that the lab writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from paper_figures import style
from paper_figures.names import CUE_WEIGHT, PIECES, SCALINGS, SCHEMES, SPAN

#: The columns that a lab's rows have beyond those of every row, and those that a row may lack.
COLUMNS = ("arm", "base", "fold", "window", "target", "scheme", "scaling", "steps")
OPTIONAL = ("prompt", "prompt_weight", "anchors", "recall_span", "pieces", "seeds")


def tidy(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with what the figures call an arm: `kind`, `cue`, `usual`, `main`, `label`; method is the arm's name.
    kind: scheme, or full or longlora, or base (not trained). usual: trained for the number of steps that most arms of
    this base and fold are, or by rows of the target's length, where tokens count. main: usual, not one of the other
    wordings or weights of an end prompt, and with at least a quarter of the seeds that most arms of this base and fold
    have."""
    rows = rows.reindex(columns=dict.fromkeys([*rows.columns, *COLUMNS, *OPTIONAL])).copy()
    rows["base"] = rows["base"].astype(str)
    rows["method"] = rows["arm"]
    rows["steps"] = rows["steps"].fillna(0).astype(int)
    rows["kind"] = [_kind(row) for row in rows[["arm", "scheme", "anchors", "pieces", "steps"]].to_dict("records")]
    rows["cue"] = [_cue(prompt, span) for prompt, span in zip(rows["prompt"], rows["recall_span"])]
    weight = rows["prompt_weight"].astype(float).fillna(CUE_WEIGHT)
    wordings = rows["cue"].str.startswith("EP_") & ~((rows["cue"] == "EP_1") & (weight == CUE_WEIGHT))
    trained = rows[rows["kind"] != "base"].drop_duplicates(["base", "fold", "arm"])
    most = trained.groupby(["base", "fold"])["steps"].agg(lambda steps: steps.value_counts().index[0])
    keys = zip(rows["base"], rows["fold"], rows["steps"])
    rows["usual"] = [most.get((base, fold)) == steps for base, fold, steps in keys]
    rows["usual"] |= rows["kind"].str.startswith(("full", "longlora"))
    rows["main"] = (rows["usual"] | (rows["kind"] == "base")) & ~wordings & _has_seeds(rows)
    shown = zip(rows["kind"], rows["arm"], rows["cue"])
    rows["label"] = [" ".join(filter(None, (_named(kind, arm), cue))) for kind, arm, cue in shown]
    return rows


def _kind(row: dict[str, Any]) -> str:
    if not row["steps"]:
        return "base"
    if str(row["arm"]).startswith(("full", "longlora")):
        return re.split("[+@]", row["arm"])[0]
    if row["scheme"] == "anchors" and row["anchors"] == row["anchors"]:
        return f"anchors{row['anchors']:.0f}"
    if "sentences" in str(row["scheme"]) and row["pieces"] not in (None, PIECES) and row["pieces"] == row["pieces"]:
        return f"{row['scheme']}-{row['pieces']:.0f}"
    return str(row["scheme"])


def _cue(prompt: Any, span: float | None) -> str:
    if prompt in (None, "none") or prompt != prompt:
        return ""
    told = prompt in ("recall", "question") and span == span and span not in (None, SPAN)
    return f"{prompt}-{span:.0f}" if told else str(prompt)


def _has_seeds(rows: pd.DataFrame) -> pd.Series:
    """Rows of arms with at least a quarter of the seeds that most arms of the same base and fold have."""
    counted = rows.groupby(["base", "fold", "arm"])["seed"].transform("nunique")
    seeds = rows["seeds"].fillna(counted)  # rows of several seeds together say how many
    usual = seeds.groupby([rows["base"], rows["fold"]]).transform(lambda counts: counts.value_counts().index[0])
    return seeds >= usual / 4


def _named(kind: str, arm: str) -> str:
    if kind == "base":
        return "base" if "none" in arm or arm == "base" else "untrained"
    first, _, more = kind.partition("-")
    return ", ".join(part for part in (SCHEMES[first], more) if part) if first in SCHEMES else kind


def reference(rows: pd.DataFrame) -> pd.DataFrame:
    """What a general figure shows of a lab: of the base and fold with the most arms those with PI or YaRN. Of them the
    usual steps and weights; other wordings of the end prompt stay, since Figure 2 is about them."""
    groups = rows.groupby(["base", "fold"])["arm"].nunique()
    base, fold = groups.index[groups.argmax()]
    chosen = rows[(rows["base"] == base) & (rows["fold"] == fold)]
    about = tidy(chosen)
    weight = about["prompt_weight"].astype(float).fillna(CUE_WEIGHT)
    whole = about["usual"] & ((weight == CUE_WEIGHT) | ~about["cue"].str.startswith("EP_"))
    scaled = about["scaling"].isin(("linear", "yarn"))
    return chosen[(whole & scaled) | (about["label"] == "base")]


def groups(rows: pd.DataFrame) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """(heading, base, fold, rows) of each base and fold, small before large."""
    keys = sorted({(int(w), int(f), b) for w, f, b in zip(rows["window"], rows["fold"], rows["base"])})
    for window, fold, base in keys:
        part = rows[(rows["base"] == base) & (rows["fold"] == fold)]
        yield f"window {window}, {fold}-fold to {int(part['target'].iloc[0])}", base, fold, part


def looks(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Label -> colour, marker, line and face of each arm, the same in all panels of a figure. The colour and marker
    tell the place of the anchor; a filled marker and a full line tell a prompt that is copied from the context, or
    none; a hollow one and dashes tell a fixed cue."""
    unknown = [kind for kind in dict.fromkeys(rows["kind"]) if arm_of(kind) not in style.ARMS]
    found = {}
    for kind, cue, label in dict.fromkeys(zip(rows["kind"], rows["cue"], rows["label"])):
        arm = "recall" if (kind, cue) == ("endprompt", "recall") else arm_of(kind)
        color, marker = style.ARMS.get(arm) or style.OTHERS[unknown.index(kind) % len(style.OTHERS)]
        fixed = cue.startswith("EP_") and kind != "endprompt"
        dotted = kind == "base" or ("-" in kind and arm_of(kind) in SCHEMES)
        found[label] = {
            "color": color,
            "marker": marker,
            "linestyle": ":" if dotted else (0, (3, 1.2)) if fixed else "-",
            "markerfacecolor": "white" if fixed or label == "untrained" or (dotted and kind != "base") else color,
        }
    return dict(sorted(found.items(), key=lambda entry: _place(entry[0])))


def arm_of(kind: str) -> str:
    """What is drawn in one colour: the kind, all numbers of anchors alike, all lengths of full training alike."""
    first = kind.partition("-")[0]
    return first if first in SCHEMES else "anchors" if re.fullmatch(r"anchors\d*", kind) else kind


def _place(label: str) -> tuple[int, str]:
    order = ("base", "untrained", "contiguous", "endprompt", "endprompt-random", "anchors", "endprompt-pose", "pose")
    first = re.sub(r"^anchors\d+", "anchors", label.split(" ")[0])
    return (order.index(first) if first in order else len(order) + (first in ("full", "LongLoRA")), label)


def handles(chosen: dict[str, dict[str, Any]], line: bool = True) -> list[Line2D]:
    hidden = {} if line else {"linestyle": "none"}
    return [Line2D([], [], label=label, markersize=4.5, **(look | hidden)) for label, look in chosen.items()]


def scaling_name(scaling: str) -> str:
    return SCALINGS.get(scaling, scaling)
