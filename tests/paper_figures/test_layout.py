"""How the figures look, measured: no clipped or overlapping text, nothing below 6 pt, the same bytes twice."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys

import matplotlib
import pytest
from matplotlib.text import Text

from paper_figures import catalog, style
from paper_figures.inputs import NoData, load, measured_files, read_results
from paper_figures.names import LONGBENCH, LONGBENCH_ZH
from tests.support import study_page
from tests.support.figures_rows import DEMO, demo_rows, lab_rows, longbench_rows, row, write_run
from tests.support.lab_rows import lab_run

ENGLISH = [name for names in LONGBENCH.values() for name in names]
CHINESE = [name for names in LONGBENCH_ZH.values() for name in names]
#: Checkpoints and sets of a LongBench run.
LONGBENCH_RUNS = {
    "four checkpoints": (
        ("base", "contiguous+linear", "endprompt+EP_1+yarn", "endprompt+recall+yarn"),
        ENGLISH + CHINESE,
    ),
    "English sets": (("base", "pose+linear", "pose+yarn"), ENGLISH),
    "one checkpoint": (("base",), ENGLISH + CHINESE),
    "two sets": (("base", "endprompt+EP_1+yarn"), ["gov_report", "lcc"]),
}
#: The rows that the project ships.
MEASURED = measured_files()
MANY = {
    "base": (100, 0, 0, 0), "base+yarn": (70, 60, 50, 40), "contiguous+linear": (96, 92, 80, 24),
    "contiguous+yarn": (99, 98, 97, 45), "endprompt+EP_1+linear": (98, 94, 82, 34),
    "endprompt+EP_2+linear": (98, 94, 81, 33), "endprompt+EP_3+yarn": (98, 94, 92, 64),
    "endprompt+recall+linear": (98, 97, 96, 75), "recall+yarn": (100, 98, 98, 96),
    "endprompt-random+EP_1+yarn": (98, 96, 94, 90), "pose+linear": (94, 93, 92, 87), "pose+yarn": (99, 98, 98, 97),
    "endprompt-pose+EP_1+yarn": (99, 99, 98, 98), "anchors+EP_1+yarn": (97, 96, 94, 80),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(name)`: the rows of a run, made once."""
    root = tmp_path_factory.mktemp("runs")
    makers = {
        "none": lambda: [],
        "demo": lambda: [write_run(root / "demo", demo_rows(window=256))],
        "lab": lambda: [write_run(root / "lab", lab_rows(MANY))],
        "one": lambda: [write_run(root / "one", [row("base", "niah_single_1", 256, 100.0)])],
        "plan": lambda: [lab_run(root / "plan", seeds=(0, 1))],
        "measured": lambda: MEASURED,
        "study": lambda: [study_page.ROWS / "smollm2_small.jsonl.gz"],
        "small": lambda: [lab_run(root / "small", bases=((256, 8),), seeds=(0, 1))],
    } | {
        name: lambda of=of, name=name: [write_run(root / name, longbench_rows(*of))]
        for name, of in LONGBENCH_RUNS.items()
    }
    return functools.cache(lambda name: read_results(makers[name]()))


def texts_of(fig):
    """(text, bounding box in pixels) of everything written in a figure; of an annotation, its text only."""
    renderer = fig.canvas.get_renderer()
    fig.canvas.draw()
    undrawn = set()  # tick labels outside the limits of their axis exist as objects, but are not drawn
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        drawn = {id(label) for tick in axis._update_ticks() for label in (tick.label1, tick.label2)}
        every = {id(label) for tick in axis.majorTicks + axis.minorTicks for label in (tick.label1, tick.label2)}
        undrawn |= every - drawn
    written = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in undrawn]
    return [(t, Text.get_window_extent(t, renderer)) for t in written]


#: Figures that read no rows look the same whatever the run; the whole plan of a lab is for its own.
CASES = [
    (name, which)
    for name in catalog.FIGURES
    for which in (("none", "lab") if catalog.module(name).INPUTS.rows else ("none",))
] + [(name, "plan") for name in ("lab_scores", "anchor_place", "score_against_steps")]
CASES += [(name, "study") for name in study_page.PICTURES]
CASES += [("longbench_bars", "two sets")]
CASES += [
    pytest.param("longbench_bars", which, marks=pytest.mark.slow)
    for which in ("four checkpoints", "English sets", "one checkpoint")
]
CASES += [
    pytest.param(name, which, marks=pytest.mark.slow)
    for name in catalog.FIGURES
    for which in ("one", "demo", "small", "measured")
] + [pytest.param(name, "plan", marks=pytest.mark.slow) for name in ("figure_2", "figure_3", "score_against_length")]


@pytest.mark.parametrize(("name", "which"), CASES)
def test_no_text_is_clipped_small_or_overlapping(name, which, runs):
    module = catalog.module(name)
    with style.journal():
        try:
            frames = load(module.INPUTS, runs(which))
        except NoData:
            assert module.INPUTS.needs_rows
            return
        fig = module.draw(frames)
        found = texts_of(fig)
    assert found
    assert fig.get_figwidth() <= 7.01, "wider than a page of two columns"
    width, height = fig.bbox.width, fig.bbox.height
    for text, box in found:
        label = text.get_text()
        assert text.get_fontsize() >= 6, f"{label!r} is set in {text.get_fontsize()} pt"
        if re.search(r"\$[^$]*[\^_]", label):  # mathtext sets scripts at 70%
            assert 0.7 * text.get_fontsize() >= 6, f"the script in {label!r} is below 6 pt"
        assert box.x0 >= -0.5 and box.y0 >= -0.5, f"{label!r} leaves the figure on the left or below"
        assert box.x1 <= width + 0.5 and box.y1 <= height + 0.5, f"{label!r} leaves the figure on the right or above"
    for (first, a), (second, b) in itertools.combinations(found, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) < 1.0, f"{first.get_text()!r} and {second.get_text()!r} overlap by {overlap} pixels"


def test_a_second_drawing_has_the_same_bytes_and_its_text_stays_text(runs, tmp_path):
    """Also with other settings of the user's own in between."""
    first = catalog.make("figure_3", runs("demo"), tmp_path / "first")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        second = catalog.make("figure_3", runs("demo"), tmp_path / "second")
    assert len(first) == 3
    assert b"/FontFile2" in first[0].read_bytes() and b"/Type3" not in first[0].read_bytes()
    for one, two in zip(first, second):
        assert one.read_bytes() == two.read_bytes(), one.name


def children_seconds():
    """CPU seconds of ended child processes: the machine may be busy with others."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    """Everything, from single runs and a lab with its verdicts, with the hashes of strings drawn anew."""
    from benchmarks.lab import verdicts

    run, lab = write_run(tmp_path / "run", lab_rows(MANY)), lab_run(tmp_path / "lab")
    read = write_run(tmp_path / "read", longbench_rows(("base", "pose+yarn"), ENGLISH))
    verdicts.write(lab)
    given = {  # those of a lab with other rows by themselves
        (): [run, lab, read],
        ("--only", "measure_against_score"): [MEASURED[0].parent / "lab_predict.jsonl.gz"],
        ("--only", "loss_by_position"): [MEASURED[0].parent / "pages" / "smollm2_small.jsonl.gz"],
    }
    for seed in ("1", "2"):
        for only, results in given.items():
            command = [sys.executable, "-m", "endprompt.cli", "figures", *only, "--results", *results]
            command += ["--output", tmp_path / seed]
            started = children_seconds()
            subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
            assert children_seconds() - started < 60
    first = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "2").iterdir()}
    assert sum(name.endswith(".pdf") for name in first) == len(catalog.FIGURES)
    assert sum(name.endswith(".tex") for name in first) == len(catalog.TABLES)
    assert first == second


def luminance(color):
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def simulated(color, kind):
    """Colour as seen without one kind of cone, linear RGB: the matrices of Machado et al. 2009, severity 1."""
    import numpy as np
    from matplotlib.colors import to_rgb

    matrix = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }[kind]
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.clip(np.array(matrix) @ linear, 0, 1)


def test_arms_differ_for_colour_blind_readers():
    """Every pair differs in the marker; and in the simulated colour, whichever cone is missing."""
    import numpy as np

    markers = [marker for _, marker in style.ARMS.values()]
    assert len(set(markers)) == len(markers)
    for kind in ("protan", "deutan", "tritan"):
        for (a, (one, _)), (b, (two, _)) in itertools.combinations(style.ARMS.items(), 2):
            distance = np.linalg.norm(simulated(one, kind) - simulated(two, kind))
            assert distance > 0.05, f"{a} and {b} look alike to a {kind} reader: {distance:.3f}"


def test_lines_and_labels_are_dark_enough():
    """At least 1.9:1 against white, so that no line vanishes in print."""
    for arm, (color, _) in style.ARMS.items():
        assert 1.05 / (luminance(color) + 0.05) >= 1.9, arm


def test_demo_methods_are_all_named_in_the_picture(runs):
    module = catalog.module("score_against_length")
    with style.journal():
        fig = module.draw(load(module.INPUTS, runs("demo")))
        written = " ".join(text.get_text() for text, _ in texts_of(fig))
    for label in ("base, unextended", "contiguous, PI", "endprompt EP_1, PI", "recall, YaRN"):
        assert label in written
    assert len(DEMO) == 4
    assert "small scale" in written


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with booktabs and longtable")
def test_latex_sets_every_table_without_complaint(tmp_path):
    """Those of the shipped rows, in one document of one column: no error, no line wider than the page."""
    rows = read_results(MEASURED)
    for name in catalog.TABLES:
        catalog.make(name, rows, tmp_path)
    lines = ["\\documentclass{article}", "\\usepackage[a4paper,margin=2cm]{geometry}"]
    lines += ["\\usepackage{booktabs,graphicx,longtable}", "\\begin{document}"]
    lines += [f"\\input{{{name}.tex}}\\clearpage" for name in catalog.TABLES]
    (tmp_path / "all.tex").write_text("\n".join([*lines, "\\end{document}"]))
    for _ in range(3):  # longtable needs a second and a third run to align its pages
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout and "undefined" not in done.stdout
