"""Two revisions' losses, step by step: what counts as a difference, and a fault that was put into one tree."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.speed import loss_compare
from benchmarks.speed.loss_compare import Run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """`main` on runs that are typed by hand: (losses, weight) of the revision and of the working tree."""

    def run(before, after, *flags, dtype=torch.float32):
        runs = []
        for name, (losses, weight) in (("a", before), ("b", after)):
            values = torch.tensor([1.0, weight], dtype=dtype if name == "b" else torch.float32)
            save_file({"w": values}, tmp_path / f"{name}.safetensors")
            runs.append({"plain": Run(losses, tmp_path / f"{name}.safetensors")})
        monkeypatch.setattr(loss_compare, "checked_out", lambda revision, tree: contextlib.nullcontext(tree))
        monkeypatch.setattr(loss_compare, "measured", lambda *_: runs.pop(0))
        return loss_compare.main(["main", "--settings", "plain", *flags])

    return run


def test_equal_runs_agree(compared, capsys):
    assert compared(([4.5, 4.25], 2.0), ([4.5, 4.25], 2.0)) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "plain       1      4.500000      4.500000  0",
        "plain       2      4.250000      4.250000  0",
        "plain    weights after the last step           0",
        "largest difference 0, tolerance 0",
    ]


@pytest.mark.parametrize(
    ("after", "largest"),
    [
        (([4.5, 4.375], 2.0), "0.125"),
        (([4.5, 4.25], 2.5), "0.5"),  # only the last update
        (([4.5], 2.0), "inf"),  # it ended sooner
        (([4.5, 4.25, 4.0], 2.0), "inf"),
        (([4.5, math.nan], 2.0), "inf"),
        (([4.5, 4.25], math.nan), "inf"),
    ],
)
def test_what_differs_is_found_at_any_tolerance_below_it(compared, capsys, after, largest):
    assert compared(([4.5, 4.25], 2.0), after) == 1
    assert f"largest difference {largest}, " in capsys.readouterr().out
    assert compared(([4.5, 4.25], 2.0), after, "--tolerance", "0.1") == 1
    assert compared(([4.5, 4.25], 2.0), after, "--tolerance", "0.5") == int(largest == "inf")


def test_weights_of_another_dtype_differ(compared):
    assert compared(([4.5], 2.0), ([4.5], 2.0), "--tolerance", "1", dtype=torch.bfloat16) == 1


def test_a_revision_that_is_not_there_is_named(capsys):
    assert loss_compare.main(["no-such-revision"]) == 2
    assert capsys.readouterr().err.startswith("no-such-revision: git failed: fatal: ")


@pytest.mark.slow
def test_a_changed_rate_is_found_in_another_tree(tmp_path):
    """The first loss is the same, the weights after its step are not."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    tree = tmp_path / "tree"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    shutil.copy(loss_compare.__file__, tree / "benchmarks" / "speed")
    loop = tree / "endprompt" / "train" / "loop.py"
    right = "return config.lr * (step + 1) / config.warmup"
    assert loop.read_text().count(right) == 1
    loop.write_text(loop.read_text().replace(right, right.replace("step + 1", "step + 1.5")))

    def compare(*revisions):
        command = [sys.executable, "-P", "-m", "benchmarks.speed.loss_compare", *revisions, "--settings", "plain"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        return subprocess.run([*command, "--steps", "1"], cwd=tree, env=environment, capture_output=True, text=True)

    same, changed = compare("HEAD", "HEAD"), compare("HEAD")
    assert same.returncode == 0, same.stdout + same.stderr
    assert changed.returncode == 1, changed.stdout + changed.stderr
    first, weights = changed.stdout.splitlines()[1:3]
    assert first.split()[-1] == "0" and float(weights.split()[-1]) > 0
    listed = subprocess.run(["git", "-C", str(tree), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1
