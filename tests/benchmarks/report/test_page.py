"""The report as a page: what it holds, that nothing of a run gets out of its text, that its numbers are right."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import shlex
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path

import pytest

from analysis.config import VerifyConfig
from benchmarks import report
from benchmarks.config import DemoConfig, ReportConfig
from benchmarks.report import charts, runs
from benchmarks.report import page as report_page
from benchmarks.scoring import ScoreConfig
from endprompt import cli
from endprompt.config import ExtendConfig
from endprompt.results import append_rows
from endprompt.runs import RunDirectory
from tests.support import report_runs
from tests.support.report_runs import EVIL, LENGTHS, TASKS, Elements, ruler_row, write_verification


@pytest.fixture
def demo_run(tmp_path):
    return report_runs.demo_run(tmp_path)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run and its page, made once."""
    run = report_runs.demo_run(tmp_path_factory.mktemp("shown"))
    path = report.report(ReportConfig([str(run)]))
    assert path == run / "report.html"
    return run, path.read_text(encoding="utf-8")


@pytest.fixture
def page(shown):
    return shown[1]


def test_page_is_whole_and_accessible(page):
    found = Elements(page)
    assert not found.unclosed and found.around == []
    assert found.named("html")[0]["lang"] == "en" and found.named("main") and found.named("nav")
    levels = [int(name[1]) for name, _ in found.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(found.named("table")) == len(found.named("caption"))
    assert all("scope" in attributes for attributes in found.named("th"))
    charts_ = [a for a in found.named("svg") if a.get("class") == "chart"]
    assert len(charts_) == 1 + 3  # losses, mean and two tasks
    for chart in charts_:
        assert chart["aria-labelledby"] in ids and chart["aria-describedby"] in ids
    assert sum("data-v" in a for _, a in found.elements) > 60
    assert {a["href"][1:] for a in found.named("a")} <= set(ids)


def test_nothing_is_loaded_and_only_our_own_script_runs(page):
    found = Elements(page)
    assert len(found.named("script")) == 1 and "src" not in found.named("script")[0]
    for name in ("img", "link", "iframe", "object", "base", "form", "image", "use"):
        assert not found.named(name)
    loading = {"src", "srcset", "action", "data", "poster", "background", "xlink:href", "style", "srcdoc"}
    for name, attributes in found.elements:
        assert not loading & set(attributes), (name, attributes)
        assert not [key for key in attributes if key.startswith("on")], (name, attributes)
    assert "url(" not in page and "@import" not in page and "http" not in found.text("style")
    policy = next(a["content"] for a in found.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.text(name).encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_what_a_model_wrote_stays_text(page, tmp_path):
    found = Elements(page)
    shown = [data for around, data in found.texts if around[-2:] == ("td", "code")]
    assert EVIL in "".join(shown)
    rows = tmp_path / "x&<b>.jsonl"
    append_rows(rows, [ruler_row(EVIL, 256, 50.0, EVIL, model=EVIL), ruler_row("vt", 256, 50.0, "b")])
    other = Elements(report_page.render(runs.read_runs([str(rows)])))
    assert not other.unclosed and len(other.named("script")) == 1 and not other.named("img") and not other.named("b")
    assert any(EVIL in attributes.get("data-v", "") for _, attributes in other.elements)


def test_scores_are_those_of_the_files(shown):
    demo_run, page = shown
    facet = runs.facets(runs.read_runs([str(demo_run)]))[0]
    assert facet.tasks == list(TASKS) and facet.lengths == list(LENGTHS) and facet.window == 256
    assert facet.cells["contiguous+linear", "vt", 256] == (56.25, 36.25, 71.25)
    mean = facet.cells["contiguous+linear", runs.MEANS, 256]
    assert mean.value == (75 + 56.25) / 2 and mean.low == pytest.approx(mean.value - math.hypot(20, 20) / 2)
    assert "[51, 76]" in Elements(page).text("small")


def test_seeds_give_a_t_interval(tmp_path):
    rows = [
        ruler_row("vt", 256, value, method, seed=seed, samples_sha256=f"s{seed}", base="256", fold=8)
        for method, values in (("contiguous", (10.0, 20.0, 60.0)), ("pose", (15.0, 27.0, 63.0)))
        for seed, value in enumerate(values)
    ]
    append_rows(tmp_path / "lab.jsonl", [*rows, ruler_row("vt", 256, 1.0, "pose", base="512", fold=8)])
    facets = runs.facets(runs.read_runs([str(tmp_path / "lab.jsonl")]))
    assert [facet.title for facet in facets] == ["base 256, 8-fold", "base 512, 8-fold"]
    cell = facets[0].cells["contiguous", "vt", 256]
    assert cell.value == 30 and cell.low == 0.0
    assert cell.high == pytest.approx(30 + 4.302653 * math.sqrt(700) / math.sqrt(3), abs=1e-4)


def test_methods_of_one_name_are_told_apart(tmp_path):
    rows = [ruler_row("vt", 256, 50.0 + steps / 100, "pose", steps=steps) for steps in (100, 300)]
    append_rows(tmp_path / "a.jsonl", rows)
    append_rows(tmp_path / "b.jsonl", rows[:1])
    facet = runs.facets(runs.read_runs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))[0]
    assert [*facet.methods] == ["pose (steps 100, a)", "pose (steps 300, a)", "pose (steps 100, b)"]


def test_many_methods_are_split_into_charts_that_can_be_read(tmp_path):
    rows = [
        ruler_row(task, length, 50.0, f"method {k}", window=256, target=2048)
        for k in range(18)
        for task in TASKS
        for length in LENGTHS
    ]
    append_rows(tmp_path / "lab.jsonl", rows)
    page = report_page.render(runs.read_runs([str(tmp_path / "lab.jsonl")]))
    assert len(re.findall("mean over tasks: score against length</title>", page)) == 3  # of 8, 8 and 2 methods


def test_violated_bound_and_broken_lines_are_said(tmp_path):
    bad = tmp_path / "bad"
    write_verification(bad, "bad", violated=True)
    with open(bad / "results.jsonl", "a") as file:
        file.write('{"suite": "ruler"}\n{"cut o')
    said = Elements(report_page.render(runs.read_runs([str(bad)])))
    assert "A bound is violated." in said.text("strong") and "1.2000" in said.text("td")
    count = len((bad / "results.jsonl").read_text().splitlines())
    places = f"results.jsonl, line {count - 1}; results.jsonl, line {count}"
    assert f"2 lines of this run's files are broken and left out: {places}." in said.text("p")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("config.yaml", "checkpoint: a\n  b: [c\n", "config.yaml, line 2"),
        ("config.yaml", "just words", "config.yaml"),
        ("environment.json", '{"revision":\n', "environment.json, line 2"),
        ("runs.jsonl", "[]\n", "runs.jsonl, line 1"),
        ("results.jsonl", "[" * 100_000, "results.jsonl, line 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, place):
    append_rows(tmp_path / "log.jsonl", [{"step": 1, "loss": 2.0}])
    (tmp_path / name).write_text(content)
    assert runs.read_part(tmp_path).broken == [place]


def test_lengths_are_short_where_they_can_be():
    assert [charts.tokens(n) for n in (256, 1024, 65536, 3000, 1 << 20)] == ["256", "1K", "64K", "3,000", "1M"]


ODD = {"eval_lengths": [4, 8], "prompt": "text:it's", "autocast": True, "rope_options": {"x": 1}}
EXTEND = ExtendConfig(model="m", data=["a b", "c"], target=9, **ODD)


@pytest.mark.parametrize(
    ("name", "module", "config"),
    [
        ("extend", "endprompt.commands:extend", EXTEND),
        ("score", "benchmarks.commands:score", ScoreConfig("a b", tasks=["vt", "cwe"], lengths=[1, 2], shots=0)),
        ("verify", "analysis.commands:verify", VerifyConfig("ckpt", against="b c", pairs=7, formats=("png",))),
        ("demo", "benchmarks.commands:demo", DemoConfig(output="x y", steps=3)),
    ],
)  # fmt: skip
def test_command_to_run_it_again_gives_the_same_configuration(name, module, config, tmp_path, monkeypatch):
    RunDirectory(tmp_path / "a run", config).log(step=1, loss=2.0)
    (run,) = runs.read_runs([str(tmp_path / "a run")])
    words = shlex.split(report_page.commands(run)[-1])
    assert run.parts[0].kind == name and words[:2] == ["endprompt", name]
    given = []
    entry_point = EntryPoint(name=name, value=module, group=cli.GROUP)

    def stands_in(self):
        def command(config):
            given.append(config)

        command.__annotations__ = {"config": type(config)}
        return command

    monkeypatch.setattr(EntryPoint, "load", stands_in)
    assert cli.run(entry_point, words[2:]) == 0
    assert json.loads(json.dumps(dataclasses.asdict(given[0]))) == run.parts[0].config


def test_report_command_takes_several_runs(tmp_path, capsys):
    entry_point = EntryPoint(name="report", value="benchmarks.commands:report", group=cli.GROUP)
    rows, more = tmp_path / "rows [1].jsonl", tmp_path / "more.jsonl"
    append_rows(rows, [ruler_row("vt", 256, 50.0, "pose")])
    append_rows(more, [ruler_row("vt", 256, 70.0, "contiguous")])
    output = tmp_path / "new" / "page.html"
    assert cli.run(entry_point, [str(more), str(rows), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    text = output.read_text()
    assert "more, rows [1]" in text and str(Path.home()) not in text
    for wrong, rule in (
        ([str(tmp_path / "none")], "there is no such run"),
        ([str(tmp_path / "new")], "has no results.jsonl"),
    ):
        assert cli.run(entry_point, [*wrong, "--output", str(tmp_path / "no.html")]) == 1
        said = capsys.readouterr().err
        assert rule in said and len(said.splitlines()) == 1
    assert not (tmp_path / "no.html").exists()


def test_home_directory_is_not_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    told = report_page.tidy("--data='/home/somebody/my data' --model=/home/somebody/m")
    assert told == "--data=~/'my data' --model=~/m"
