"""A checkpoint's scores: from a configuration to rows, by transformers or vLLM, resumable."""

from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.run import score

__all__ = ["ScoreConfig", "score"]
