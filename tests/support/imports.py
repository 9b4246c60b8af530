"""What a module loads when it is imported, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def source(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def loaded(module: str) -> set[str]:
    """Top-level packages of others that are imported with a module of the project, by it or by what it imports."""
    seen, left, others = set(), [module], set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        path = source(name)
        if path is None:
            others.add(name.partition(".")[0])
            continue
        left += [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
        for node in at_import(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            else:
                left += [f"{node.module}.{alias.name}" for alias in node.names if source(f"{node.module}.{alias.name}")]
                left.append(node.module or "")
    return others


def at_import(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a module outside of its functions and of what is for type checkers alone."""
    found: list[ast.Import | ast.ImportFrom] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            found.append(child)
        elif isinstance(child, (ast.If, ast.Try, ast.With)) and "TYPE_CHECKING" not in ast.unparse(child):
            found += at_import(child)
    return found
