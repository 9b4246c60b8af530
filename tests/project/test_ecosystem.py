"""What stands around the code: the notebook runs, the workflow calls what exists, a source distribution is whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.support import ruler_helpers

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "8k_to_64k.ipynb"


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs_at_tiny_size(tmp_path, monkeypatch, capsys):
    """Every cell in order, with other parameters; its arms, scores and picture are those that it speaks of."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    base = ruler_helpers.checkpoint(tmp_path / "base", window=512)
    lines = "".join(json.dumps({"text": ruler_helpers.STORY * 12}) + "\n" for _ in range(30))
    (tmp_path / "books.jsonl").write_text(lines)
    (tmp_path / "held.txt").write_text(ruler_helpers.STORY * 60)
    tiny = {
        "MODEL": str(base), "HELD_OUT": ["held.txt"], "TARGET": 2048, "STEPS": 2, "ROWS": 2, "RATE": 1e-3,
        "LENGTHS": [512, 2048], "SAMPLES": 2, "MORE": {"device": "cpu", "eval_lengths": [512, 1024]},
        "SCORE": {"device": "cpu", "quiet": True, "max_new_tokens": 8, "shots": 0, "cache_dir": "cache"},
    }  # fmt: skip
    space: dict = {}
    for cell in code_cells():
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), space)
        if "parameters" in cell["metadata"].get("tags", []):
            assert set(tiny) < set(space)
            space |= tiny
    assert {name: len(rows) for name, rows in space["rows"].items()} == {"control": 4, "end prompt": 4}
    methods = {name: {row["method"] for row in rows} for name, rows in space["rows"].items()}
    assert methods == {"control": {"contiguous+yarn"}, "end prompt": {"endprompt+recall+yarn"}}
    for path in ("control/loss.png", "recall/loss.png", "scores.png"):
        assert (tmp_path / space["OUT"] / path).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert space["answer"] in said.out and "left out of the end" in said.err


def test_the_notebook_is_kept_without_outputs():
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), str(NOTEBOOK), "exec")


def test_the_workflow_calls_targets_commands_and_stages_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    matrix = workflow["jobs"]["make"]["strategy"]["matrix"]
    assert {*matrix["target"], *(one["target"] for one in matrix["include"])} <= targets
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
    builds = [step["with"]["target"] for step in workflow["jobs"]["image"]["steps"] if "target" in step.get("with", {})]
    assert builds == ["cpu"] and {"cpu", "cuda"} <= stages
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        body = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert form.name == "config.yml" or {"name", "description", "body"} <= set(body)


@pytest.mark.slow
def test_a_source_distribution_builds_the_same_wheel_and_has_its_tests(tmp_path):
    """The wheel of the sdist has the files of the wheel of the tree; pages, examples and tests are in the sdist."""
    pytest.importorskip("build")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, tracked):  # a copy, since a build leaves folders where it is made
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    # without a format: the sdist of the tree, and the wheel of that sdist
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tmp_path / "tree")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (packed,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(packed) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    left_out = {".github", ".gitignore", ".dockerignore", "MANIFEST.in"}
    wanted = {name for name in tracked if name and name.split("/")[0] not in left_out}
    assert not wanted - held, sorted(wanted - held)[:10]
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    packages = ("endprompt/", "analysis/", "benchmarks/", "paper_figures/")
    assert names >= {name for name in tracked if name.startswith(packages) and name.endswith((".py", ".yaml", ".csv"))}
    assert all(name.startswith(packages) for name in names)
