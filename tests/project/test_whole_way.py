"""The way from documents to figures through the script's own commands, and the demo's parts."""

import json

import pytest

from endprompt import cli

TARGET = 1024


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2"])
def test_every_command_runs_alone_on_another_architecture(architecture, checkpoints, documents, tmp_path, capsys):
    base = str(checkpoints(architecture))
    extended, scored, checked, drawn = (str(tmp_path / name) for name in ("extended", "scored", "checked", "drawn"))

    flags = ["--model", base, "--data", str(documents), "--output", extended, "--target", str(TARGET)]
    flags += ["--prompt", "EP_3", "--scaling", "yarn", "--rows", "4", "--steps", "2", "--warmup", "1"]
    assert cli.main(["extend", *flags]) == 0
    config = json.loads((tmp_path / "extended" / "config.json").read_text())
    assert config["max_position_embeddings"] == TARGET
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["rope_parameters"]["factor"] == TARGET / 32

    assert cli.main(["positions", "--target", str(TARGET), "--context", "28", "--prompt", "4"]) == 0
    assert f"{TARGET - 32}" in capsys.readouterr().out  # the gap's end, L - a - b

    verify = ["verify", extended, "--against", base, "--prompt", "4", "--pairs", "8", "--output", checked]
    assert cli.main([*verify, "--formats", '["png"]']) == 0
    shares = [
        row["value"]
        for row in map(json.loads, (tmp_path / "checked" / "results.jsonl").read_text().splitlines())
        if row["metric"].startswith("share_within")
    ]
    assert shares and set(shares) == {1.0}

    score = ["score", extended, "--tasks", "niah_single_1", "--lengths", "1024", "--samples", "2", "--device", "cpu"]
    score += ["--max-new-tokens", "4", "--output", scored, "--cache-dir", str(tmp_path / "cache"), "--quiet"]
    assert cli.main(score) == 0
    (row,) = map(json.loads, (tmp_path / "scored" / "results.jsonl").read_text().splitlines())
    assert (row["task"], row["length"], row["n"], row["n_truncated"]) == ("niah_single_1", 1024, 2, 0)
    assert row["method"] == "endprompt+EP_3+yarn" and 0 <= row["value"] <= 100

    assert cli.main(["figures", "--results", scored, "--output", drawn, "--only", "score_against_length"]) == 0
    assert (tmp_path / "drawn" / "score_against_length.png").stat().st_size > 10_000


def test_demo_arms_differ_only_in_what_they_compare(tmp_path):
    from benchmarks import demo
    from benchmarks.config import DemoConfig

    made = [demo.arm_config(arm, tmp_path / arm.name, tmp_path / "d.jsonl", DemoConfig()) for arm in demo.ARMS]
    control, paper, _ = made
    free = {"output", "scheme", "prompt", "scaling"}
    for other in made[1:]:
        assert {k for k, v in vars(other).items() if v != vars(control)[k]} <= free
    assert (control.scheme, paper.scheme, paper.prompt) == ("contiguous", "endprompt", "EP_1")
    assert control.scaling == paper.scaling == "linear"


@pytest.mark.slow
def test_demo_twice_keeps_what_is_done(tmp_path, capsys):
    from benchmarks import demo
    from benchmarks.config import DemoConfig

    config = DemoConfig(output=str(tmp_path / "a demo"), steps=2, samples=2)
    assert demo.demo(config) == 0
    first = (tmp_path / "a demo" / "results.jsonl").read_text()
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "a demo").glob("*/model.safetensors")}
    assert len(weights) == 3
    assert demo.demo(config) == 0
    rows = [row for row in map(json.loads, first.splitlines()) if row["suite"] == "ruler"]
    assert {row["method"] for row in rows} >= {"base", "contiguous+linear", "endprompt+EP_1+linear"}
    again = [json.loads(line) for line in (tmp_path / "a demo" / "results.jsonl").read_text().splitlines()]
    assert [row for row in again if row["suite"] == "ruler"] == rows
    assert {p: p.stat().st_mtime_ns for p in weights} == weights
