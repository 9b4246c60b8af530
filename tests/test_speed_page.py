"""What docs/speed.md and the README say of the newest runs, against their rows."""

import re
from pathlib import Path

import pytest

from endprompt.rows import read_rows

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "paper_figures" / "data" / "measured"
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
WHOLE, PLAIN, REFERENCE, FULL = "endprompt, whole step", "joined, torch's products", "reference", "full, 65,536"
AGAIN, EXTEND = "endprompt, whole step, again", "extend, one process"


def rows_of(path):
    """{task: {metric: value}}"""
    found = {}
    for row in read_rows(path):
        found.setdefault(row["task"], {})[row["metric"]] = row["value"]
    return found


@pytest.fixture(scope="module")
def runs():
    names = {5: "h200_fused", 6: "h200_again", 7: "h200_target"}
    return {number: rows_of(MEASURED / f"{name}.jsonl") for number, name in names.items()}


@pytest.fixture(scope="module")
def run(runs):
    return runs[7]


def section(title):
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("number", "tasks"),
    [(5, (WHOLE, PLAIN, REFERENCE)), (6, (WHOLE, AGAIN, PLAIN, REFERENCE)), (7, (WHOLE, EXTEND, REFERENCE))],
)
def test_the_table_of_measurements_has_its_rows(runs, number, tasks):
    lines = [cells(line) for line in PAGE.splitlines() if re.search(rf"\| {number} \| [\d,]+ \|", line)]
    assert len(lines) == len(tasks)
    for line, task in zip(lines, tasks):
        one = runs[number][task]
        assert line[2:] == [
            f"{one['tokens_per_s']:,.0f}",
            f"{one['hours_per_1b_tokens']:.1f}",
            f"{one['mfu_percent']:.1f}",
            f"{one['peak_gib']:.1f}",
        ]


def test_the_targets_are_judged_by_it(runs, run):
    speed = {task: values["tokens_per_s"] for task, values in run.items()}
    against = {line[0]: line[1:] for line in map(cells, section("Against the targets").splitlines()) if len(line) == 3}
    reached, verdict = against["12,000 tokens/s in bfloat16"]
    assert reached == f"{speed[WHOLE]:,.0f}; `extend` itself {speed[EXTEND]:,.0f}"
    below = 100 * (1 - runs[6][WHOLE]["tokens_per_s"] / 12000)
    assert (
        min(speed[WHOLE], speed[EXTEND]) >= 12000 and verdict.startswith("met;") and f" {below:.1f}% below" in verdict
    )
    reached, verdict = against["1.5 times transformers as it is"]
    assert reached.startswith(f"{speed[WHOLE] / speed[REFERENCE]:.2f}, both") and verdict == "met"
    reached, verdict = against["2.8 times full length at 65,536"]
    assert reached.startswith(f"{speed[WHOLE] / speed[FULL]:.2f} in bfloat16") and verdict.startswith("missed in bf")
    peaks = {values["peak_gib"] for task, values in run.items() if task in (WHOLE, EXTEND)}
    assert {f"{peak:.1f}" for peak in peaks} == {against["peak below 130 GiB"][0].split(",")[0]}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{speed[WHOLE]:,.0f} tokens/s in bf16 at {run[WHOLE]['peak_gib']:.0f} GiB" in readme
    assert f"(`extend` itself {speed[EXTEND]:,.0f})" in readme
    assert f"{speed[WHOLE] / speed[REFERENCE]:.2f} times the usual Hugging Face way" in readme
    assert f"{speed[WHOLE] / speed[FULL]:.2f} times our own full-length" in readme
    assert f"products; {speed[WHOLE] / speed[FULL]:.2f} times as fast." in WORDS


def test_what_short_and_long_rows_compute():
    """By hand: 2 FLOP a multiplied parameter and pass, T h causal pairs; full length makes its layers once more."""
    decoder, head, width, layers = 32 * 218_103_808, 128_256 * 4096, 4096, 32
    short = 6 * (decoder + head) + (1 + 2.5) * 2 * 8192 * width * layers
    attention = (2 + 2.5) * 2 * 65536 * width * layers
    long = 8 * decoder + 6 * head + attention
    assert f"costs {short / 1e9:.1f} GFLOP in short rows and {long / 1e9:.1f} at full length" in WORDS
    assert f"it would be {long / short:.2f} times" in WORDS
    assert f"attention is {100 * attention / long:.0f}% of the work" in WORDS
    assert f"short rows {100 * (2.8 * short / long - 1):.0f}% nearer" in WORDS


def test_the_profile_is_its_own(runs, run):
    page = section("Where the time of a bfloat16 micro-batch goes")
    lines = {line[0]: line[1:] for line in map(cells, page.splitlines()) if len(line) == 5}
    one = run[WHOLE]
    kinds = {
        "matrix products": "matmul_ms",
        "attention (flash-attn-4)": "attention_ms",
        "the rest": "other_ms",
        "without a kernel": "idle_ms",
        "update, of 64 rows": "update_ms",
    }
    for kind, metric in kinds.items():
        assert lines[kind][1:3] == [f"{runs[number][WHOLE][metric]:,.0f}" for number in (5, 7)], kind
    flops = 6 * 7_504_658_432 * 16384  # those of the parameters that a token is multiplied by, 2 rows of 8,192
    assert lines["matrix products"][3] == f"{flops / one['matmul_ms'] / 1e9:.0f} TFLOP/s"
    products = [f"{runs[6][task]['matmul_ms']:,.0f}" for task in (PLAIN, WHOLE)]
    assert f"torch's own products take {products[0]} ms, the chosen ones {products[1]}" in WORDS
    update = (one["update_ms"] + one["update_idle_ms"]) / 1e3
    asked, taken = ((64 * 8192 / speed - update) / 32 * 1e3 for speed in (12000, one["tokens_per_s"]))
    alone = sum(one[metric] for metric in ("matmul_ms", "attention_ms", "other_ms", "idle_ms"))
    assert f"must take {asked:,.0f} ms; within the step it takes {taken:,.0f}, {taken - alone:.0f} more" in WORDS


def test_gpus_apart_are_those_of_the_rows(runs):
    between = rows_of(ROOT / "docs" / "h200_order.jsonl")
    plain, changed = (between[task]["tokens_per_s"] for task in ("attention as it comes", "best attention"))
    assert f"made {runs[6][WHOLE]['tokens_per_s']:,.0f} tokens/s in run 6 and {plain:,.0f} a quarter" in WORDS
    stock = [one[REFERENCE]["tokens_per_s"] for one in (runs[6], between, runs[7], runs[5])]
    assert f"transformers as it is {stock[0]:,.0f} and {stock[1]:,.0f}. In run 7" in WORDS
    assert f"on a third, that is {stock[2]:,.0f}; it was 7,683 in run 3 and {stock[3]:,.0f} in run 5" in WORDS
    ratios = [
        f"{runs[number][WHOLE]['tokens_per_s'] / runs[number][REFERENCE]['tokens_per_s']:.2f}" for number in (7, 6)
    ]
    assert f"{ratios[0]} times transformers as it is in run 7, {ratios[1]} in run 6" in WORDS
    assert f"the whole step {changed:,.0f} instead of {plain:,.0f} tokens/s" in WORDS


def test_the_steps_on_another_gpu_are_those_of_its_rows():
    rows = read_rows(ROOT / "docs" / "h200_steps.jsonl")
    speeds = [f"{row['value']:,.0f}" for row in rows if row["metric"] == "tokens_per_s"]
    assert f"{speeds[0]}, {speeds[1]} and {speeds[2]} tokens/s" in WORDS and len(speeds) == 3
    attention = [row["value"] for row in rows if row["metric"] == "attention_ms"]
    assert f"takes {min(attention):.0f} to {max(attention):.0f} ms" in WORDS
    assert "ms of a micro-batch on the machine of `docs/h200_steps.jsonl` and" in WORDS
    rest = {row["task"]: row["value"] for row in rows if row["metric"] == "other_ms"}
    assert f"the rest takes {rest['fused']:.0f} ms instead of {rest['main']:.0f}" in WORDS
