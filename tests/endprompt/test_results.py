"""Result rows on their way in and out, and the mutants' list."""

import errno
import fcntl
import json
import math
import os
import subprocess

import pytest

from endprompt import files, results, runs
from tests import mutants

GOOD = dict(suite="s", task="t", metric="m", value=50.0, model="m", method="base", seed=0)


@pytest.mark.parametrize("ci95", [(60.0, 70.0), (10.0, 40.0), (math.nan, 60.0)])
def test_value_outside_of_its_interval_is_no_result(ci95):
    with pytest.raises(ValueError, match="a result must lie in its interval"):
        results.result_row(**GOOD, ci95=ci95)
    assert results.result_row(**GOOD, ci95=(50.0, 50.0))["ci95"] == [50.0, 50.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_that_is_not_finite_is_no_result(value):
    with pytest.raises(ValueError, match="a result must be finite"):
        results.result_row(**(GOOD | {"value": value}))


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"50"', "true", "null", "[1]"])
def test_row_whose_value_is_no_number_is_named(value, tmp_path):
    path = tmp_path / "results.jsonl"
    line = json.dumps(results.result_row(**GOOD))
    path.write_text(line + "\n" + line.replace("50.0", value) + "\n")
    with pytest.raises(ValueError, match=rf"{path}, line 2: value must be a finite number"):
        results.read_rows(path)


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "results.jsonl"
    made = [results.result_row(**(GOOD | {"model": "half\u2028line \u00fc", "seed": seed})) for seed in range(3)]
    results.append_rows(path, made[:1])
    results.append_rows(path, made[1:])
    assert results.read_rows(path) == made
    path.write_bytes(path.read_bytes()[:-9])
    results.append_rows(path, made[:1])  # a line that was cut off is not glued to the next
    assert path.read_bytes().count(b"\n") == 4


def test_mutants_fit_the_sources():
    """Each mutant's text stands in its file once, so `make mutants` tests what it says."""
    for name, text, fault, tests in mutants.MUTANTS:
        source = (mutants.ROOT / name).read_text(encoding="utf-8")
        assert source.count(text) == 1 and text != fault, (name, text, source.count(text))
        assert all((mutants.ROOT / mutants.place(test)).is_file() for test in tests.split())


@pytest.mark.parametrize(("number", "held"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_used_and_any_other_fault_is_said(number, held, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if held:
        with files.sole_use(tmp_path / "out"):
            (tmp_path / "out").mkdir()
    else:
        with pytest.raises(OSError, match=os.strerror(number)), files.sole_use(tmp_path / "out"):
            raise AssertionError("the output is not held")
    assert (tmp_path / "out").exists() == held


def test_an_output_whose_holder_cannot_be_noted_is_free_again(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"), files.sole_use(tmp_path / "out"):
        raise AssertionError("the output is not held")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    with files.sole_use(tmp_path / "out"):
        pass


def test_revision_is_that_of_git_or_the_one_given(monkeypatch, tmp_path):
    def git(*arguments):
        done = subprocess.run(["git", "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    revision = runs.git_revision.__wrapped__  # it is asked once a process
    monkeypatch.setenv("ENDPROMPT_REVISION", "given")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "endprompt" / "rows.py"))
    assert revision() == "given"  # no checkout
    git("init", "-q")
    assert revision() == "given"  # nothing is committed
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "m")
    assert revision() == git("rev-parse", "HEAD")
    (tmp_path / "other").write_text("not tracked")
    assert revision() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert revision() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision() == "given"  # no git
