"""What the figures read and refuse, and the numbers that they draw, against values worked out by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from endprompt import results
from endprompt.cli import main
from paper_figures import averages, catalog, inputs, names, questions, style
from paper_figures.figures import bound_against_measured, figure_4
from paper_figures.figures.score_against_length import spread
from tests.support import figure_pages as pages
from tests.support.figures_rows import demo_rows, lab_rows, longbench_rows, row, write_run
from tests.support.lab_rows import lab_run

PUBLISHED = inputs.DATA / "published"


def figures(*arguments):
    return main(["figures", *map(str, arguments)])


def test_rows_that_a_run_writes_can_be_read(tmp_path):
    about = {"suite": "ruler", "task": "vt", "metric": "m", "model": "m", "method": "base", "seed": 3, "length": 512}
    made = results.result_row(value=40.0, ci95=[30, 51], n=50, **about)
    results.append_rows(tmp_path / "results.jsonl", [made])
    frame = inputs.read_results([tmp_path])
    assert frame.loc[0, ["value", "lo", "hi", "seed"]].tolist() == [40.0, 30.0, 51.0, 3]
    assert frame.loc[0, "origin"] == f"{tmp_path / 'results.jsonl'}, line 1"


def refused(capsys, *arguments):
    assert figures(*arguments) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("endprompt: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[6].update(schema=2), ["line 7", "schema 2", "must be 1"]),
        (lambda rows: rows[6].pop("samples_sha256"), ["line 7", "must have the columns ['samples_sha256']"]),
        (lambda rows: rows[6].pop("value"), ["line 7", "must have the columns ['value']"]),
        (lambda rows: rows[20].update(samples_sha256="0" * 64), ["line 21", "samples_sha256 must be the same"]),
        (lambda rows: rows.append({**rows[3], "value": 1.5}), ["line 65", "line 4"]),  # two values for one cell
        (lambda rows: rows[9].update(metric="string_match_part"), ["line 10", "metric='string_match_part'"]),
        (lambda rows: rows.append([1]), ["line 65"]),
        (lambda rows: rows.append("a"), ["line 65"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, capsys, change, words):
    rows = demo_rows()
    change(rows)
    run = write_run(tmp_path / "run", rows)
    message = refused(capsys, "--results", run, "--output", tmp_path / "out", "--only", "table_1")
    assert all(word in message for word in [*words, str(run / "results.jsonl")])
    (run / "results.jsonl").write_text("{\n")
    assert f"{run / 'results.jsonl'}, line 1" in refused(capsys, "--results", run, "--output", tmp_path / "out")


def test_every_figure_has_a_file_and_its_data():
    for name in catalog.NAMES:
        assert (pages.HERE / catalog.source(name)).is_file()
        assert all((inputs.DATA / f"{file}.csv").is_file() for file in catalog.module(name).INPUTS.files)
    assert {path.stem for path in (pages.HERE / "figures").glob("*.py")} - {"__init__"} == set(catalog.FIGURES)


def test_a_directory_without_results_is_named(tmp_path, capsys):
    assert f"{tmp_path / 'results.jsonl'}: no such file" in refused(capsys, "--results", tmp_path)
    assert "no such file" in refused(capsys, "--results", tmp_path / "absent")


def test_a_figure_asked_for_without_data_names_file_and_column(tmp_path, capsys):
    write_run(tmp_path / "empty", [])
    message = refused(capsys, "--only", "score_against_length", "--results", tmp_path / "empty")
    for word in ("score_against_length", "suite 'ruler'", "results.jsonl", "length"):
        assert word in message


def test_an_unknown_figure_is_refused_before_anything_is_drawn(tmp_path, capsys):
    message = refused(capsys, "--only", "table_1", "table_99", "--output", tmp_path / "out")
    assert "only='table_99'" in message and "figure_2" in message
    assert not (tmp_path / "out").exists()


def test_without_only_what_has_no_data_is_listed(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "empty", [])
    monkeypatch.setattr(catalog, "NAMES", ("lab_scores", "depth_by_length", "table_5"))
    assert figures("--results", tmp_path / "empty", "--output", tmp_path / "out") == 0
    output = capsys.readouterr()
    lines = [line.split(":")[0].strip() for line in output.err.splitlines()[1:]]
    assert lines == ["lab_scores", "depth_by_length"] and output.err.count("needs rows of suite") == 2
    assert [Path(line).name for line in output.out.splitlines()] == ["table_5.tex", "table_5.md", "table_5.csv"]


def test_a_figure_whose_rows_lack_a_column_names_it(tmp_path, capsys):
    path = lab_run(tmp_path, bases=((256, 8),), seeds=(0,)) / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "window": None}) + "\n" for row in rows))
    message = refused(capsys, "--only", "anchor_place", "--results", path.parent, "--output", tmp_path / "out")
    assert "arm, base, fold, window, target" in message and f"{path}, line 1" in message


def test_a_published_file_without_a_column_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "published" / "figure_2.csv"
    broken.parent.mkdir()
    broken.write_text("panel,x,source\nruler,EP_1,Figure 2\n")
    monkeypatch.setattr(inputs, "DATA", tmp_path)
    with pytest.raises(ValueError, match=r"figure_2\.csv: must have the column 'value'"):
        inputs.load(catalog.module("figure_2").INPUTS, inputs.read_results([]))
    with pytest.raises(inputs.NoData, match=r"figure_3\.csv with the columns panel, x, value"):
        inputs.load(catalog.module("figure_3").INPUTS, inputs.read_results([]))


def test_rows_of_one_method_under_two_conditions_are_told_apart():
    rows = [row("pose+yarn", "vt", 256, 90, steps=300), row("pose+yarn", "vt", 256, 70, steps=1000)]
    rows.append(row("base", "vt", 256, 100))
    frame = frame_of(rows)
    inputs.check_cells(frame)
    told = inputs.distinguish(frame)["method"].tolist()
    assert told == ["pose+yarn@steps=300", "pose+yarn@steps=1000", "base"]
    assert names.parse_method(told[0]).label == "pose, YaRN, steps 300"
    assert inputs.distinguish(frame[frame["steps"] != 300])["method"].tolist() == ["pose+yarn", "base"]


def test_readme_is_current():
    assert (pages.HERE / "README.md").read_text() == pages.readme(), "run python -m tests.support.figure_pages"


def test_the_lab_page_is_current():
    """Written from the committed verdicts, and not there without them."""
    frames, page = pages.lab_frames(), pages.HERE / "LAB.md"
    assert page.is_file() == (frames is not None)
    assert frames is None or page.read_text() == pages.lab_page(frames), "run python -m tests.support.figure_pages"


def test_the_lab_page_says_what_the_verdicts_say(tmp_path):
    from benchmarks.lab import verdicts

    rows = verdicts.write(lab_run(tmp_path, bases=((256, 8), (256, 32)), seeds=(0, 1)))
    frames = inputs.load(questions.INPUTS, inputs.read_results([tmp_path]))
    text = pages.lab_page(frames)
    for said in rows:
        if said["metric"] == "claim":
            assert said["sentence"].partition("; this ")[0] in text and said["claim"] in text
    for number, question in questions.QUESTIONS.items():
        assert f"## {number}. {question}" in text and verdicts.QUESTIONS[number] == question
        table = catalog.module(f"question_{number}").build(frames)
        shown = sum(len(section.rows) for section in table.sections)
        estimates = [r for r in rows if r["task"] == f"q{number}" and r["primary"] and r["metric"] != "claim"]
        left_out = [r for r in estimates if r.get("pareto_share", 1) < questions.PARETO_SHOWN]
        assert shown == len(estimates) - len(left_out) > 0
    one = next(r for r in rows if r["task"] == "q1" and r["primary"] and r["metric"] == "score_difference")
    low, high = one["ci95"]
    assert f"{one['value']:+.1f} [{low:+.1f}, {high:+.1f}] {one['verdict']}" in text


def test_a_lab_beside_other_rows_goes_to_its_own_figures(tmp_path):
    write_run(tmp_path / "demo", demo_rows(window=256))
    lab_run(tmp_path / "lab", bases=((256, 8), (256, 32)), seeds=(0,))
    rows = inputs.read_results([tmp_path / "demo", tmp_path / "lab"])

    def arms(name):
        frame = inputs.load(catalog.module(name).INPUTS, rows)["ruler"]
        return frame["arm"].notna() if "arm" in frame else frame["method"].isna()

    assert not arms("score_against_length").any() and not arms("table_1").any()
    assert arms("lab_scores").all() and arms("figure_3").all()
    assert set(inputs.load(catalog.module("figure_3").INPUTS, rows)["ruler"]["fold"]) == {8}
    assert set(inputs.load(catalog.module("lab_scores").INPUTS, rows)["ruler"]["fold"]) == {8, 32}


def test_figures_read_only_the_columns_that_they_declare():
    """Frames cut down to the declared columns draw the same figure: README.md tells the whole."""
    rows = frame_of(demo_rows(window=256)).assign(suite="ruler")
    for name in ("figure_1", "figure_2", "figure_4", "coverage", "gap_rms_against_k", "table_3", "table_9"):
        module = catalog.module(name)
        frames = inputs.load(module.INPUTS, rows)
        cut = {k: f[list(module.INPUTS.files[k])] if k in module.INPUTS.files else f for k, f in frames.items()}
        with style.journal():
            getattr(module, "draw" if name in catalog.FIGURES else "build")(cut)


def frame_of(rows):
    frame = pd.DataFrame(rows)
    frame[["lo", "hi"]] = frame["ci95"].tolist()
    return frame.assign(origin="rows")


def test_one_seed_combines_the_intervals_of_the_cells_by_squares():
    rows = [row("base", "vt", 256, 40, half=3), row("base", "vt", 512, 60, half=4)]
    mean = averages.average(frame_of(rows), ["method"]).iloc[0]
    assert mean["value"] == 50
    assert (mean["lo"], mean["hi"]) == pytest.approx((47.5, 52.5))  # sqrt(3^2 + 4^2) / 2


def test_an_interval_at_the_border_stays_one_sided():
    rows = [row("base", "vt", 256, 100, half=6), row("base", "vt", 512, 100, half=8)]
    mean = averages.average(frame_of(rows), ["method"]).iloc[0]
    assert (mean["lo"], mean["hi"]) == pytest.approx((95, 100))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Rows of a lab, made once."""
    folder = tmp_path_factory.mktemp("lab")
    return inputs.read_results([lab_run(folder, bases=((256, 8), (256, 32)), seeds=(0, 1, 2))])


@pytest.mark.parametrize(("name", "fewer"), [("anchor_place", 8), ("lab_scores", 8), ("score_against_steps", 32)])
def test_captions_of_the_lab_tell_the_least_and_the_most_seeds(name, fewer, lab):
    """Whichever base and fold is drawn last, or, where one alone has several lengths of training, which scaling."""
    rows = lab
    scaling = {8: "linear", 32: "yarn"}[fewer]
    chosen = rows["scaling"] == scaling if name == "score_against_steps" else rows["fold"] == fewer
    rows = rows[~chosen | (rows["seed"] != 2)]
    module = catalog.module(name)
    with style.journal():
        note = module.draw(inputs.load(module.INPUTS, rows)).get_suptitle()
    assert "95% intervals over 2 to 3 seeds" in note


def timing(task, value, length=65536, metric="hours_per_1b_tokens", method="full", time="1", **setting):
    made = row(method, task, length, value, suite="training-speed")
    about = {"environment": {"device": {"gpu": "X"}, "time": time}, "setting": {"optimizer": "lean"} | setting}
    return {**made, **about, "metric": metric, "samples_sha256": None}


def timings(task, hours, gib, **more):
    return [timing(task, hours, **more), timing(task, gib, metric="peak_gib", **more)]


def test_figure_4_takes_the_fastest_comparable_measurement_of_each_method():
    rows = timings("slow", 50, 30) + timings("fast", 20, 40)
    rows += [timing("short", 1, 8192, "peak_gib"), timing("half", 1)]
    rows += timings("fp8", 1, 1, float8="fast") + timings("two", 1, 1, processes=2)  # faster, and not comparable
    rows += timings("sums", 1, 1, float8="none", sums="bfloat16")
    chosen = figure_4.fastest(frame_of(rows))
    columns = ["method", "task", "peak_gib", "hours_per_1b_tokens", "device"]
    assert chosen[columns].to_numpy().tolist() == [["full", "fast", 40, 20, "X"]]


def test_seeds_give_students_interval():
    rows = [row("base", "vt", 256, value, seed) for seed, value in enumerate((10, 12, 14))]
    mean = averages.average(frame_of(rows), ["method"]).iloc[0]
    half = 4.302652729911275 * 2 / math.sqrt(3)  # t(0.975, 2) from a printed table, s = 2
    assert (mean["value"], mean["lo"], mean["hi"], mean["seeds"]) == pytest.approx((12, 12 - half, 12 + half, 3))


def test_a_method_that_lacks_a_cell_gets_no_average():
    rows = [row("base", "vt", 256, 10), row("base", "vt", 512, 10), row("pose+yarn", "vt", 256, 90)]
    assert averages.average(frame_of(rows), ["method"])["method"].tolist() == ["base"]
    by_length = averages.average(frame_of(rows), ["method", "length"], ["task"])
    assert len(by_length) == 3


def test_small_scale_is_what_stops_short_of_the_papers_lengths():
    assert averages.is_small_scale(frame_of([row("base", "vt", 16384, 1)]))
    assert not averages.is_small_scale(frame_of([row("base", "vt", 65536, 1)]))
    assert averages.is_small_scale(frame_of([row("base", "qasper", None, 1, target=2048)]))
    assert not averages.is_small_scale(frame_of([row("base", "qasper", None, 1, target=65536)]))


@pytest.mark.parametrize(
    ("method", "arm", "label"),
    [
        ("base", "base", "base, unextended"),
        ("base+yarn", "base", "base, YaRN"),
        ("contiguous+linear", "contiguous", "contiguous, PI"),
        ("endprompt+EP_1+linear", "endprompt", "endprompt EP_1, PI"),
        ("endprompt+recall+yarn", "recall", "recall, YaRN"),
        ("recall+yarn", "recall", "recall, YaRN"),
        ("endprompt-random+recall+none", "endprompt-random recall", "endprompt-random recall, no scaling"),
        ("pose+ntk", "pose", "pose, NTK"),
        ("anchors4+EP_1/EP_2+linear", "anchors", "anchors4 EP_1/EP_2, PI"),
    ],
)
def test_method_names(method, arm, label):
    parsed = names.parse_method(method)
    assert (parsed.arm, parsed.label) == (arm, label)


def test_figures_keep_the_rows_that_they_read(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", demo_rows())
    (run / "environment.json").write_text('{"revision": "abc-dirty"}')
    monkeypatch.setattr(style, "save", lambda fig, stem: [stem.with_suffix(".pdf")])
    pdf, rows = catalog.make("figure_3", inputs.read_results([run]), tmp_path / "out")
    kept = pd.read_csv(rows)
    assert (pdf.name, rows.name) == ("figure_3.pdf", "figure_3.rows.csv")
    assert len(kept) == 64 and set(kept["revision"]) == {"abc-dirty"}
    assert kept["origin"].iloc[-1].endswith("results.jsonl, line 64")
    assert len(catalog.make("figure_3", inputs.read_results([]), tmp_path / "published")) == 1


def test_depths_of_a_scoring_run_are_read(tmp_path):
    run = write_run(tmp_path / "run", demo_rows())
    cell = {"suite": "ruler", "model": "m", "method": "base", "seed": 0, "length": 512, "value": 40.0, "n": 5}
    (run / "depth.jsonl").write_text(json.dumps({**cell, "depth_from": 10.0, "depth_to": 20.0}) + "\n")
    frames = inputs.load(catalog.module("depth_by_length").INPUTS, inputs.read_results([run]))
    assert frames["ruler_depth"][["length", "depth", "value"]].to_numpy().tolist() == [[512, 15, 40]]
    (run / "depth.jsonl").write_text(json.dumps(cell) + "\n")
    with pytest.raises(ValueError, match=r"depth.jsonl, line 1: .* must have the columns \['depth_from', 'depth_to'\]"):
        inputs.read_results([run])


def test_packed_rows_are_read_as_plain_ones_and_a_damaged_file_is_named(tmp_path):
    plain = write_run(tmp_path / "run", demo_rows()) / "results.jsonl"
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    one, other = (inputs.read_results([path]) for path in (plain, packed))
    pd.testing.assert_frame_equal(one.drop(columns=["origin", "revision"]), other.drop(columns=["origin", "revision"]))
    assert other["origin"].iloc[2] == f"{packed}, line 3"
    for content in (packed.read_bytes()[:-20], packed.read_bytes()[:40] + b"?" + packed.read_bytes()[41:], b"{}"):
        packed.write_bytes(content)
        with pytest.raises(ValueError, match=r"rows.jsonl.gz: not a whole gzip file"):
            inputs.read_results([packed])


def test_figure_4_has_the_shorter_window_first_whichever_is_faster():
    for hours in ({32768: 30, 65536: 20}, {32768: 20, 65536: 30}):
        rows = [one for n, value in hours.items() for one in timings(f"at {n}", value, 1, length=n, method="endprompt")]
        axes = figure_4.draw(inputs.load(figure_4.INPUTS, frame_of(rows))).axes
        ticks = [[label.get_text() for label in ax.get_xticklabels()] for ax in axes]
        assert len(ticks) == 4 and all(one == ["32K", "64K"] for one in ticks)


def test_figure_4_tells_measurements_of_one_task_apart_and_marks_peaks_that_are_bounds():
    rows = timings("full", 20, 30) + timings("full", 50, 40, time="2")  # later, and slower
    other = {"method": "reference", "optimizer": "adamw"}
    rows += timings("reference", 60, 59, **other) + timings("reference", 70, 59, time="2", **other)
    columns = ["method", "peak_gib", "hours_per_1b_tokens", "least"]
    chosen = figure_4.fastest(frame_of(rows))
    assert chosen[columns].to_numpy().tolist() == [["full", 30, 20, False], ["reference", 59, 60, True]]
    rows.append(timing("reference", 58, metric="held_gib", **other))
    chosen = figure_4.fastest(frame_of(rows))
    assert chosen[columns].to_numpy().tolist() == [["full", 30, 20, False], ["reference", 59, 60, False]]


def test_longbench_bars_show_the_averages_of_the_scoring_run(tmp_path):
    """Category means and both English averages as the suite's own summary has them; an incomplete one is not drawn."""
    from benchmarks.longbench import TASKS
    from benchmarks.longbench.averages import averages

    module = catalog.module("longbench_bars")
    rows = longbench_rows(("base", "pose+yarn"), TASKS)
    shown = module.categories(inputs.load(module.INPUTS, inputs.read_results([write_run(tmp_path, rows)]))["longbench"])
    for k, method in enumerate(("base", "pose+yarn")):
        expected = averages({name: max(0, 90 - 10 * k - i) for i, name in enumerate(TASKS)})
        means = {label: frame.set_index("method").loc[method, "value"] for label, frame in shown.items()}
        assert means["mean of\n6 categories"] == pytest.approx(expected["english_category_mean"])
        assert means["mean of\n16 sets"] == pytest.approx(expected["english_16_mean"])
        for category, label in module.CATEGORIES.items():
            assert means[label] == pytest.approx(expected[f"english:{category}"])
    half = (shown["mean of\n6 categories"]["hi"] - shown["mean of\n6 categories"]["value"])[0]
    # half-widths of 5 a set: a category of k sets has 5 / sqrt(k), their mean the root of the squares' sum over 6
    assert half == pytest.approx((4 * 25 / 3 + 2 * 25 / 2) ** 0.5 / 6)
    fewer = [row for row in rows if row["task"] != "lcc"]
    frames = inputs.load(module.INPUTS, inputs.read_results([write_run(tmp_path / "fewer", fewer)]))
    shown = module.categories(frames["longbench"])
    assert list(shown) == [label for category, label in module.CATEGORIES.items() if category != "code"]


def test_bounds_of_parts_are_left_out_and_a_missing_metric_is_named(tmp_path):
    rows = [r for r in lab_rows({"base": (100, 0, 0, 0)}) if r["suite"] == "analysis"]
    frames = inputs.load(catalog.module("bound_against_measured").INPUTS, frame_of(rows))
    with style.journal():
        medians = [line.get_xdata()[0] for line in bound_against_measured.draw(frames).axes[0].lines[1:4:2]]
        assert medians == [0.34, 0.03]  # and not 0.42, the mean with the stratum's
        broken = {"analysis": frames["analysis"][frames["analysis"]["metric"] != "slope_over_bernstein_bound_q99"]}
        with pytest.raises(ValueError, match=r"rows of 'base' must have 'slope_over_bernstein_bound_q99'"):
            bound_against_measured.draw(broken)


def test_labels_are_moved_apart_as_little_as_possible():
    assert spread([10, 50, 90], 8, 0, 100) == [10, 50, 90]
    assert spread([50, 50], 8, 0, 100) == [46, 54]
    assert spread([99, 100, 100], 8, 0, 100) == [84, 92, 100]
    assert spread([0, 1], 8, 0, 100) == [0, 8]


def test_every_published_number_says_where_it_is_printed():
    for path in sorted(PUBLISHED.glob("*.csv")):
        frame = pd.read_csv(path)
        assert frame["source"].notna().all(), path.name
        number = frame["value" if "value" in frame else "score"]
        assert np.isfinite(number).all(), path.name
        if path.stem.startswith("table"):
            assert set(frame["source"]) == {path.stem.replace("table_", "Table ")}


def test_measured_rows_stand_below_the_published_ones(tmp_path):
    rows = inputs.read_results([write_run(tmp_path / "run", demo_rows())])
    catalog.make("table_1", rows, tmp_path)
    table = pd.read_csv(tmp_path / "table_1.csv").set_index("method")
    recall = table.loc["recall, YaRN"]
    assert "small scale" in recall["section"] and "line 49" in recall["origin"]
    # 100 98 98 96 averages 98, each further task 2 lower
    assert recall[["niah_s1", "niah_s2", "niah_m1", "vt", "avg"]].tolist() == [98, 96, 94, 92, 95]
    assert math.isnan(recall["cwe"])
    assert "small scale" in (tmp_path / "table_1.md").read_text()


def test_latex_escapes_and_marks_the_best():
    from paper_figures.table import Row, Section, Table, latex, markdown

    section = Section("s", [Row("a&b", [1, None], "o"), Row("c", [2, "–"], "o")])
    table = Table("t", "100% of a_b", "method", ["x_1", "y"], [section])
    text = latex(table)
    assert "100\\% of a\\_b" in text and "a\\&b & 1.00 & --" in text and "c & \\textbf{2.00} & --" in text
    assert "| c | **2.00** | – |" in markdown(table)


def test_figures_work_as_files_alone(tmp_path):
    """A run directory with a space in its path, rows with further columns and an empty line."""
    run = write_run(tmp_path / "my run", demo_rows(haystack="noise"))
    with open(run / "results.jsonl", "a") as file:
        file.write("\n" + json.dumps({**row("base", "mmlu", None, 30.0, suite="short"), "extra": [1, 2]}) + "\n")
    assert figures("--results", run, "--output", tmp_path / "my figures", "--only", "figure_3", "table_5") == 0
    assert (tmp_path / "my figures" / "figure_3.pdf").stat().st_size > 10_000
    assert "30.00" in (tmp_path / "my figures" / "table_5.csv").read_text()
