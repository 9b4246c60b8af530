"""What the pages of paper_figures take from its figures and findings: `python -m tests.support.figure_pages` writes it.

Such a part stands between two marks, `<!-- NAME -->` and `<!-- end of NAME -->`; all other text is the page's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import paper_figures
from paper_figures import audit, catalog, questions
from paper_figures.inputs import DATA, SHOWN, Frames, load, read_results
from paper_figures.names import SAID_BY, SCALINGS

HERE = Path(paper_figures.__file__).resolve().parent


def renewed(name: str, parts: Mapping[str, Sequence[str]]) -> str:
    """The page with its parts, each a list of lines. Raises ValueError naming the marks that it lacks."""
    page = (HERE / name).read_text(encoding="utf-8")
    for part, lines in parts.items():
        begin, end = f"<!-- {part} -->\n", f"\n<!-- end of {part} -->"
        head, found, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{name}: must have the marks {begin.strip()} and {end.strip()}, in this order")
        page = "\n".join([head + begin, *lines, end + tail])
    return page


def readme() -> str:
    """README.md: figure -> file -> data -> columns."""
    return renewed("README.md", {"list of figures": table(("figure", "file", "data", "columns"), _listing())})


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
            yield *first, f"{need} of suite `{suite}`", ", ".join((*SHOWN, *extras))
            first = ("", "")


def audit_page() -> str:
    """AUDIT.md: what follows from the printed tables, what does not, and the column that is not printed."""
    found = audit.findings()
    count = {verdict: sum(f["verdict"] == verdict for f in found) for verdict in audit.VERDICTS}
    recovered = audit.recovered_64k()
    order = [task for task in next(iter(recovered.values())) if task in audit.ANSWERS]
    constant = [f for f in found if f["rule"].startswith("each of the ") and isinstance(f["recomputed"], list)]
    cells = ((m, *(f"{scores[t]:.2f}" for t in (*order, "mean"))) for m, scores in recovered.items())
    told = ((f["table"], f["row"], f["rule"], _show(f["printed"])) for f in constant)
    parts = {
        "counts": [
            f"{len(found)} findings: {count['agrees']} agree, {count['rounding']} are rounding, "
            f"{count['does not follow']} do not follow."
        ],
        "what does not follow": _findings(f for f in found if f["verdict"] == audit.DOES_NOT_FOLLOW),
        "64K": table(("method", *order, "mean"), cells),
        "constants": table(("table", "row", "rule", "printed"), told),
        "all findings": _findings(found),
    }
    return renewed("AUDIT.md", parts)


def lab_page(frames: Frames) -> str:
    """LAB.md: what the lab's rows say to each question, against the paper and against our own prototypes."""
    said = {number: findings(frames, number) for number in questions.QUESTIONS}
    every = [finding for found in said.values() for finding in found]
    counted = (
        (SAID_BY[who], *(str(sum(f[0] == who and f[3] == word for f in every)) for word in HOLDS.values()))
        for who in dict.fromkeys(f[0] for f in every)
    )
    parts = {"claims": table(("claims of", "hold", "do not hold", "not decided"), counted)}
    for number, found in said.items():
        parts[f"claims of question {number}"] = [
            f"- {shown}; the claim of {SAID_BY[who]}, that {claim}: **{holds}**." for who, claim, shown, holds in found
        ]
        lines: list[str] = []
        for heading, heads, body in side_by_side(frames, number):
            lines += ["", f"{heading}:", "", *table(heads, body)]
        parts[f"estimates of question {number}"] = lines[1:]
    return renewed("LAB.md", parts)


def findings(frames: Frames, number: int) -> list[tuple[str, str, str, str]]:
    """(said by, claim, what was found, whether it holds) of each claim; the second and third make its sentence."""
    return [
        (row["source"], row["claim"], row["sentence"].partition("; this ")[0], HOLDS[row["agrees"]])
        for row in questions.of_question(frames, number)[1].to_dict("records")
    ]


HOLDS = {"agrees": "holds", "does not agree": "does not hold", "not decided": "not decided"}


def side_by_side(frames: Frames, number: int) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, heads, lines) for each base and fold: a line for two arms that are compared, a column a scaling."""
    rows = questions.of_question(frames, number)[0]
    found = []
    for (base, fold), group in rows.groupby(["base", "fold"], sort=False, dropna=False):
        several = group["scaling"].nunique() > 1
        scalings = list(dict.fromkeys(group["scaling"]))
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for row in group[~group["metric"].str.startswith("score_by")].to_dict("records"):
            key = (questions.kind(row), " against ".join(questions.names(row)))
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


def cell(row: dict) -> str:
    """`+6.0 [+4.0, +8.0] helps`"""
    low, high = (questions.number(row[key], questions.digits_of(row)) for key in ("lo", "hi"))
    span = f" [{low}, {high}]" if low else ""
    return f"{questions.number(row['value'], questions.digits_of(row))}{span} {row['verdict']}"


def lab_frames() -> Frames | None:
    """The committed verdicts of the lab; None where there are none."""
    path = DATA / "measured" / "lab_questions.jsonl"
    return load(questions.INPUTS, read_results([path])) if path.is_file() else None


def _findings(found: Iterable[audit.Finding]) -> list[str]:
    return table(
        ("table", "row", "rule", "printed", "recomputed", "verdict"),
        ((f["table"], f["row"], f["rule"], _show(f["printed"]), _show(f["recomputed"]), f["verdict"]) for f in found),
    )


def _show(value: Any) -> str:
    if value is None:
        return "not printed"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return f"{value:.2f}" if isinstance(value, float) and round(value, 2) == value else str(value)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def main() -> None:
    frames = lab_frames()
    pages = {"README.md": readme(), "AUDIT.md": audit_page()} | ({"LAB.md": lab_page(frames)} if frames else {})
    for name, text in pages.items():
        (HERE / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
