"""The paper's tables as they are written, against the CSV they come from, turned by pandas; and our rows below them."""

import re

import pandas as pd
import pytest

from endprompt import results
from paper_figures import catalog, inputs
from paper_figures.names import LONGBENCH, RULER, SHORT, TASK_GROUPS

PUBLISHED = inputs.DATA / "published"
#: table: the column of its CSV that its heads are
HEADS = {2: "category", 3: "task_group", 4: "category"} | dict.fromkeys((1, 5, 6, 7, 8, 9), "task")


def written(number, folder, measured=()):
    catalog.make(f"table_{number}", inputs.read_results(measured), folder)
    return pd.read_csv(folder / f"table_{number}.csv", keep_default_na=False)


@pytest.mark.parametrize("number", HEADS)
def test_every_printed_number_stands_in_its_place_and_no_other(number, tmp_path):
    """Also in Markdown and LaTeX, where the best of a section's column, and nothing else, is in bold."""
    printed = pd.read_csv(PUBLISHED / f"table_{number}.csv")
    several_parts = "group" in printed and printed["group"].nunique() > 1
    group = printed["group"] if several_parts else pd.Series("", index=printed.index)
    wide = printed.pivot_table(index=[group.rename("part"), "method"], columns=HEADS[number], values="score",
                               sort=False)  # fmt: skip
    assert wide.size == len(printed), "a pair of method and column is printed twice"
    table = written(number, tmp_path)
    lines = [line for line in (tmp_path / f"table_{number}.md").read_text().splitlines() if line.startswith("|")]
    latex = (tmp_path / f"table_{number}.tex").read_text()
    assert len(table) == len(wide) and list(table.columns[2:-1]) == list(wide.columns)
    for (part, method), expected in wide.iterrows():
        (own,) = [line for _, line in table.iterrows() if line["section"].endswith(part) and line.iloc[1] == method]
        assert [float(own[name]) for name in wide.columns] == pytest.approx(expected.tolist())
        assert own["origin"] == f"published: Table {number}"
        best = wide.loc[part].max()
        several = len(wide.loc[part]) > 1
        cells = [f"**{v:.2f}**" if several and v == best[name] else f"{v:.2f}" for name, v in expected.items()]
        assert f"| {method} | {' | '.join(cells)} |" in lines
        marked = [re.sub(r"\*\*(.*)\*\*", r"\\textbf{\1}", cell) for cell in cells]
        assert f" & {' & '.join(marked)} \\\\" in latex
    assert latex.count("\\begin{") == latex.count("\\end{")


def scored(folder, suite, task, length, value, seed=0):
    about = {"metric": "m", "model": "m", "method": "base", "n": 50, "samples_sha256": f"{task}{length}"}
    interval = (value - 1, value + 1)
    row = results.result_row(suite=suite, task=task, length=length, value=value, seed=seed, ci95=interval, **about)
    results.append_rows(folder / "results.jsonl", [row])


@pytest.mark.parametrize(("number", "length"), [(6, 4096), (9, 32768)])
def test_a_table_of_one_length_takes_our_rows_of_that_length_alone(number, length, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for place, task in enumerate(RULER.values()):
        scored(run, "ruler", task, length, 80 + place)
        scored(run, "ruler", task, 2 * length, 10)
    own = written(number, tmp_path, [run]).iloc[-1]
    assert [float(own[name]) for name in RULER] == [80 + place for place in range(13)]
    assert float(own["avg"]) == 86.0  # the mean of 80 to 92
    assert "measured" in own["origin"]


@pytest.mark.parametrize("number", [2, 4])
def test_a_category_is_the_mean_of_its_sets_and_the_average_that_of_all(number, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    value, expected = 0.0, {}
    for name, sets in LONGBENCH.items():
        for task in sets:
            scored(run, "longbench", task, None, value)
            expected.setdefault(name, []).append(value)
            value += 1
    own = written(number, tmp_path, [run]).iloc[-1]
    for name, values in expected.items():
        assert float(own[name]) == pytest.approx(sum(values) / len(values), abs=0.005)
    assert float(own["avg"]) == 7.5  # 0 to 15, weighted alike


def test_groups_and_short_tasks_have_the_columns_of_their_tables(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for task in RULER.values():
        scored(run, "ruler", task, 4096, 60 if task.startswith("niah_single") else 90)
    for place, task in enumerate(SHORT):
        scored(run, "short", task, None, 10.0 * place)
    third, fifth = written(3, tmp_path, [run]).iloc[-1], written(5, tmp_path, [run]).iloc[-1]
    assert [float(third[name]) for name in TASK_GROUPS] == [60.0 if n == "niah_single" else 90.0 for n in TASK_GROUPS]
    assert [float(fifth[task]) for task in SHORT] == [0, 10, 20, 30]
