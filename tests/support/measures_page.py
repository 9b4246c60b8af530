"""The part of analysis/README.md that the test of the theory decides, and its picture: from the committed rows.

`python -m tests.support.measures_page` writes both again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from analysis.predict import MEASURES
from benchmarks.lab.theory import LATER, SETS
from paper_figures import catalog
from paper_figures.inputs import read_results
from tests.support import figure_pages as pages
from tests.support.lab_rows import packed_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "paper_figures" / "data" / "measured" / "lab_predict.jsonl.gz"
PICTURE = ROOT / "analysis" / "measure_against_score.png"
PAGE = "../analysis/README.md"


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
    return pages.renewed(PAGE, {"table of measures": [f"Arms: {numbers}.", "", *pages.table(heads, lines)]})


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
