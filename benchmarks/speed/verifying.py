"""Seconds of `endprompt verify` and of `endprompt predict` on random weights of a model's shape.

    python -m benchmarks.speed.verifying --model llama3-8b --device cuda --out runs/verify-speed.jsonl

Each run is whole, from loading the weights to the pictures or the table; the first also sets up libraries and kernels.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from analysis import predict
from analysis.config import PredictConfig, VerifyConfig
from analysis.verify import verify
from benchmarks.speed.measure import say, speed_rows, timed
from endprompt.model import load_tokenizer, new_model
from endprompt.results import append_rows
from endprompt.shapes import SHAPES, model_config


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of verify and predict.")
    parser.add_argument("--out", type=Path, default=Path("runs/verify-speed.jsonl"))
    parser.add_argument("--model", default="llama3-8b", choices=sorted(SHAPES))
    parser.add_argument("--target", type=int, default=65_536)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["verify", "predict"], choices=["verify", "predict"])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(Path(__file__).parents[1] / "base" / "256")
        tokenizer.save_pretrained(folder)
        shape = model_config(args.model)
        shape.vocab_size = max(shape.vocab_size, len(tokenizer))
        new_model(shape, seed=0, dtype="bfloat16", attention="sdpa", device=args.device).save_pretrained(folder)
        heads = shape.num_attention_heads * shape.num_hidden_layers
        for run in range(args.runs):
            output = str(Path(folder) / f"verify-{run}")
            common = {"target": args.target, "dtype": "bfloat16", "device": args.device}
            works: dict[str, partial[Any]] = {
                "verify": partial(verify, VerifyConfig(folder, **common, output=output)),
                "predict": partial(predict.report, PredictConfig(folder, **common)),
            }
            for task in args.parts:
                seconds, found = timed(args.device, works[task])
                say(f"{task}, {args.model}, {heads} heads, target {args.target:,}, run {run}: {seconds:.1f} s")
                about = {"suite": "analysis-speed", "task": task, "model": args.model, "method": "random weights"}
                about |= {"length": args.target, "n": heads, "run": run, "dtype": "bfloat16"}
                about |= {"holds": found.holds} if task == "verify" else {}
                args.out.parent.mkdir(parents=True, exist_ok=True)
                append_rows(args.out, speed_rows({"seconds": seconds}, **about))


if __name__ == "__main__":
    main()
