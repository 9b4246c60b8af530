"""What docs/speed.md and the README say of the newest run, against its rows."""

import json
import re
from pathlib import Path

import pytest

from endprompt.rows import read_rows

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "paper_figures" / "data" / "measured"
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
WHOLE, PLAIN, REFERENCE, FULL = "endprompt, whole step", "joined, torch's products", "reference", "full, 65,536"


@pytest.fixture(scope="module")
def run():
    """{task: {metric: value}} of the fifth run."""
    found = {}
    for row in read_rows(MEASURED / "h200_fused.jsonl"):
        found.setdefault(row["task"], {})[row["metric"]] = row["value"]
    return found


def section(title):
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_measurements_has_its_rows(run):
    lines = [cells(line) for line in PAGE.splitlines() if re.search(r"\| 5 \| [\d,]+ \|", line)]
    assert len(lines) == 3
    for line, task in zip(lines, (WHOLE, PLAIN, REFERENCE)):
        one = run[task]
        assert line[2:] == [
            f"{one['tokens_per_s']:,.0f}",
            f"{one['hours_per_1b_tokens']:.1f}",
            f"{one['mfu_percent']:.1f}",
            f"{one['peak_gib']:.1f}",
        ]


def test_the_targets_are_judged_by_it(run):
    speed = {task: values["tokens_per_s"] for task, values in run.items()}
    against = {line[0]: line[1:] for line in map(cells, section("Against the targets").splitlines()) if len(line) == 3}
    reached, verdict = against["12,000 tokens/s in bfloat16"]
    assert reached == f"{speed[WHOLE]:,.0f}" and verdict == f"missed, by {100 * (1 - speed[WHOLE] / 12000):.1f}%"
    reached, verdict = against["1.5 times transformers as it is"]
    assert reached.startswith(f"{speed[WHOLE] / speed[REFERENCE]:.2f}, both") and verdict == "met"
    reached, verdict = against["2.8 times full length at 65,536"]
    assert reached.startswith(f"{speed[WHOLE] / speed[FULL]:.2f} in bfloat16") and verdict.startswith("missed in bf")
    assert against["peak below 130 GiB"][0].startswith(f"{run[WHOLE]['peak_gib']:.1f}, or")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{speed[WHOLE]:,.0f} tokens/s in bf16 at {run[WHOLE]['peak_gib']:.0f} GiB" in readme
    assert f"{speed[WHOLE] / speed[REFERENCE]:.2f} times the usual Hugging Face way" in readme
    assert f"{speed[WHOLE] / speed[FULL]:.2f} times our own full-length" in readme
    assert f"{speed[WHOLE] / speed[FULL]:.2f} times as fast. On torch's products both, " in WORDS
    assert f"On torch's products both, {speed[PLAIN] / speed[FULL]:.2f} times" in WORDS


def test_the_profile_is_its_own(run):
    page = section("Where the time of a bfloat16 micro-batch goes")
    lines = {line[0]: line[1:] for line in map(cells, page.splitlines()) if len(line) == 4}
    one = run[WHOLE]
    kinds = {
        "matrix products": "matmul_ms",
        "attention (flash-attn-4)": "attention_ms",
        "the rest": "other_ms",
        "without a kernel": "idle_ms",
        "update, of 64 rows": "update_ms",
    }
    for kind, metric in kinds.items():
        assert lines[kind][1] == f"{one[metric]:,.0f}", kind
    flops = 6 * 7_504_658_432 * 16384  # those of the parameters that a token is multiplied by, 2 rows of 8,192
    assert lines["matrix products"][2] == f"{flops / one['matmul_ms'] / 1e9:.0f} TFLOP/s"
    assert f"take {run[PLAIN]['matmul_ms']:,.0f} ms on the same GPU" in WORDS
    step = (64 * 8192 / 12000 - one["update_ms"] / 1e3) / 32
    assert f"must take {1e3 * step:,.0f} ms" in WORDS


def test_the_chosen_products_are_those_that_were_measured():
    kept = json.loads((ROOT / "docs" / "h200_products.json").read_text(encoding="utf-8"))
    rates = []
    for choice in kept["choices"]:
        rows, columns, inside = choice["product"][:3]
        times = choice["milliseconds"]
        tflops = [2 * rows * columns * inside / ms / 1e9 for ms in (times["torch"], min(times.values()))]
        rates.append([f"{rows} x {columns} x {inside}", *(f"{rate:.0f}" for rate in tflops)])
    told = [cells(line)[1:] for line in section("Products by measured algorithms").splitlines() if " x " in line[:60]]
    told = [line for line in told if len(line) == 3 and line[0][0].isdigit()]
    assert sorted(told) == sorted(rates) and len(told) == 15


def test_the_steps_on_another_gpu_are_those_of_its_rows():
    rows = read_rows(ROOT / "docs" / "h200_steps.jsonl")
    speeds = [f"{row['value']:,.0f}" for row in rows if row["metric"] == "tokens_per_s"]
    assert f"{speeds[0]}, {speeds[1]} and {speeds[2]} tokens/s" in WORDS and len(speeds) == 3
    attention = [row["value"] for row in rows if row["metric"] == "attention_ms"]
    assert f"takes {min(attention):.0f} to {max(attention):.0f} ms" in WORDS
    rest = {row["task"]: row["value"] for row in rows if row["metric"] == "other_ms"}
    assert f"the rest takes {rest['fused']:.0f} ms instead of {rest['main']:.0f}" in WORDS
