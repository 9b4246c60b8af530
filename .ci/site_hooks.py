"""What the documentation site is made of beside docs/: pages that live with what they describe, and the API reference.

Their links point into the repository; where the file is a page of the site the link is turned to it, and where it is
not, it is left as text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    own = {path.name for path in Path(config.docs_dir).glob("*.md")} | set(PAGES.values())
    named = [{title: page} for page, title in NAV.items() if page in own]
    rest = sorted(own - set(NAV) - {"changelog.md", "contributing.md"})
    api = {"API": [{package: f"api/{package}.md"} for package in PACKAGES]}
    config.nav = [*named, *rest, api, {"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    known = {f"docs/{file.src_uri}": file.src_uri for file in files} | PAGES
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/demo.png)", "](demo.png)")
        files.append(File.generated(config, page, content=site_page(text, source, known)))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links of the pages below docs/ that lead out of it."""
    if page.file.src_uri in PAGES.values() or page.file.src_uri.startswith("api/"):
        return markdown
    known = {f"docs/{file.src_uri}": file.src_uri for file in files} | PAGES
    return site_page(markdown, f"docs/{page.file.src_uri}", known | {page.file.src_uri: page.file.src_uri})
