"""Commands of this package. Heavy imports stay inside the functions, so that `endprompt --help` is fast."""

from __future__ import annotations

from benchmarks.score import ScoreConfig


def score(config: ScoreConfig) -> int | None:
    """Score a checkpoint on RULER, LongBench or short-text tasks through lm-eval.

    Result rows go to the output directory; the table of scores is printed.
    """
    from benchmarks import score as scoring
    from benchmarks import summary

    made = scoring.score(config)
    if made and config.suite == "ruler":
        print(summary.table(made))
    return None
