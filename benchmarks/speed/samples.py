"""Speed of building RULER samples: ours and lm-eval's generators, on one tokenizer in one run.

    python -m benchmarks.speed.samples [CHECKPOINT] --length 4096 --output runs/sample-speed
    python -m benchmarks.speed.samples --page docs/scoring.md --rows paper_figures/data/measured/cpu_samples.jsonl

The second line measures nothing: it writes the table of a page from rows, between two marks.

Ours are built, rendered, hashed and put into an empty cache, then opened again from it: all 500 are timed. lm-eval's
generators size the haystack once and then make one sample after another in a loop under a progress bar. A clock in the
place of that bar times each part of one call for fewer samples, and the time for 500 is that of sizing plus 500 times
the mean sample's; the standard error is that of this mean. (Two calls for different numbers of samples do not tell the
parts apart: sizing draws at random and takes another time in each.) lm-eval's essays are the haystack text of the run.
Both are compared by CPU seconds, those of building processes included; wall seconds stand in rows of their own. QA
needs --data-dir and is left out without.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import ruler
from benchmarks.ruler import cache, texts
from endprompt import files, results, runs

STAND_IN_TOKENS = 16384
BEGIN, END = "<!-- sample speed -->", "<!-- end of sample speed -->"
# Where lm-eval makes the samples of a task family.
MODULES = {
    "niah": "prepare_niah",
    "vt": "vt_utils",
    "cwe": "cwe_utils",
    "fwe": "fwe_utils",
    "qa": "qa_utils",
}
# lm-eval's samples that are timed: at least this many, and more where they are short.
TIMED_SAMPLES = 16
TIMED_TOKENS = 262_144


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of building RULER samples.")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="directory with a tokenizer (default: a stand-in)")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--haystack-text")
    parser.add_argument("--data-dir")
    parser.add_argument("--output", type=Path, default=Path("runs/sample-speed"))
    parser.add_argument("--page", type=Path, help="write the table of --rows into this page, and measure nothing")
    parser.add_argument("--rows", type=Path, help="rows of one run or more, for --page")
    args = parser.parse_args(argv)
    if args.page is not None:
        text = with_table(args.page.read_text(encoding="utf-8"), list(results.read_rows(args.rows)))
        files.write_text(args.page, text)
        return
    if args.checkpoint is None:
        tokenizer, name = stand_in(), "stand-in"
    else:
        from endprompt.model import load_tokenizer

        tokenizer, name = load_tokenizer(args.checkpoint), args.checkpoint.name
    out = runs.RunDirectory(args.output, vars(args))
    about: dict[str, Any] = {"suite": "sample-speed", "length": args.length, "model": name, "seed": 0}
    about |= {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    wanted = [
        (task, args.length) for task in ruler.TASKS if ruler.SPECS[task].family != "qa" or args.data_dir is not None
    ]
    made: list[dict[str, Any]] = []

    def add(task: str, metric: str, value: float, method: str, **more: Any) -> None:
        made.append(results.result_row(task=task, metric=metric, value=value, method=method, **about, **more))
        print(f"{task:<18} {method:<14} {metric:<20} {value:12.3f}", flush=True)

    options = ruler.Options(haystack_text=args.haystack_text)
    with tempfile.TemporaryDirectory() as folder:
        build = partial(cache.cells, wanted, tokenizer, args.samples, 0, args.data_dir, options, folder)
        ours, wall, cells = measured(build)
        _, again, _ = measured(build)
    add("all", "cpu_seconds", ours, "ours", n=args.samples, tasks=len(wanted))
    add("all", "wall_seconds", wall, "ours", n=args.samples, processes=cache.processes())
    add("all", "wall_seconds", again, "ours, cached", n=args.samples)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    add("all", "peak_gib", peak / 2**20, "ours")  # of one process, before lm-eval is imported
    for cell in cells:
        used = [tokens + cell.recipe["max_new_tokens"] for _, tokens in cell.recipe["samples"]]
        share = 100 / args.length
        add(cell.recipe["task"], "fill", share * sum(used) / len(used), "ours", n=args.samples)
        add(cell.recipe["task"], "largest_fill", share * max(used), "ours", n=args.samples)
    theirs, variance = 0.0, 0.0
    timed = min(args.samples, max(TIMED_SAMPLES, TIMED_TOKENS // args.length))
    with quiet():
        generators = dict(upstream(tokenizer, args))
    for task, _ in wanted:
        sizing, samples = sample_seconds(partial(generators[task], timed), MODULES[ruler.SPECS[task].family])
        seconds = sizing + args.samples * float(np.mean(samples))
        error = args.samples * float(np.std(samples, ddof=1)) / len(samples) ** 0.5
        theirs, variance = theirs + seconds, variance + error**2
        add(task, "cpu_seconds", seconds, "lm-eval", stderr=error, n=args.samples, timed=timed, sizing_seconds=sizing)
    add("all", "cpu_seconds", theirs, "lm-eval", stderr=variance**0.5, n=args.samples, timed=timed)
    add("all", "times_faster", theirs / ours, "ours", stderr=variance**0.5 / ours)
    out.add(made)


def with_table(page: str, measured_rows: Sequence[Mapping[str, Any]]) -> str:
    """The page with `table(measured_rows)` between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"the page must have the marks {BEGIN} and {END}, in this order")
    return f"{head}{BEGIN}\n\n{table(measured_rows)}\n{END}{tail}"


def table(measured_rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a column a length."""
    lengths = sorted({row["length"] for row in measured_rows})

    def values(length: int, metric: str, method: str, families: Sequence[str] = ()) -> list[float]:
        tasks = {task for task, spec in ruler.SPECS.items() if spec.family in families} or {"all"}
        wanted = (length, metric, method)
        found = [r for r in measured_rows if (r["length"], r["metric"], r["method"]) == wanted and r["task"] in tasks]
        return [row["value"] for row in found]

    def line(name: str, text: Callable[[int], str]) -> str:
        return f"| {name} | {' | '.join(map(text, lengths))} |"

    exact, loose = ("niah", "vt", "cwe"), ("fwe", "qa")
    return "\n".join(
        [
            line("", lambda n: f"{n:,} tokens"),
            f"|---|{'---|' * len(lengths)}",
            line("CPU seconds", lambda n: f"{values(n, 'cpu_seconds', 'ours')[0]:.1f}"),
            line("wall seconds", lambda n: f"{values(n, 'wall_seconds', 'ours')[0]:.1f}"),
            line("wall seconds from the cache", lambda n: f"{values(n, 'wall_seconds', 'ours, cached')[0]:.2f}"),
            line("peak of a process, GiB", lambda n: f"{values(n, 'peak_gib', 'ours')[0]:.2f}"),
            line("mean fill at least, NIAH, VT, CWE, %", lambda n: f"{min(values(n, 'fill', 'ours', exact)):.2f}"),
            line("mean fill at least, FWE, QA, %", lambda n: f"{min(values(n, 'fill', 'ours', loose)):.2f}"),
            line(
                "largest fill of a sample, %",
                lambda n: f"{max(values(n, 'largest_fill', 'ours', (*exact, *loose))):.2f}",
            ),
            line("lm-eval's generators, CPU seconds", lambda n: f"{values(n, 'cpu_seconds', 'lm-eval')[0]:,.0f}"),
            line("times as fast", lambda n: f"{values(n, 'times_faster', 'ours')[0]:.1f}"),
            "",
        ]
    )


def stand_in() -> Any:
    """A byte-level BPE of about a published tokenizer's tokens per word: that of the smallest base has few words, and
    its shortest prompts of common words are over 4,096 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=STAND_IN_TOKENS,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lists = [" ".join(texts.word_list(kind)) for kind in ("noun", "adjective", "verb")]
    text = [texts.shipped_sample().read_text(encoding="utf-8"), *lists, *texts.noise()]
    made.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def measured(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds with those of child processes, wall seconds, result) of a quiet call."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    with quiet():
        result = work()
    return cpu_seconds() - cpu, time.perf_counter() - wall, result


def sample_seconds(work: Callable[[], Any], module: str) -> tuple[float, list[float]]:
    """CPU seconds of a generator of lm-eval's module: before its loop over samples, and of each round of the loop."""
    clock: list[float] = []

    def rounds(indices: Iterable[int], **_: Any) -> Iterator[int]:
        for index in indices:
            clock.append(cpu_seconds())
            yield index
        clock.append(cpu_seconds())

    random.seed(0)
    np.random.seed(0)
    with quiet(), mock.patch(f"lm_eval.tasks.ruler.{module}.tqdm", rounds):
        clock.append(cpu_seconds())
        work()
    sizing, *samples = [after - before for before, after in pairwise(clock)]
    return sizing, samples


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def upstream(tokenizer: Any, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """lm-eval's generator of each task, as a function of the number of samples."""
    with mock.patch("nltk.data.find"):  # its import would download a sentence splitter
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, qa_utils, vt_utils
    length, essay = args.length, texts.essay(args.haystack_text, args.data_dir)
    prepare_niah.sent_tokenize = split_sentences  # the splitter's data are not there either
    for task, spec in ruler.SPECS.items():
        if spec.family == "niah":
            text = {"essay": essay.words, "noise": "".join(texts.noise()), "needle": texts.needle()}[spec.haystack]
            made = partial(
                prepare_niah.generate_samples,
                text,
                tokenizer,
                max_seq_length=length,
                template=niah_utils.TEMPLATE,
                type_haystack={"noise": "repeat"}.get(spec.haystack, spec.haystack),
                type_needle_k=spec.key,
                type_needle_v=spec.value,
                num_needle_k=spec.keys,
                num_needle_v=spec.values,
                num_needle_q=spec.queries,
            )
            yield task, partial(of_size, made)
    example = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)[0]
    yield "vt", lambda n: vt_utils.sys_vartrack_w_noise_random(tokenizer, n, length, icl_example=example)
    yield "cwe", lambda n: cwe_utils.sys_word_pair_random(n, length, tokenizer)
    yield "fwe", lambda n: fwe_utils.sys_kwext(tokenizer, length, n)
    for task in ("qa_1", "qa_2"):
        if args.data_dir is None:
            continue
        library = texts.library(ruler.SPECS[task].dataset, args.data_dir, task)
        qas = [
            {"query": q.text, "outputs": list(q.answers), "context": list(q.context), "more_context": list(q.related)}
            for q in library.questions
        ]
        documents = list(library.documents)
        yield task, partial(qa_utils.generate_samples, tokenizer, documents, qas, length)


def of_size(made: Callable[..., Any], n: int) -> Any:
    return made(num_samples=n)


def split_sentences(text: str) -> list[str]:
    made = texts.Essay("text", "", text.split())
    ends = [0, *made.ends.tolist()]
    return [made.text(a, b) for a, b in pairwise(ends)]


if __name__ == "__main__":
    main()
