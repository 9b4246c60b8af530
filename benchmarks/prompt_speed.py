"""Speed of scoring long prompts on one GPU: the ceiling, our loop, and lm-eval's HFLM way, side by side in one run.

    python -m benchmarks.prompt_speed --output runs/prompt-speed

An 8B Llama shape with random weights serves, since speed does not depend on them. lm-eval's way is the call that its
HFLM makes with default settings: transformers' `generate`, one prompt at a time, with an attention mask.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import generate
from endprompt import rows

VOCABULARY, THETA = 128_256, 500_000.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of scoring long prompts on one GPU.")
    parser.add_argument("--output", type=Path, default=Path("runs/prompt-speed"))
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args(argv)
    out = rows.RunDirectory(args.output, vars(args))
    model = random_model(args.length)
    kept = args.new_tokens
    numbers = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, VOCABULARY, (args.samples, args.length - kept), generator=numbers).tolist()
    warm = [prompts[0][:2048]]
    generate.greedy(model, warm, 2)
    hflm_generate(model, warm[0], 2)

    ceiling = matrix_ceiling()
    flops = prompt_flops(model, args.length - kept)
    batches = [prompts[i : i + args.batch_size] for i in range(0, args.samples, args.batch_size)]

    def first_tokens() -> None:
        for batch in batches:
            ids = torch.tensor(batch, device="cuda")
            generate.prefill(model, ids, torch.full((len(batch),), ids.shape[1], device="cuda"))

    def whole_answers() -> None:
        for batch in batches:
            generate.greedy(model, batch, kept)

    def theirs(new_tokens: int) -> None:
        for prompt in prompts:
            hflm_generate(model, prompt, new_tokens)

    measured = {
        "prompts, ours": timed(first_tokens),
        "prompts, transformers generate": timed(lambda: theirs(1)),
        "scoring, ours": timed(whole_answers),
        "scoring, transformers generate": timed(lambda: theirs(kept)),
    }
    about: dict[str, Any] = {"suite": "speed", "length": args.length, "method": "speed", "seed": 0, "n": args.samples}
    about |= {"model": "llama 8B shape, random", "batch_size": args.batch_size, "max_new_tokens": kept}
    about |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    made = [rows.result_row(task="matrix ceiling", metric="TFLOP/s", value=ceiling / 1e12, **about)]
    for task, seconds in measured.items():
        made.append(rows.result_row(task=task, metric="seconds", value=seconds, **about))
        if task.startswith("prompts"):
            share = 100 * flops * args.samples / seconds / ceiling
            made.append(rows.result_row(task=task, metric="percent of ceiling", value=share, **about))
    for kind in ("prompts", "scoring"):
        ratio = measured[f"{kind}, transformers generate"] / measured[f"{kind}, ours"]
        made.append(rows.result_row(task=kind, metric="times faster", value=ratio, **about))
    out.add(made)
    for row in made:
        print(f"{row['task']:<32} {row['value']:10.2f} {row['metric']}")


def random_model(length: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # all of the new tokens are generated
    return model.eval()


def hflm_generate(model: Any, prompt: list[int], new_tokens: int) -> None:
    ids = torch.tensor([prompt], device="cuda")
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_length=ids.shape[1] + new_tokens,
            pad_token_id=0,
            use_cache=True,
            do_sample=False,
        )


def timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_ceiling(size: int = 8192, repeats: int = 40) -> float:
    """FLOP/s of a bfloat16 matrix product, after a warm-up."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    seconds = timed(lambda: [a @ b for _ in range(repeats)])
    return 2 * size**3 * repeats / seconds


def prompt_flops(model: Any, tokens: int) -> float:
    """Multiply-adds of one prompt, twice: all linear layers but the head, and causal attention."""
    linear = sum(
        m.weight.numel() for name, m in model.named_modules() if hasattr(m, "in_features") and "head" not in name
    )
    config = model.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * tokens**2 / 2
    return 2.0 * linear * tokens + attention


if __name__ == "__main__":
    main()
