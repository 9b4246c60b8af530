"""What the pages say of the lab, against the committed rows: every score, every difference with its interval."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lab import estimates, material, matrix, verdicts
from benchmarks.lab.arms import arms_of
from benchmarks.lab.config import LabConfig
from benchmarks.lab.verdicts import compare
from benchmarks.ruler import build_samples
from benchmarks.ruler.cell import samples_sha256
from endprompt.results import read_rows
from tests.support.lab_rows import packed_rows

ROOT = Path(__file__).parents[3]
MEASURED = ROOT / "paper_figures" / "data" / "measured"
INTERVAL = re.compile(r"([+-]\d+\.\d+)(?: points)? \[([+-]\d+\.\d+), ([+-]\d+\.\d+)\]")
SETTINGS = (("256", "yarn"), ("256", "linear"), ("512", "yarn"), ("512", "linear"))


@pytest.fixture(scope="module")
def rows():
    return packed_rows(MEASURED / "lab_results.jsonl.gz")


@pytest.fixture(scope="module")
def arms(rows):
    return {(arm.base, arm.fold, arm.name): arm for arm in arms_of(rows)}


@pytest.fixture(scope="module")
def questions():
    return read_rows(MEASURED / "lab_questions.jsonl")


def part(path, first, last=None):
    """A page from one heading or phrase to another."""
    text = (ROOT / path).read_text(encoding="utf-8").split(first, 1)[1]
    return text.split(last, 1)[0] if last else text


def lines_of(text):
    """The lines of all tables, cell by cell."""
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in found if not set("".join(cells)) <= {"-"}]


def counts(path="docs/lab.md", first="## Appendix: reproducibility", last="### The same seeds"):
    """{first cell of a line: the others as numbers} of the tables of counts."""
    lines = {name: cells for name, *cells in lines_of(part(path, first, last))}
    return {
        name: [float(cell.replace(",", "")) for cell in cells]
        for name, cells in lines.items()
        if all(re.fullmatch(r"[-\d,.]+", cell) for cell in cells)
    }


def shown(value, low, high):
    return tuple(f"{v:+.1f}" for v in (value, low, high))


def against(first, second, seeds=None):
    """First less second at the target, over the seeds that both have."""
    a, b = (arm.scores[arm.target] for arm in (first, second))
    return estimates.over_seeds([a[s] - b[s] for s in a if s in b and (seeds is None or s in seeds)])


def test_the_table_of_schemes_has_the_scores_of_the_rows(arms):
    table = lines_of(part("docs/schemes.md", "## What was measured", "`sliding` has"))[1:]
    assert len(table) > 20
    for name, _, *cells in table:
        for (base, scaling), cell in zip(SETTINGS, cells, strict=True):
            full = {"256": "full-8192", "512": "full-16384"}[base]
            arm = arms.get((base, 32, f"{full if name == 'full length, equal tokens' else name}+{scaling}"))
            scores = list(arm.scores[arm.target].values()) if arm else []
            said = f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f} ({len(scores)})" if arm else ""
            assert cell == said, (name, base, scaling)


def test_the_schemes_against_pose_and_each_other(arms):
    text = part("docs/schemes.md", "Against PoSE, seed by seed:")
    for name, *cells in lines_of(text)[1:]:
        for (base, scaling), cell in zip(SETTINGS, cells, strict=True):
            found = against(arms[base, 32, f"{name}+{scaling}"], arms[base, 32, f"pose+{scaling}"])
            assert INTERVAL.findall(cell) == [shown(found.value, found.lo, found.hi)], (name, base, scaling)
    longer = against(arms["256", 32, "sliding-long+linear"], arms["256", 32, "sliding+linear"])
    assert shown(longer.value, longer.lo, longer.hi) in INTERVAL.findall(text)
    for name, scaling in (("sliding-long", "linear"), ("sliding", "yarn")):  # chosen on seeds 0 to 4 of base 256
        tested = [
            against(arms[base, 32, f"{name}+{scaling}"], arms[base, 32, f"pose+{scaling}"], seeds)
            for base, seeds in (("256", range(5, 20)), ("512", None))
        ]
        found = estimates.over_settings(tested)
        assert shown(found.value, found.lo, found.hi) in INTERVAL.findall(text), name


def test_every_other_estimate_on_the_pages_is_one_of_the_questions(questions):
    known = {
        tuple(f"{v:+.{digits}f}" for v in (row["value"], *row["ci95"]))
        for row in questions
        if row["primary"] and row["ci95"]
        for digits in (1, 2)
    }
    texts = {
        "README.md": part("README.md", "- **The lab, small scale**", "## The demonstration"),
        "docs/lab.md": part("docs/lab.md", "## LongLoRA"),
        "docs/schemes.md": part("docs/schemes.md", "Which scheme is the best cannot", "Before seeds 10 to 19"),
    }
    for path, text in texts.items():
        found = INTERVAL.findall(" ".join(text.split()))
        assert len(found) >= 2 and set(found) <= known, (path, set(found) - known)


def test_longlora_against_the_others_is_said_for_each_base(arms):
    names = {"pose": "pose", "endprompt recall": "recall", "endprompt EP_1": "endprompt"}
    names |= {"contiguous, short": "contiguous"}
    table = lines_of(part("docs/lab.md", "Others less LongLoRA", "So the paper's claim"))[1:]
    assert len(table) == 5
    for name, *cells in table:
        for (base, length), cell in zip((("256", 2048), ("512", 4096)), cells, strict=True):
            arm = arms[base, 8, f"{names.get(name, f'full-{length}')}+yarn"]
            found = against(arm, arms[base, 8, f"longlora-{length}+yarn"])
            assert INTERVAL.findall(cell) == [shown(found.value, found.lo, found.hi)], (name, base)


@functools.cache
def micro_cells(seeds):
    config = LabConfig(preset="micro", seeds=list(seeds))
    made = matrix.cells(matrix.read_matrix(matrix.matrix_files(config)[0]), "micro", config)
    return {cell.sha256 for cell in made}


@pytest.fixture(scope="module")
def again():
    return packed_rows(ROOT / "paper_figures" / "data" / "measured" / "pages" / "lab_again.jsonl.gz")


@pytest.fixture(scope="module")
def runs(rows, again, tmp_path_factory):
    """Directories of preset micro alone, ten seeds each, with every choice as that run alone makes it."""
    folder, micro = tmp_path_factory.mktemp("runs"), micro_cells(range(20))
    made = {
        "0-9": [row for row in rows if row["cell"] in micro and row["seed"] < 10],
        "10-19": [row for row in rows if row["cell"] in micro and row["seed"] >= 10],
        "again": again,
    }
    for name, chosen in made.items():
        assert len({row["cell"] for row in chosen}) == len(micro) / 2 == 830
        (folder / name).mkdir()
        (folder / name / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        verdicts.write(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "column", "section", "end"),
    [("10-19", 1, "### Other seeds", "## LongLoRA"), ("again", 0, "### The same seeds", "### Other seeds")],
)
def test_two_runs_end_as_the_page_says(runs, second, column, section, end):
    """How many claims and estimates end alike, that none is reversed, and each that differs with its interval."""
    page = part("docs/lab.md", section, end)
    said = {name: cells[column] for name, cells in counts().items() if len(cells) == 2}
    lines = compare(runs / "0-9", runs / second)
    judged = [line for line in lines if line["metric"] == "claim"]
    others = [line for line in lines if line["metric"] != "claim" and line["first"] and line["second"]]
    same = sum(line["same"] for line in judged)
    assert (said["claims of `LAB.md`"], said["claims with the same verdict"]) == (len(judged), same)
    assert said["estimates, at all lengths"] == len(others)
    assert said["estimates with the same verdict"] == sum(x["same"] for x in others)
    assert said["claims reversed"] == said["estimates from helps to hurts or the other way"] == 0
    assert not [x for x in judged if {x["first"], x["second"]} == {verdicts.AGREES, verdicts.DISAGREES}]
    turned = [{"helps", "hurts"}, {"rises", "falls"}, {"larger", "smaller"}, {"predicts", "contradicts"}]
    assert not [x for x in others if {x["first"], x["second"]} in turned]
    lost = sum({x["first"], x["second"]} == {"lost", "kept"} for x in others)
    assert said["estimates from lost to kept or the other way"] == lost
    told = [read_rows(runs / run / "questions.jsonl") for run in ("0-9", second)]
    claims = [{(row["source"], row["claim"]): row for row in run if row["metric"] == "claim"} for run in told]
    words = {verdicts.AGREES: "holds", verdicts.DISAGREES: "does not hold", estimates.OPEN: "not decided"}
    table = {claim: cells for claim, *cells in lines_of(page)[1:]}
    assert len(table) == len(judged) - same
    for line in judged:
        key = line["source"], line["claim"]
        if not line["same"]:
            expected = [
                f"{words[x[key]['agrees']]}: {verdicts.estimate_text(x[key]).replace(' points', '')}" for x in claims
            ]
            short = line["claim"].replace("recall with YaRN keeps it", "recall with YaRN keeps the short window")
            assert table[short] == expected


def average(rows, fold=None):
    """{(arm, base, fold, seed): mean score at the target} of trained arms."""
    found = {}
    for row in rows:
        if row["suite"] == "ruler" and row["length"] == row["target"] and not row["arm"].startswith("untrained"):
            found.setdefault((row["arm"], row["base"], row["fold"], row["seed"]), []).append(row["value"])
    return {key: np.mean(values) for key, values in found.items() if fold in (None, key[2])}


def test_the_same_seeds_differ_by_as_much_as_the_page_says(rows, again):
    said = {name: cells[0] for name, cells in counts().items()}
    micro = micro_cells(range(10))
    first = [row for row in rows if row["cell"] in micro]
    samples = [
        {(row["cell"], row["task"], row["length"]): row["samples_sha256"] for row in run if row["suite"] == "ruler"}
        for run in (first, again)
    ]
    assert samples[0] == samples[1] and {key[0] for key in samples[0]} == micro
    apart = {}
    for fold in (8, 32):
        a, b = average(first, fold), average(again, fold)
        assert a.keys() == b.keys()
        apart[fold] = np.sqrt(np.mean([(a[key] - b[key]) ** 2 for key in a]))
    for fold, points in apart.items():
        assert said[f"difference at {fold}-fold, root mean square, points"] == round(points, 1)
    a, b = average(first), average(again)
    arms = {key[:3] for key in a}
    spreads = np.array([[np.std([run[(*arm, seed)] for seed in range(10)]) for arm in arms] for run in (a, b)])
    spreads = spreads[:, (spreads > 0).all(axis=0)]
    ratio = np.exp(np.log(spreads[1] / spreads[0]).mean())
    assert said["spread over seeds, ratio, geometric mean"] == round(ratio, 2)
    less = np.mean(list(b.values())) - np.mean(list(a.values()))
    assert said["mean score less that without, points"] == round(less, 1)


def test_what_determinism_costs_is_that_of_the_rows(rows, again):
    micro = micro_cells(range(10))
    spent = []
    for run in (again, [row for row in rows if row["cell"] in micro]):
        seconds = {row["cell"]: row["gpu_seconds"] for row in run if row.get("gpu_seconds")}
        assert len(seconds) == 720
        spent.append(sum(seconds.values()))
    text = " ".join(part("docs/training.md", "## Reproducibility", "## Watching").split())
    assert f"{spent[0] / spent[1]:.2f} times as long" in text and f"{spent[0]:,.0f} against {spent[1]:,.0f}" in text


@pytest.mark.slow
def test_the_whole_preset_was_run_twice_with_the_same_rows_and_verdicts(again, runs, tmp_path):
    """Every column of every row, but how long it took; the estimates that differ are those of seconds."""
    more = packed_rows(ROOT / "paper_figures" / "data" / "measured" / "pages" / "lab_once_more.jsonl.gz")
    first, second = (
        {(row["cell"], row["task"], row["length"], row["metric"]): row for row in run} for run in (again, more)
    )
    assert len(again) == len(first) == len(more) and first.keys() == second.keys()
    for key, row in first.items():
        assert {**row, "gpu_seconds": 0} == {**second[key], "gpu_seconds": 0}
    assert [row.get("gpu_seconds") for row in again] != [row.get("gpu_seconds") for row in more]  # not a copy
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    verdicts.write(tmp_path)
    lines = compare(runs / "again", tmp_path)
    claims = [line for line in lines if line["metric"] == "claim"]
    others = [line for line in lines if line["metric"] != "claim" and line["first"] and line["second"]]
    changed = [line for line in others if not line["same"]]
    assert all(line["same"] for line in claims) and {line["metric"] for line in changed} == {"score_by_seconds"}
    said = counts()
    assert said["rows, every column but the seconds"] == [len(again)] * 2 and said["claims"] == [len(claims)] * 2
    assert said["other estimates"] == [len(others), len(others) - len(changed)]


def test_cells_that_were_done_twice_are_the_same(again):
    """In processes of their own, with another number of workers and in another order."""
    twice = packed_rows(ROOT / "paper_figures" / "data" / "measured" / "pages" / "lab_twice.jsonl.gz")

    def values(rows):
        keys = ("cell", "suite", "task", "length", "metric")
        return {tuple(row[key] for key in keys): (row["value"], row.get("final_loss"), row["jobs"]) for row in rows}

    second, first = values(twice), values(again)
    assert counts()["rows of eight cells, other workers and order"] == [len(second)] * 2
    assert len({row["cell"] for row in twice}) == 8 and all(row["deterministic"] for row in twice + again)
    assert {key: value[:2] for key, value in second.items()} == {key: first[key][:2] for key in second}
    assert {value[2] for value in second.values()} == {3} and {first[key][2] for key in second} == {8}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_todays_samples_are_those_of_the_rows(again):
    """The models of the lab were trained on its own edition of RULER: its wording must not change."""
    rows = {
        (row["base"], row["task"], row["length"], row["seed"]): (row["samples_sha256"], row["n"])
        for row in again
        if row["suite"] == "ruler"
    }
    config = LabConfig(preset="micro", seeds=list(range(10)))
    matrices = {str(path): matrix.read_matrix(path) for path in matrix.matrix_files(config)}
    made = {}
    for cell in matrix.all_cells(matrices, config):
        for item in material.samples(cell):
            key = cell.base, item.task, item.length, cell.seed
            if key not in made:
                options = {name: getattr(item, name) for name in ("max_new_tokens", "shots", "hops", "edition")}
                tokenizer = material.tokenizer_of(item.model)
                samples = build_samples(item.task, item.length, tokenizer, item.count, item.seed, **options)
                made[key] = samples_sha256(samples), len(samples)
    assert made == rows and len(made) == 280
