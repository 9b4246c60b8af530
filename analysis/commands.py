"""The commands of this package, `endprompt verify` and `endprompt positions`; the work is imported when called."""

from __future__ import annotations

import sys

from analysis.config import PositionsConfig, VerifyConfig


def verify(config: VerifyConfig) -> int:
    """Check the smoothness bounds and what the gap's observability is, on a checkpoint's own weights."""
    from analysis import verify as work

    report = work.verify(config)
    print(report.table())
    print("all bounds hold" if report.holds else "A CERTIFIED BOUND IS VIOLATED: see the rows")
    print(f"rows and pictures: {config.output}", file=sys.stderr)
    return 0 if report.holds else 1


def positions(config: PositionsConfig) -> None:
    """Show what a position scheme observes: intervals of distance, the gap, pair counts, a picture."""
    from analysis import coverage

    print(coverage.report(config))
