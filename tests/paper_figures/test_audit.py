"""The audit against other routes: numbers worked out by hand, float arithmetic in pandas, and
altered tables. A finding must be there where it is due, and nowhere else."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from endprompt.cli import main
from paper_figures import audit, inputs
from tests.support import figure_pages as pages

PUBLISHED = inputs.DATA / "published"


@pytest.fixture(scope="module")
def found():
    return audit.findings()


def chosen(found, **where):
    return [f for f in found if all(word in str(f[key]) for key, word in where.items())]


def only(found, **where):
    (one,) = chosen(found, **where)
    return one


def table(number):
    return pd.read_csv(PUBLISHED / f"table_{number}.csv")


@pytest.mark.parametrize(
    ("method", "from_averages", "from_tasks"),
    # 5 x 76.03 - (90.92 + 87.07 + 83.28 + 75.23) and so on; then the mean of the thirteen tasks
    [
        ("EndPrompt", 43.65, 43.6531),
        ("Full FT", 49.66, 49.6462),
        ("LCEG", 53.22, 53.2462),
        ("LongLoRA", 54.79, 54.8015),
    ],
)
def test_the_column_that_is_not_printed(found, method, from_averages, from_tasks):
    one = only(found, table="64K", row=method, rule="5 x the avg of Table 1")
    two = only(found, table="64K", row=method, rule="mean of the 13 tasks, each")
    assert (one["recomputed"], two["recomputed"]) == (from_averages, from_tasks)
    assert one["printed"] is None and abs(from_averages - from_tasks) <= 0.045


def test_recovered_scores_are_scores_of_500_samples(found):
    """In whole numbers: 5 x mean - the rest, in hundredths, is divisible by 20 in all 32 cells; by chance 4^-32."""
    one_answer = [t for t in table(1)["task"].unique() if t[:6] in ("niah_s", "qa_1", "qa_2") or t[:-1] == "niah_m"]
    one_answer = [t for t in one_answer if t not in ("niah_mv", "niah_mq")]
    assert len(one_answer) == 8
    means = table(1).pivot(index="method", columns="task", values="score")[one_answer]
    rest = sum(table(n).pivot(index="method", columns="task", values="score")[one_answer] for n in (6, 7, 8, 9))
    hundredths = np.rint(100 * (5 * means - rest)).astype(int)
    assert (hundredths % 20 == 0).all().all()
    rows = chosen(found, table="64K", rule="multiple of 0.2")
    assert [f["recomputed"] for f in rows] == ["8 of 8 tasks"] * 4
    assert {f["verdict"] for f in rows} == {"agrees"}
    assert Fraction(hundredths.loc["EndPrompt", "niah_m3"].item(), 100) == Fraction(29, 5)


def test_endprompt_is_first_at_four_lengths_and_last_at_64k(found):
    f = only(found, rule="highest RULER average at each length")
    assert f["recomputed"] == [1, 1, 1, 1, 4] and f["verdict"] == "does not follow"


def follows(found):
    return {(f["table"], f["row"]): f for f in found if f["rule"].startswith("avg is the mean")}


def test_averages_against_pandas(found):
    """Floats and numpy instead of decimals; the weights from the number of data sets and tasks, counted here."""
    sets = {
        "single_doc_qa": ["narrativeqa", "qasper", "multifieldqa_en"],
        "multi_doc_qa": ["hotpotqa", "2wikimqa", "musique"],
        "summarization": ["gov_report", "qmsum", "multi_news"],
        "few_shot": ["trec", "triviaqa", "samsum"],
        "synthetic": ["passage_count", "passage_retrieval_en"],
        "code": ["lcc", "repobench-p"],
    }
    groups = {"niah_single": 3, "niah_multikey": 3, "qa": 2}
    seen = 0
    for number in range(1, 10):
        frame = table(number)
        column = next(c for c in ("task", "category", "task_group") if c in frame)
        for method, rows in frame.groupby("method"):
            printed = rows.loc[rows[column] == "avg", "score"].item()
            rows = rows[rows[column] != "avg"]
            weights = [len(sets.get(c, [c])) * groups.get(c, 1) for c in rows[column]]
            difference = abs(np.average(rows["score"], weights=weights) - printed)
            expected = "agrees" if difference < 0.005 + 1e-9 else "rounding" if difference < 0.01 else "does not follow"
            assert follows(found)[f"Table {number}", method]["verdict"] == expected, (number, method)
            seen += 1
    assert seen == 20 + 8 + 4 + 7 + 6


def test_which_averages_do_not_follow(found):
    bad = {key for key, f in follows(found).items() if f["verdict"] == "does not follow"}
    assert bad == {("Table 2", "LCEG"), ("Table 2", "LongLoRA"), ("Table 2", "Full FT")}
    assert only(found, table="Table 2", row="EndPrompt", rule="16 English sets")["recomputed"] == 38.3
    for method, mean in (("LCEG", 33.1575), ("LongLoRA", 32.1575), ("Full FT", 34.1575)):
        assert only(found, table="Table 2", row=method, rule="16 English sets")["recomputed"] == mean
        assert len(chosen(found, table="Table 2", row=method, rule="avg is the mean")) == 3  # each weighting is named


def test_no_common_weighting_gives_the_averages_of_table_2(found):
    """Rows that differ by a constant would have averages that differ by it, whatever the weights."""
    frame = table(2).pivot(index="method", columns="category", values="score")
    for method, constant, printed in (("LongLoRA", -1.0, 0.23), ("Full FT", 1.0, -0.98)):
        apart = frame.loc[method] - frame.loc["LCEG"]
        assert apart.drop("avg").to_numpy() == pytest.approx(constant) and apart["avg"] == pytest.approx(printed)
        f = only(found, table="Table 2", row=method, rule="avg - avg of LCEG")
        assert (f["printed"], f["recomputed"], f["verdict"]) == (printed, constant, "does not follow")


def test_rows_that_are_another_row_plus_a_constant(found):
    """Every pair of rows in every two tables with the same columns, by float differences."""
    frames = {n: table(n) for n in range(1, 10)}
    pairs = set()
    for a, left in frames.items():
        for b, right in frames.items():
            column = next(c for c in ("task", "category", "task_group") if c in left)
            if column not in right or a > b:
                continue
            one = left.pivot(index="method", columns=column, values="score").drop(columns="avg")
            two = right.pivot(index="method", columns=column, values="score").drop(columns="avg")
            if set(one) != set(two):
                continue
            for first in one.index:
                for second in two.index:
                    if np.ptp((two.loc[second] - one.loc[first]).to_numpy()) < 1e-6 and (a, first) != (b, second):
                        pairs.add(frozenset([(f"Table {a}", first), (f"Table {b}", second)]))
    rows = {place for pair in pairs for place in pair}
    named = chosen(found, rule="columns is that of")
    assert {(f["table"], f["row"]) for f in named} | {("Table 2", "LCEG")} == rows
    assert len(rows) == 4 and len(pairs) == 6  # four rows, each of which is every other plus a constant
    for f in named:
        assert f["printed"] == f["recomputed"]
    rules = {f["row"]: f["rule"].rpartition("LCEG")[2] for f in named}
    assert rules == {"LongLoRA": " - 1.00", "Full FT": " + 1.00", "LLaMA-2-7B": " of Table 2 - 2.00"}


def test_claims_of_the_text(found):
    expected = {  # by hand: 36.52 of 76.0 GB; 20.5, 24.5 and 25.7 over 14.5 hours
        "memory reduction": 100 * (1 - 36.52 / 76),
        "over Full FT": 20.5 / 14.5,
        "over LongLoRA": 24.5 / 14.5,
        "over LCEG": 25.7 / 14.5,
    }
    for rule, value in expected.items():
        f = only(found, table="appendix B.2", rule=rule)
        assert f["recomputed"] == pytest.approx(value, abs=5e-5) and f["verdict"] == "agrees"
    assert "1.38 to 1.45" in only(found, rule="over Full FT")["rule"]  # 20.3 / 14.7, 20.7 / 14.3
    assert [f["verdict"] for f in chosen(found, table="abstract")] == ["agrees"] * 4


def test_printed_scores_are_shares_of_500_samples(found):
    """Fractions: each printed score is the two-decimal rounding of k / (500 answers); three of Full FT's are not."""
    answers = {"niah_mv": 4, "niah_mq": 4, "vt": 5, "cwe": 10, "fwe": 3}
    off = set()
    for number in (6, 7, 8, 9):
        for row in table(number).itertuples():
            if row.task == "avg":
                continue
            n, score = 500 * answers.get(row.task, 1), Fraction(str(row.score))
            if abs(Fraction(100 * round(score * n / 100), n) - score) > Fraction(1, 200):
                off.add((number, row.method, row.task))
    assert off == {(6, "Full FT", "fwe"), (9, "Full FT", "fwe"), (9, "Full FT", "vt")}
    rows = chosen(found, rule="answers a sample), to two")
    assert len(rows) == 16
    assert {(f["table"], f["row"]) for f in rows if f["verdict"] == "rounding"} == {
        ("Table 6", "Full FT"),
        ("Table 9", "Full FT"),
    }
    assert all(f["verdict"] == "agrees" for f in rows if f["row"] != "Full FT")


def altered(tmp_path, monkeypatch, name, change):
    shutil.copytree(inputs.DATA, tmp_path / "data")
    path = tmp_path / "data" / "published" / f"{name}.csv"
    frame = pd.read_csv(path, dtype=str)
    change(frame)
    frame.to_csv(path, index=False)
    monkeypatch.setattr(audit, "DATA", tmp_path / "data")
    return audit.findings()


@pytest.mark.parametrize(
    ("printed", "verdict"), [("76.03", "agrees"), ("76.02", "rounding"), ("76.00", "does not follow")]
)
def test_another_average_gets_another_verdict(tmp_path, monkeypatch, printed, verdict):
    def change(frame):
        frame.loc[(frame["method"] == "EndPrompt") & (frame["task"] == "avg"), "score"] = printed

    found = altered(tmp_path, monkeypatch, "table_1", change)
    assert only(found, table="Table 1", row="EndPrompt", rule="avg is the mean")["verdict"] == verdict


def test_another_score_is_off_the_grid(tmp_path, monkeypatch):
    def change(frame):
        frame.loc[(frame["method"] == "LCEG") & (frame["task"] == "niah_m3"), "score"] = "59.31"

    found = altered(tmp_path, monkeypatch, "table_7", change)
    assert only(found, table="Table 7", row="LCEG", rule="500 samples x")["verdict"] == "does not follow"
    assert only(found, table="64K", row="LCEG", rule="multiple of 0.2")["recomputed"] == "7 of 8 tasks"


def test_another_row_breaks_the_constant(tmp_path, monkeypatch):
    def change(frame):
        frame.loc[(frame["method"] == "LLaMA-2-7B") & (frame["category"] == "code"), "score"] = "44.87"

    found = altered(tmp_path, monkeypatch, "table_4", change)
    assert not chosen(found, table="Table 4", row="LLaMA-2-7B", rule="columns is that of")


def test_command_prints_every_finding(capsys, found):
    assert main(["audit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  ") for line in lines) == len(found)
    assert main(["audit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_page_is_current():
    assert (pages.HERE / "AUDIT.md").read_text() == pages.audit_page(), "run python -m tests.support.figure_pages"
