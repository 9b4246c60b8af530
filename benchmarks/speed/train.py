"""Speed and memory of training steps on random weights of a named shape, as result rows.

    tokens/s = physical tokens of a step / its seconds, optimizer included
    FLOPs of a token = 6 P + 6 A T         (forward 2, backward 4; recomputation is not counted)
        P  parameters that are multiplied: all but the embeddings
        A  query heads x head dim x layers; causal attention multiplies a query by T/2 keys and T/2 values on average
      LongLoRA: 4 P + 6 A T 15/64          (no gradients of frozen matrices, shifted attention; LoRA's own products,
                                            a thousandth, and the trained embeddings' look-up are not counted)
    MFU = tokens/s x FLOPs of a token / dense bfloat16 peak of the device (989.4e12 for H100 and H200, their datasheet),
        also where the products run in float8
    peak memory: the most that torch's allocator held in tensors; held: what it held before the timed micro-batches,
        weights, gradients and moments among it

Speed does not depend on the values of the weights beyond the power they draw, so random ones serve. The measurements of
a suite run in processes of their own: one that runs out of memory ends alone. `--suite h200` is the whole comparison on
one GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.config import METHODS, BenchConfig
from benchmarks.speed.measure import attention_rates, say
from benchmarks.speed.step import measure
from endprompt.shapes import SHAPES


def check(config: BenchConfig) -> None:
    """Raises ValueError naming key, value and rule."""
    from endprompt.config import FLOAT8

    choices = {
        "suite": ("none", *SUITES),
        "shape": tuple(SHAPES),
        "method": tuple(METHODS),
        "optimizer": ("lean", "adamw", "none"),
        "sums": ("float32", "bfloat16"),
        "float8": FLOAT8,
        "recompute": ("none", "selective", "full"),
    }
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}: {key}={getattr(config, key)!r}")
    for key in ("row_tokens", "target", "micro_rows", "rows", "timed"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key} must be at least 1: {key}={getattr(config, key)}")
    if not 0 <= config.memory_budget <= 1:
        raise ValueError(f"memory_budget must be in [0, 1]: memory_budget={config.memory_budget}")
    if config.warm_layers < 0:
        raise ValueError(f"warm_layers must not be negative: warm_layers={config.warm_layers}")
    if config.row_tokens > config.target:
        raise ValueError(f"a row must fit into the target: row_tokens={config.row_tokens} target={config.target}")
    if config.rows % config.micro_rows:
        raise ValueError(f"micro_rows must divide rows: micro_rows={config.micro_rows} rows={config.rows}")
    if config.method == "reference" and config.optimizer == "lean" and config.fused_sums:
        raise ValueError("the reference is transformers as it is: set fused_sums=false or optimizer=none")
    if config.float8_head and config.float8 == "none":
        raise ValueError(f"float8_head needs float8: float8_head={config.float8_head} float8={config.float8!r}")
    if config.float8 != "none" and config.optimizer != "lean":
        raise ValueError(f"float8 needs the lean optimizer: optimizer={config.optimizer!r}")


def bench(config: BenchConfig) -> int:
    """Run the measurement or the suite; rows go to results.jsonl, a table to stdout. 1 if a measurement failed."""
    check(config)
    # forked parts start CUDA themselves, so this process must not: NVML answers whether there is a device
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    if config.suite == "none":
        from endprompt.results import append_rows

        rows = measure(config)
        append_rows(output / "results.jsonl", rows)
        print(table(rows))
        return 0
    suite = Suite(config, output)
    with suite.table_at_the_end():
        SUITES[config.suite](suite)
    return 1 if suite.failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Suites


class Suite:
    """Runs parts one after another, each in a process of its own, until the time is up."""

    def __init__(self, config: BenchConfig, output: Path):
        self.config, self.output = config, output
        self.results = output / "results.jsonl"
        self.started = time.monotonic()
        self.failed: list[str] = []

    def left(self) -> float:
        return self.config.seconds - (time.monotonic() - self.started)

    def measure(self, name: str, seconds: float, **changes: Any) -> dict[str, float]:
        """One measurement of at most `seconds`; its values by metric, empty if it failed or there was no time."""
        config = dataclasses.replace(self.config, suite="none", name=name, **changes)
        if self.config.tiny:
            config = toy(config)
        check(config)
        rows = self.part(name, seconds, "measure", dataclasses.asdict(config))
        return {row["metric"]: row["value"] for row in rows}

    def part(self, name: str, seconds: float, function: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Run one of PARTS in a process of its own and append its rows to the results."""
        wanted = [prefix.strip() for prefix in self.config.parts.split(";") if prefix.strip()]
        if wanted and not any(name.startswith(prefix) for prefix in wanted):
            return []
        if self.left() < seconds * 0.6:
            say(f"[{self.clock()}] {name}: left out, {self.left():.0f} s left of {self.config.seconds:.0f}")
            self.failed.append(name)
            return []
        say(f"[{self.clock()}] {name} ...")
        began = time.monotonic()
        aside = self.output / "part.jsonl"
        aside.unlink(missing_ok=True)
        code = in_process(function, arguments, aside, min(seconds * 2, self.left() + 20))
        rows = []
        if aside.exists():
            rows = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
            aside.unlink()
        with open(self.results, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        values = {row["metric"]: row["value"] for row in rows}
        shown = "  ".join(f"{metric} {value:,.4g}" for metric, value in values.items() if len(rows) < 12)
        say(f"[{self.clock()}] {name}: {shown or f'{len(rows)} rows'}  ({time.monotonic() - began:.0f} s, code {code})")
        if code != 0:
            self.failed.append(name)
        return rows

    def clock(self) -> str:
        return f"{time.monotonic() - self.started:5.0f} s"

    @contextlib.contextmanager
    def table_at_the_end(self) -> Iterator[None]:
        import transformers.models.llama.modeling_llama

        import endprompt.train  # noqa: F401  imported here so that every forked part has them

        assert transformers.models.llama.modeling_llama
        try:
            yield
        finally:
            if self.results.exists():
                lines = self.results.read_text(encoding="utf-8").splitlines()
                print(table([json.loads(line) for line in lines]), flush=True)
            if self.failed:
                print(f"failed or left out: {', '.join(self.failed)}", flush=True)


def in_process(function: str, arguments: dict[str, Any], aside: Path, limit: float) -> int:
    """Exit code of a child that writes the rows of a part to `aside`; it is killed after `limit` seconds.

    A forked child inherits the imports, which saves ten seconds; its parent must not have touched CUDA.
    """
    child = multiprocessing.get_context("fork").Process(target=run_part, args=(function, arguments, aside))
    child.start()
    child.join(limit)
    child.kill()
    child.join()
    return child.exitcode or 0


def run_part(function: str, arguments: dict[str, Any], aside: Path) -> None:
    rows = PARTS[function](**arguments)
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "measure": lambda **fields: measure(BenchConfig(**fields)),
    "attention_rates": attention_rates,
}


def toy(config: BenchConfig) -> BenchConfig:
    """The same measurement with sizes for a rehearsal; a kernel that needs a GPU is replaced."""
    shorter = max(32, config.row_tokens // 256)
    longer = max(128, config.target // 256)
    attention = "eager" if "flash" in config.attention else config.attention
    sizes: dict[str, Any] = {"row_tokens": shorter, "target": longer, "rows": 4, "micro_rows": 2, "timed": 1}
    return dataclasses.replace(config, shape="tiny", attention=attention, **sizes)


def h200(suite: Suite) -> None:
    """The comparison on one GPU of 141 GB, the most wanted first: what does not fit into the time is left out.

    The attention kernels; whole steps with the faster one, in bfloat16 and float8; full length with it, and both with
    cuDNN's; the reference; full length in float8; LongLoRA and the shorter window of the paper's Figure 4.
    """
    layer = {"shape": "tiny", "tokens": 64} if suite.config.tiny else {"shape": "llama3-8b", "tokens": 8192}
    rates = suite.part("kernels", 40, "attention_rates", layer)
    best = {"attention": faster_attention(rates, suite.config.attention)}
    sdpa = {"attention": "sdpa"}
    plain: dict[str, Any] = {"recompute": "none"}
    float8: dict[str, Any] = {"joint": False, "float8": "fast"}
    long: dict[str, Any] = {"micro_rows": 1, "timed": 1, "warm_layers": 2, "recompute": "full"}
    reference = {"method": "reference", "optimizer": "adamw", "fused_sums": False, "micro_rows": 1, "recompute": "full"}
    longlora = long | {"method": "longlora", "fused_sums": False}
    lceg = long | reference | {"whole_logits": False}
    at_64k = {"row_tokens": 65536, "target": 65536, "rows": 8}
    at_32k = {"row_tokens": 32768, "target": 32768, "rows": 16}

    suite.measure("endprompt, whole step", 65, whole_step=True, profile=True, **plain, **best)
    suite.measure("float8, whole step", 60, whole_step=True, profile=True, **float8, **best)
    suite.measure(
        "float8 with the head, whole step", 60, whole_step=True, profile=True, float8_head=True, **float8, **best
    )
    suite.measure("endprompt, sdpa", 35, profile=True, **plain, **sdpa)
    suite.measure("full, 65,536", 40, method="full", **at_64k, **long, **best)
    if best != sdpa:
        suite.measure("full, 65,536, sdpa", 35, method="full", **at_64k, **long, **sdpa)
    suite.measure("LCEG, 65,536", 35, **at_64k, **lceg)
    suite.measure("reference, short rows, with its update", 20, target=8192, **reference)
    suite.measure("full, 65,536, float8", 40, method="full", **at_64k, **(long | float8), **best)
    suite.measure("longlora, 65,536", 40, **at_64k, **longlora)
    suite.measure("full, 32,768", 25, method="full", **at_32k, **long, **best)
    suite.measure("longlora, 32,768", 25, **at_32k, **longlora)
    suite.measure("LCEG, 32,768", 25, **at_32k, **lceg)
    suite.measure("short rows, target 32,768", 35, target=32768, **plain, **best)


def faster_attention(rates: list[dict[str, Any]], otherwise: str) -> str:
    """The attention with the highest rate forward and backward: a flash one by its name, sdpa for cuDNN's.

    rates: rows of `attention_rates`; without them, `otherwise`.
    """
    whole = {row["task"]: row["value"] for row in rates if row["task"].endswith(": forward and backward")}
    if not whole:
        return otherwise
    name = max(whole, key=lambda task: whole[task]).removeprefix("attention ").partition(":")[0]
    return name if name.startswith("flash") else "sdpa"


SUITES: dict[str, Callable[[Suite], None]] = {"h200": h200}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a measurement: tokens/s, hours per 1B tokens, MFU, peak memory, where the time goes."""
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
        "matmul_ms": "matmul ms",
        "attention_ms": "attn ms",
        "other_ms": "other ms",
        "idle_ms": "idle ms",
        "update_ms": "update ms",
        "tflop_per_s": "TFLOP/s",
    }
    used = [key for key in columns if any(key in values for values in by_task.values())]
    lines = [f"{'measurement':<52}" + "".join(f"{columns[key]:>11}" for key in used)]
    for (task, _), values in by_task.items():
        cells = [f"{values[key]:>11,.4g}" if key in values else f"{'':>11}" for key in used]
        lines.append(f"{task:<52}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":  # the configuration as JSON: for machines without the command line's packages
    sys.exit(bench(BenchConfig(**json.loads(sys.argv[1]))))
