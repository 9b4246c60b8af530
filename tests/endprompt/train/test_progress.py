"""TensorBoard and Weights & Biases: what they have on the disk, read back, is what log.jsonl has."""

import pytest

from endprompt import train
from tests.support.runs import lines_of, log_of, resumed


def test_tensorboard_reads_each_step_of_a_resumed_run_once(extend_config, documents):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = {"eval_data": [str(documents)], "eval_lengths": [96], "eval_rows": 2, "eval_every": 2}
    output = resumed(extend_config(steps=5, save_every=2, report=["tensorboard"], **held), step=3)
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    log = {row["step"]: row for row in log_of(output)}
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "grad_norm", "tokens_per_s", "save_seconds", "held_out/96"}
    for key in ("loss", "lr", "grad_norm"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert len(events.Scalars(key)) == len(found) == 5
        assert found == pytest.approx({step: row[key] for step, row in log.items()}, rel=1e-6)  # stored as float32
    held_out = {event.step: event.value for event in events.Scalars("held_out/96")}
    rows = lines_of(output / "results.jsonl")
    assert held_out == pytest.approx({row["step"]: row["value"] for row in rows}, rel=1e-6)


def records(raw):
    """What a file in LevelDB's log format holds: a header of 7 bytes, then records in blocks of 32 KiB."""
    assert raw[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(raw):
        if 2**15 - place % 2**15 < 7:  # too little room for a record's own header
            place += 2**15 - place % 2**15
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        parts += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_has_a_run_whole_before_the_output_gets_its_name(extend_config, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    output = train.extend(extend_config(steps=3, report=["wandb"]))
    (path,) = output.glob("wandb/offline-run-*/run-*.wandb")
    found, ended = {}, None
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            found[int(values["_step"])] = float(values["loss"])
        elif record.WhichOneof("record_type") == "exit":
            ended = record.exit.exit_code
    assert found == {row["step"]: row["loss"] for row in log_of(output)} and ended == 0
    assert not output.with_name(output.name + ".partial").exists()
