"""The timing of scoring, rehearsed small: every row there, and the limit that a step is held against."""

from __future__ import annotations

import sys

import pytest

from benchmarks import ruler
from benchmarks.ruler import tasks
from benchmarks.speed import generation
from endprompt import results
from tests.support.imports import loaded


@pytest.mark.slow
def test_rows_of_all_methods_with_the_limit_of_a_step(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    generation.main(["--tiny", "--out", str(out)])
    made = {(row["task"], row["method"]): row for row in results.read_rows(out)}
    assert set(made) == {("step", "now"), ("ruler", "now"), ("ruler", "lm-eval")}
    assert {row["suite"] for row in made.values()} == {"scoring-speed"}
    row = made["step", "now"]
    # bfloat16: the head, two layers of q, o (64 x 64), k, v (32 x 64), the MLP, five norms; 3 rows' keys and values
    weights = 2 * (256 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 5 * 64)
    caches = 3 * 256 * 2 * 2 * 32 * 2
    assert row["limit_ms"] == pytest.approx(1000 * (weights + caches) / row["copy_bytes_per_second"])
    assert row["decode_over_limit"] == pytest.approx(row["decode_ms"] / row["limit_ms"])
    spent = row["prompt_seconds"] + (row["max_new_tokens"] - 1) * row["decode_ms"] / 1000
    assert 3 * row["sample_seconds"] == pytest.approx(spent)
    assert row["prompt_share"] == pytest.approx(row["prompt_seconds"] / spent)
    assert row["environment"]["packages"]["torch"] and row["environment"]["revision"]
    assert made["ruler", "now"]["n"] == 13
    assert len(capsys.readouterr().out.splitlines()[-4:]) == 4


def test_tokens_of_the_tasks_are_rulers():
    for task in ruler.TASKS:
        assert generation.RULER_TOKENS[ruler.SPECS[task].family] == tasks.reserve(task, tasks.DEFAULTS)


@pytest.mark.slow
def test_it_needs_torch_and_transformers_only():
    assert loaded("benchmarks.speed.generation") - sys.stdlib_module_names == {"numpy", "torch", "transformers", "yaml"}
