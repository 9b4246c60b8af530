"""Seconds of scoring a served model by requests at a time, and how many answers are those of the backend hf.

    python -m benchmarks.speed.serving CHECKPOINT --url http://HOST/v1 --engine NAME --out FILE

Samples are made before the first clock starts, and one request warms the server up. Rows of suite `serving-speed`:
`seconds` from the call to its rows, `n` samples, `same` answers that equal those of hf in float32 on this CPU.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.scoring import ScoreConfig, score
from benchmarks.scoring.predictions import read_predictions
from benchmarks.speed.measure import say
from endprompt import results, runs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure scoring through a server.")
    parser.add_argument("checkpoint")
    parser.add_argument("--url", required=True)
    parser.add_argument("--engine", required=True, help="the server's name and version, for the rows")
    parser.add_argument("--out", type=Path, default=Path("runs/serving-speed.jsonl"))
    parser.add_argument("--concurrency", default="1,16", help="parts, in this order")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    environment = runs.environment()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"tasks": "niah_single_1", "lengths": args.length, "samples": args.samples}
        common |= {"max_new_tokens": args.new_tokens, "cache_dir": f"{folder}/cache", "quiet": True}

        def run(name: str, **settings: Any) -> tuple[float, dict[Any, str]]:
            began = time.perf_counter()
            score(ScoreConfig(args.checkpoint, output=f"{folder}/{name}", **{**common, **settings}))
            seconds = time.perf_counter() - began
            return seconds, {key: entry["prediction"] for key, entry in read_predictions(f"{folder}/{name}").items()}

        wanted = run("hf", dtype="float32", device="cpu", whole_answers=True)[1]
        served = {"backend": "server", "url": args.url}
        run("warm", **served, samples=1)
        for concurrency in map(int, args.concurrency.split(",")):
            seconds, texts = run(f"at-{concurrency}", **served, concurrency=concurrency)
            same = sum(texts[key] == text for key, text in wanted.items())
            row = results.result_row(
                suite="serving-speed", task="niah_single_1", metric="seconds", value=seconds, seed=0,
                model=Path(args.checkpoint).name, method=args.engine, length=args.length, n=args.samples, same=same,
                concurrency=concurrency, new_tokens=args.new_tokens, environment=environment,
                load_average=round(os.getloadavg()[0], 1),
            )  # fmt: skip
            results.append_rows(args.out, [row])
            say(f"{concurrency} at a time: {seconds:.1f} s, {same} of {args.samples} answers as hf's")


if __name__ == "__main__":
    main()
