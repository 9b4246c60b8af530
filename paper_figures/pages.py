"""The package's written pages, made from what it draws and finds: `python -m paper_figures.pages` writes them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paper_figures import audit, catalog, questions
from paper_figures.inputs import CONDITIONS, DATA, REQUIRED, SCHEMA, SHOWN, Frames, load, read_results

HERE = Path(__file__).resolve().parent


#: What the columns mean that a figure needs beyond those of every row.
COLUMNS = (
    ("`train_tokens`, `gpu_seconds`", "`ruler`", "training tokens and GPU-seconds of the checkpoint that was scored"),
    ("`bernstein_constant`", "`ruler`", "largest frequency times the square of the attention factor, per token"),
    ("`gap_rms`", "`ruler`", "predicted RMS error of the score in the gap, in units of the score's own"),
    ("`depth`", "`ruler_depth`", "place of the needle, percent of the context; from depth.jsonl of a run directory"),
    (
        "`metric`, `environment`",
        "`training-speed`",
        "`peak_gib` (per GPU) or `hours_per_1b_tokens`, method `reference`, `longlora`, `full` or `endprompt`; the "
        "device",
    ),
    (
        "`metric`",
        "`analysis`",
        "`slope_over_coefficient_bound_q01`, `_q50`, `_q99` (largest slope over its bound), the same for `bernstein`, "
        "and `share_within_coefficient_order1`, `share_within_bernstein_order1`",
    ),
    ("`first`", "`lab`", "of task `loss_by_position`: the first of the positions that end at `length`"),
    ("`window`, `target`, `steps`, `prompt_weight`", "any", "optional: how the method was run"),
    (
        "`arm`, `base`, `fold`, `window`, `target`",
        "`ruler`",
        "of a lab: name of the training among those of one base and fold, name of the base, target over window; "
        "optional `scheme`, `scaling`, `prompt`, `prompt_weight`, `anchors`, `steps`",
    ),
    (
        "`question`, `family`, `labels`, `verdict`, `sentence`",
        "`lab-question`",
        "an estimate of a lab's verdicts: the question, the kind of comparison, both arms, what the numbers say; from "
        "questions.jsonl of a run directory",
    ),
)


def readme() -> str:
    """README.md: figure -> file -> data -> columns."""
    lines = [
        "# Figures and tables",
        "",
        _paragraph(
            "`endprompt figures` draws every figure and table of the paper, and our own, from files "
            "alone: no model, no torch, "
            "no GPU."
        ),
        "",
        "    endprompt figures                                  all that have data, into figures/",
        "    endprompt figures --results runs/demo runs/lab     with these runs beside the published numbers",
        "    endprompt figures --only figure_3 table_1          some of them",
        "    endprompt audit                                    the published numbers, recomputed (AUDIT.md)",
        "",
        _paragraph(
            "Each figure is one function of files, `draw(frames)`, in a file of its name; each table "
            "is `build(frames)`. "
            "Figures are written as PDF and PNG, 178 mm wide. Tables are written as LaTeX (booktabs), "
            "Markdown and CSV; "
            "the last column states the source of each line. A figure of measured values has a "
            "NAME.rows.csv beside it: the rows that it read, each with file, line and revision. A second run writes "
            "the same bytes."
        ),
        "",
        _paragraph(
            "Published numbers are transcribed, with their place in the paper, in the CSV files of `data/published/`. "
            "Measured numbers are rows of results (JSON Lines): those of the run directories given by `--results`, "
            "otherwise those in `data/measured/`. Measured values are hatched or stand in a section of their own, and "
            "are marked as small-scale where they stop short of the paper's 64K. A method without a cell that others "
            "have gets no average. `data/computed/` holds positions and predictions of the project's own `endprompt` "
            "and `analysis` packages, made by `tests/support/figure_data.py`; tests recompute and compare them."
        ),
        "",
        _paragraph(
            f"Rows have schema {SCHEMA} and the columns {_code(REQUIRED)}; the list "
            "below names the further columns that a figure needs. `method` is `base`, or scheme, "
            "prompt kind and scaling "
            "joined by `+` (`endprompt+EP_1+linear`, `pose+yarn`). Rows of one task, length and seed must carry the "
            f"same `samples_sha256`. Rows of one method that differ in {_code(CONDITIONS)} are told apart."
        ),
        "",
        _paragraph(
            "Rows of `endprompt lab` have the column `arm`. The lab's own figures tell its arms apart by base and "
            "fold. Figures and tables of single runs use them only where no other rows are given (Figures 2 and 3 "
            "prefer them), and then those of the base and fold with the most arms, with PI and YaRN. A run's "
            "questions.jsonl holds its verdicts; LAB.md is generated from those in `data/measured/`."
        ),
        "",
        "## Figure → file → data → columns",
        "",
        *_table(("figure", "file", "data", "columns"), _listing()),
        "",
        "Columns beyond those of every row:",
        "",
        *_table(("column", "suite", "meaning"), COLUMNS),
        "",
        "This page is generated by `python -m paper_figures.pages`; a test compares it with what the code reads.",
        "",
    ]
    return "\n".join(lines)


def _listing() -> Iterable[Sequence[str]]:
    for name in catalog.NAMES:
        module = catalog.module(name)
        source = catalog.source(name)
        first = (module.TITLE, f"[`{Path(source).name}`]({source})")
        for file, columns in module.INPUTS.files.items():
            yield *first, f"[`{file}.csv`](data/{file}.csv)", ", ".join(columns)
            first = ("", "")
        for suite, extras in module.INPUTS.rows.items():
            need = "rows" if module.INPUTS.needs_rows else "if any, rows"
            yield (
                *first,
                f"{need} of suite `{suite}`",
                ", ".join((*SHOWN, *extras)),
            )
            first = ("", "")


def audit_page() -> str:
    """AUDIT.md: what follows from the printed tables, what does not, and the column that is not printed."""
    found = audit.findings()
    count = {verdict: sum(f["verdict"] == verdict for f in found) for verdict in audit.VERDICTS}
    recovered = audit.recovered_64k()
    tasks = list(audit.ANSWERS)
    order = [task for task in next(iter(recovered.values())) if task in tasks]
    constant = [f for f in found if f["rule"].startswith("each of the ") and isinstance(f["recomputed"], list)]
    lines = [
        "# The published numbers, recomputed",
        "",
        _paragraph(
            'What follows from the tables of "EndPrompt: Efficient Long-Context Extension via Terminal Anchoring" (May '
            "2026) by arithmetic alone. Each finding names the rule, the printed number, the recomputed one, and one "
            "of "
            "three verdicts: *agrees* (within half a unit of the last digit), *rounding* (explained by the rounding of "
            "the numbers that it is computed from), *does not follow*. A number can differ from its rule for many "
            "reasons, a misprint among them; nothing is said here about which. `endprompt audit` computes this page's "
            "findings anew, `endprompt audit --json` prints them for a program."
        ),
        "",
        f"{len(found)} findings: {count['agrees']} agree, {count['rounding']} are rounding, "
        f"{count['does not follow']} do not follow.",
        "",
        "## What does not follow",
        "",
        *_findings(f for f in found if f["verdict"] == audit.DOES_NOT_FOLLOW),
        "",
        _paragraph(
            "No weighting common to the rows of Table 2 can give its averages: rows that differ by a constant in every "
            "column have averages that differ by the same constant."
        ),
        "",
        "## The 64K column",
        "",
        _paragraph(
            "Tables 6 to 9 print 4K to 32K and Table 1 the mean over 4K to 64K, so five times Table 1 less the four "
            "tables is the score at 64K. The reading is plausible: for the tasks with one answer a sample the result "
            "is "
            "a multiple of 0.2 in every cell, as 500 samples a task must give (the printed means alone would allow "
            "steps "
            "of 0.05, of which one in four is such a multiple). Of the others, vt, cwe and fwe are known to ±0.05 and "
            "the mean to ±0.01; Full FT is printed to one decimal, so that its are known to ±0.23 and its mean to "
            "±0.09."
        ),
        "",
        *_table(
            ("method", *order, "mean"),
            (
                (m, *(f"{scores[task]:.2f}" for task in order), f"{scores['mean']:.2f}")
                for m, scores in recovered.items()
            ),
        ),
        "",
        "## Rows that are another row plus a constant",
        "",
        *_table(
            ("table", "row", "rule", "printed"),
            ((f["table"], f["row"], f["rule"], _show(f["printed"])) for f in constant),
        ),
        "",
        "In the other tables no two rows differ by a constant.",
        "",
        "## All findings",
        "",
        *_findings(found),
        "",
        "This page is written by `python -m paper_figures.pages`, and a test holds it to the findings.",
        "",
    ]
    return "\n".join(lines)


#: What the rows of a question do not say of themselves.
REMARKS = {
    6: "LongLoRA's learning rate and rank were looked for apart, on seed 0 of each base (`docs/lab.md`), so that seed "
    "favours it if anything; the other arms of a base share one rate, which was not tuned for any. With PI it does not "
    "learn at any rate tried, and the comparisons there say nothing about the method: the claims are about YaRN.",
}
#: The figure that shows what a question asks.
SHOWN_BY = {1: "lab_scores", 2: "score_against_steps", 4: "anchor_place", 5: "smoothness_against_score", 6: "cost"}


def lab_page(frames: Frames) -> str:
    """LAB.md: what the lab's rows say to each question, against the paper and against our own prototypes."""
    said = [finding for number in questions.QUESTIONS for finding in questions.findings(frames, number)]
    lines = [
        "# What the lab found",
        "",
        _paragraph(
            "Seven questions that the published tables leave open, answered at small scale: the project's own bases "
            "(windows of 256 and 512 tokens), extended by `endprompt lab` and scored on four tasks of RULER. What "
            "holds here need not hold for a model of 8B; what fails here at least needs another explanation than the "
            "one given. Claims of the prototypes are our own, from one to three seeds, written down before."
        ),
        "",
        _paragraph(
            questions.RULE
            + " An average over settings (base, fold, scaling) leaves out those where both fail; settings of different "
            "seeds count as independent (Welch). The best scheme that keeps the text whole is chosen, for each fold "
            "and scaling, on the lower half of the seeds of the smallest base, and tested on the other seeds and "
            "bases. These rows were trained before training repeated bit for bit, so an interval holds the chance of a "
            "run, too; how far two runs of the same seeds, or of other seeds, come apart: `docs/lab.md`."
        ),
        "",
        *_table(
            ("claims of", "hold", "do not hold", "not decided"),
            (
                (
                    SAID_BY[who],
                    *(str(sum(f[0] == who and f[3] == word for f in said)) for word in questions.HOLDS.values()),
                )
                for who in dict.fromkeys(f[0] for f in said)
            ),
        ),
    ]
    for number, question in questions.QUESTIONS.items():
        found = questions.findings(frames, number)
        shown = f" Drawn by `endprompt figures --only {SHOWN_BY[number]}`." if number in SHOWN_BY else ""
        lines += ["", f"## {number}. {question}", ""]
        lines += [
            f"- {found}; the claim of {SAID_BY[who]}, that {claim}: **{holds}**." for who, claim, found, holds in found
        ]
        if number in REMARKS and found:
            lines += ["", _paragraph(REMARKS[number])]
        lines += ["", _paragraph(f"All estimates with their p-values: table `question_{number}`.{shown}")]
        for heading, heads, body in questions.side_by_side(frames, number):
            lines += ["", f"{heading}:", "", *_table(heads, body)]
    lines += [
        "",
        "This page is written by `python -m paper_figures.pages` from `data/measured/lab_questions.jsonl`, and a test "
        "holds it to the rows.",
        "",
    ]
    return "\n".join(lines)


SAID_BY = {"paper": "the paper", "prototypes": "our prototypes", "theory": "the theory", "aim": "our aim"}


def lab_frames() -> Frames | None:
    """The committed verdicts of the lab; None where there are none."""
    path = DATA / "measured" / "lab_questions.jsonl"
    return load(questions.INPUTS, read_results([path])) if path.is_file() else None


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _findings(found: Iterable[audit.Finding]) -> list[str]:
    return _table(
        ("table", "row", "rule", "printed", "recomputed", "verdict"),
        ((f["table"], f["row"], f["rule"], _show(f["printed"]), _show(f["recomputed"]), f["verdict"]) for f in found),
    )


def _show(value: Any) -> str:
    if value is None:
        return "not printed"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return f"{value:.2f}" if isinstance(value, float) and round(value, 2) == value else str(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def main() -> None:
    frames = lab_frames()
    pages = {"README.md": readme(), "AUDIT.md": audit_page()} | ({"LAB.md": lab_page(frames)} if frames else {})
    for name, text in pages.items():
        (HERE / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
