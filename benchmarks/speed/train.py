"""Speed and memory of training steps on random weights of a named shape, as result rows.

    tokens/s = physical tokens of a step / its seconds, optimizer included; FLOPs of a token as in `train.progress`
    MFU = tokens/s x FLOPs of a token / dense bfloat16 peak of the device (989.4e12 for H100 and H200, their datasheet),
        also where the products run in float8
    peak memory: the most that torch's allocator held in tensors; held: what it held before the timed micro-batches

Speed does not depend on the values of the weights beyond the power they draw, so random ones serve. The measurements of
the published comparison are recipes; each takes a process of its own, since one that runs out of memory ends it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.config import METHODS, BenchConfig
from benchmarks.speed.step import measure
from endprompt.config import FLOAT8, check_fields
from endprompt.results import append_rows
from endprompt.shapes import SHAPES


def check(config: BenchConfig) -> None:
    """Raises ValueError naming key, value and rule."""
    choices = {
        "shape": tuple(SHAPES),
        "method": tuple(METHODS),
        "optimizer": ("lean", "adamw", "none"),
        "float8": FLOAT8,
        "recompute": ("none", "selective", "attention", "full"),
    }
    check_fields(config, choices, dict.fromkeys(("row_tokens", "target", "micro_rows", "rows", "timed"), 1))
    if config.row_tokens > config.target:
        raise ValueError(f"a row must fit into the target: row_tokens={config.row_tokens} target={config.target}")
    if config.rows % config.micro_rows:
        raise ValueError(f"micro_rows must divide rows: micro_rows={config.micro_rows} rows={config.rows}")
    if config.method == "reference" and config.optimizer == "lean":
        raise ValueError(f"the reference is transformers as it is, optimizer must be adamw or none: {config.optimizer}")
    if config.float8 != "none" and config.optimizer != "lean":
        raise ValueError(f"float8 needs the lean optimizer: optimizer={config.optimizer!r}")


def bench(config: BenchConfig) -> int:
    """Run the measurement; rows go to results.jsonl, a table to stdout."""
    check(config)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = measure(config)
    append_rows(output / "results.jsonl", rows)
    print(table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """One line a measurement: tokens/s, hours per 1B tokens, MFU, peak memory."""
    by_task: dict[tuple[str, Any], dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "training-speed":
            by_task.setdefault((row["task"], row["length"]), {})[row["metric"]] = row["value"]
    columns = {
        "tokens_per_s": "tokens/s",
        "hours_per_1b_tokens": "h/1B",
        "mfu_percent": "MFU %",
        "peak_gib": "GiB",
        "micro_batch_seconds": "micro s",
        "optimizer_seconds": "optim s",
    }
    used = [key for key in columns if any(key in values for values in by_task.values())]
    lines = [f"{'measurement':<52}" + "".join(f"{columns[key]:>11}" for key in used)]
    for (task, _), values in by_task.items():
        cells = [f"{values[key]:>11,.4g}" if key in values else f"{'':>11}" for key in used]
        lines.append(f"{task:<52}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":  # the configuration as JSON: for machines without the command line's packages
    sys.exit(bench(BenchConfig(**json.loads(sys.argv[1]))))
