"""Who may import whom, as import-linter's contracts in pyproject.toml have it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("endprompt", "analysis", "benchmarks", "paper_figures")


def lint(tree: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache"], cwd=tree, capture_output=True, text=True)


def test_the_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.fixture
def tree(tmp_path):
    """The sources alone, to be broken."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("importer", "imported", "contract"),
    [
        ("endprompt/model/geometry.py", "endprompt.train.loss", "The trainer's rooms"),
        ("endprompt/plan.py", "analysis.bounds", "The packages"),
        ("analysis/scene.py", "endprompt.train.run", "The theory"),
        ("benchmarks/scoring/run.py", "benchmarks.speed.train", "The rooms of benchmarks"),
        ("benchmarks/ruler/fit.py", "benchmarks.ruler.cell", "No circles"),
        ("paper_figures/style.py", "torch", "The figures"),
    ],
)
def test_a_wrong_import_is_found(tree, importer, imported, contract):
    path = tree / importer
    path.write_text(path.read_text(encoding="utf-8") + f"\n\ndef wrong():\n    import {imported}\n", encoding="utf-8")
    done = lint(tree)
    broken = [line for line in done.stdout.splitlines() if "BROKEN" in line]
    assert done.returncode == 1 and any(line.startswith(contract) for line in broken), done.stdout
