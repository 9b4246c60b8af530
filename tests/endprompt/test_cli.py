"""The script as a user runs it: exit codes, one-line errors, no torch for its help."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from endprompt import cli
from endprompt.config import ExtendConfig
from endprompt.plan import PlanConfig
from tests.support.imports import loaded

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "Train: extend a checkpoint's window"),
        (["extend", "--help"], "scaling factor; default target / window"),
    ],
)
def test_help_imports_no_torch(arguments, said):
    code = (
        "import sys; from endprompt import cli\n"
        f"try: cli.main({arguments})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and said in done.stdout, done.stderr


def test_the_configuration_of_a_run_is_the_whole_of_it(llama, documents, tmp_path, capsys):
    output = tmp_path / "with a space" / "out"
    flags = f"--data {documents} --target 128 --prompt EP_3 --rows 2 --steps 2 --device cpu".split()
    assert cli.main(["extend", "--model", str(llama), "--output", str(output), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert json.loads((output / "config.json").read_text())["max_position_embeddings"] == 128
    assert cli.main(["extend", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "second")]) == 0
    first, second = ((path / "model.safetensors").read_bytes() for path in (output, tmp_path / "second"))
    assert first == second


def test_unknown_command_is_bad_usage(capsys):
    assert cli.main([]) == 2
    assert cli.main(["extnd"]) == 2
    assert "did you mean extend" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("extend --targt 4", "unrecognized arguments: --targt 4; did you mean --target?"),
        ("extend --micro-row 4", "unrecognized arguments: --micro-row 4; did you mean --micro-rows?"),
        ("extend --target far", "target must be a whole number: target=far"),
        ("extend --lr fast", "lr must be a number: lr=fast"),
        ("extend --factor x", "factor must be a number: factor=x"),
        ("extend --eval-lengths a b", "eval_lengths must be whole numbers: eval_lengths=['a', 'b']"),
        ("extend --rope-options 3", "rope_options must be a mapping: rope_options=3"),
        ("extend --data", "--data: expected one argument"),
        ("score x --backend foo", "backend must be one of hf, vllm, server: backend=foo"),
        ("score", "the following arguments are required: checkpoint"),
        ("completion fish", "shell must be one of bash, zsh: shell=fish"),
    ],
)
def test_usage_errors_are_one_line_and_exit_with_2(arguments, said, capsys):
    name = arguments.split()[0]
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments.split())
    assert raised.value.code == 2
    assert capsys.readouterr() == ("", f"endprompt {name}: {said} (see endprompt {name} --help)\n")


def test_unknown_recipe_names_near_ones(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["extend", "--recipe", "pose-llama3"])
    assert raised.value.code == 2
    assert "recipe='pose-llama3'; did you mean pose-llama3-8b-64k" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(ep.name for ep in cli.entry_points(group=cli.GROUP)))
def test_help_fits_80_columns_and_shows_flags_as_they_are_written(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    (entry_point,) = [ep for ep in cli.entry_points(group=cli.GROUP) if ep.name == name]
    config = typing.get_type_hints(entry_point.load())["config"]
    for field in dataclasses.fields(config):
        flag = f"--{field.name.replace('_', '-')}"
        where = field.name.upper() if cli.is_positional(field) else rf"^  {flag}\b"
        assert re.search(where, shown, re.MULTILINE), flag
        if field.default is False:  # a switch: nothing stands behind it
            assert re.search(rf"^  {flag}(  .*)?$", shown, re.MULTILINE), flag
        elif isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert f"default: {field.default}" in " ".join(shown.split()), flag


@pytest.mark.parametrize(
    ("arguments", "rule"), [(["--target", "16"], "target=16 window=32"), (["--rows", "5000"], "fewer documents than")]
)
def test_bad_values_give_one_line(llama, documents, tmp_path, capsys, arguments, rule):
    usual = ["--model", str(llama), "--data", str(documents), "--target", "128", "--prompt", "EP_3", "--steps", "1"]
    assert cli.main(["extend", *usual, "--output", str(tmp_path / "out"), *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("endprompt: ") and rule in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Positional:
    """Settings.

    Args:
        checkpoint: one
        tasks: some
        quiet: yes
    """

    checkpoint: str
    tasks: list[str] = dataclasses.field(default_factory=list)
    quiet: bool = False


@dataclasses.dataclass
class Listed:
    runs: list[str]
    open: bool = False
    formats: tuple[str, ...] = ("png",)
    name: str = ""


@pytest.mark.parametrize(
    ("config", "given", "read"),
    [
        (ExtendConfig, "--save-every 5 --save_every=6", "--save-every=5 --save-every=6"),
        (ExtendConfig, "--checkpoints.save_every 5 --optimizer.lr=1", "--save-every=5 --lr=1"),
        (ExtendConfig, "--resume --lr 1 --overwrite false", "--resume=true --lr=1 --overwrite=false"),
        (ExtendConfig, "--autocast --lr -1e-5", "--autocast=true --lr=-1e-5"),
        (ExtendConfig, "--data a c --eval_lengths 64 128", '--data=["a","c"] --eval-lengths=[64,128]'),
        (ExtendConfig, "--eval-lengths=[8] --report [x] --data=a", '--eval-lengths=[8] --report=[x] --data=["a"]'),
        (ExtendConfig, "--prompt EP_1 --print_config --targt 4", "--prompt=EP_1 --print_config --targt 4"),
        (ExtendConfig, "--data", "--data"),
        (Positional, "--quiet runs/x --tasks vt", '--quiet=true --tasks=["vt"] runs/x'),
        (Positional, "--tasks vt runs/x", '--tasks=["vt"] runs/x'),
        (Listed, "a --open b --config c --name d", '--open=true --config c --name=d ["a","b"]'),
        (Listed, "--formats png a", '--formats=["png"] ["a"]'),
        (PlanConfig, "some/model --json", "--json=true --model=some/model"),
        (PlanConfig, "--model m --target 8", "--model=m --target=8"),
    ],
)  # fmt: skip
def test_arguments_are_written_as_in_a_shell(config, given, read):
    assert cli.as_parsed(given.split(), config, {}) == read.split()
    assert cli.as_parsed(["--prompt", "a b"], ExtendConfig, {}) == ["--prompt=a b"]


def test_a_word_alone_and_its_flag_are_not_both_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "a", "--model", "b"])
    assert capsys.readouterr().err == "endprompt: model is given twice, by --model and as 'a'\n"


@pytest.mark.parametrize(
    "text",
    [
        "lr: 0.25\nscheme: pose\ndata: [a, b]\nrow_tokens: 64\nclip: 5\n",
        "optimizer: {lr: 0.25}\nmethod: {scheme: pose}\ndata: {data: [a, b], row_tokens: 64}\n",
        "optimizer: {lr: 0.25}\nscheme: pose\ndata: [a, b]\nrow_tokens: 64\npieces: 3\n",
    ],
)
def test_a_configuration_may_be_grouped_or_flat(text, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as raised:
        cli.main(["extend", "--config", str(tmp_path / "run.yaml"), "--optimizer.clip", "2", "--print_config"])
    assert raised.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert [shown[key] for key in ("lr", "scheme", "data", "row_tokens", "clip")] == [0.25, "pose", ["a", "b"], 64, 2]
    assert shown["optimizer"] == "auto" and "pieces" not in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {lr: fast}\n", "lr must be a number: lr=fast"),
        ("optimizer: {lrr: 1}\n", "lrr"),
        ("optimizer: {lr: 1}\nlr: 2\n", "optimizer.lr is given twice"),
        ("pieces: 8\n", "pieces"),
        ("lrr: 1\n", "lrr"),
    ],
)
def test_what_is_wrong_in_a_grouped_configuration_is_named(text, said, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as raised:
        cli.main(["extend", "--config", str(tmp_path / "run.yaml")])
    shown = capsys.readouterr()
    assert raised.value.code == 2 and said in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_the_help_has_the_groups(capsys):
    with pytest.raises(SystemExit):
        cli.main(["extend", "--help"])
    shown = capsys.readouterr().out
    places = [shown.index(f"\n{group}:\n") for group in ("checkpoints", "data", "method", "optimizer", "precision")]
    assert places == sorted(places)
    assert places[3] < shown.index("--weight-decay") < places[4]


class Odd(Exception):
    """What a package may raise."""


@dataclasses.dataclass
class RaisingConfig:
    """Settings.

    Args:
        what: which error
        output: a run's directory
    """

    what: str = "key"
    output: str = ""


def raising(config: RaisingConfig) -> int:
    """Raise what a package, or a fault of ours, would."""
    import jinja2

    raise {
        "key": KeyError("layers"),
        "jinja": jinja2.TemplateSyntaxError("unexpected '}'", 1),
        "memory": RuntimeError("CUDA error:\n  out of memory"),
        "bare": Odd(),
        "assert": AssertionError("two lists of one length"),
        "own": ValueError("steps must be at least 1: steps=0"),
        "file": FileNotFoundError(2, "No such file or directory", "x.json"),
    }[config.what]


@pytest.fixture
def raises(monkeypatch):
    entry = EntryPoint("raising", f"{__name__}:raising", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("key", "KeyError: 'layers' (--debug shows where)"),
        ("jinja", "TemplateSyntaxError: unexpected '}' line 1 (--debug shows where)"),
        ("memory", "RuntimeError: CUDA error: out of memory (--debug shows where)"),
        ("bare", "Odd (--debug shows where)"),
        ("assert", "AssertionError: two lists of one length (--debug shows where)"),
        ("own", "steps must be at least 1: steps=0"),
        ("file", "x.json: No such file or directory"),
    ],
)
def test_whatever_is_raised_is_one_line_that_names_its_type(raises, capsys, monkeypatch, what, said):
    monkeypatch.delenv("ENDPROMPT_TRACEBACK", raising=False)
    assert cli.main(["raising", "--what", what]) == 1
    assert capsys.readouterr() == ("", f"endprompt: {said}\n")
    for arguments in (["--debug", "--what", what], ["--what", what, "--debug"]):
        with pytest.raises(Exception) as raised:
            cli.main(["raising", *arguments])
        assert raised.traceback[-1].name == "raising"  # of the place that raised
    monkeypatch.setenv("ENDPROMPT_TRACEBACK", "1")
    with pytest.raises(Exception) as raised:
        cli.main(["raising", "--what", what])
    assert raised.traceback[-1].name == "raising"


@pytest.mark.parametrize("folder", ["out", "out.partial"])
def test_the_traceback_is_in_the_log_of_a_run_that_has_begun(raises, capsys, tmp_path, folder):
    log = tmp_path / folder / "log.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 1}\n')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.jsonl").write_text('{"step": 1}\n')
    os.utime(tmp_path / "old" / "log.jsonl", (0, 0))
    assert cli.main(["raising", "--output", str(tmp_path / "old")]) == 1  # the log of a run before this one
    assert capsys.readouterr().err.endswith("(--debug shows where)\n")
    assert cli.main(["raising", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"endprompt: KeyError: 'layers' (the traceback is in {log})\n"
    first, second = map(json.loads, log.read_text().splitlines())
    assert first == {"step": 1} and second["error"] == "KeyError"
    assert "in raising\n" in "".join(second["traceback"])
    assert cli.main(["raising", "--what", "own", "--output", str(tmp_path / "out")]) == 1  # has said it all
    assert len(log.read_text().splitlines()) == 2


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
    assert cli.main(["env"]) == 128 + 13 and capsys.readouterr().err == ""


def test_a_command_that_cannot_be_imported_is_one_line(monkeypatch, capsys):
    entry = EntryPoint("broken", "endprompt.cli:nothing", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    assert cli.main(["broken"]) == 1
    assert capsys.readouterr().err.startswith(
        "endprompt: AttributeError: module 'endprompt.cli' has no attribute 'nothing'"
    )
    with pytest.raises(AttributeError):
        cli.main(["broken", "--debug"])


def test_the_script_loads_nothing_of_others():
    assert loaded("endprompt.cli") <= sys.stdlib_module_names


def test_help_is_a_manual_of_the_command_and_names_what_is_near(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["help", "extend"]) == 0
    page = capsys.readouterr().out
    heads = [line for line in page.splitlines() if line and line == line.upper() and not line.startswith(" ")]
    assert heads == ["NAME", "SYNOPSIS", "OPTIONS", "RECIPES", "EXIT STATUS", "ENVIRONMENT"]
    assert max(map(len, page.splitlines())) <= 80 and "\n    130  interrupted, " in page
    assert page.startswith("NAME\n    endprompt extend - Train: ") and "\n    endprompt extend [options]\n" in page
    assert "--scaling SCALING" in page and "    endprompt-llama3-8b-64k " in page
    assert cli.main(["help", "extnd"]) == 1
    assert capsys.readouterr().err == "endprompt: unknown command: 'extnd'; did you mean extend?\n"
    cli.main(["help", "score"])
    page = capsys.readouterr().out
    assert "\n    endprompt score CHECKPOINT [options]\n\nDESCRIPTION\n    " in page
