"""The commands of this package, `endprompt verify`, `predict` and `positions`; the work is imported when called."""

import sys

from analysis.config import PositionsConfig, PredictConfig, VerifyConfig


def verify(config: VerifyConfig) -> int:
    """Check the smoothness bounds and what the gap's observability is, on a checkpoint's own weights."""
    from analysis import verify as work

    report = work.verify(config)
    print(report.table())
    print("all bounds hold" if report.holds else "A CERTIFIED BOUND IS VIOLATED: see the rows")
    print(f"rows and pictures: {config.output}", file=sys.stderr)
    return 0 if report.holds else 1


def predict(config: PredictConfig) -> None:
    """Compare scalings and schemes for a target on a checkpoint's own weights, before any training."""
    from analysis import predict as work

    print(work.report(config))


def positions(config: PositionsConfig) -> None:
    """Show what a position scheme observes: intervals of distance, the gap, pair counts, a picture."""
    from analysis import coverage

    print(coverage.report(config))
