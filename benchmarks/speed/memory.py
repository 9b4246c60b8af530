"""Peak memory of building RULER's samples and of serving them to a model through lm-eval: all tasks, six lengths.

    python -m benchmarks.speed.memory --output runs/serve-memory

Both are `endprompt score`, each in a process of its own: with --prepare-only into an empty cache, then from the cache
with a model that answers nothing, so that what is measured is all but the model. Essays, SQuAD and HotpotQA are random
words in the sets' layouts, as many documents and about as long as theirs; --data-dir takes the real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import ruler
from benchmarks.ruler import cache, texts
from benchmarks.speed import samples
from endprompt import results, runs

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
# Of the sets: SQuAD 2.0 dev has 35 articles; HotpotQA dev 7,405 questions with ten documents each.
ARTICLES, PARAGRAPHS, QUESTIONS, PARAGRAPH_WORDS = 35, 34, 5, 120
HOTPOT_QUESTIONS, HOTPOT_DOCUMENTS, HOTPOT_WORDS = 7405, 10, 90
ESSAY_WORDS = 500_000
EVERY = 0.2  # seconds between looks at the memory
LONGER_LIST = 100_000  # of the word list that common-word extraction takes past 8,166 words


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the memory that RULER's samples take.")
    parser.add_argument("--output", type=Path, default=Path("runs/serve-memory"))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--data-dir", type=Path, help="folder with the real essays, SQuAD and HotpotQA")
    parser.add_argument("--part", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        print(json.dumps(measure(args, args.part[0], Path(args.part[1]))))
        return
    out = runs.RunDirectory(args.output, vars(args))
    tasks = len(ruler.TASKS) if args.tasks == "all" else len(args.tasks.split(","))
    about: dict[str, Any] = {"suite": "speed", "model": "stand-in", "method": "ours", "seed": 0, "n": args.samples}
    about |= {"tasks": tasks, "lengths": [int(length) for length in args.lengths.split(",")]}
    about["environment"] = runs.environment()
    about["texts"] = "random words" if args.data_dir is None else str(args.data_dir.name)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder, "model"), max(about["lengths"]))
        if args.data_dir is None:
            stand_in_texts(Path(folder, "texts"))
        for part in ("build", "serve"):
            given = sys.argv[1:] if argv is None else argv
            line = [sys.executable, "-m", "benchmarks.speed.memory", *given, "--part", part, folder]
            for metric, value in watched(line).items():
                row = results.result_row(task=part, metric=metric, value=value, **about)
                out.add([row])
                print(f"{part:<8} {metric:<24} {value:10.3f}", flush=True)


def watched(line: Sequence[str]) -> dict[str, float]:
    """What a part printed, and the peak of what it and the processes that it started took together, looked at often.

    Pages that processes share count once (the proportional set size, Linux).
    """
    together = 0
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            together = max(together, sum(map(proportional_kib, family(running.pid))))
            time.sleep(EVERY)
        printed = running.stdout.read() if running.stdout else ""
    if running.returncode:
        raise SystemExit(running.returncode)
    return {**json.loads(printed.splitlines()[-1]), "peak_gib_together": together / 2**20}


def family(process: int) -> Iterator[int]:
    """The process and all that descend from it."""
    yield process
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            yield from family(int(child))


def proportional_kib(process: int) -> int:
    """Memory of a process in KiB, pages shared with others by their share; 0 of one that has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def measure(args: argparse.Namespace, part: str, folder: Path) -> dict[str, float]:
    """Peaks and times of one part in this process and those that it starts."""
    from benchmarks import scoring
    from benchmarks.scoring import run

    began = time.perf_counter()
    config = scoring.ScoreConfig(
        checkpoint=str(folder / "model"),
        tasks=args.tasks,
        lengths=args.lengths,
        samples=args.samples,
        data_dir=str(args.data_dir or folder / "texts"),
        cache_dir=str(folder / "cache"),
        output=str(folder / "run"),
        device="cpu",
        prepare_only=part == "build",
    )
    with mock.patch.object(run, "load", lambda *given: silent_model()):
        made = scoring.score(config)
    own, started = (
        resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    found = {"peak_gib": own, "seconds": time.perf_counter() - began}
    if part == "build":
        found |= {"peak_gib_builder": started, "processes": cache.processes()}
    else:
        found["cells"] = len(made)
    return found


def silent_model() -> Any:
    from lm_eval.api.model import LM

    class Silent(LM):
        def generate_until(self, requests: list[Any]) -> list[str]:
            return [""] * len(requests)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

    return Silent()


def checkpoint(directory: Path, window: int) -> None:
    """A tokenizer of a published one's tokens per word, and weights that nobody runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = samples.stand_in()
    tokenizer.save_pretrained(directory)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=window, **shape)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(directory)


def stand_in_texts(directory: Path) -> None:
    """Essays, SQuAD, HotpotQA and the longer word list, of random words."""
    draw, words = random.Random(0), texts.common_words()

    def text(n: int) -> str:
        return sentences(draw.choices(words, k=max(3, round(n * draw.uniform(0.5, 1.5)))))

    directory.mkdir()
    (directory / "essays.json").write_text(json.dumps({"text": sentences(draw.choices(words, k=ESSAY_WORDS))}))
    longer = {str(i): texts.key_word(i * 61).replace("-", "") for i in range(LONGER_LIST)}
    (directory / "english_words.json").write_text(json.dumps(longer))
    asked = [
        {"question": f"{text(10)}?", "answers": [{"text": text(3)}], "is_impossible": False} for _ in range(QUESTIONS)
    ]
    squad = [
        {"paragraphs": [{"context": text(PARAGRAPH_WORDS), "qas": asked} for _ in range(PARAGRAPHS)]}
        for _ in range(ARTICLES)
    ]
    (directory / "squad.json").write_text(json.dumps({"data": squad}))
    hotpot = [
        {
            "question": f"{text(15)}?",
            "answer": text(3),
            "context": [[text(3), [text(HOTPOT_WORDS)]] for _ in range(HOTPOT_DOCUMENTS)],
        }
        for _ in range(HOTPOT_QUESTIONS)
    ]
    (directory / "hotpotqa.json").write_text(json.dumps(hotpot))


def sentences(words: Sequence[str], size: int = 14) -> str:
    return " ".join(f"{' '.join(words[i : i + size])}." for i in range(0, len(words), size))


if __name__ == "__main__":
    main()
