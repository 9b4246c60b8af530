"""The documentation site's pages beside docs/: pages that live with what they describe, and the API reference.

    python .ci/site_pages.py [FOLDER]     writes FOLDER/pages and FOLDER/mkdocs.yml (build/site), which zensical builds

Their links point into the repository; where the file is a page of the site the link is turned to it, and where it is
not, it is left as text.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
#: File in the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "analysis/README.md": "analysis.md",
    "benchmarks/base/README.md": "base_models.md",
    "paper_figures/README.md": "figures.md",
    "paper_figures/AUDIT.md": "audit.md",
    "paper_figures/REAL.md": "real.md",
}
PACKAGES = ("endprompt", "analysis", "benchmarks", "paper_figures")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
#: Titles and order of the pages; one that is not named here comes last.
NAV = {
    "index.md": "EndPrompt Lab",
    "install.md": "Installing",
    "training.md": "Training",
    "nodes.md": "Several GPUs and nodes",
    "library.md": "As a library",
    "talk.md": "Trying a checkpoint",
    "scoring.md": "Scoring",
    "models.md": "Which models work",
    "parity.md": "Checked against the originals",
    "lab.md": "The lab",
    "analysis.md": "The analysis",
    "figures.md": "Figures and tables",
    "audit.md": "The audit",
    "real.md": "A published model",
    "base_models.md": "The base models",
    "speed.md": "Speed",
    "drills.md": "When things go wrong",
    "security.md": "Security",
    "architecture.md": "How the code is laid out",
}


def modules(package: str) -> list[str]:
    """Dotted names of a package's public modules."""
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


def api_page(package: str) -> str:
    """The reference of one package, made from its docstrings."""
    blocks = [f"::: {name}\n    options:\n      show_root_full_path: true\n" for name in modules(package)]
    return f"# `{package}`\n\n" + "\n".join(blocks)


def site_page(text: str, source: str, pages: dict[str, str]) -> str:
    """The text of a repository's file with its links as the site has them."""

    def turned(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        wanted = os.path.normpath(PurePosixPath(source).parent / target)
        if wanted in pages:
            here = PurePosixPath(pages.get(source, source)).parent
            return f"[{label}]({os.path.relpath(pages[wanted], here)}{anchor})"
        return label  # a file of the repository that is no page

    return LINK.sub(turned, text)


def navigation(own: set[str]) -> list[Any]:
    named = [{title: page} for page, title in NAV.items() if page in own]
    rest = sorted(own - set(NAV) - {"changelog.md", "contributing.md"})
    api = {"API": [{package: f"api/{package}.md"} for package in PACKAGES]}
    return [*named, *rest, api, {"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]


def write(folder: Path) -> None:
    """All pages with their links, and the configuration with its navigation."""
    pages = folder / "pages"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages)
    (pages / "api").mkdir()
    docs = {f"docs/{path.name}": path.name for path in (ROOT / "docs").iterdir()}
    known = docs | PAGES
    for source, page in known.items():
        if page.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/demo.png)", "](demo.png)")
            (pages / page).write_text(site_page(text, source, known), encoding="utf-8")
    for picture in (ROOT / "paper_figures").glob("*.png"):
        shutil.copy(picture, pages)
    for package in PACKAGES:
        (pages / "api" / f"{package}.md").write_text(api_page(package), encoding="utf-8")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= {"docs_dir": "pages", "nav": navigation({page for page in known.values() if page.endswith(".md")})}
    (handler,) = (one["mkdocstrings"]["handlers"]["python"] for one in config["plugins"] if "mkdocstrings" in one)
    handler["paths"] = [str(ROOT)]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "site")
