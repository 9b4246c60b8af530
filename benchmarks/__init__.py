"""RULER and LongBench as lm-eval tasks, scoring, summaries, the demo and the replication lab."""

import endprompt  # noqa: F401  # says how threads wait, before torch is imported
