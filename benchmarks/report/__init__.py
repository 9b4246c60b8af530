"""One page of HTML from finished runs."""

from benchmarks.report.page import report, show

__all__ = ["report", "show"]
