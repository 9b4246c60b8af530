"""The direction of imports, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("endprompt", "analysis", "benchmarks", "paper_figures")
#: What a package may import of the others; a module of its own it may always import.
ARROWS = {
    "endprompt": set(),
    "analysis": {
        "endprompt.positions",
        "endprompt.rope",
        "endprompt.model",
        "endprompt.rows",
        "endprompt.text",
        "endprompt.origin",
    },
    "benchmarks": {"endprompt", "analysis"},
    "paper_figures": set(),
}
#: Modules that import nothing of ours at all.
LEAVES = ("cli", "positions", "prompts", "rope", "rows", "text", "triton_kernels")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", OURS)
def test_packages_import_along_the_arrows(package):
    assert files(package)
    wrong = []
    for path in files(package):
        for name in imported(path):
            top = name.partition(".")[0]
            if top not in OURS or top == package:
                continue
            if not any(name == allowed or name.startswith(allowed + ".") for allowed in ARROWS[package]):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("module", LEAVES)
def test_leaf_modules_import_nothing_of_ours(module):
    ours = {name for name in imported(ROOT / "endprompt" / f"{module}.py") if name.partition(".")[0] in OURS}
    assert not ours


def test_figures_need_no_torch():
    heavy = {"torch", "transformers", "lm_eval"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files("paper_figures")
        for name in imported(path)
        if name.partition(".")[0] in heavy
    ]
    assert not wrong


def test_the_reading_of_imports_finds_a_wrong_one(tmp_path):
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from benchmarks import summary\n    import endprompt.train\n")
    assert imported(source) == {"benchmarks.summary", "endprompt.train"}
