"""Speed of scoring, prompts and generation: ours and lm-eval's own model, side by side in one run.

    python -m benchmarks.speed.generation --out runs/generation-speed.jsonl
    python -m benchmarks.speed.generation --tiny --out FILE            a rehearsal on a CPU, its numbers mean nothing

Random weights of Llama-3-8B's and SmolLM2-135M's shapes, in bfloat16; no answer ends early, and prompts differ by a few
tokens, as RULER's do. Rows of suite `scoring-speed`: `step`, one batch with 128 tokens made for each prompt
(`decode_ms`: a step, all rows together; `decode_over_limit`: over the time in which the device copies as many bytes as
weights and caches have; `percent_of_ceiling`: of a matrix product, of the prompts), and `ruler`, a prompt for each of
RULER's 13 tasks, with the tokens that RULER lets each make. `sample_seconds`: prompt and answer; `prompt_share`: of
that, of reading prompts. Methods: `now` is `benchmarks.scoring.generate`, `lm-eval` is HFLM with its defaults. Each
part is written as soon as it is known; no part begins after --seconds.
"""

import argparse
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import ruler
from benchmarks.scoring import generate
from benchmarks.speed.measure import timed
from endprompt import results, runs
from endprompt.model import load_tokenizer, new_model
from endprompt.shapes import model_config

NEW_TOKENS = 128
#: What RULER lets a task's families make.
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# (model, prompts, length)
STEPS = [
    ("llama3-8b", 4, 65_536),
    ("llama3-8b", 8, 8_192),
    ("llama3-8b", 8, 32_768),
    ("llama3-8b", 2, 131_072),
    ("llama3-8b", 16, 4_096),
    ("smollm2-135m", 8, 65_536),
    ("smollm2-135m", 32, 8_192),
]
# (model, length, samples of each task)
RULER = [
    ("llama3-8b", 65_536, 1),
    ("llama3-8b", 4_096, 1),
    ("llama3-8b", 4_096, 20),
    *(("smollm2-135m", length, 20) for length in (4_096, 8_192, 16_384, 32_768, 65_536)),
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of scoring: prompts and generation.")
    parser.add_argument("--out", type=Path, default=Path("runs/generation-speed.jsonl"))
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no part after this time")
    parser.add_argument("--parts", default="step,ruler", help="step, ruler or both")
    parser.add_argument("--model", help="only this model's parts")
    parser.add_argument("--their-samples", type=int, default=1, help="prompts a task that lm-eval's model answers")
    parser.add_argument("--tiny", action="store_true", help="a very small model and lengths on the CPU")
    args = parser.parse_args(argv)
    steps, suites, new = STEPS, RULER, NEW_TOKENS
    if args.tiny:
        steps, suites, new = [("tiny", 3, 256)], [("tiny", 256, 1)], 16
    bench = Bench(args.out, "cpu" if args.tiny else "cuda", new)
    tasks = [(suite[0], partial(bench.ruler, *suite, args.their_samples)) for suite in suites if "ruler" in args.parts]
    batches = [(step[0], partial(bench.step, *step)) for step in steps if "step" in args.parts]
    parts = [*tasks[:1], *batches, *tasks[1:]]
    for name, work in sorted(parts, key=lambda part: part[0]):
        if args.model in (None, name) and time.perf_counter() - bench.began < args.seconds:
            work()
    print(bench.table())


class Bench:
    """Models, rows and the device's own speeds."""

    def __init__(self, out: Path, device: str, new_tokens: int):
        self.began, self.out, self.device, self.new = time.perf_counter(), out, device, new_tokens
        self.made: list[dict[str, Any]] = []
        self.environment = runs.environment()
        self.bytes_per_second = copy_speed(device, 2**24 if device == "cpu" else 2**32)
        self.ceiling = matrix_ceiling(device, 256 if device == "cpu" else 8192)
        self._model: tuple[str, Any] = ("", None)
        out.parent.mkdir(parents=True, exist_ok=True)
        self.note(f"copies {self.bytes_per_second / 1e9:,.0f} GB/s, multiplies {self.ceiling / 1e12:.3g} TFLOP/s")

    def note(self, text: str) -> None:
        print(f"{time.perf_counter() - self.began:6.1f} s  {text}", flush=True)

    def model(self, name: str) -> Any:
        if self._model[0] != name:
            self._model = ("", None)
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self._model = (name, random_model(name, 131_072 + 512, self.device))
            self.note(f"{name}: {self._model[1].num_parameters() / 1e9:.2f}B parameters")
        return self._model[1]

    def add(self, task: str, model: str, method: str, length: int, n: int, seconds: float, **columns: Any) -> None:
        each = seconds / n
        row = results.result_row(
            suite="scoring-speed", task=task, metric="sample_seconds", value=each, model=model, method=method, seed=0,
            length=length, n=n, sample_seconds=each, **columns, dtype="bfloat16", matrix_flops=self.ceiling,
            copy_bytes_per_second=self.bytes_per_second, device=self.environment["device"].get("gpu", "cpu"),
            environment=self.environment,
        )  # fmt: skip
        results.append_rows(self.out, [row])
        self.made.append(row)
        self.note(" ".join(f"{key}={row[key]:.4g}" for key in ("value", *columns) if isinstance(row[key], float)))

    def step(self, name: str, batch: int, length: int) -> None:
        """A batch of prompts, each with `new` tokens."""
        model = self.model(name)
        self.note(f"step: {name}, {batch} prompts of {length:,}")
        jobs = [generate.Job(prompt, self.new) for prompt in prompts(model, batch, length - self.new)]
        found = generate.way(model)
        if found.reason:
            raise ValueError(f"{name} must run on the laid-out cache: {found.reason}")
        warm(model, jobs, found)
        reading, whole = now(model, jobs, found)
        decode = (whole - reading) / (self.new - 1)
        limit = step_bytes(model, found, batch, length) / self.bytes_per_second
        flops = prompt_flops(model, length - self.new) * batch
        self.add(
            "step", name, "now", length, batch, whole,
            decode_ms=1000 * decode, decode_over_limit=decode / limit, limit_ms=1000 * limit,
            prompt_share=reading / whole, prompt_seconds=reading, batch=batch,
            percent_of_ceiling=100 * flops / reading / self.ceiling, max_new_tokens=self.new,
        )  # fmt: skip

    def ruler(self, name: str, length: int, samples: int, their_samples: int) -> None:
        """A prompt or more of each task, with the task's own number of new tokens."""
        model = self.model(name)
        self.note(f"ruler: {name}, 13 tasks, {samples} prompts of {length:,} each")
        tasks = {task: RULER_TOKENS[ruler.SPECS[task].family] for task in ruler.TASKS}
        if self.device == "cpu":
            tasks = {task: max(2, new // 8) for task, new in tasks.items()}
        made = {task: prompts(model, samples, length - new) for task, new in tasks.items()}
        jobs = {task: [generate.Job(prompt, tasks[task]) for prompt in made[task]] for task in tasks}
        every = [job for task in tasks for job in jobs[task]]
        found = generate.way(model)
        warm(model, every, found)
        reading, whole = now(model, every, found)
        about = {"max_new_tokens": sum(tasks.values()) / len(tasks)}
        share = {"prompt_share": reading / whole, "answers_over_prompts": whole / reading - 1}
        self.add("ruler", name, "now", length, len(every), whole, prompt_seconds=reading, **share, **about)
        theirs = hflm(model)
        if theirs is None:
            self.note("lm_eval is not installed: no rows of its model")
            return
        few = [job for task in tasks for job in jobs[task][:their_samples]]
        with torch.inference_mode():
            seconds, _ = timed(self.device, lambda: [theirs(job) for job in few])
        slower = seconds / len(few) / (whole / len(every))
        self.add("ruler", name, "lm-eval", length, len(few), seconds, times_slower=slower)

    def table(self) -> str:
        columns = ("prompt_seconds", "prompt_share", "decode_ms", "decode_over_limit", "sample_seconds")
        lines = [f"{'':<46}" + "".join(f"{name:>18}" for name in columns)]
        for row in self.made:
            values = (row.get(name) for name in columns)
            about = f"{row['task']} {row['model']} {row['n']} x {row['length']:,} {row['method']}"
            lines.append(f"{about:<46}" + "".join(f"{'' if v is None else f'{v:.4g}':>18}" for v in values))
        return "\n".join(lines)


def warm(model: Any, jobs: Sequence[generate.Job], found: generate.Way) -> None:
    """Compile and set up kernels: a whole prompt's, and those of as many rows, whose prompts need not be long."""
    new = generate.RECORD + 2
    now(model, [jobs[0]._replace(new_tokens=new)], found)
    now(model, [job._replace(prompt=job.prompt[: 1024 - i], new_tokens=new) for i, job in enumerate(jobs)], found)


def now(model: Any, jobs: Sequence[generate.Job], found: generate.Way) -> tuple[float, float]:
    """(seconds of reading prompts, of all)."""
    reading = 0.0
    read = generate.Batch._read

    def watched(batch: generate.Batch) -> None:
        nonlocal reading
        reading += timed(batch.device.type, lambda: read(batch))[0]

    with mock.patch.object(generate.Batch, "_read", watched):
        whole, batches = timed(model.device.type, lambda: list(generate.run(model, jobs, found=found)))
    made = dict(pair for batch in batches for pair in batch)
    assert all(len(made[i]) == job.new_tokens for i, job in enumerate(jobs))
    return reading, whole


def hflm(model: Any) -> Callable[[generate.Job], Any] | None:
    """lm-eval's model with its defaults, one prompt at a time; None if it is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return None
    lm: Any = HFLM(model, tokenizer=load_tokenizer(Path(__file__).parents[1] / "base" / "256"))  # ids are given as such

    def answer(job: generate.Job) -> Any:
        ids_BT = torch.tensor([list(job.prompt)], device=model.device)
        mask = torch.ones_like(ids_BT)
        return lm._model_generate(ids_BT, len(job.prompt) + job.new_tokens, stop=[], attention_mask=mask)

    return answer


def random_model(shape: str, window: int, device: str) -> Any:
    """A Llama in bfloat16 that never ends its answer: all of the new tokens are generated."""
    config = model_config(shape)
    config.max_position_embeddings, config.bos_token_id, config.eos_token_id = window, None, None
    model = new_model(config, seed=0, dtype="bfloat16", attention="sdpa", device=device)
    if not config.tie_word_embeddings:
        with torch.no_grad():
            model.lm_head.weight[0] = 0.0  # the end of text's logit is never the largest
    return model.eval()


def prompts(model: Any, count: int, tokens: int) -> list[list[int]]:
    """Random tokens, of about so many each, the longest first."""
    draw = random.Random(tokens)
    return [draw.choices(range(1, model.config.vocab_size), k=tokens - 3 * i) for i in range(count)]


def step_bytes(model: Any, found: generate.Way, batch: int, length: int) -> float:
    """What a step cannot but read: weights, less embeddings that are only looked up, and keys and values."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        weights -= embedding.numel() * embedding.element_size()
    return weights + batch * found.row_bytes(length)


def prompt_flops(model: Any, tokens: int) -> float:
    """Multiply-adds of one prompt, twice: all linear layers but the head, and causal attention."""
    linear = sum(
        m.weight.numel() for name, m in model.named_modules() if hasattr(m, "in_features") and "head" not in name
    )
    config = model.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * tokens**2 / 2
    return 2.0 * linear * tokens + attention


def matrix_ceiling(device: str, size: int, repeats: int = 40) -> float:
    """FLOP/s of a bfloat16 matrix product, after a warm-up."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    return 2 * size**3 * repeats / in_a_row(device, repeats, lambda: a @ b)


def copy_speed(device: str, size: int, repeats: int = 20) -> float:
    """Bytes a second that the device reads and writes when it copies `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    return 2 * size * repeats / in_a_row(device, repeats, lambda: target.copy_(source))


def in_a_row(device: str, repeats: int, work: Callable[[], Any]) -> float:
    """Seconds of so many calls, what they return let go."""
    return timed(device, lambda: deque((work() for _ in range(repeats)), maxlen=0))[0]


if __name__ == "__main__":
    main()
