"""Curves at the end of a run: dots counted by hand, values those of the log, no escape codes where nobody looks."""

import json

import numpy as np
import pytest
import torch

from endprompt import model as models
from endprompt.data import Documents
from endprompt.distributed import World
from endprompt.train import Objective, curves, evaluate


def dots(lines: list[str], width: int) -> np.ndarray:
    """[4 height, 2 width] of a chart's braille."""
    body = [line.partition("┤")[2] for line in lines if "┤" in line]
    out = np.zeros((4 * len(body), 2 * width), dtype=bool)
    places = {0: (0, 0), 1: (1, 0), 2: (2, 0), 6: (3, 0), 3: (0, 1), 4: (1, 1), 5: (2, 1), 7: (3, 1)}
    for i, line in enumerate(body):
        for j, character in enumerate(line):
            for bit, (row, column) in places.items():
                out[4 * i + row, 2 * j + column] = bool((ord(character) - 0x2800) >> bit & 1)
    return out


def test_a_straight_line_is_a_diagonal_and_its_ends_are_labelled():
    lines = curves.chart([0, 7], [0, 7], width=4, height=2)
    drawn = dots(lines, 4)
    assert drawn[::-1].diagonal().all()  # each column has the dot of its own height, from the bottom up
    assert not np.triu(drawn[::-1], 2).any() and not np.tril(drawn[::-1], -1).any()  # and at most the step up to it
    assert lines[0].startswith("       7 ┤") and lines[1].startswith("       0 ┤") and lines[-1].split() == ["0", "7"]


def test_no_peak_is_lost_and_a_flat_line_is_one_row():
    ys = [1.0] * 1001
    ys[500] = 9.0  # one of 1,001 points in 16 columns
    drawn = dots(curves.chart(range(1001), ys, width=8, height=3), 8)
    assert drawn[0, 7:9].any() and drawn[:, 7:9].any(axis=1).all() and drawn[-1].all()
    assert dots(curves.chart([1, 5], [2.0, 2.0], width=4, height=2), 4).sum() == 8


@torch.no_grad()
def test_loss_by_position_is_torchs_mean_of_each_part(llama):
    model = models.load_model(llama, attention=models.training_attention("sdpa"))
    text = Documents(np.arange(200, dtype=np.uint32) * 7 % 300, np.array([0, 200]), np.array([200]))
    held = evaluate.Evaluation(text, [10, 36], 3, 0, lambda words: [], seed=0)
    list(held.measure(Objective(model, autocast=False), World()))
    for length, parts in ((10, 9), (36, 16)):
        ids = torch.stack([torch.from_numpy(row) for row, _ in evaluate.held_out_rows(text, length, 3)])
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)
        wanted = [float(part.mean()) for part in losses.tensor_split(parts)]
        assert held.by_position[length] == pytest.approx(wanted, rel=1e-5)


@pytest.fixture
def run(tmp_path):
    """A finished run's log and results, in which a shorter row and an earlier step come last or first."""
    log = [{"step": n, "loss": 5 - n / 10} for n in range(1, 21)]
    log += [{"step": 10, "held_out_length": 9, "by_position": [8.0, 8.0]}]
    log += [{"step": 20, "held_out_length": 9, "by_position": [4.0, 2.0]}]
    log += [{"step": 20, "held_out_length": 5, "by_position": [7.0, 7.0]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"step')
    rows = [{"task": "held_out", "length": 9, "step": n, "value": 3 + n / 100} for n in (10, 20)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_log_file_gets_plain_lines_and_a_terminal_charts(run, capsys, monkeypatch):
    found = curves.read(run)
    assert found.by_position == ([4.0, 8.0], [4.0, 2.0]) and found.held_out == {9: ([10, 20], [3.1, 3.2])}
    curves.show(run)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training loss by step: 1 4.9000, 3 4.7000,") and lines[0].endswith(", 20 3.0000")
    assert lines[1] == "held-out loss at 9 tokens by step: 10 3.1000, 20 3.2000"
    assert lines[2] == "held-out loss by position, up to 9 tokens: 4 4.0000, 8 2.0000"
    assert lines[3] == f"picture of the losses: {run / 'loss.png'}"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich take stderr for a terminal
    curves.show(run)
    shown = capsys.readouterr().err
    assert shown.count("┤") == 2 * curves.LINES and "\x1b" not in shown and ": 1 4.9" not in shown


def test_a_run_keeps_its_end_without_a_picture(run, capsys, monkeypatch):
    monkeypatch.setattr(curves, "draw", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    curves.show(run)
    assert "no picture of the losses: read-only" in capsys.readouterr().err
