"""Two gloo processes on the CPU under torchrun against one process."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from endprompt import checkpoint, train

ROOT = Path(__file__).resolve().parent.parent
#: What each of the processes does: whole runs, two that are cut off after the second step of which one is resumed, and
#: one that must fail.
WORKER = """
import json, sys
import torch.distributed as dist
from endprompt import train

dist.init_process_group("gloo")
*whole, broken, again, uneven = json.load(open(sys.argv[1]))
for job in whole:
    train.extend(train.ExtendConfig(**job))

step = train.Trainer.train_step
def cut(self, batch, rate):
    if self.step == 2:
        raise KeyboardInterrupt
    return step(self, batch, rate)
train.Trainer.train_step = cut
for job in (broken, again):
    try:
        train.extend(train.ExtendConfig(**job))
    except KeyboardInterrupt:
        pass
train.Trainer.train_step = step
train.extend(train.ExtendConfig(**again | {"resume": True}))
try:
    train.extend(train.ExtendConfig(**uneven))
except ValueError as error:
    print(error)
dist.barrier()
dist.destroy_process_group()
"""


def log_of(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def results_of(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_processes(llama, documents, tmp_path_factory):
    """(directory with `whole` and `broken.partial`, made by two processes; the configuration; what they printed)."""
    tmp = tmp_path_factory.mktemp("two")
    config = train.ExtendConfig(
        model=str(llama), data=[str(documents)], output=str(tmp / "whole"), target=128, prompt="EP_3", rows=4, steps=4,
        warmup=2, lr=1e-3, device="cpu", log_every=1, weight_decay=0.1, clip=0.5, micro_rows=1,
        eval_data=[str(documents)], eval_lengths=[96], eval_rows=3, eval_needles=3,
    )  # fmt: skip
    jobs = [
        config,
        dataclasses.replace(config, output=str(tmp / "rounded"), autocast=True),
        dataclasses.replace(config, output=str(tmp / "lora"), lora_rank=4),
        dataclasses.replace(config, output=str(tmp / "broken"), save_every=2),
        dataclasses.replace(config, output=str(tmp / "again"), save_every=2),
        dataclasses.replace(config, output=str(tmp / "uneven"), rows=3),
    ]
    (tmp / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    (tmp / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp / "worker.py"), str(tmp / "jobs.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp, config, done.stdout


@pytest.fixture(scope="module")
def one_process(two_processes):
    tmp, config, _ = two_processes
    return train.extend(dataclasses.replace(config, output=str(tmp / "one"), micro_rows=None))


def assert_equal_runs(left: Path, right: Path) -> None:
    for a, b in zip(log_of(left), log_of(right), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for a, b in zip(results_of(left), results_of(right), strict=True):
        assert (a["task"], a["step"], a["n"]) == (b["task"], b["step"], b["n"])
        assert a["value"] == pytest.approx(b["value"], abs=1e-5)
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_two_processes_give_the_losses_and_weights_of_one(two_processes, one_process):
    assert_equal_runs(two_processes[0] / "whole", one_process)


def test_two_processes_train_lora_as_one_does(two_processes):
    tmp, config, _ = two_processes
    one = train.extend(dataclasses.replace(config, output=str(tmp / "one-lora"), lora_rank=4))
    assert_equal_runs(tmp / "lora", one)


def test_shares_are_float32_masters_of_what_is_multiplied_in_bfloat16(two_processes, one_process):
    tmp, _, _ = two_processes
    exact, rounded = ([row["loss"] for row in log_of(run)] for run in (one_process, tmp / "rounded"))
    assert rounded == pytest.approx(exact, rel=2e-2) and rounded != pytest.approx(exact, rel=1e-6)
    weights = load_file(tmp / "rounded" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


def test_state_of_two_processes_is_resumed_by_one(two_processes, one_process):
    tmp, config, _ = two_processes
    state = checkpoint.newest_state(tmp / "broken.partial" / "states")
    assert state.step == 2
    assert len(list(state.path.glob("__*.distcp"))) == 2  # each process wrote its own share
    resumed = train.extend(dataclasses.replace(config, output=str(tmp / "broken"), save_every=2, resume=True))
    assert_equal_runs(resumed, one_process)


def test_two_processes_resume_bitwise(two_processes):
    tmp, _, _ = two_processes
    whole, again = ((tmp / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert whole == again


def test_processes_take_the_rows_of_one(two_processes, documents):
    """Whatever the number of processes, together they have the same rows in the same order."""
    _, config, _ = two_processes
    trainers = []
    for size in (1, 2, 4):
        rows = make_rows(config, documents)
        shares = [row_share(rows, config, train.World(rank, size), step=3) for rank in range(size)]
        trainers.append(torch.cat(shares))
    assert all(torch.equal(trainers[0], other) for other in trainers[1:])


def make_rows(config, documents):
    tokenizer = train.load_tokenizer(config.model)
    return train.Rows(train.load_documents([str(documents)], tokenizer), train.row_spec(config, 32, tokenizer))


def row_share(rows, config, here, step):
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.rows, trainer.config, trainer.here = rows, config, here
    return torch.from_numpy(trainer.batch(step).input_ids)


def test_rows_that_the_processes_cannot_share_are_refused(two_processes):
    tmp, _, printed = two_processes
    assert printed.count("rows must be a multiple of the number of processes: rows=3, 2") == 2
    assert not (tmp / "uneven.partial").exists()
