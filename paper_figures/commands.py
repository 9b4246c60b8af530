"""The commands `figures` and `audit`."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class FiguresConfig:
    """What `figures` draws.

    Args:
        results: Run directories (with results.jsonl) or JSON Lines files whose rows stand beside the published
            numbers; without any, the rows that come with the project.
        output: Directory for the files: PDF and PNG for a figure; LaTeX, Markdown and CSV for a table.
        only: Names of the figures and tables to draw, for example figure_2 table_1; without any, all that have data.
    """

    results: list[str] = field(default_factory=list)
    output: str = "figures"
    only: list[str] = field(default_factory=list)


def figures(config: FiguresConfig) -> int | None:
    """Draw figures and tables from files, the published numbers beside the measured ones."""
    from paper_figures import catalog
    from paper_figures.inputs import NoData, measured_files, read_results

    for name in config.only:
        catalog.module(name)
    rows = read_results(config.results or measured_files())
    output = Path(config.output)
    absent: dict[str, list[str]] = {}  # by what they lack
    for name in config.only or catalog.NAMES:
        try:
            for path in catalog.make(name, rows, output):
                print(path)
        except NoData as error:
            if config.only:
                raise ValueError(f"{name} {error}") from None
            absent.setdefault(str(error), []).append(name)
    if absent:
        print("without data, not drawn:", file=sys.stderr)
        for reason, names in absent.items():
            print(f"  {', '.join(names)}: {reason}", file=sys.stderr)
    return None


@dataclass
class AuditConfig:
    """How `audit` prints its findings.

    Args:
        json: Print JSON, a list of objects, instead of lines.
    """

    json: bool = False


def audit(config: AuditConfig) -> int | None:
    """Recompute the paper's averages, ratios and claims from its printed tables."""
    from paper_figures.audit import VERDICTS, findings

    found = findings()
    if config.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return None
    width = min(120, shutil.get_terminal_size().columns)
    for verdict in reversed(VERDICTS):
        chosen = [finding for finding in found if finding["verdict"] == verdict]
        print(f"{verdict} ({len(chosen)})")
        for f in chosen:
            printed = "not printed" if f["printed"] is None else f"printed {f['printed']}"
            line = f"  {f['table']}, {f['row']}: {f['rule']}: {printed}, recomputed {f['recomputed']}"
            print(textwrap.fill(line, width, subsequent_indent="    ") if sys.stdout.isatty() else line)
    return None
