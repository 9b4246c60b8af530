"""Runs of several processes as users start them: on two nodes, killed at any place, and on two GPUs."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.speed import extend
from endprompt import distributed, train
from endprompt.runs import RunDirectory
from tests.support import two_processes
from tests.support.processes import several
from tests.support.runs import lines_of, log_of, same_weights

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
#: Runs what it is given, one after the other.
RUNS = """
import json, sys
from endprompt import train, config
for job in json.load(open(sys.argv[1])):
    train.extend(config.ExtendConfig(**job))
"""


#: The command line, but the second process alone fails in its last evaluation.
FAILS_ALONE = """
import os, sys
from endprompt import cli, train
evaluate = train.Trainer.evaluate
def fails(self, reports):
    if os.environ["RANK"] == "1" and self.step == self.steps:
        raise RuntimeError("out of memory")
    evaluate(self, reports)
train.Trainer.evaluate = fails
sys.exit(cli.main(sys.argv[1:]))
"""


def launched(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def losses_of(directory):
    return [json.loads(line)["loss"] for line in (directory / "log.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_of_one_process_train_as_one(extend_config, tmp_path):
    """Two launchers meet at an address, as on two machines; what is written is in a folder that both see."""
    config = extend_config(output=str(tmp_path / "nodes"), save_every=2)
    RunDirectory(tmp_path, config)  # writes config.yaml
    meeting = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    meeting += ["--rdzv-endpoint", f"localhost:{free_port()}"]
    command = ["-m", "endprompt.cli", "extend", "--config", tmp_path / "config.yaml"]
    nodes = [launched(*meeting, *command) for _ in range(2)]
    printed = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert "".join(out for out, _ in printed) == f"{tmp_path / 'nodes'}\n"  # one of all processes says it
    one = train.extend(dataclasses.replace(config, output=str(tmp_path / "one")))
    assert losses_of(tmp_path / "nodes") == pytest.approx(losses_of(one), abs=1e-5)
    left, right = (load_file(path / "model.safetensors") for path in (tmp_path / "nodes", one))
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)


def until(config, rank, place, counts):
    """A run that process `rank` leaves by SIGKILL at its `place`-th event of the output's files, of sums and of steps.

    counts: where it says how many there were.
    """
    here, seen = int(os.environ["RANK"]), itertools.count(1)

    def event(*_):
        number = next(seen)
        counts.joinpath(str(here)).write_text(str(number))
        if (here, number) == (rank, place):
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(kind, about):
        kinds = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
        if kind in kinds and str(about[0]).startswith(config.output):
            event()

    def before(real):
        return lambda *given, **named: (event(), real(*given, **named))[1]

    for owner, name in ((train.Trainer, "train_step"), (distributed, "total"), (distributed.dist, "all_gather_object")):
        setattr(owner, name, before(getattr(owner, name)))
    sys.addaudithook(audited)
    train.extend(config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", ["weights", "moments"])
def test_two_processes_killed_at_twenty_places_lose_nothing(shard, extend_config, documents, tmp_path):
    """At the start, in steps, sums, saves, around their renames, in evaluations and in the export."""
    held = {"eval_data": [str(documents)], "eval_lengths": [24], "eval_rows": 2, "eval_every": 2}
    lean = {"dtype": "bfloat16", "optimizer": "lean", "shard": shard}
    config = extend_config(output=str(tmp_path / "whole"), save_every=1, resume_or_start=True, **held, **lean)
    assert several(2, until, config, 0, 0, tmp_path)[0] == [0, 0]
    events = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    asked = [[row[key] for key in ("task", "step", "value")] for row in lines_of(tmp_path / "whole" / "results.jsonl")]
    for number in range(20):
        rank, place = number % 2, 1 + (events[number % 2] - 1) * (number // 2) // 9
        output = tmp_path / f"killed-{number}"
        one = dataclasses.replace(config, output=str(output))
        codes, said = several(2, until, one, rank, place, tmp_path)
        assert codes[rank] == -signal.SIGKILL, (number, said[-2000:])
        codes, said = several(2, two_processes.runs, [one])
        assert codes == [0, 0], (number, said[-2000:])
        assert same_weights(output, tmp_path / "whole"), number
        assert [line["step"] for line in log_of(output)] == [1, 2, 3, 4], number
        rows = [[row[key] for key in ("task", "step", "value")] for row in lines_of(output / "results.jsonl")]
        assert rows == asked and not output.with_name(f"{output.name}.partial").exists(), number


@pytest.mark.slow
def test_two_processes_that_overwrite_keep_the_old_run_until_the_new_one_is_whole(extend_config, documents, tmp_path):
    """Ctrl-C, then the printed command; a last evaluation that one process fails in, then --resume."""
    old = train.extend(extend_config(seed=7, save_every=1))
    unfinished = tmp_path / "out.partial" / "states" / "step-00000099"  # of a run that was killed
    unfinished.mkdir(parents=True)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    held = {"eval_data": [str(documents)], "eval_lengths": [24], "eval_rows": 2}
    config = extend_config(overwrite=True, save_every=1, steps=30, **held)
    RunDirectory(tmp_path, config)  # writes config.yaml
    arguments = ["extend", "--config", tmp_path / "config.yaml"]
    two = ["--standalone", "--nproc-per-node", 2]
    log = tmp_path / "out.partial" / "log.jsonl"
    process = launched(*two, "-m", "endprompt.cli", *arguments, start_new_session=True)
    while process.poll() is None and not (log.exists() and len(losses_of(log.parent)) > 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=100)
    kept = {path.name for path in unfinished.parent.iterdir()}
    assert kept and unfinished.name not in kept, said
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before, "the old run is there"
    line = next(line for line in said.splitlines() if "go on with: torchrun" in line)
    going_on = shlex.split(line.partition("go on with: torchrun ")[2])
    assert going_on[-1] == "--resume"
    (tmp_path / "worker.py").write_text(FAILS_ALONE)
    place = going_on.index("-m")
    process = launched(*going_on[:place], tmp_path / "worker.py", *going_on[place + 2 :])
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1 and "resumed from step" in said, said
    assert max(path.name for path in unfinished.parent.iterdir()) == "step-00000030"
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before, "the old run is there"
    process = launched(*going_on)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0 and "resumed from step 30 of 30" in said, said
    whole = train.extend(dataclasses.replace(config, output=str(tmp_path / "whole")))
    left, right = (load_file(path / "model.safetensors") for path in (old, whole))
    assert all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-5) for name in right)
    assert not log.parent.exists()


def two_against_one(config, tmp_path, device):
    """Losses of two processes and of one, by kind of run."""
    (tmp_path / "worker.py").write_text(RUNS)
    long = {"scheme": "contiguous", "prompt": None, "row_tokens": 128, "checkpointing": "full"}
    kinds = {
        "plain": {"steps": 50},
        "autocast": {"autocast": True},
        "compiled": {"compile": "layers", "checkpointing": "selective"},
        "masters": {"dtype": "bfloat16"},
        "longlora": {**long, "attention": "shifted", "lora_rank": 4, "autocast": True},
    }
    jobs = {
        name: dataclasses.replace(config, device=device, **{"compile": "none", **changes})
        for name, changes in kinds.items()
    }
    losses = {}
    for processes in (2, 1):
        outputs = {name: tmp_path / f"{name}-{processes}" for name in jobs}
        made = [dataclasses.asdict(dataclasses.replace(job, output=str(outputs[name]))) for name, job in jobs.items()]
        (tmp_path / "jobs.json").write_text(json.dumps(made))
        several = ["--standalone", "--nproc-per-node", processes]
        process = launched(*several, tmp_path / "worker.py", tmp_path / "jobs.json")
        _, said = process.communicate(timeout=280)
        assert process.returncode == 0, said
        losses[processes] = {name: losses_of(output) for name, output in outputs.items()}
    return losses[2], losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(extend_config, tmp_path):
    """Over NCCL: shares read onto the devices, gathered in bfloat16, compiled layers, fused updates of shares."""
    two, one = two_against_one(extend_config(micro_rows=1, steps=4), tmp_path, "cuda")
    for name in two:
        near = {"abs": 1e-5} if name == "plain" else {"rel": 1e-4 if name == "compiled" else 1e-2}
        assert two[name] == pytest.approx(one[name], **near), name


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"shape": "llama9"}, "shape='llama9'"),
        ({"steps": 1}, "not counted, .* steps=1 profile=False"),
        ({"steps": 2, "profile": True}, "not counted, .* steps=2 profile=True"),
    ],
)
def test_impossible_measurements_name_key_and_value(changes, rule, tmp_path):
    with pytest.raises(ValueError, match=rule):
        extend.measure(extend.ManyConfig(work=str(tmp_path), **changes))


def test_a_step_s_time_by_kind_of_kernel(monkeypatch):
    """With torch's profiler stood in for: communication begins under a product, and lasts half a millisecond longer."""
    made = [("nvjet_tn", 1.0, 4.0), ("ncclDevKernel_AllGather", 2.5, 4.5), ("flash_fwd", 4.75, 5.75), ("norm", 5, 5.5)]
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        types.SimpleNamespace(name=name, device_type=kind, time_range=types.SimpleNamespace(start=a * 1e3, end=b * 1e3))
        for kind, spans in ((cuda, [*made, ("ncclDevKernel_ReduceScatter", 5.5, 6.75)]), (cpu, [("launch", 0, 99)]))
        for name, a, b in spans
    ]
    profiler = contextlib.nullcontext(types.SimpleNamespace(events=lambda: events))
    monkeypatch.setattr("torch.profiler.profile", lambda **_: profiler)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    kinds = {"matmul_ms": 3.0, "attention_ms": 1.0, "communication_ms": 3.25, "other_ms": 0.5}
    assert extend.where_time_goes(lambda: None) == kinds | {"idle_ms": 0.25, "communication_alone_ms": 0.5 + 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes", "task"),
    [
        (2, {}, "extend, 2 processes"),
        (1, {"dtype": "bfloat16", "optimizer": "lean", "attention": "eager"}, "extend, one process"),
        (2, {"dtype": "bfloat16", "optimizer": "lean", "float8": "fast", "save_every": 1}, "extend, 2 processes"),
    ],
)
def test_measurement_is_a_real_run(processes, changes, task, tmp_path):
    tiny = {"shape": "tiny", "device": "cpu", "row_tokens": 32, "target": 128, "rows": 4, "compile": "none"}
    config = extend.ManyConfig(work=str(tmp_path), processes=processes, **tiny | changes)
    rows = {row["metric"]: row for row in extend.measure(config)}
    assert {row["task"] for row in rows.values()} == {task}
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows["tokens_per_s"]["value"] == pytest.approx((log[1]["tokens_per_s"] + log[2]["tokens_per_s"]) / 2)
    assert rows["tokens_per_s_a_process"]["value"] == rows["tokens_per_s"]["value"] / processes
    assert 0.1 < rows["host_gib_least"]["value"] <= rows["host_gib"]["value"] < 4
    assert rows["tokens_per_s"]["loss"] == pytest.approx(math.log(256), abs=0.3)  # random weights know nothing
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_position_embeddings"] == 128
    trained = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: trained[key] for key in changes} == changes
