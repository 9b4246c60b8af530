"""The multi-process service with a stand-in for NVIDIA's control daemon."""

import os
import sys

import pytest

from benchmarks.lab import mps


@pytest.fixture
def control(tmp_path, monkeypatch):
    """`control(2)` puts a control program on the path that ends so; returns the file where it notes its calls."""
    notes = tmp_path / "notes"

    def put(code: int):
        program = tmp_path / "bin" / mps.CONTROL
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\necho "$1 $CUDA_MPS_PIPE_DIRECTORY" >> {notes}\n'
            f'if [ "$1" = -d ]; then sleep 5 & echo no permission; exit {code}; fi\ncat >> {notes}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
        return notes

    return put


def test_the_service_runs_while_the_context_lasts(control):
    notes = control(0)
    client = (sys.executable, "-c", "import os; assert os.path.isdir(os.environ['CUDA_MPS_PIPE_DIRECTORY'])")
    with mps.service(client) as reason:
        place = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
        assert reason is None and notes.read_text().split() == ["-d", place]
    assert notes.read_text().splitlines()[1:] == [f" {place}", "quit -t 5"]
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ and not os.path.exists(place)


def test_work_goes_on_without_a_daemon_that_fails(control):
    control(3)
    with mps.service(("true",)) as reason:
        assert reason == f"{mps.CONTROL} ended with 3: no permission"
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_daemon_whose_clients_fail_is_stopped(control):
    notes = control(0)
    with mps.service((sys.executable, "-c", "raise SystemExit('no CUDA here')")) as reason:
        assert reason is not None and reason.endswith("no CUDA here")
        assert notes.read_text().endswith("quit -t 5\n") and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_work_goes_on_where_there_is_no_service(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with mps.service() as reason:
        assert reason == f"there is no {mps.CONTROL}"
