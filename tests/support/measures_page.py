"""The part of analysis/README.md that the test of the theory decides, and its picture: from the committed rows.

`python -m tests.support.measures_page` writes both again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from analysis.predict import MEASURES
from benchmarks.lab import estimates, theory
from benchmarks.lab.theory import CONTROLS, LATER, SETS
from paper_figures import catalog
from paper_figures.inputs import read_results
from tests.support import figure_pages as pages
from tests.support.lab_rows import packed_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "paper_figures" / "data" / "measured" / "lab_predict.jsonl.gz"
FACTOR = [ROWS.parent / "pages" / f"{name}.jsonl.gz" for name in ("lab_controls", "lab_controls_heads")]
AGAIN = ROWS.parent / "pages" / "lab_predict_again.jsonl.gz"
PICTURE = ROOT / "analysis" / "measure_against_score.png"
PAGE = "../analysis/README.md"
SCHEMES = {"contiguous": "contiguous", "recall": "recall", "pose": "PoSE"}


def page() -> str:
    found: dict[str, dict] = {}
    for row in packed_rows(ROWS):
        if row["task"] == "predict-test":
            found.setdefault(row["method"], {})[row["half"]] = row
    (pair,) = (name for name in found if " + " in name)
    ceiling = "mean score of the scaling"
    heads = ("measure", "chosen half", "other half", "SmolLM2", "SmolLM2, later", "p, other half", "one sign")
    lines = []
    for name in (*MEASURES, pair, ceiling):
        sets = found[name]
        other = sets["other"]
        last = ("", "")
        if name != ceiling:
            last = (f"{other['p']:.3f}", "yes" if other["one_sign"] else "no")
        shown = f"**`{name}`**" if other.get("candidate") else f"`{name}`" if name in MEASURES else name
        lines.append((shown, *(value(sets.get(half)) for half in (*SETS, LATER)), *last))
    numbers = ", ".join(str(found[pair][half]["n"]) for half in (*SETS, LATER))
    blocks = {"table of measures": [f"Arms: {numbers}.", "", *pages.table(heads, lines)]}
    return pages.renewed(PAGE, blocks | {"table of controls": controls(), "table of factors": factors()})


def controls() -> list[str]:
    """What was chosen before on all control arms, and the test made again on their halves."""
    found: dict[str, dict] = {}
    for row in packed_rows(AGAIN):
        if row["task"] in ("predict-again", "predict-test"):
            found.setdefault(row["method"], {})[row["half"]] = row
    first, again = sorted(name for name in found if " + " in name)
    ceiling = "mean score of the scaling"
    measures = ("smoothness", "gap_pretrained", "entropy", "entropy_plain", "gap_rows", "unseen", "unseen_rows")
    lines = []
    for name in (first, again, *measures, ceiling):
        half, whole = found[name].get("other"), found[name].get(CONTROLS)
        mark = "**" if half and half.get("candidate") else ""
        shown = name if name == ceiling else f"{mark}`{name}`{mark}"
        p = f"{half['p']:.4f}" if half and name != ceiling else ""
        both = (value(found[name][one]) if one in found[name] else "" for one in ("chosen", "other"))
        lines.append((shown, value(whole) if whole else "", *both, p))
    sizes = [found[ceiling][half]["n"] for half in (CONTROLS, "chosen", "other")]
    numbers = ", ".join(map(str, sizes))
    heads = ("measure", "all control arms", "their chosen half", "their other half", "p, other half")
    return [f"Arms: {numbers}.", "", *pages.table(heads, lines)]


def factors() -> list[str]:
    """Each arm's score with YaRN's own factor and the differences of the tuned ones; then their means."""
    lab, heads = map(packed_rows, FACTOR)
    found = theory.tuned([*lab, *theory.of_heads(heads)], "lab")
    cells: dict[tuple, list[str]] = {}
    for place, row in enumerate(found):
        for part in row["parts"]:
            base, target, kind = part["of"]
            name = SCHEMES["recall" if kind == "endprompt" else kind]
            cell = cells.setdefault((base, target, name), [f"{part['scores'][1]:.1f}", "", ""])
            cell[1 + place] = points(part) if part["ci95"][0] is not None else "one seed"
    lines = [
        (f"{base}, {target // int(base)}-fold", name, *cell) for (base, target, name), cell in sorted(cells.items())
    ]
    means = [("all with five seeds", "", "", *(f"{points(row)}: {row['verdict']}" for row in found))]
    for fold in (8, 32):
        parts = [[p for p in row["parts"] if p["of"][1] == fold * int(p["of"][0]) and p["n"] == 5] for row in found]
        each = [np.mean([[*part["per_seed"].values()] for part in own], axis=0) for own in parts]
        made = [estimates.over_seeds(own.tolist()) for own in each]
        means.append(
            (
                f"of them {fold}-fold, seen afterwards",
                "",
                "",
                *(points({"value": e.value, "ci95": (e.lo, e.hi)}) for e in made),
            )
        )
    names = ("base", "arm", "YaRN", "one factor", "a factor for each head")
    return pages.table(names, [*lines, *means])


def points(row: dict) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(row["value"], *row["ci95"])


def value(row: dict | None) -> str:
    if row is None or not row["ci95"]:
        return "does not vary"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(row["value"], *row["ci95"])


def main() -> None:
    (pages.HERE / PAGE).write_text(page(), encoding="utf-8", newline="\n")
    with tempfile.TemporaryDirectory() as folder:
        catalog.make("measure_against_score", read_results([ROWS]), Path(folder))
        PICTURE.write_bytes(Path(folder, "measure_against_score.png").read_bytes())


if __name__ == "__main__":
    main()
