"""`endprompt compare`: numbers against values typed by hand and other routes to them; the page in a browser."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from importlib.resources import files

import numpy as np
import pytest

from benchmarks import commands, summary
from benchmarks.config import CompareConfig
from benchmarks.report import board
from benchmarks.ruler.tasks import TASKS
from endprompt.results import append_rows, result_row
from tests.support.browser import browser, executable

ASKED = dict.fromkeys(("suite", "generator", "edition", "max_new_tokens", "chat", "date", "template_args", "asked"), "")


def scored(folder, model, cells, *, prompts="p", suite="ruler", log=(), asked=ASKED, **more):
    """A finished scoring. cells: (task, length) → scores by sample."""
    folder.mkdir()
    common = {"suite": suite, "model": model, "method": "base", "seed": 0, "run_sha256": "now"}
    names = {cell: f"{cell[0]}@{cell[1]}" if cell[1] else cell[0] for cell in cells}
    rows = [
        result_row(task=task, length=length, metric="m", value=statistics.fmean(own), n=len(own), **common, **more)
        for (task, length), own in cells.items()
    ]
    entries = [
        {"run": "now", "task": names[cell], "index": i, "prompt_sha256": f"{prompts}{names[cell]}{i}", "score": value,
         "max_new_tokens": 9, "prediction": "x", "outputs": ["y"]}
        for cell, own in cells.items() for i, value in enumerate(own)
    ]  # fmt: skip
    append_rows(folder / "results.jsonl", rows)
    append_rows(folder / "predictions.jsonl", entries)
    append_rows(folder / "runs.jsonl", [{"run_sha256": "now", "fingerprint": dict(asked), "environment": {}}])
    append_rows(folder / "log.jsonl", [{"time": 0, **line} for line in log])
    return str(folder)


def mix(share, n=20):
    """n scores of 0 and 100 with this share of hits, spread evenly."""
    return [100.0 * (int((i + 1) * share + 1e-9) > int(i * share + 1e-9)) for i in range(n)]


def compared(runs, **settings):
    made, found = board.compare(CompareConfig(list(runs), **settings))
    return {table.title: table for table in made}, found


def test_effective_lengths_and_their_intervals(tmp_path):
    """By RULER's rule a length counts though a shorter one fails; 17 of 20 is under 85.6, and over it by chance."""
    cells = {("vt", 4096): mix(1), ("vt", 8192): mix(0.85), ("vt", 16384): mix(0.0), ("vt", 32768): mix(1)}
    tables, _ = compared([scored(tmp_path / "a", "m", cells)])
    row = dict(zip(tables["ruler"].columns, tables["ruler"].rows[0]))
    assert row["effective length"][0] == "32K [32K, 32K]" and row["unbroken"][0] == "4K [4K, 8K]"
    assert compared([str(tmp_path / "a")], threshold=84)[0]["ruler"].rows[0][6][0] == "8K [4K, 8K]"


def test_a_mean_is_over_the_tasks_that_any_run_has_or_there_is_none(tmp_path):
    one = scored(tmp_path / "a", "a", {("vt", 4096): mix(0.5), ("cwe", 4096): mix(1)})
    other = scored(tmp_path / "b", "b", {("vt", 4096): mix(0.5)})
    table = compared([one, other])[0]["ruler"]
    rows = {row[0][0]: row[1] for row in table.rows}
    assert rows["a"][1] == 75 and rows["b"] == ("", "")
    assert table.notes[1] == "No mean at a length where a run lacks one of these tasks: b."


def test_intervals_of_means_and_of_differences_without_spread(tmp_path):
    """The mean's from the tasks' by squares; 4 of 4 against 0 of 4 by Wilson's intervals (51.0 to 100, 0 to 49.0)."""
    cells = {("vt", 4096): mix(1, 4), ("cwe", 4096): mix(1, 4)}
    runs = [scored(tmp_path / "a", "a", cells), scored(tmp_path / "b", "b", {cell: mix(0, 4) for cell in cells})]
    tables, found = compared(runs)
    by = {row["task"]: row for row in found}
    assert by["vt"]["ci95"] == pytest.approx([-100, -100 + 49.0 * 2**0.5], abs=0.05) and by["vt"]["p"] == 0.125
    assert by["mean"]["ci95"] == pytest.approx([-100, -100 + 49.0], abs=0.05) and by["mean"]["p"] == 2 / 256
    assert tables["ruler"].rows[0][1] == ("100.0", 100)  # these rows have no interval
    own = [(100.0, [51.0, 100.0]), (50.0, [20.0, 80.0])]
    assert board.combined(own) == pytest.approx((75 - (49**2 + 30**2) ** 0.5 / 2, 75 + 15))


def test_differences_are_paired_where_prompts_are_shared_and_corrected_in_families(tmp_path):
    cells = {("vt", 4096): mix(0.5), ("cwe", 4096): mix(0.25)}
    runs = [scored(tmp_path / "a", "a", cells)]
    better = {("vt", 4096): [100.0] * 5 + mix(0.5)[5:], ("cwe", 4096): mix(0.25)}
    runs.append(scored(tmp_path / "b", "b", better))
    runs.append(scored(tmp_path / "c", "c", better, prompts="other"))
    runs.append(scored(tmp_path / "d", "d", better, asked=ASKED | {"edition": "2024"}))
    _, found = compared(runs)
    by = {(row["other"], row["task"]): row for row in found}
    assert len(by) == 9 and {row["reference"] for row in found} == {"a"}
    gains = np.subtract(better["vt", 4096], mix(0.5))
    ends = np.percentile(np.random.default_rng(1).choice(gains, (10_000, 20)).mean(1), [2.5, 97.5])
    assert by["b", "vt"]["difference"] == pytest.approx(gains.mean()) == 15
    assert by["b", "vt"]["ci95"] == pytest.approx(ends, abs=2.6) and by["b", "vt"]["p"] < 0.2
    assert by["b", "mean"]["difference"] == pytest.approx(7.5) and by["b", "mean"]["n"] == 40
    assert [by[name, "vt"]["paired"] for name in "bcd"] == [True, False, False]
    wide = [high - low for low, high in (by[name, "vt"]["ci95"] for name in "bc")]
    assert wide[1] > 1.5 * wide[0]  # nothing known of pairs
    for tasks in (("vt", "cwe"), ("mean",)):
        family = sorted((row["p"], row["p_holm"]) for row in found if row["task"] in tasks)
        steps = [min(1.0, p * (len(family) - i)) for i, (p, _) in enumerate(family)]
        assert [held for _, held in family] == pytest.approx(list(itertools.accumulate(steps, max)))


def test_shared_samples_alone_are_paired_and_scores_of_another_number_are_not_taken(tmp_path):
    one = scored(tmp_path / "a", "a", {("vt", 4096): mix(0.5, 20)})
    _, (row,) = compared([one, scored(tmp_path / "b", "b", {("vt", 4096): mix(0.5, 12)})])
    assert row["paired"] and row["n"] == 12 and row["difference"] == 0
    changed = (tmp_path / "a" / "results.jsonl").read_text().replace('"value": 50.0', '"value": 40.0')
    (tmp_path / "a" / "results.jsonl").write_text(changed)
    tables, found = compared([one, str(tmp_path / "b")])
    assert found == []  # its predictions are not those of the row
    assert tables["ruler"].notes[-1].endswith("no answers are kept that have the row's score: vt at 4,096 of a.")


def test_costs_are_those_that_the_log_tells_of_this_run(tmp_path):
    line = {"run": "now", "seconds": 2.0, "prompt_tokens": 1000, "answer_tokens": 24, "gpus": 2}
    one = scored(tmp_path / "a", "a", {("vt", 4096): mix(1)}, log=[line, line, {**line, "run": "earlier"}])
    other = scored(tmp_path / "b", "b", {("vt", 4096): mix(1)}, log=[{**line, "gpus": None}])
    silent = scored(tmp_path / "c", "c", {("vt", 4096): mix(1)}, log=[{"seconds": 3.0, "prompt_tokens": 5}])
    costs = [[cell[0] for cell in row[2:5]] for row in compared([one, other, silent])[0]["ruler"].rows]
    assert costs == [["2,048", "4", "8"], ["1,024", "2", ""], ["", "", ""]]


def published(name):
    lines = (files("benchmarks") / "report" / "boards" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    head, *rows = csv.reader(line for line in lines if not line.startswith("# "))
    return [dict(zip(head, row)) for row in rows]


def test_boards_keep_their_own_rules():
    """Averages follow from the columns to a tenth, but where the published table itself does not."""
    lengths, odd = ["4096", "8192", "16384", "32768", "65536", "131072"], set()
    for row in published("ruler"):
        scores = {int(n): float(row[n]) for n in lengths if row[n]}
        means = {"average": summary.average(scores)} | {
            f"weighted_average_{way}": summary.weighted_average(scores, way) for way in ("inc", "dec")
        }
        if len(scores) == 6 and any(row[k] and abs(float(row[k]) - value) > 0.11 for k, value in means.items()):
            odd.add(row["model"])
        reach, said = summary.effective_length(scores) // 1024, row["effective length"].strip(">Kk")
        if said and said != ("<4" if reach == 0 else str(reach)):
            odd.add(row["model"])
    assert odd == {"Qwen3-14B (14B)", "Qwen3-8B (8B)", "Qwen3-4B (4B)", "Qwen2.5-7B-Instruct-1M (7B)",
                   "Qwen2.5-14B-Instruct-1M (14B)", "EXAONE-4.0-1.2B (1.2B)"}  # fmt: skip
    for row in published("longbench"):
        for language in ("english", "chinese"):
            parts = [float(value) for key, value in row.items() if key.startswith(f"{language}:")]
            assert len(parts) == 6
            assert statistics.fmean(parts) == pytest.approx(float(row[f"{language}_category_mean"]), abs=0.1)
    for row in published("helmet"):
        parts = [float(row[key]) for key in ("Recall", "RAG", "ICL", "Cite", "Re-rank", "LongQA", "Summ")]
        assert statistics.fmean(parts) == pytest.approx(float(row["Average"]), abs=0.11)
    assert [len(published(name)) for name in ("ruler", "longbench", "helmet")] == [45, 8, 64]


def test_a_run_stands_on_a_board_with_the_numbers_of_its_own_summary(tmp_path):
    cells = {(task, 4096): mix(0.9) for task in TASKS}
    whole, part = (
        scored(tmp_path / "a", "a", cells, edition="2025"),
        scored(tmp_path / "b", "b", {("vt", 4096): mix(1)}),
    )
    common = {"suite": "ruler", "model": "a", "method": "base", "seed": 0, "task": "average", "run_sha256": "now"}
    averages = [
        {"length": 4096, "metric": "mean_over_tasks", "value": 90.0},
        {"metric": "effective_length", "value": 4096},
    ]
    append_rows(tmp_path / "a" / "summary.jsonl", [result_row(**common, **one) for one in averages])
    table = compared([whole, part], board="ruler,longbench")[0]["RULER, published"]
    row = dict(zip(table.columns, table.rows[0]))
    assert (row["model"][0], row["4096"][0], row["8192"][0]) == ("a [this run]", "90.0", "") and table.own == 1
    assert table.rows[1][0][0] == "Llama2 (7B)" and len(table.rows) == 46
    assert any("b has 1 of the 13 tasks" in note for note in table.notes) and any(
        "a: edition 2025" in n for n in table.notes
    )


def test_scores_as_the_hub_s_model_index(tmp_path):
    from huggingface_hub import ModelCard

    run = scored(tmp_path / "a", "m", {("vt", 4096): mix(0.5), ("cwe", 8192): mix(1)})
    board.compare(CompareConfig([run], model_index=str(tmp_path / "README.md")))
    read = ModelCard.load(tmp_path / "README.md")
    found = {(one.dataset_config, one.metric_type): one.metric_value for one in read.data.eval_results}
    assert found == {("vt@4096", "m"): 50, ("cwe@8192", "m"): 100} and read.data.model_name == "m"


def test_the_command_prints_tables_or_lines(tmp_path, capsys):
    runs = [scored(tmp_path / name, name, {("vt", 4096): mix(share)}) for name, share in (("a", 0.5), ("b", 1))]
    commands.compare(CompareConfig(runs))
    said = capsys.readouterr().out
    assert "ruler, differences by task" in said and "+50.0 [" in said
    commands.compare(CompareConfig(runs, json=True, reference="b"))
    assert json.loads(capsys.readouterr().out)["difference"] == -50


BAD = {
    "no run": ({"runs": []}, "name at least one run directory"),
    "nothing there": ({"runs": ["nowhere"]}, "nowhere must be the output of `endprompt score`"),
    "a reference that is none": ({"reference": "z"}, "reference must be one of a: 'z'"),
    "a board that is none": ({"board": "rular"}, "board must be one of helmet, longbench, ruler: 'rular'"),
    "an index of two": ({"twice": True, "model_index": "x"}, "model_index is for one run's scores: 2 runs"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, name):
    changes, message = BAD[name]
    run = scored(tmp_path / "a", "a", {("vt", 4096): mix(1)})
    runs = [run] * (1 + changes.pop("twice", 0))
    with pytest.raises(ValueError, match=message):
        board.compare(CompareConfig(**{"runs": runs, **changes}))


@pytest.mark.slow
@pytest.mark.skipif(executable() is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_sorts_loads_nothing_and_fits(tmp_path, width):
    pytest.importorskip("websocket")
    evil = '<img src=x onerror="window.ran=1">'
    runs = [
        scored(tmp_path / str(place), name, {(task, n): mix(share) for n in (4096, 8192) for task in TASKS})
        for place, (name, share) in enumerate((("m9", 0.9), (evil, 0.2), ("m10", 1)))
    ]
    board.compare(CompareConfig(runs, board="ruler,longbench,helmet", page=str(tmp_path / "board.html")))
    with browser(tmp_path / "profile") as page:
        page.open((url := (tmp_path / "board.html").as_uri()), width)
        assert page.complaints() == [] and page.requests() == [url]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && window.ran === undefined")
        first = "[...document.querySelector('#t1 tbody').rows].map(r => r.cells[0].textContent)"
        assert page.evaluate(first) == ["m9", evil, "m10"]
        click = "document.querySelectorAll('#t1 th button')[{}].click(); 0"
        page.evaluate(click.format(1))
        assert page.evaluate(first) == ["m10", "m9", evil]
        page.evaluate(click.format(1))
        assert page.evaluate(first) == [evil, "m9", "m10"]
        page.evaluate("[...document.querySelectorAll('#t4 th button')].find(b => b.textContent == '131072').click(); 0")
        values = page.evaluate("[...document.querySelectorAll('#t4 tbody tr')].map(r => r.cells[9].dataset.s)")
        filled = [float(value) for value in values if value]
        assert filled == sorted(filled, reverse=True) and values[len(filled) :] == [""] * (len(values) - len(filled))
        page.screenshot(tmp_path / f"board-{width}.png")


def test_no_cell_has_no_interval():
    """A run that was not scored at a length of another's."""
    assert all(map(math.isnan, board.combined([])))
