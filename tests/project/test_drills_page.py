"""docs/drills.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_drill_on_the_page_is_a_test():
    page = (ROOT / "docs" / "drills.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+/test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) >= 15
    for file, function in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {function}" in source, f"{file}::{function}"


def test_every_drill_is_on_the_page():
    page = (ROOT / "docs" / "drills.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "tests" / "project").glob("test_drills*.py")):
        for function in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            own = path.name == "test_drills_page.py"
            assert own or f"project/{path.name}::{function}" in page, f"{path.name}::{function}"
