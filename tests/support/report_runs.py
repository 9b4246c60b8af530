"""Runs that a report is made of, and a reader of the page's elements."""

from __future__ import annotations

import json
import statistics
from html.parser import HTMLParser
from pathlib import Path

from analysis.config import VerifyConfig
from benchmarks.config import DemoConfig
from benchmarks.report import page as report_page
from benchmarks.report import runs
from benchmarks.scoring import ScoreConfig
from endprompt.config import ExtendConfig
from endprompt.results import append_rows, result_row
from endprompt.runs import RunDirectory

EVIL = '</code></pre><script>alert(1)</script><img src=x onerror=alert(2)>"\' onload="alert(3)'


LENGTHS, TASKS = (256, 2048), ("niah_single_1", "vt")


def ruler_row(task, length, value, method, **extra):
    values = {"model": method, "seed": 0, "n": 4, "run_sha256": method, "ci": "wilson"}
    values |= {"samples_sha256": f"{task}{length}"}
    interval = (max(0.0, value - 20), min(100.0, value + 15))
    return result_row(
        suite="ruler", task=task, metric="string_match_all", value=value, ci95=interval, length=length, method=method,
        **(values | extra),
    )  # fmt: skip


def write_scoring(directory: Path, method: str, hits: dict[tuple[str, int], list[float]], text: str = "no") -> None:
    run = RunDirectory(directory, ScoreConfig("ckpt", tasks=list(TASKS), lengths=list(LENGTHS), samples=4))
    run.add(ruler_row(task, length, statistics.fmean(own), method) for (task, length), own in hits.items())
    entries = [
        {"run": method, "task": f"{task}@{length}", "index": index, "prompt_sha256": f"{task}{length}{index}",
         "prediction": text, "score": score, "outputs": ["42"], "depth": [10.0 * index]}
        for (task, length), own in hits.items()
        for index, score in enumerate(own)
    ]  # fmt: skip
    append_rows(directory / "predictions.jsonl", entries)
    depth = [
        {"method": method, "length": length, "n": 3}
        | {"depth_from": 10.0 * k, "depth_to": 10.0 * k + 10, "value": 10.0 * k}
        for length in LENGTHS
        for k in range(0, 10, 2 if length == 256 else 1)
    ]
    append_rows(directory / "depth.jsonl", depth)


def write_training(directory: Path, method: str, scheme: str, prompt: int) -> None:
    config = ExtendConfig(model="base", data=["a b.jsonl", "c.txt"], output="out", target=2048, scheme=scheme, steps=30)
    run = RunDirectory(directory, config)
    for step in range(1, 31):
        run.log(step=step, loss=2.0 + 3.0 / step, lr=1e-3)
    about = {"method": method, "model": EVIL, "window": 256, "target": 2048, "row_tokens": 256, "prompt_tokens": prompt,
             "steps": 30, "tokens": 7680, "seconds": 1.5, "final_loss": 2.1, "config": vars(config)}  # fmt: skip
    (directory / "endprompt.json").write_text(json.dumps(about))


def write_verification(directory: Path, method: str, violated: bool = False) -> None:
    run = RunDirectory(directory, VerifyConfig(checkpoint="ckpt", pairs=64, formats=("png",)))
    for bound in report_page.BOUNDS:
        bad = violated and bound == "bernstein_order1"
        for metric, value in (
            (f"largest_over_{bound}", 1.2 if bad else 0.8),
            (f"share_within_{bound}", 0.5 if bad else 1.0),
        ):
            run.add([result_row(suite="analysis", task="bounds", metric=metric, value=value, model="m", method=method,
                                seed=0, length=2048, scheme="endprompt", context=236, prompt=20)])  # fmt: skip


FIRST = {("niah_single_1", 256): [100.0, 100.0, 0.0, 100.0], ("vt", 256): [50.0, 75.0, 100.0, 0.0],
         ("niah_single_1", 2048): [0.0, 100.0, 0.0, 0.0], ("vt", 2048): [0.0, 25.0, 0.0, 0.0]}  # fmt: skip


SECOND = {("niah_single_1", 256): [100.0, 100.0, 100.0, 100.0], ("vt", 256): [50.0, 100.0, 100.0, 25.0],
          ("niah_single_1", 2048): [100.0, 100.0, 100.0, 0.0], ("vt", 2048): [25.0, 50.0, 75.0, 0.0]}  # fmt: skip


def demo_run(folder: Path) -> Path:
    """A run as the demo leaves it, whose model writes markup."""
    run = folder / "a run"
    RunDirectory(run, DemoConfig(output=str(run), steps=30)).log(seconds=61.0)
    write_training(run / "control", "contiguous+linear", "contiguous", 0)
    write_training(run / "random", "endprompt-random+EP_1+linear", "endprompt-random", 20)
    write_scoring(run / "score" / "control", "contiguous+linear", FIRST, EVIL)
    write_scoring(run / "score" / "random", "endprompt-random+EP_1+linear", SECOND)
    write_verification(run / "verify" / "control", "contiguous+linear")
    rows = [row for path in sorted(run.rglob("results.jsonl")) for row in runs.read_lines(path, [])]
    append_rows(run / "results.jsonl", [{**row, "window": 256, "target": 2048} for row in rows])
    return run


class Elements(HTMLParser):
    """Every element as (name, attributes), every text by the elements around it."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.around, self.texts, self.unclosed = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.around.append(name)

    def handle_endtag(self, name):
        if self.around.pop() != name:
            self.unclosed.append(name)

    def handle_data(self, data):
        self.texts.append((tuple(self.around), data))

    def named(self, name):
        return [attributes for own, attributes in self.elements if own == name]

    def text(self, inside):
        return "".join(data for around, data in self.texts if inside in around)
