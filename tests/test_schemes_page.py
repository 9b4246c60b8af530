"""The pages' tables of the lab against the committed rows, worked out apart from the code that judges them."""

import gzip
import json
import re
import statistics
from pathlib import Path

import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = [("256", "yarn"), ("256", "linear"), ("512", "yarn"), ("512", "linear")]
FULL = {"256": "full-8192", "512": "full-16384"}
LAB = {"256": "full-2048", "512": "full-4096"}
ARMS = {"LongLoRA": {"256": "longlora-2048", "512": "longlora-4096"}, "full length": LAB, "`recall`": "recall"}
ARMS |= {"short interpolation": "contiguous", "fixed end prompt": "endprompt", "PoSE": "pose"}


@pytest.fixture(scope="module")
def scores():
    """Score at the target by (base, fold, arm) and seed: the mean of the four tasks."""
    tasks = {}
    with gzip.open(ROOT / "paper_figures/data/measured/lab_results.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["suite"] == "ruler" and row["length"] == row["target"]:
                key = (row["base"], row["fold"], row["arm"])
                tasks.setdefault(key, {}).setdefault(row["seed"], []).append(row["value"])
    return {key: {seed: statistics.mean(v) for seed, v in seeds.items()} for key, seeds in tasks.items()}


def table(page, head):
    """Cells of the first table of a page whose first line begins so."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head)) + 2
    stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:stop]]


def spread(found):
    return f"{statistics.mean(found.values()):.1f} ± {statistics.stdev(found.values()):.1f}"


def test_means_of_the_search_are_those_of_the_rows(scores):
    lines = table("docs/schemes.md", "| arm | text whole |")
    assert len(lines) > 15
    for name, _, *cells in lines:
        for (base, scaling), cell in zip(COLUMNS, cells, strict=True):
            arm = FULL[base] if name.startswith("full length") else name
            found = scores.get((base, 32, f"{arm}+{scaling}"))
            assert cell == (f"{spread(found)} ({len(found)})" if found else ""), (name, base, scaling)


def test_differences_to_pose_are_paired_by_seed(scores):
    lines = table("docs/schemes.md", "| | 256, YaRN | 256, PI |")
    assert [line[0] for line in lines] == ["sliding-long", "sliding"]
    for name, *cells in lines:
        for (base, scaling), cell in zip(COLUMNS, cells, strict=True):
            ours, pose = (scores[base, 32, f"{arm}+{scaling}"] for arm in (name, "pose"))
            seeds = sorted(ours.keys() & pose.keys())
            test = stats.ttest_rel([ours[s] for s in seeds], [pose[s] for s in seeds])
            lo, hi = test.confidence_interval(0.95)
            mean = statistics.mean(ours[s] - pose[s] for s in seeds)
            assert cell == f"{mean:+.1f} [{lo:+.1f}, {hi:+.1f}]", (name, base, scaling)


def test_longlora_s_tables_are_those_of_the_rows(scores):
    for name, *cells in table("docs/lab.md", "| | base 256, 8-fold | base 512, 8-fold |"):
        for base, cell in zip(("256", "512"), cells, strict=True):
            arm = ARMS[name] if isinstance(ARMS[name], str) else ARMS[name][base]
            assert cell == spread(scores[base, 8, f"{arm}+yarn"]), (name, base)
    tried = {}
    for row in map(json.loads, (ROOT / "docs/lab_longlora.jsonl").read_text(encoding="utf-8").splitlines()):
        if row["suite"] == "ruler" and row["length"] == row["target"] and (row["seed"], row["lora_rank"]) == (0, 8):
            tried.setdefault((row["base"], row["fold"], row["scaling"], row["lr"]), []).append(row["value"])
    shown = 0
    for name, *cells in table("docs/lab.md", "| rate | 2e-4 |"):
        base, fold = map(int, re.findall(r"\d+", name))
        for rate, cell in zip((2e-4, 5e-4, 1e-3, 2e-3, 5e-3), cells, strict=True):
            found = tried.pop((str(base), fold, "yarn", rate), None)
            assert cell == (f"{statistics.mean(found):.1f}" if found else ""), (name, rate)
            shown += bool(found)
    assert shown == 11 and {key[2] for key in tried} == {"linear"}
