"""What building and serving samples take: the benchmark's own rows, and the largest thing that is not kept."""

from __future__ import annotations

import json

from benchmarks.ruler import cell, tasks
from benchmarks.speed import memory
from endprompt import results
from tests.support import ruler_helpers as helpers


def test_rows_of_building_and_serving(tmp_path):
    memory.main(
        [
            "--lengths",
            "2048,4096",
            "--tasks",
            "vt,fwe",
            "--samples",
            "2",
            "--data-dir",
            str(tmp_path),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    made = {(row["task"], row["metric"]): row for row in results.read_rows(tmp_path / "out" / "results.jsonl")}
    assert made["serve", "cells"]["value"] == 4
    for part in ("build", "serve"):
        own, together = (made[part, metric]["value"] for metric in ("peak_gib", "peak_gib_together"))
        assert 0.1 < own < 1.5 and 0.05 < together < 1.5
        assert made[part, "peak_gib"]["lengths"] == [2048, 4096] and made[part, "peak_gib"]["n"] == 2


def test_a_sample_of_common_words_keeps_no_more_of_the_long_list_than_fits(tmp_path):
    """500 of them must be there at once: all 100,000 words of each would be 400 MB."""
    (tmp_path / "english_words.json").write_text(json.dumps({str(i): f"wordling{i}" for i in range(100_000)}))
    made = cell.source("cwe", 131_072, helpers.tokenizer(), 0, tmp_path, tasks.DEFAULTS)
    assert len(made.long_words) == 100_000
    draft = made.draw(0)
    assert draft.long_order.base is None and draft.long_order.nbytes < 200_000
