"""The README and the pages: links lead somewhere, every command is one that the script takes, the site builds."""

from __future__ import annotations

import functools
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from endprompt import cli
from paper_figures import inputs
from tests.support import longbench_fixtures, ruler_helpers

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "analysis" / "README.md",
        ROOT / "paper_figures" / "README.md",
        ROOT / "paper_figures" / "AUDIT.md",
        ROOT / "benchmarks" / "base" / "README.md",
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def code_lines(text: str) -> list[str]:
    """Lines of indented and fenced code, continued ones joined, and code within a sentence that is a command."""
    lines, fenced, prose = [], False, True
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and not prose):
            lines.append(line.strip())
        else:
            prose = bool(line.strip())
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    inline = re.findall(r"`(endprompt [a-z-]+(?: [^`]*)?)`", re.sub(r"(?m)^(    |```).*$", "", text))
    return [*joined.split("\n"), *inline]


def commands(text: str) -> list[list[str]]:
    """Arguments of every `endprompt ...`, `python -m endprompt.cli ...` and the same under torchrun."""
    found = []
    for line in code_lines(text):
        line = re.sub(r"\s{2,}[a-z#(].*$", "", line) if line.startswith("endprompt ") else line  # a remark beside it
        match = re.match(r"(?:endprompt|.*-m endprompt\.cli) (.*)", line.partition(" #")[0])
        if match and "<" not in line:
            found.append(shlex.split(match[1]))
    return found


#: {command: the first page that has it}
ALL = {
    tuple(arguments): name
    for name, page in reversed([*zip(NAMES, PAGES)])
    for arguments in commands(page.read_text(encoding="utf-8"))
}


def test_commands_are_found():
    assert len(ALL) > 35
    named = {arguments[0] for arguments in ALL}
    every = {ep.name for ep in cli.entry_points(group=cli.GROUP)}
    assert named >= every - {"bench"}, "a command that no page shows"
    assert commands("    endprompt plan --target 5 \\\n        --rows 2   # so\n") == []  # no blank line: a list item
    assert commands("\n    endprompt plan --target 5 \\\n        --rows 2   # so\n") == [
        ["plan", "--target", "5", "--rows", "2"]
    ]


@pytest.mark.parametrize("arguments", ALL, ids=" ".join)
def test_command_on_a_page_is_one_that_the_script_takes(arguments):
    given = [argument for argument in arguments if argument not in ("--help", "--list-recipes", "...")]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main([*given, "--print_config"])
    assert ended.value.code == 0, err.getvalue()
    assert isinstance(yaml.safe_load(out.getvalue()), dict)


CHEAP = ("audit", "plan", "positions", "tasks-path", "figures", "env", "completion", "help")
#: Commands of the README that are run one after the other, in this order, with fewer of everything.
WALK = (
    "prepare --data a.",
    "plan --model CHECKPOINT",
    "extend --model",
    "generate extended --file book.txt",
    "verify extended",
    "score extended --tasks niah",
    "score extended --show",
    "compare runs/score",
    "score extended --suite longbench --tasks qasper,hotpotqa_e",
    "figures --results runs/score",
    "card extended",
)


def runs_as_it_stands(arguments: tuple[str, ...]) -> bool:
    line = " ".join(arguments)
    elsewhere = "runs" in line or "CHECKPOINT" in line or line.startswith("positions --scheme all --target")
    drawn = "figures --only" in line  # by the figures' own tests
    return (arguments[0] in CHEAP and not elsewhere and not drawn) or "--list-recipes" in line


@functools.cache
def measured():
    """The rows that the project ships, read once."""
    return inputs.read_results(inputs.measured_files())


@pytest.mark.parametrize("arguments", filter(runs_as_it_stands, ALL), ids=" ".join)
def test_cheap_command_runs_as_it_stands(arguments, tmp_path, monkeypatch, capsys):
    arguments = [*arguments]
    if arguments[0] == "figures":
        shipped = measured()
        monkeypatch.setattr(inputs, "read_results", lambda paths: shipped if paths == inputs.measured_files() else None)
        arguments += ["--only", "table_1"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out


#: What a change is most likely to break; the rest, too, where slow tests are asked for.
SHORT_WALK = tuple(start for start in WALK if not start.startswith(("plan", "generate", "verify", "figures")))


@pytest.mark.parametrize("walk", [SHORT_WALK, pytest.param(WALK, marks=pytest.mark.slow)], ids=["short", "whole"])
def test_the_readme_from_extend_to_figures(walk, tmp_path, monkeypatch, capsys):
    """The README's own lines, one after the other, with a tiny checkpoint and fewer of everything: from a mixture of
    books, code and conversations to a report, without a question."""
    ruler_helpers.checkpoint(tmp_path / "CHECKPOINT")
    (tmp_path / "CHECKPOINT" / "chat_template.jinja").write_text(
        "{% for turn in messages %}{% if turn.role == 'assistant' %}A: {% generation %}{{ turn.content }}"
        "{% endgeneration %}{% else %}Q: {{ turn.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    turns = [{"role": "user", "content": "Who lives here?"}, {"role": "assistant", "content": ruler_helpers.STORY}]
    code = Path(ruler_helpers.__file__).read_text(encoding="utf-8")
    made = {"books": {"text": ruler_helpers.STORY * 12}, "code": {"text": code}, "chat": {"messages": turns}}
    for name, record in made.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 10)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # whoever asked would read the end of the input
    (tmp_path / "book.txt").write_text(ruler_helpers.STORY * 5)
    monkeypatch.chdir(tmp_path)
    small = {
        "prepare": ["--data", "books.jsonl:0.6", "code.jsonl:0.3", "chat.jsonl:0.1"],
        "extend": ["--short-documents", "apart", "--target", "4096", "--steps", "2", "--rows", "2", "--device", "cpu",
                   "--overwrite"],
        "generate": ["--max-new-tokens", "8"],
        "verify": ["--pairs", "8", "--tokens", "64", "--target", "4096", "--formats", "png"],
        "score": ["--lengths", "1024", "--samples", "2", "--dtype", "float32", "--device", "cpu", "--quiet",
                  "--cache-dir", "cache", "--max-new-tokens", "8", "--shots", "0"],
        "figures": ["--only", "score_against_length"],
    }  # fmt: skip
    page = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    longbench_fixtures.write_data(tmp_path / "longbench", tasks=("qasper", "hotpotqa_e"), n=1, words=60)
    other = ["score", "extended", "--tasks", "niah_single_2,vt", "--output", "runs/score/other", *small["score"]]
    for start in walk:
        for arguments in (found for found in page if " ".join(found).startswith(start)):
            name = arguments[0]
            more = small.get(name, [])
            if name == "compare":
                assert cli.main(other) == 0
            if "longbench" in arguments:
                more = ["--device", "cpu", "--quiet", "--output", "runs/longbench"]
            capsys.readouterr()
            assert cli.main([*arguments, *more]) == 0, capsys.readouterr().err
            assert capsys.readouterr().out, arguments
    scored = yaml.safe_load((tmp_path / "extended" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    (model,) = scored["model-index"]
    assert {result["dataset"]["name"] for result in model["results"]} and len(model["results"]) == 2
    assert (tmp_path / "extended/loss.png").is_file()
    assert (tmp_path / "figures" / "score_against_length.png").is_file() == (walk == WALK)
    mixed = json.loads((tmp_path / "extended" / "endprompt.json").read_text(encoding="utf-8"))["mixture"]
    assert [one["source"] for one in mixed] == ["books.jsonl", "code.jsonl", "chat.jsonl"]
    runs = ["extended", *(["runs/score/extended", "runs/verify"] if walk == WALK else [])]
    assert cli.main(["report", *runs, "--output", "report.html"]) == 0
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "endprompt+recall+yarn" in html and ("niah_single_2" in html) == (walk == WALK)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"(?m)^    .*$|`[^`]*`", "", page.read_text(encoding="utf-8"))
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    if name == "README.md":
        assert len(targets) > 10
    for target in targets:
        generated = target.startswith("api/")  # the reference is made when the site is built
        assert generated or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_be_filled_in(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|TBD|XXX|lorem)\b", text, re.IGNORECASE)


def test_readme_fits_a_terminal():
    shown = re.sub(r"<!-- .*? -->", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert not [line for line in shown.split("\n") if len(line) > 120]


def test_files_that_pages_name_exist():
    """Paths in backticks that look like files of the repository."""
    missing = []
    for name, page in zip(NAMES, PAGES):
        for path in re.findall(
            r"`((?:docs|tests|endprompt|analysis|benchmarks|paper_figures)/[\w./-]+)`", page.read_text(encoding="utf-8")
        ):
            if not (ROOT / path).exists():
                missing.append((name, path))
    assert not missing


def test_citation_file_is_in_the_format():
    """Keys and types of the Citation File Format 1.2.0, as far as this file uses them."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["cff-version"] == "1.2.0" and cff["type"] in ("software", "dataset")
    assert all(isinstance(cff[key], str) for key in ("message", "title", "version", "license", "abstract"))
    for entry in [cff, *cff["references"]]:
        assert {"type", "title"} <= set(entry) and entry["authors"]
        assert all({"name"} == set(a) or {"family-names", "given-names"} <= set(a) for a in entry["authors"])
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cff["version"], cff["license"]) == (project["version"], project["license"])
    wheels = re.findall(r"endprompt_lab-([\d.]+)-py3", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"))
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*wheels, newest[1]} == {project["version"]}


@pytest.mark.slow  # GitHub's workflow builds the site, too
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings")
    for command in (
        [".ci/site_pages.py", str(tmp_path / "site")],
        ["-m", "zensical", "build", "--strict", "--config-file", str(tmp_path / "site" / "mkdocs.yml")],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    site = tmp_path / "site" / "site"
    pages = {path.name for path in site.glob("*.html")}
    assert {"index.html", "drills.html", "analysis.html", "audit.html", "figures.html", "install.html"} <= pages
    for package in ("endprompt", "analysis", "benchmarks", "paper_figures"):
        html = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
        assert html.count('class="doc doc-heading"') > 20
    html = (site / "api" / "endprompt.html").read_text(encoding="utf-8")
    assert 'id="endprompt.positions.observed_distances"' in html and "where it starts to" not in html
    assert 'href="audit.html"' in (site / "index.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):  # nothing is fetched by the pages
        loaded = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not loaded, (page, loaded)
