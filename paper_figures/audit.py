"""The published numbers, recomputed: which averages, ratios and claims follow from the printed tables.

Arithmetic is exact (decimal). Two printed numbers of two decimals can differ by rounding alone: an average of rounded
columns is known to +-0.005, so a printed average agrees within 0.005 of the recomputed one, and up to 0.01 the
difference is one of rounding. Everything else does not follow. A finding says what was computed, not why it differs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from paper_figures.inputs import DATA
from paper_figures.names import TASK_GROUPS

AGREES, ROUNDING, DOES_NOT_FOLLOW = "agrees", "rounding", "does not follow"
VERDICTS = (AGREES, ROUNDING, DOES_NOT_FOLLOW)
HALF = Decimal("0.005")  # half a unit of the last printed digit

#: RULER's tasks with one answer a sample: 500 samples make every score a multiple of 0.2.
ONE_ANSWER = ("niah_s1", "niah_s2", "niah_s3", "niah_m1", "niah_m2", "niah_m3", "qa_1", "qa_2")
#: Answers a sample of the other tasks (RULER's defaults): scores are multiples of 100 / (500 * answers).
ANSWERS = {"niah_mv": 4, "niah_mq": 4, "vt": 5, "cwe": 10, "fwe": 3} | dict.fromkeys(ONE_ANSWER, 1)
SAMPLES = 500
LENGTH_TABLES = ("Table 6", "Table 7", "Table 8", "Table 9")
#: Suite, its main table, and its panel in Figures 2 and 3.
SUITES = (("RULER", "Table 1", "ruler"), ("LongBench", "Table 2", "longbench"))
#: Tables -> what their column avg may be: rule -> weights of the columns, None for equal ones. Those of LongBench's six
#: categories are the numbers of data sets in each.
AVERAGES: dict[tuple[str, ...], dict[str, Sequence[int] | None]] = {
    ("Table 1", *LENGTH_TABLES): {"mean of the 13 tasks": None},
    ("Table 3",): {"mean of the 13 tasks (weights 3, 3, 1, 1, 1, 1, 1, 2)": [*map(len, TASK_GROUPS.values())]},
    ("Table 2", "Table 4"): {
        "mean over the 16 English sets (weights 3, 3, 3, 3, 2, 2)": (3, 3, 3, 3, 2, 2),
        "mean of the six categories": None,
        "mean over all 21 sets (weights 4, 4, 4, 4, 3, 2)": (4, 4, 4, 4, 3, 2),
    },
    ("Table 5",): {"mean of the four tasks": None},
}

Finding = dict[str, Any]
Scores = Mapping[str, Decimal]
Rows = dict[str, dict[str, Decimal]]


def findings() -> list[Finding]:
    """Every check in order: dict(table, row, rule, printed, recomputed, verdict). printed and recomputed are numbers,
    lists of numbers or short text; printed is None for what the paper leaves out."""
    tables = read_tables()
    checks = (averages, repeated_numbers, sample_grid, longest_length, constant_rows, common_weighting, claims)
    return [finding for check in (*checks, growth_with_tokens, highest_average) for finding in check(tables)]


def finding(
    table: str, row: str, rule: str, printed: Any, recomputed: Any, verdict: str | None = None, slack: Decimal = HALF
) -> Finding:
    """One finding; without a verdict, that of two numbers whose inputs are rounded by at most `slack` together."""
    numbers = {"printed": plain(printed), "recomputed": plain(recomputed)}
    verdict = verdict or compare(printed, recomputed, slack)
    return {"table": table, "row": row, "rule": rule, **numbers, "verdict": verdict}


def compare(printed: Decimal, recomputed: Decimal, slack: Decimal = HALF) -> str:
    difference = abs(printed - recomputed)
    return AGREES if difference <= HALF else ROUNDING if difference <= HALF + slack else DOES_NOT_FOLLOW


def follows(holds: bool) -> str:
    return AGREES if holds else DOES_NOT_FOLLOW


def plain(value: Any) -> Any:
    """Decimals as floats of at most four decimals, for JSON."""
    if isinstance(value, Decimal):
        return float(value.quantize(Decimal("0.0001"), ROUND_HALF_UP))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def mean(values: Sequence[Decimal], weights: Sequence[int] | None = None) -> Decimal:
    weights = weights or [1] * len(values)
    return sum((w * v for w, v in zip(weights, values)), Decimal(0)) / sum(weights)


def read_tables() -> dict[str, Rows]:
    """Table 1 .. Table 9, each method -> column -> printed number."""
    tables: dict[str, Rows] = {}
    for number in range(1, 10):
        rows: Rows = {}
        for line in read(f"table_{number}"):
            column = line.get("task") or line.get("category") or line["task_group"]
            rows.setdefault(line["method"], {})[column] = Decimal(line["score"])
        tables[f"Table {number}"] = rows
    return tables


def read(name: str) -> list[dict[str, str]]:
    with open(DATA / "published" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bars(figure: str, panel: str) -> dict[str, Decimal]:
    lines = read(figure.lower().replace(" ", "_"))
    return {line["x"]: Decimal(line["value"]) for line in lines if line["panel"] == panel}


def tasks_of(scores: Scores) -> list[str]:
    return [column for column in scores if column != "avg"]


def averages(tables: dict[str, Rows]) -> Iterator[Finding]:
    """Of each row the first rule where it holds; every rule where none does."""
    for names, rules in AVERAGES.items():
        for table, method, scores in ((name, *row) for name in names for row in tables[name].items()):
            values = [scores[column] for column in tasks_of(scores)]
            means = {f"avg is the {rule}": mean(values, weights) for rule, weights in rules.items()}
            tried = [finding(table, method, rule, scores["avg"], found) for rule, found in means.items()]
            yield from [f for f in tried if f["verdict"] != DOES_NOT_FOLLOW][:1] or tried


def repeated_numbers(tables: dict[str, Rows]) -> Iterator[Finding]:
    """Numbers that are printed in two places, and group means that follow from another table."""
    own, main = tables["Table 3"]["EndPrompt"], tables["Table 1"]["EndPrompt"]
    for group, tasks in TASK_GROUPS.items():
        rule = f"{group} is the mean of {', '.join(tasks)} in Table 1"
        yield finding("Table 3", "EndPrompt", rule, own[group], mean([main[task] for task in tasks]))
    yield finding("Table 3", "EndPrompt", "avg is that of Table 1", own["avg"], main["avg"], slack=Decimal(0))
    for suite, table, panel in SUITES:
        for figure, bar in (("Figure 2", "EP_1"), ("Figure 3", "ET")):
            place, average = f"{figure}, {bar}, {suite}", tables[table]["EndPrompt"]["avg"]
            rule, printed = f"avg is that of {table}", bars(figure, panel)[bar]
            yield finding(place, "EndPrompt", rule, printed, average, slack=Decimal(0))


def sample_grid(tables: dict[str, Rows]) -> Iterator[Finding]:
    """A score of 500 samples with k answers each is a multiple of 100 / (500 k); rows may be printed to one decimal."""
    for table in LENGTH_TABLES:
        for method, scores in tables[table].items():
            off = {task: distance_to_grid(scores[task], ANSWERS[task]) for task in tasks_of(scores)}
            on_grid = sum(distance <= HALF for distance in off.values())
            one_decimal = all(scores[task] % Decimal("0.1") == 0 for task in off)
            rounded = ROUNDING if one_decimal and max(off.values()) <= 10 * HALF else DOES_NOT_FOLLOW
            verdict = AGREES if on_grid == len(off) else rounded
            rule = "scores are multiples of 100 / (500 samples x answers a sample), to two decimals"
            if verdict == ROUNDING:
                rule += " (the row is printed to one decimal)"
            yield finding(table, method, rule, f"{len(off)} scores", f"{on_grid} on the grid", verdict)


def distance_to_grid(value: Decimal, answers: int) -> Decimal:
    steps = (value * SAMPLES * answers / 100).to_integral_value(ROUND_HALF_UP)
    return abs(value - steps * 100 / (SAMPLES * answers))


def recovered_64k(tables: dict[str, Rows] | None = None) -> Rows:
    """The column that is not printed: 5 x the mean over five lengths - the four that are, by method and task. `avg` is
    the same with the printed averages; `mean` is the mean of the 13 recovered tasks."""
    tables = tables or read_tables()
    recovered: Rows = {}
    for method, means in tables["Table 1"].items():
        scores = {c: 5 * means[c] - sum(tables[table][method][c] for table in LENGTH_TABLES) for c in means}
        recovered[method] = {**scores, "mean": mean([scores[task] for task in tasks_of(scores)])}
    return recovered


def longest_length(tables: dict[str, Rows]) -> Iterator[Finding]:
    recovered = recovered_64k(tables)
    place = "Table 1, 64K (not printed)"
    for method, scores in recovered.items():
        grid = "is a multiple of 0.2 for each task with one answer (500 samples)"
        inside = [0 <= scores[task] <= 100 for task in ANSWERS]
        on_grid = [scores[task] % Decimal("0.2") == 0 for task in ONE_ANSWER]
        for rule, held in ((grid, on_grid), ("lies in [0, 100] for each of the 13 tasks", inside)):
            found = f"{sum(held)} of {len(held)} tasks"
            yield finding(place, method, f"5 x Table 1 - Tables 6 to 9 {rule}", None, found, follows(all(held)))
    for method, scores in recovered.items():
        # Five rounded averages: 5 x 0.005 + 4 x 0.005 = 0.045 at most from the mean of the recovered tasks.
        rule = "avg at 64K: 5 x the avg of Table 1 - those of Tables 6 to 9; verdict against the mean of the 13 tasks"
        verdict = compare(scores["avg"], scores["mean"], Decimal("0.04"))
        yield finding(place, method, rule, None, scores["avg"], verdict)
        rule = "avg at 64K: mean of the 13 tasks, each recovered as 5 x Table 1 - Tables 6 to 9"
        yield finding(place, method, rule, None, scores["mean"], verdict)


def constant_rows(tables: dict[str, Rows]) -> Iterator[Finding]:
    """Pairs of rows, in tables with the same columns, that differ by one constant in every column."""
    groups = (("Table 1",), *((table,) for table in LENGTH_TABLES), ("Table 2", "Table 4"), ("Table 3",), ("Table 5",))
    for group in groups:
        rows = [(table, method, scores) for table in group for method, scores in tables[table].items()]
        pairs = []
        for i, row in enumerate(rows):  # each row against the first one that it follows from
            source = next((other for other in rows[:i] if len(differences(other[2], row[2])) == 1), None)
            if source:
                pairs.append((source, row))
        if not pairs:
            rule = "no row is another row plus a constant in every column"
            yield finding(" and ".join(group), "all", rule, f"{len(rows)} rows", "no such row", AGREES)
        for (first_table, first, base), (table, method, scores) in pairs:
            constant, columns = differences(base, scores).pop(), tasks_of(scores)
            origin = first if first_table == table else f"{first} of {first_table}"
            moved = f"{'+' if constant > 0 else '-'} {abs(constant)}"
            rule = f"each of the {len(columns)} columns is that of {origin} {moved}"
            printed, recomputed = [scores[c] for c in columns], [base[c] + constant for c in columns]
            yield finding(table, method, rule, printed, recomputed, AGREES)


def differences(first: Scores, second: Scores) -> set[Decimal]:
    return {second[column] - first[column] for column in tasks_of(first)}


def common_weighting(tables: dict[str, Rows]) -> Iterator[Finding]:
    """Rows that differ by a constant have averages that differ by it, whatever the weights (they sum to one)."""
    base = tables["Table 2"]["LCEG"]
    for method in ("LongLoRA", "Full FT"):
        scores = tables["Table 2"][method]
        constants = differences(base, scores)
        if len(constants) == 1:
            rule = "avg - avg of LCEG is what every column differs by, as for any weights common to both rows"
            yield finding("Table 2", method, rule, scores["avg"] - base["avg"], constants.pop())


def claims(tables: dict[str, Rows]) -> Iterator[Finding]:
    """The numbers of the text; where a bar was read off the chart, the range that the reading allows is named."""
    for line in read("claims"):
        printed, subject, claim = Decimal(line["value"]), line["subject"], line["claim"]
        if claim == "RULER average, 4K-64K":
            recomputed, lo, hi = (tables["Table 1"][subject]["avg"],) * 3
            rule = "avg of Table 1"
        elif claim.startswith("memory reduction"):
            recomputed, lo, hi = (100 * (1 - r) for r in ratio("memory_gb", subject, "Full FT"))
            rule = "1 - memory of EndPrompt / memory of Full FT, percent"
        elif claim.startswith("speed-up at 64K over "):
            other = claim.removeprefix("speed-up at 64K over ")
            recomputed, lo, hi = ratio("time_h", other, subject)
            rule = f"hours of {other} / hours of {subject}, Figure 4"
        else:
            continue  # growth with tokens: below, with the row between
        if lo != hi:
            rule += f" (bars as read: {lo:.2f} to {hi:.2f})"
        digit = Decimal(1).scaleb(printed.as_tuple().exponent)  # type: ignore[arg-type]
        near = ROUNDING if lo <= printed <= hi else DOES_NOT_FOLLOW
        verdict = AGREES if recomputed.quantize(digit, ROUND_HALF_UP) == printed else near
        yield finding(line["source"], subject, f"{claim}: {rule}", printed, recomputed, verdict)


def ratio(panel: str, top: str, bottom: str) -> tuple[Decimal, Decimal, Decimal]:
    """Ratio of two bars of Figure 4 at 64K, and its lowest and highest value within the error of reading."""
    lines = {line["series"]: line for line in read("figure_4") if line["panel"] == panel and line["x"] == "65536"}
    parts = ((lines[series]["value"], lines[series]["reading_error"]) for series in (top, bottom))
    (a, da), (b, db) = (map(Decimal, part) for part in parts)
    return a / b, (a - da) / (b + db), (a + da) / (b - db)


def growth_with_tokens(tables: dict[str, Rows]) -> Iterator[Finding]:
    """0.5B, 1B (the main row) and 2B training tokens."""
    rows = tables["Table 3"]
    averages = [rows[method]["avg"] for method in ("ET-0.5B", "EndPrompt", "ET-2.0B")]
    line = next(line for line in read("claims") if line["subject"] == "ET-0.5B to ET-2.0B")
    printed = [Decimal(line["claim"].split()[-2]), Decimal(line["value"])]
    ends = [averages[0], averages[2]]
    rising, growing = printed == ends and ends[1] > ends[0], averages == sorted(averages)
    rule = "the RULER average rises from 0.5B to 2B tokens, as in Table 3"
    yield finding(line["source"], line["subject"], rule, printed, ends, follows(rising))
    rule = "the RULER average grows with every step of tokens: 0.5B, 1B (EndPrompt's main row), 2B"
    yield finding(line["source"], line["subject"], rule, printed, averages, follows(growing))


def highest_average(tables: dict[str, Rows]) -> Iterator[Finding]:
    for suite, table, panel in SUITES:
        averages = {method: scores["avg"] for method, scores in tables[table].items()}
        yield highest(table, f"highest {suite} average of the methods in {table}", averages)
        averages |= {method: value for method, value in bars("Figure 3", panel).items() if method != "ET"}
        yield highest(f"{table} and Figure 3", f"highest {suite} average, PoSE and ET(PoSE) included", averages)
    columns = [{m: scores["avg"] for m, scores in tables[table].items()} for table in LENGTH_TABLES]
    columns.append({m: scores["mean"] for m, scores in recovered_64k(tables).items()})
    ranks = [1 + sum(value > column["EndPrompt"] for value in column.values()) for column in columns]
    rule = "highest RULER average at each length: rank among the four methods at 4K, 8K, 16K, 32K and, recovered, 64K"
    said = "highest average over 4K to 64K"
    yield finding("Tables 6 to 9 and 64K", "EndPrompt", rule, said, ranks, follows(set(ranks) == {1}))


def highest(table: str, rule: str, averages: Mapping[str, Decimal]) -> Finding:
    """printed: the row's own average; recomputed: the highest ones down to it, by name."""
    own = averages["EndPrompt"]
    above = sorted((value, method) for method, value in averages.items() if value > own)[::-1]
    names = ", ".join(f"{method} {value:.2f}" for value, method in (above or [(own, "EndPrompt")]))
    return finding(table, "EndPrompt", rule, own, names, follows(not above))
