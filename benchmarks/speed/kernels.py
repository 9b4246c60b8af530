"""Speed of the kernels of layers and loss alone: `python -m benchmarks.speed.kernels --output bench`.

Each kernel at the shapes of a micro-batch of Llama-3-8B, in several launches, beside what torch.compile makes of the
same work and beside a copy. Time is a kernel's own (the mean of several in a row); bytes are those that must be read
and written once, so a kernel that moves some twice has a lower rate. The error is that of the first 256 tokens against
the same work in torch. Rows (suite kernel-speed) go to results.jsonl; launches in use are marked.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from endprompt.fast import layers
from endprompt.fast.available import triton_kernels
from endprompt.results import append_rows, result_row
from endprompt.runs import environment
from endprompt.train import loss

EPS = 1e-5
#: Launches: block and warps of SwiGLU's kernels; warps of the norm's; block and warps of the loss's; warps of RoPE's;
#: warps, programs and stages of the norm's backward one.
SWIGLU = ((2048, 4), (4096, 8), (8192, 8), (2048, 8), (4096, 4))
NORM = (4, 8, 16)
CROSS_ENTROPY = ((8192, 8), (8192, 16), (4096, 8), (16384, 32), (32768, 32))
ROTATE = (2, 4, 8)
NORM_BACKWARD = ((8, 2, 1), (8, 2, 2), (8, 1, 3), (16, 2, 1), (16, 1, 2), (4, 2, 1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="bench", help="directory that gets results.jsonl")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size")
    parser.add_argument("--intermediate", type=int, default=14336, help="intermediate size")
    parser.add_argument("--vocabulary", type=int, default=128256, help="of the loss, for half the tokens")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each measurement")
    options = parser.parse_args(argv)
    torch._dynamo.config.recompile_limit = 64
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    about = environment()
    print(f"{'kernel':<34}{'by':<44}{'ms':>9}{'GB/s':>9}{'error %':>9}")
    for task, method, launch, size, work, error in measurements(options):
        try:
            seconds = duration(work, options.seconds)
            wrong = error()
        except Exception as failed:  # a launch may not fit this device: the others still count
            print(f"{task:<34}{method:<44}{failed!r:.100}", flush=True)
            continue
        print(f"{task:<34}{method:<44}{1e3 * seconds:>9.4f}{size / seconds / 1e9:>9.0f}{wrong:>9.4f}", flush=True)
        about_it: dict[str, Any] = {
            "suite": "kernel-speed",
            "task": task,
            "model": f"{options.tokens}x{options.hidden}x{options.intermediate}",
            "method": method,
            "seed": 0,
            "setting": launch,
            "environment": about,
        }
        values = {"milliseconds": 1e3 * seconds, "gb_per_s": size / seconds / 1e9, "relative_error_percent": wrong}
        append_rows(
            output / "results.jsonl",
            [result_row(metric=metric, value=value, **about_it) for metric, value in values.items()],
        )


Measurement = tuple[str, str, dict[str, int], int, Callable[[], Any], Callable[[], float]]


def measurements(options: argparse.Namespace) -> Iterator[Measurement]:
    """(kernel, by what, its launch, bytes moved, the work, its error against torch in percent)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    def moved(count: float, tensor: torch.Tensor) -> int:
        return int(count * tensor.numel() * tensor.element_size())

    yield from of_loss(options, random, moved)
    kernels: Any = triton_kernels(torch.empty(0, device=device))

    def each(
        task: str,
        size: int,
        plain: Callable[..., Any],
        ours: Any,
        launches: list[Any],
        chosen: Any,
        arguments: tuple[Any, ...],
    ) -> Iterator[Measurement]:
        """What torch.compile makes of `plain`, then `ours` in each launch; `chosen` is what it takes by itself."""
        compiled = torch.compile(plain, dynamic=False)
        expected = plain(*head(arguments))
        yield task, "torch.compile", {}, size, partial(compiled, *arguments), partial(error, compiled, expected)
        for launch in launches:
            setting = {key: value for key, value in dataclasses.asdict(launch).items() if value}
            used = " (used)" if launch == chosen else ""
            name = " ".join(f"{key} {value}" for key, value in setting.items()) + used
            work = partial(ours, launch=launch)
            yield task, name, setting, size, partial(work, *arguments), partial(error, work, expected, arguments)

    def head(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The first 256 tokens: enough for an error, and little memory in float32."""

        def cut(value: Any) -> Any:
            if isinstance(value, list):
                return [cut(one) for one in value]
            wide = isinstance(value, torch.Tensor) and value.shape[0] == options.tokens
            return value[:256].contiguous() if wide else value

        return tuple(cut(value) for value in arguments)

    def error(work: Any, expected: Any, arguments: tuple[Any, ...] = ()) -> float:
        if not arguments:
            return 0.0
        pairs = zip(*(flat(result) for result in (work(*head(arguments)), expected)))
        errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs if b.numel() == a.numel()]
        return 100 * max(errors)

    def flat(result: Any) -> tuple[torch.Tensor, ...]:
        parts = result if isinstance(result, tuple) else (result,)
        return tuple(part for part in parts if part.numel())

    x, y = random(options.tokens, options.intermediate), random(options.tokens, options.intermediate)
    yield "copy", "torch", {}, moved(2, x), partial(y.copy_, x), lambda: 0.0
    grad = random(options.tokens, options.intermediate)
    launch = kernels.Launch if kernels else None
    wide = [launch(block=block, warps=warps) for block, warps in SWIGLU] if launch else []
    ours, chosen = kernels and kernels.swiglu, kernels and kernels.SWIGLU
    yield from each("swiglu", moved(3, x), layers.torch_swiglu, ours, wide, chosen, (x, y))
    ours, chosen = kernels and kernels.swiglu_backward, kernels and kernels.SWIGLU_BACKWARD
    for again in (True, False):
        name = "swiglu backward" + ("" if again else ", h kept")
        size = moved(5 + again, x)
        yield from each(name, size, layers.torch_swiglu_backward, ours, wide, chosen, (grad, x, y, again))
    del x, y, grad
    x, added, weight = (
        random(options.tokens, options.hidden),
        random(options.tokens, options.hidden),
        random(options.hidden),
    )
    rows = [launch(warps=warps) for warps in NORM] if launch else []
    ours, chosen = kernels and kernels.rms_norm, kernels and kernels.NORM
    for name, second, count in (("norm", None, 2), ("add and norm", added, 4)):
        plain = partial_norm(second is None)
        yield from each(name, moved(count, x), plain, ours, rows, chosen, (x, second, weight, EPS))
    scale = layers.torch_norm(x, None, weight, EPS)[2]
    grads = [random(options.tokens, options.hidden) for _ in range(3)]
    loops = [launch(warps=w, programs=p, stages=s) for w, p, s in NORM_BACKWARD] if launch else []
    for count in (1, 2, 3):
        ours, each_one = kernels and kernels.rms_norm_backward, (x, scale, weight, added, grads[:count])
        size = moved(4 + count, x)
        chosen = kernels and kernels.norm_backward_launch(count, 2 * options.hidden)
        yield from each(f"norm backward, {count}", size, layers.torch_norm_backward, ours, loops, chosen, each_one)
    heads, groups = max(1, options.hidden // 128), max(1, options.hidden // 512)
    turned = tuple(random(1, options.tokens, count, 128) for count in (heads, groups, groups))
    angles = random(1, options.tokens, 128), random(1, options.tokens, 128)
    turns = [launch(warps=warps) for warps in ROTATE] if launch else []
    ours, chosen = kernels and kernels.rotate_backward, kernels and kernels.ROTATE_BACKWARD
    size = sum(moved(2, part) for part in turned)
    yield from each("rotate backward", size, layers.torch_rotate_backward, ours, turns, chosen, (turned, *angles))


def of_loss(
    options: argparse.Namespace, random: Callable[..., torch.Tensor], moved: Callable[[float, torch.Tensor], int]
) -> Iterator[Measurement]:
    """The loss of half the tokens, whose kernel overwrites its logits."""
    half, vocabulary = options.tokens // 2, options.vocabulary
    logits = random(half, vocabulary)
    kernels: Any = triton_kernels(logits)
    labels = torch.randint(vocabulary, (half,), device=logits.device)
    weights = torch.full((half,), 1e-5, device=logits.device)
    few = slice(0, 64)
    expected = loss._chunk_eager(logits[few], labels[few], weights[few])[1].float()

    def wrong(work: Callable[..., Any]) -> float:
        found = logits[few].clone()
        result = work(found, labels[few], weights[few])
        gradient = result[1] if isinstance(result, tuple) else found
        return 100 * float((gradient.float() - expected).norm() / expected.norm())

    parts = logits, labels, weights
    compiled = torch.compile(loss._chunk_eager, dynamic=True)
    by: list[tuple[str, dict[str, int], Callable[..., Any]]] = [("torch.compile", {}, compiled)]
    for block, warps in CROSS_ENTROPY if kernels else ():
        launch = kernels.Launch(block=block, warps=warps)
        used = " (used)" if launch == kernels.CROSS_ENTROPY else ""
        name, setting = f"block {block} warps {warps}{used}", {"block": block, "warps": warps}
        by.append((name, setting, partial(kernels.cross_entropy, launch=launch)))
    errors = [wrong(work) for *_, work in by]  # before the logits are overwritten
    for (name, setting, work), error in zip(by, errors):
        yield "cross-entropy", name, setting, moved(2, logits), partial(work, *parts), partial(float, error)


def partial_norm(alone: bool) -> Callable[..., Any]:
    """The norm in torch; alone, without the sum that is only its input."""

    def norm(x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        return layers.torch_norm(x, added, weight, eps)[1 if alone else 0 :]

    return norm


def duration(work: Callable[[], Any], seconds: float) -> float:
    """Mean seconds of one call in a row of about so many; on a CPU, which only rehearses, of one."""
    work()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def row(count: int) -> float:
        begin.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    return row(max(3, round(seconds / max(row(3), 1e-6))))


if __name__ == "__main__":
    main()
