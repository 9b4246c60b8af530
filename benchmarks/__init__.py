"""RULER and LongBench as lm-eval tasks, scoring, summaries, the demo and the replication lab."""
