"""Speed and memory of `extend` itself on one or several GPUs of one host, from a checkpoint of random weights.

    python -m benchmarks.speed.extend '{"shape": "llama3-8b", "processes": 2, "work": "/scratch"}'
    python -m benchmarks.speed.extend scaling '{"processes": 2, "work": "/scratch"}'  the settings of `SCALING`, or some
    python -m benchmarks.speed.extend planned '{"processes": 8}'  what `endprompt plan` says of them

What is given stays as it is in `scaling` and `planned`. The whole way is run: each process reads its share, some steps
are made, the extended model is exported. The first step, which compiles, is not counted, nor the last if it is
profiled. The work folder needs room for two copies of the model in bfloat16, and may be used again.
"""

import dataclasses
import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import speed_rows
from endprompt.files import aside

GIB = 2**30


@dataclass
class ManyConfig:
    """What is measured: a shape's name as in bench, processes of a GPU each, and settings as of extend.

    work: folder for the checkpoint, the data and the run. output: of results.jsonl. timeout: of the run, seconds.
    dtype: float32 is multiplied in bfloat16 (the shards are masters), bfloat16 has masters beside, or is lean. method:
    full has contiguous rows that all processes share. save_every: what a save costs the steps becomes a row. profile:
    of the last step on the first GPU (none on a CPU), by kind of kernel, without any, and with none but communication.
    """

    output: str = "bench"
    work: str = "many"
    shape: str = "llama3-8b"
    processes: int = 2
    device: str = "cuda"
    row_tokens: int = 8192
    target: int = 65536
    rows: int = 64
    micro_rows: int = 1
    steps: int = 3
    dtype: str = "float32"
    checkpointing: str = "selective"
    compile: str = "layers"
    optimizer: str = "auto"
    attention: str = "sdpa"
    float8: str = "none"
    method: str = "endprompt"
    shard: str = "weights"
    reduce_dtype: str = "float32"
    save_every: int = 0
    profile: bool = False
    timeout: float = 540.0


LEAN = {"dtype": "bfloat16", "optimizer": "lean", "checkpointing": "selective", "steps": 4, "profile": True}
SHORT = LEAN | {"shard": "moments"}
#: The settings that several GPUs are measured in, by the number of processes.
SCALING: dict[str, Callable[[int], dict[str, Any]]] = {
    "bf16": lambda n: SHORT | {"micro_rows": 2, "rows": 16 * n},
    "float8": lambda n: SHORT | {"micro_rows": 1, "rows": 16 * n, "float8": "fast", "checkpointing": "none"},
    "sharded": lambda n: LEAN | {"micro_rows": 2, "rows": 16 * n},
    "full": lambda n: (
        LEAN | {"method": "full", "row_tokens": 65536 * n, "target": 65536 * n, "rows": 2, "checkpointing": "attention"}
    ),
    "save": lambda n: SHORT | {"micro_rows": 2, "rows": 16 * n, "save_every": 3, "steps": 7, "profile": False},
}


def scaled(given: dict[str, Any]) -> dict[str, ManyConfig]:
    """The settings of `SCALING` under what is given."""
    processes = ManyConfig(**given).processes
    return {name: ManyConfig(**setting(processes) | given) for name, setting in SCALING.items()}


def planned(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Result rows of what `endprompt plan` says of the settings of `SCALING`."""
    from endprompt.plan import PlanConfig, plans

    rows = []
    for name, one in scaled(given).items():
        full = one.method == "full"
        wanted = PlanConfig(
            model=one.shape, method=one.method, target=one.target, row_tokens=one.row_tokens, gpus=one.processes,
            context_parallel=one.processes if full else 1, rows=one.rows, attention=one.attention, shard=one.shard,
            optimizer=one.optimizer, float8=one.float8, reduce_dtype=one.reduce_dtype,
        )  # fmt: skip
        same = (one.micro_rows, one.checkpointing)
        found = next(plan for plan in plans(wanted) if (plan.micro_rows, plan.recompute) == same)
        values = {
            "tokens_per_s": found.tokens_per_s,
            "tokens_per_s_a_process": found.tokens_per_s / one.processes,
            "peak_gib": found.total_gib,
        }
        if name != "save":
            rows += rows_with(one, values, f"planned {name}, {one.processes} processes", "endprompt plan, not measured")
    return rows


def measure(config: ManyConfig, name: str = "") -> list[dict[str, Any]]:
    """Result rows of one run, of the setting of this name. Raises ValueError naming the value, or if the run fails,
    with the end of what it said.
    """
    from endprompt.config import ExtendConfig
    from endprompt.shapes import SHAPES

    if config.shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}: shape={config.shape!r}")
    if config.steps < 2 + config.profile:
        raise ValueError(
            f"the first step is not counted, nor a profiled one: steps={config.steps} profile={config.profile}"
        )
    work = Path(config.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, shard, run = work / f"checkpoint-{config.shape}", work / "shard", work / "run"
    if not (checkpoint / "tokenizer.json").is_file():
        make_checkpoint(config, checkpoint)
    make_shard(config, checkpoint, shard)
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(aside(run), ignore_errors=True)
    full = config.method == "full"
    prompt = "text:" + " ".join(["end"] * min(20, config.row_tokens // 2))
    taken = vars(config).keys() & vars(ExtendConfig()).keys()
    job = {key: getattr(config, key) for key in taken} | {
        "model": str(checkpoint), "data": [str(shard)], "output": str(run), "log_every": 1,
        "prompt": None if full else prompt, "scheme": "contiguous" if full else "endprompt",
        "context_parallel": config.processes if full else 1, "autocast": config.dtype == "float32",
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.processes)]
    about = {"job": job, "work": str(work), "profile": config.profile and config.device == "cuda"}
    worker = ["-m", "benchmarks.speed.extend", "--worker", json.dumps(about)]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launcher, *worker], stderr=subprocess.PIPE, text=True, timeout=config.timeout
    )
    wall = time.perf_counter() - started
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise ValueError(f"the run has failed ({done.returncode}): {done.stderr[-400:]}")
    return rows_of(config, name, run, work, wall)


def rows_of(config: ManyConfig, name: str, run: Path, work: Path, wall: float) -> list[dict[str, Any]]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    speed = statistics.median(entry["tokens_per_s"] for entry in log[1 : len(log) - config.profile])
    notes = [json.loads((work / f"rank-{rank}.json").read_text()) for rank in range(config.processes)]
    hosts = [note["host_gib"] for note in notes]
    values = {
        "tokens_per_s": speed,
        "tokens_per_s_a_process": speed / config.processes,
        "hours_per_1b_tokens": 1e9 / speed / 3600,
        "host_gib": max(hosts),  # of the process that has most: the one that exports
        "host_gib_least": min(hosts),
        "wall_seconds": wall,
        **notes[0]["profile"],
    }
    if "mfu" in log[-1]:
        mfu = log[-1]["mfu"] / log[-1]["tokens_per_s"] * speed
        values |= {"mfu_percent": 100 * mfu, "peak_gib": log[-1]["peak_gib"]}
    if saves := [entry["save_seconds"] for entry in log if "save_seconds" in entry]:
        values["save_seconds"] = saves[-1]  # the first one has the host's memory to make
    several = config.processes > 1
    task = f"extend{name and ' '}{name}, {f'{config.processes} processes' if several else 'one process'}"
    shared = {"weights": ", sharded by FSDP2", "moments": ", whole weights, moments in parts"}[config.shard] * several
    what = f"extend from a checkpoint of random weights to its export{shared}; the median of its steps but the first"
    return rows_with(config, values, task, what, loss=log[-1]["loss"])


def rows_with(config: ManyConfig, values: dict[str, float], task: str, what: str, **more: Any) -> list[dict[str, Any]]:
    setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "work", "timeout")}
    about = {"length": config.target, "model": config.shape, "method": config.method, "setting": setting}
    return speed_rows(values, task=task, what=what, **about, **more)


def make_checkpoint(config: ManyConfig, directory: Path) -> None:
    """Random weights in bfloat16, and a tokenizer of one word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from endprompt.model import new_model
    from endprompt.shapes import model_config

    model = new_model(model_config(config.shape), seed=0, dtype="bfloat16", attention="sdpa", device=config.device)
    model.save_pretrained(directory)
    del model
    if config.device == "cuda":
        torch.cuda.empty_cache()  # the run's processes need it
    words = Tokenizer(models.WordLevel({"end": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(directory)


def make_shard(config: ManyConfig, checkpoint: Path, directory: Path) -> None:
    """Two steps' documents of random tokens, each as long as a row."""
    import numpy as np

    from endprompt.data import Documents
    from endprompt.data.shards import tokenizer_sha256, write_shard
    from endprompt.model import load_tokenizer
    from endprompt.shapes import SHAPES

    shutil.rmtree(directory, ignore_errors=True)
    offsets = np.arange(2 * config.rows + 1, dtype=np.int64) * config.row_tokens
    tokens = np.random.default_rng(0).integers(0, SHAPES[config.shape][0], int(offsets[-1]), dtype=np.uint32)
    write_shard(Documents(tokens, offsets, offsets[1:]), directory, tokenizer_sha256(load_tokenizer(checkpoint)))


def work_of(arguments: dict[str, Any]) -> None:
    """What each process does: the run, and a note of the most host memory that it had."""
    from endprompt.config import ExtendConfig
    from endprompt.train import Trainer, extend

    found: dict[str, float] = {}
    train_step = Trainer.train_step

    def profiled(self: Trainer, *given: Any) -> Any:
        if self.step < self.steps - 1:
            return train_step(self, *given)
        made: list[Any] = []
        found.update(where_time_goes(lambda: made.append(train_step(self, *given))))
        return made[0]

    if arguments["profile"]:
        Trainer.train_step = profiled  # type: ignore[assignment, method-assign]
    extend(ExtendConfig(**arguments["job"]))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    note = Path(arguments["work"]) / f"rank-{os.environ.get('RANK', '0')}.json"
    note.write_text(json.dumps({"host_gib": most, "profile": found}), encoding="utf-8")


def where_time_goes(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of kernels by their kind, of none, and of communication with no other beside it, on this GPU."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [one for one in profiler.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(one.time_range.start / 1000, one.time_range.end / 1000, kind_of_kernel(one.name)) for one in events]
    times = dict.fromkeys(("matmul_ms", "attention_ms", "communication_ms", "other_ms"), 0.0)
    for start, end, kind in spans:
        times[f"{kind}_ms"] += end - start
    busy, own = covered(spans), covered([span for span in spans if span[2] != "communication"])
    whole = max(end for _, end, _ in spans) - min(start for start, *_ in spans)
    return times | {"idle_ms": whole - busy, "communication_alone_ms": busy - own}


def covered(spans: list[tuple[float, float, str]]) -> float:
    """How long any of the spans (start, end, kind) lasts, in any order, overlapping or not."""
    total, reached = 0.0, float("-inf")
    for start, end, _ in sorted(spans):
        total, reached = total + max(0.0, end - max(start, reached)), max(reached, end)
    return total


def kind_of_kernel(name: str) -> str:
    kinds = {"communication": ("nccl",), "attention": ("sdpa", "fmha", "flash", "attention")}
    kinds["matmul"] = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "scaled_mm")
    return next((kind for kind, parts in kinds.items() if any(part in name.lower() for part in parts)), "other")


def main(argv: list[str]) -> int:
    from benchmarks.speed.train import table
    from endprompt.results import append_rows

    if argv[:1] == ["--worker"]:
        work_of(json.loads(argv[1]))
        return 0
    kind = argv.pop(0) if argv[0] in ("scaling", "planned") else ""
    given = json.loads(argv[0])
    configs = scaled(given) if kind == "scaling" else {"": ManyConfig(**given)}
    makers = [functools.partial(measure, configs[name], name) for name in argv[1:] or configs]
    if kind == "planned":
        makers = [functools.partial(planned, given)]
    output = Path(ManyConfig(**given).output)
    output.mkdir(parents=True, exist_ok=True)
    for make in makers:  # each is kept before the next is made
        rows = make()
        append_rows(output / "results.jsonl", rows)
        print(table(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
