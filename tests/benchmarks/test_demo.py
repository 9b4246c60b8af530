"""The demo from its first line to its last, with one arm, one step and few samples."""

import dataclasses
import re

import pytest

from benchmarks import demo
from benchmarks.config import DemoConfig
from endprompt import cli, results


@pytest.fixture
def short_demo(monkeypatch):
    monkeypatch.setattr(demo, "ARMS", demo.ARMS[2:])
    monkeypatch.setattr(demo, "TASKS", ("niah_single_1",))
    monkeypatch.setattr(demo, "LENGTHS", (256, 2048))
    monkeypatch.setattr(demo, "DOCUMENTS", 40)
    real = demo.verify_config
    monkeypatch.setattr(demo, "verify_config", lambda *a: dataclasses.replace(real(*a), pairs=4, tokens=128))


@pytest.mark.slow
def test_demo_runs_and_a_second_one_does_only_what_is_missing(short_demo, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert cli.main(["demo", f"--output={run}", "--steps=1", "--samples=2"]) == 0
    said = capsys.readouterr()
    assert re.search(r"endprompt\+recall\+yarn\s*│\s*256", said.out) and "base" in said.out
    assert all(f"[{step}/5]" in said.err for step in range(1, 6))
    scored = [row for row in results.read_rows(run / "results.jsonl") if row["suite"] == "ruler"]
    assert [(r["method"], r["length"], r["n"], r["window"], r["target"]) for r in scored] == [
        (method, length, 2, 256, 2048) for method in ("base", "endprompt+recall+yarn") for length in (256, 2048)
    ]
    assert {row["model"] for row in results.read_rows(run / "results.jsonl") if row["suite"] == "analysis"}
    assert (run / "figures" / demo.PICTURE).is_file()
    weights = (run / "recall" / "model.safetensors").stat().st_mtime_ns
    predictions = (run / "score" / "recall" / "predictions.jsonl").read_bytes()

    assert demo.demo(DemoConfig(output=str(run), steps=1, samples=2)) == 0
    again = capsys.readouterr()
    assert "[1/5]" not in again.err and "this run is finished already" in again.err
    assert (run / "recall" / "model.safetensors").stat().st_mtime_ns == weights
    assert (run / "score" / "recall" / "predictions.jsonl").read_bytes() == predictions
    second = [row for row in results.read_rows(run / "results.jsonl") if row["suite"] == "ruler"]
    assert second == scored
