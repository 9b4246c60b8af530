"""The demo around its heavy parts, which stand-ins play: what each step is given, what is written, how it ends."""

import json
import types

import pytest
import yaml

from benchmarks import demo
from benchmarks.config import DemoConfig
from endprompt import results


@pytest.fixture
def played(monkeypatch, tmp_path):
    """`played(violated)`: runs the demo with parts that note their settings; (exit code, notes, run directory)."""
    notes = {"extend": [], "verify": [], "score": [], "opened": [], "drawn": []}

    def row(suite, task, metric, value, config, length, **more):
        about = {
            "model": config.name if suite == "ruler" else config.checkpoint,
            "method": config.method or config.name,
        }
        about |= {"seed": 0, "n": 2, "length": length, "value": value}
        return results.result_row(suite=suite, task=task, metric=metric, **about, **more)

    def extend(config):
        notes["extend"].append(config)
        return demo.Path(config.output)

    def score(config):
        notes["score"].append(config)
        place = len(notes["score"])
        return [
            row("ruler", task, "string_match_all", 10 * place + k, config, length, ci95=(10 * place + k - 4, 99),
                samples_sha256=f"{task}{length}")
            for length in config.length_list for k, task in enumerate(config.task_names)
        ]  # fmt: skip

    def play(violated=None, drawn=0, page=False, **settings):
        def draw(command, **_):
            notes["drawn"].append(command)
            return types.SimpleNamespace(returncode=drawn, stderr="endprompt: no font\n")

        monkeypatch.setattr(demo, "subprocess", types.SimpleNamespace(run=draw))

        def verify(config):
            notes["verify"].append(config)
            name = demo.Path(config.output).name
            found = row("analysis", "bounds", "share_within_bernstein", 1.0, config, 2048)
            results.append_rows(demo.Path(config.output) / "results.jsonl", [found])
            return types.SimpleNamespace(shares={"bernstein": 0.5 if name == violated else 1.0}, holds=name != violated)

        for name, part in (("extend", extend), ("verify", verify), ("score", score)):
            monkeypatch.setattr({"extend": demo.train, "verify": demo, "score": demo.scoring}[name], name, part)
        run = tmp_path / "run"
        for name in ("base", *(arm.name for arm in demo.ARMS)):
            (run / "verify" / name).mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(demo, "DOCUMENTS", 4)
        monkeypatch.setattr(demo.report, "show", notes["opened"].append)
        if not page:
            monkeypatch.setattr(demo.report, "report", lambda config: demo.Path(config.runs[0], "report.html"))
        return demo.demo(DemoConfig(output=str(run), **settings)), notes, run

    return play


def test_every_part_gets_the_settings_of_its_arm_and_the_table_shows_the_rows(played, capsys):
    code, notes, run = played(open=True, page=True)
    said = capsys.readouterr()
    assert code == 0
    assert [config.output for config in notes["extend"]] == [str(run / name) for name in ("control", "paper", "recall")]
    lengths = [config.length_list for config in notes["score"]]
    assert lengths == [[256, 2048], *[[256, 1024, 2048]] * 3] and notes["score"][0].beyond_window
    seen = [(config.scheme, config.context + config.prompt, config.against) for config in notes["verify"]]
    assert seen[1] == ("contiguous", 256, str(demo.BASE)) and seen[0][2] is None
    assert [scheme for scheme, *_ in seen[2:]] == ["endprompt"] * 2 and {context for _, context, _ in seen} == {256}
    written = results.read_rows(run / "results.jsonl")
    scored = [row for row in written if row["suite"] == "ruler"]
    assert len(scored) == 4 * (2 + 3 * 3) and {(row["window"], row["target"]) for row in scored} == {(256, 2048)}
    assert len(written) - len(scored) == 4
    shown = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in said.out.splitlines() if "[" in line]
    wanted = [[row["method"], str(row["length"])] for row in scored if row["task"] == "niah_single_1"]
    assert [line[:2] for line in shown if line[0] != "" and len(line) == 6] == wanted
    first = next(line for line in shown if line[:2] == ["base", "256"])
    assert first[2:] == ["10 [6, 99]", "11 [7, 99]", "12 [8, 99]", "13 [9, 99]"]
    (drawn,) = notes["drawn"]
    assert drawn[-5:] == ["figures", "--results", str(run), "--output", str(run / "figures")]
    assert f"picture: {run / 'figures' / demo.PICTURE}" in said.err
    assert said.out.splitlines()[-1] == str(run / "report.html") and notes["opened"] == [run / "report.html"]
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 150
    assert json.loads((run / "documents.json").read_text()) == {"seed": 0, "documents": 4, "longest": demo.LONGEST}


@pytest.mark.parametrize("native", [True, False])
def test_a_violated_bound_is_the_exit_code_and_bfloat16_is_where_the_processor_has_it(
    played, monkeypatch, capsys, native
):
    """The page is named as a terminal opens it."""
    monkeypatch.setattr(demo, "bfloat16_matmuls", lambda: native)
    code, notes, run = played("paper")
    said = capsys.readouterr().err
    assert code == 1 and f"a certified bound is violated: see the rows in {run / 'verify'}" in said
    lines = [line for line in said.splitlines() if "share of pairs" in line]
    assert ["VIOLATED" in line for line in lines] == ["paper" in line for line in lines] == [False, False, True, False]
    assert f"open in a browser: {(run / 'report.html').resolve().as_uri()}\n" in said and notes["opened"] == []
    assert {config.autocast for config in notes["extend"]} == {native}
    assert ("trained in float32" in said) is not native


def test_figures_that_cannot_be_drawn_are_an_error(played):
    with pytest.raises(ValueError, match="the figures could not be drawn: endprompt: no font"):
        played(drawn=1)


def test_arms_differ_only_in_what_they_compare(tmp_path):
    made = [demo.arm_config(arm, tmp_path / arm.name, tmp_path / "d.jsonl", DemoConfig()) for arm in demo.ARMS]
    control, paper, _ = made
    free = {"output", "scheme", "prompt", "scaling"}
    for other in made[1:]:
        assert {k for k, v in vars(other).items() if v != vars(control)[k]} <= free
    assert (control.scheme, paper.scheme, paper.prompt) == ("contiguous", "endprompt", "EP_1")
    assert control.scaling == paper.scaling == "linear"
