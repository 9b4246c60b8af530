"""The command `bench`."""

from benchmarks.speed.config import BenchConfig


def bench(config: BenchConfig) -> int:
    """Measure training steps on random weights of a named shape: tokens/s, MFU, peak memory."""
    from benchmarks.speed import train as measurements

    return measurements.bench(config)
