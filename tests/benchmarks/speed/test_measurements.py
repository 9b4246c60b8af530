"""The benchmarks' own arithmetic: rows of small runs against what follows from their parts."""

from benchmarks.speed import train


def test_the_table_puts_each_number_under_its_head():
    def row(task, metric, value, suite="training-speed", **more):
        return {"suite": suite, "task": task, "length": 64, "metric": metric, "value": value} | more

    speeds = [row("fast", "tokens_per_s", 12345.6), row("fast", "peak_gib", 110.25), row("slow", "tokens_per_s", 7.0)]
    head, fast, slow = train.table(speeds).splitlines()
    places = {name: head.index(name) + len(name) for name in ("tokens/s", "GiB")}
    assert fast[: places["tokens/s"]].split()[-1] == "1.235e+04" and fast[: places["GiB"]].split()[-1] == "110.2"
    assert slow.split() == ["slow", "7"] and "MFU" not in head
