"""How fast the analysis is, and how much memory it takes: `python -m benchmarks.speed.analysis --output runs/bench`.

Each measurement is a row (suite analysis-speed). The naive loop runs on a sample of the same spectra in the same run,
and its time for all of them is that sample's, scaled.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from analysis import observability, scene, verify
from analysis.certificates import certified_max
from analysis.config import VerifyConfig
from analysis.spectra import rope_freqs
from analysis.sweep import ORDERS, Sweep
from endprompt.model import new_model
from endprompt.results import result_row
from endprompt.runs import RunDirectory

#: Llama-3-8B: 32 layers of 32 heads, head_dim 128, base 500000, window 8192, interpolated 8-fold.
HEADS, HEAD_DIM, BASE, FACTOR, WINDOW = 1024, 128, 500000.0, 8, 8192
LENGTHS = (65536, 131072)
NAIVE_SPECTRA = 4
#: Random Llamas to verify: vocabulary, hidden, layers, heads, key/value heads, intermediate; tokens and pairs read.
VERIFIED = {"llama3-8b": (128256, 4096, 32, 32, 8, 14336, 1024, 256), "tiny": (512, 64, 2, 4, 2, 128, 256, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/bench-analysis", help="run directory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pairs", type=int, default=256, help="spectra for each of 1,024 heads")
    parser.add_argument("--spacing", type=float, default=FACTOR / 2, help="tokens between grid points")
    parser.add_argument("--repeats", type=int, default=2, help="timings of the sweep; the best is kept")
    parser.add_argument("--verify", choices=VERIFIED, help="instead: verify a random model of this shape")
    options = parser.parse_args()
    run = RunDirectory(options.output, vars(options))
    for measure in (verification,) if options.verify else (sweeps, questions, configurations):
        for row in measure(options):
            run.add([row])
            print(f"{row['task']:<24}{row['metric']:<34}{row['value']:>12.4g}  length {row['length']}", flush=True)


def row(task: str, metric: str, value: float, options: Any, length: int, **extra: Any) -> dict[str, Any]:
    on_cpu = options.device == "cpu"
    return result_row(
        suite="analysis-speed",
        task=task,
        metric=metric,
        value=value,
        model="llama-3-8b-shape",
        method="linear",
        seed=0,
        length=length,
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        device="cpu" if on_cpu else torch.cuda.get_device_name(),
        load=os.getloadavg()[0],
        **extra,
    )


def sweeps(options: Any) -> Iterator[dict[str, Any]]:
    """All heads x pairs x distances x orders 0..2, reduced; certified over real distances by the grid's spacing."""
    omega, _ = rope_freqs(BASE, HEAD_DIM, "linear", FACTOR, WINDOW)
    count = HEADS * options.pairs
    rng = np.random.default_rng(0)
    shape = (count, HEAD_DIM // 2)
    parts = rng.standard_normal((*shape, 2), dtype=np.float32)
    z = torch.view_as_complex(torch.as_tensor(parts, device=options.device))
    elapsed = {}
    for length in LENGTHS:
        times = []
        for _ in range(options.repeats):
            synchronise(options)
            start, cpu = time.perf_counter(), time.process_time()
            found = Sweep(omega, length, spacing=options.spacing, dtype="float32", device=options.device).maxima(z)
            synchronise(options)
            times.append((time.perf_counter() - start, time.process_time() - cpu))
        elapsed[length], busy = min(times)
        shared = {"n": count, "spacing": options.spacing, "dtype": "float32"}
        yield row("sweep", "seconds", elapsed[length], options, length, **shared)
        yield row("sweep", "cpu_seconds", busy, options, length, **shared)
        for order in ORDERS:
            width = 2 * found.error[order] + found.between[order]
            yield row(
                "sweep",
                f"median_relative_width_order{order}",
                float(np.median(width / found.size[order])),
                options,
                length,
                **shared,
            )
        yield row("sweep", "naive_over_fused", naive(omega, z, length, found, count) / elapsed[length], options, length)
    yield row("sweep", "time_at_double_length", elapsed[LENGTHS[1]] / elapsed[LENGTHS[0]], options, LENGTHS[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield row("sweep", "peak_resident_gib", peak, options, LENGTHS[1])
    if options.device != "cpu":
        yield row("sweep", "peak_device_gib", torch.cuda.max_memory_allocated() / 2**30, options, LENGTHS[1])


def naive(omega: np.ndarray, z: torch.Tensor, length: int, found: Any, count: int) -> float:
    """Seconds of the plain numpy loop for all spectra at every integer distance, from a sample; checks the maxima."""
    d = np.arange(length)
    start = time.perf_counter()
    for place in range(NAIVE_SPECTRA):
        spectrum = z[place].cpu().numpy().astype(np.complex128)
        amplitude, phase = np.abs(spectrum), np.angle(spectrum)
        for order in ORDERS:
            angle = np.outer(d, omega) + phase + order * np.pi / 2
            largest = np.abs(np.cos(angle) @ (amplitude * omega**order)).max()
            if largest > found.size[order][place] + found.error[order][place] + found.between[order][place]:
                raise ArithmeticError(f"the certified maximum is below a sampled one: {order=} {place=}")
    return (time.perf_counter() - start) / NAIVE_SPECTRA * count


def questions(options: Any) -> Iterator[dict[str, Any]]:
    """Both regularised questions of one configuration, Gram matrices included; and one certificate."""
    length, prompt = LENGTHS[1], 20
    omega, _ = rope_freqs(BASE, HEAD_DIM, "linear", length / WINDOW, WINDOW)
    start, cpu = time.perf_counter(), time.process_time()
    answer(omega, length, WINDOW - prompt, prompt, 0.1, 0.01)
    yield row("observability", "seconds_one_configuration", time.perf_counter() - start, options, length)
    yield row("observability", "cpu_seconds_one_configuration", time.process_time() - cpu, options, length)
    z = np.random.default_rng(0).normal(size=(2, HEAD_DIM // 2)) @ np.eye(HEAD_DIM // 2)
    start = time.perf_counter()
    _, _, evaluations = certified_max(z[0] + 1j * z[1], omega, 0, length - 1, 1, 1e-3)
    yield row("certificate", "seconds_one_spectrum", time.perf_counter() - start, options, length)
    yield row("certificate", "evaluations", evaluations, options, length)


def answer(omega: np.ndarray, length: int, context: int, prompt: int, noise: float, eps: float) -> tuple[float, float]:
    observed, gap = observability.distance_segments(length, context, prompt)
    G_obs, G_gap = observability.gram(omega, observed), observability.gram(omega, gap)
    average = observability.posterior_gap_rms(G_obs, observability.size(observed), G_gap, noise)
    return average, observability.worst_gap(G_obs, G_gap, eps)[0]


def configurations(options: Any) -> Iterator[dict[str, Any]]:
    """200 configurations: targets, contexts, prompts, noises."""
    start, cpu, number = time.perf_counter(), time.process_time(), 0
    for factor in (2, 4, 8, 16, 32):
        omega, _ = rope_freqs(BASE, HEAD_DIM, "linear", factor, WINDOW)
        for context in (1024, 2048, 4096, 6144):
            for prompt in (1, 5, 20, 50, 100):
                for noise, eps in ((0.1, 0.1), (0.01, 0.01)):
                    answer(omega, factor * WINDOW, context, prompt, noise, eps)
                    number += 1
    length = 32 * WINDOW
    yield row("observability", "seconds_200_configurations", time.perf_counter() - start, options, length, n=number)
    yield row("observability", "cpu_seconds_200_configurations", time.process_time() - cpu, options, length, n=number)


def verification(options: Any) -> Iterator[dict[str, Any]]:
    """`endprompt verify`, whole, of a model with random bfloat16 weights, made on the device and never saved."""
    vocabulary, hidden, layers, heads, groups, intermediate, tokens, pairs = VERIFIED[options.verify]
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=intermediate,
        max_position_embeddings=FACTOR * WINDOW,
        rope_parameters={
            "rope_type": "linear",
            "rope_theta": BASE,
            "factor": float(FACTOR),
            "original_max_position_embeddings": WINDOW,
        },
        bos_token_id=0,
        eos_token_id=1,
    )
    directory = Path(options.output) / "model"
    settings.save_pretrained(directory)
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({chr(32 + i): i for i in range(256)}, [], unk_token=" "))
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=" ").save_pretrained(directory)
    start = time.perf_counter()
    model = new_model(settings, seed=0, dtype="bfloat16", attention="sdpa", device=options.device).eval()
    synchronise(options)
    made, resident = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = VerifyConfig(
        str(directory),
        output=str(Path(options.output) / "verify"),
        tokens=tokens,
        pairs=pairs,
        dtype="bfloat16",
        device=options.device,
        formats=("png",),
    )
    with mock.patch.object(scene, "load", lambda path, config: model):
        report = verify.verify(config)
    synchronise(options)
    shared = {"n": layers * heads * pairs, "holds": report.holds, "what": f"{layers} layers, random weights, {tokens=}"}
    length = FACTOR * WINDOW
    yield row("verify", "seconds", time.perf_counter() - made, options, length, **shared)
    yield row("verify", "seconds_to_make_the_model", made - start, options, length, **shared)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 2**20
    yield row("verify", "more_resident_gib", more, options, length, **shared)
    if options.device != "cpu":
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        yield row("verify", "model_gib", weights / 2**30, options, length, **shared)
        beside = (torch.cuda.max_memory_allocated() - weights) / 2**30
        yield row("verify", "peak_device_gib_beside_the_model", beside, options, length, **shared)


def synchronise(options: Any) -> None:
    if options.device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
