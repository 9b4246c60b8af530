"""Speed of scoring long prompts on one GPU: `endprompt score`'s model and lm-eval's own, side by side in one run.

    python -m benchmarks.speed.prompts --output runs/prompt-speed
    python -m benchmarks.speed.prompts --tiny                        a rehearsal on a CPU, its numbers mean nothing

An 8B Llama shape with random weights serves both, since speed does not depend on them. The prompts are random words of
a byte-level BPE that is made here, of exactly the window less the generation. Both models are lm-eval's: ours is
`benchmarks.scoring.hf.LongContextLM` with the settings of `endprompt score`, theirs is `HFLM` with its defaults (sdpa
attention, one prompt at a time); each `generate_until` takes the same requests, tokenizing included, in turns of a few
samples. Every row is written as soon as it is known; --seconds ends the turns early, and the rows say how many samples
were run.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.scoring import ScoreConfig
from benchmarks.scoring.hf import LongContextLM
from benchmarks.speed.generation import SHAPES, matrix_ceiling, prompt_flops, random_model, timed
from benchmarks.speed.samples import stand_in
from endprompt import results, runs
from endprompt.distributed import say

NEW_TOKENS = 30


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of scoring long prompts on one GPU.")
    parser.add_argument("--output", type=Path, default=Path("runs/prompt-speed"))
    parser.add_argument("--length", type=int, default=65536, help="of prompt and generation together")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--turn", type=int, default=8, help="samples that each runs in its turn")
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no turn that would end after this time")
    parser.add_argument("--their-batch-size", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a very small model and window on the CPU")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        args.length, args.samples, args.turn = min(args.length, 512), min(args.samples, 4), min(args.turn, 2)
    out = runs.RunDirectory(args.output, vars(args))

    def note(text: str) -> None:
        say(f"{time.perf_counter() - began:6.1f} s  {text}")

    tokenizer = stand_in()
    prompts = word_prompts(tokenizer, args.samples, args.length - NEW_TOKENS)
    note(f"{len(prompts)} prompts of {args.length - NEW_TOKENS:,} tokens")
    model = random_model(SHAPES["tiny" if args.tiny else "llama3-8b"], args.length, device)
    note(f"a model of {model.num_parameters() / 1e9:.2f}B parameters on {device}")
    ours, theirs = language_models(model, tokenizer, args.length, device, args.their_batch_size)
    note("lm-eval's models around it")

    about: dict[str, Any] = {"suite": "speed", "length": args.length, "seed": 0}
    about |= {"model": "llama 8B shape, random" if not args.tiny else "tiny, random", "environment": runs.environment()}
    settings = {
        "ours": {"method": "ours", "batch_size": ours.batch_size},
        "lm-eval": {"method": "lm-eval", "batch_size": theirs.batch_size},
    }

    def add(task: str, metric: str, value: float, **more: Any) -> None:
        out.add([results.result_row(task=task, metric=metric, value=value, **about, **{"method": "speed", **more})])
        note(f"{task:<16} {more.get('method', ''):<8} {metric:<20} {value:12.3f}")

    def run(lm: Any, some: list[str], new_tokens: int) -> tuple[float, list[str]]:
        jobs = requests(some, new_tokens)
        return timed(device, lambda: lm.generate_until(jobs, disable_tqdm=True))

    # The first call at a shape makes the kernels' plans: one batch of each model, whose time counts for nothing.
    for name, lm, some in (("ours", ours, prompts[:2]), ("lm-eval", theirs, prompts[: args.their_batch_size])):
        seconds, _ = run(lm, some, 2)
        note(f"warm-up of {name}: {seconds:.1f} s")

    ceiling = matrix_ceiling(device, size=256 if args.tiny else 8192)
    first = prompts[: args.turn]
    alone, _ = timed(device, lambda: [ours.tok_encode(prompt) for prompt in first])
    seconds, _ = run(ours, first, 1)
    ceiling = max(ceiling, matrix_ceiling(device, size=256 if args.tiny else 8192))
    add("matrix ceiling", "TFLOP/s", ceiling / 1e12)
    mine = {**settings["ours"], "n": len(first), "max_new_tokens": 1}
    add("prompts", "seconds", seconds, **mine)
    add("prompts", "tokenizing_seconds", alone, **mine)
    flops = prompt_flops(model, args.length - NEW_TOKENS) * len(first)
    add("prompts", "percent_of_ceiling", 100 * flops / seconds / ceiling, **mine)

    total = {"ours": 0.0, "lm-eval": 0.0}
    same = done = 0
    longest = 0.0
    while done < len(prompts):
        turn = prompts[done : done + args.turn]
        if time.perf_counter() - began + longest > args.seconds:
            note(f"{done} of {len(prompts)} samples: another turn of {longest:.0f} s would end after {args.seconds} s")
            break
        entered = time.perf_counter()
        answers = []
        for name, lm in (("ours", ours), ("lm-eval", theirs)):
            seconds, made = run(lm, turn, NEW_TOKENS)
            total[name] += seconds
            answers.append(made)
            add("scoring, a turn", "seconds", seconds, **settings[name], n=len(turn), max_new_tokens=NEW_TOKENS)
        same += sum(a == b for a, b in zip(*answers))
        done += len(turn)
        longest = max(longest, time.perf_counter() - entered)
    if not done:
        return
    for name, seconds in total.items():
        add("scoring", "seconds", seconds, **settings[name], n=done, max_new_tokens=NEW_TOKENS)
    pair = {"n": done, "max_new_tokens": NEW_TOKENS, "method": "ours"}
    add("scoring", "times_faster", total["lm-eval"] / total["ours"], **pair)
    add("scoring", "same_answers_percent", 100 * same / done, **pair)
    if device == "cuda":
        add("scoring", "peak_gib", torch.cuda.max_memory_allocated() / 2**30, **pair)


def word_prompts(tokenizer: Any, samples: int, tokens: int) -> list[str]:
    """Texts of random words, each of them one token: of exactly so many tokens."""
    vocabulary = tokenizer.get_vocab()
    words = [
        piece[1:] for piece in sorted(vocabulary) if piece[:1] == "Ġ" and piece[1:].isascii() and piece[1:].isalpha()
    ]
    words = [
        word for word in words if tokenizer.encode(" " + word, add_special_tokens=False) == [vocabulary["Ġ" + word]]
    ]
    draw = random.Random(0)
    return ["".join(" " + word for word in draw.choices(words, k=tokens)) for _ in range(samples)]


def language_models(
    model: Any, tokenizer: Any, window: int, device: str, their_batch_size: int
) -> tuple[LongContextLM, HFLM]:
    """(ours, lm-eval's) around one model."""
    batch_size = ScoreConfig("random").batch_size
    ours = LongContextLM(model, tokenizer=tokenizer, max_length=window, batch_size=batch_size, device=device)
    theirs = {"batch_size": their_batch_size} if their_batch_size != 1 else {}
    return ours, HFLM(model, tokenizer=tokenizer, **theirs)


def requests(prompts: list[str], new_tokens: int) -> list[Instance]:
    """What lm-eval asks of a model for prompts whose answers no string ends."""
    settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": new_tokens}
    return [Instance("generate_until", {}, (prompt, dict(settings)), i) for i, prompt in enumerate(prompts)]


if __name__ == "__main__":
    main()
