"""Two nodes as network namespaces of this machine: torchrun meets over a link, a node is killed, both go on."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from endprompt import cli, distributed, train
from endprompt.config import ExtendConfig
from endprompt.runs import RunDirectory
from endprompt.train import run, start
from tests.support.processes import several
from tests.support.runs import log_of

ROOT = Path(__file__).resolve().parents[2]
NAMES, LINKS, ADDRESSES = ("endprompt0", "endprompt1"), ("epveth0", "epveth1"), ("10.77.0.1", "10.77.0.2")


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """Two namespaces with a link between them and nothing else."""
    if shutil.which("ip") is None or ip("netns", "add", NAMES[0]).returncode:
        pytest.skip("network namespaces need root and iproute2")
    ip("netns", "add", NAMES[1])
    ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
    for name, link, address in zip(NAMES, LINKS, ADDRESSES):
        ip("link", "set", link, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
        ip("-n", name, "link", "set", link, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield
    for name in NAMES:
        kill(name)
        ip("netns", "delete", name)


def pids(name):
    return [int(pid) for pid in ip("netns", "pids", name).stdout.split()]


def kill(name):
    """SIGKILL for all that runs on a node, at once."""
    for pid in pids(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


#: A torchrun that ends with the endpoint's node is started again.
AGAIN = ["sh", "-c", 'for attempt in 1 2 3 4 5; do "$@" && break; sleep 1; done', "sh"]


def node(number, config: Path, said: Path, restarts=5):
    """A node's torchrun, which waits for the other."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"{ADDRESSES[0]}:29511"]
    torchrun += [
        "--rdzv-conf",
        f"is_host={int(number == 0)},read_timeout=300",
        "--local-addr",
        ADDRESSES[number],
        "--max-restarts",
        str(restarts),
    ]
    command = [*(AGAIN if restarts else ()), *torchrun, "-m", "endprompt.cli", "extend", "--config", str(config)]
    about = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": LINKS[number],
    }
    with open(said, "a") as into:
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[number], *command], env=os.environ | about, stdout=into, stderr=into
        )


def steps_of(output: Path):
    log = output.with_name(f"{output.name}.partial") / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def waited(reached, processes, seconds=400):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end and any(one.poll() is None for one in processes)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_that_is_killed_and_comes_back_changes_no_bit(nodes, extend_config, tmp_path):
    """The second node in a step, in a save, while all meet again; then the first, whose torchrun held the meeting."""

    def begun(name) -> tuple[ExtendConfig, list[subprocess.Popen]]:
        settings = {"steps": 24, "save_every": 2, "resume_or_start": True, "dtype": "bfloat16", "optimizer": "lean"}
        config = extend_config(output=str(tmp_path / name), **settings)
        RunDirectory(tmp_path / f"config-{name}", config)
        return config, [
            node(number, tmp_path / f"config-{name}" / "config.yaml", tmp_path / "said") for number in (0, 1)
        ]

    config, running = begun("whole")
    assert [one.wait(400) for one in running] == [0, 0], (tmp_path / "said").read_text()[-3000:]
    config, running = begun("killed")
    output, yaml = Path(config.output), tmp_path / "config-killed" / "config.yaml"
    states = output.with_name(f"{output.name}.partial") / "states"
    for number, reached in (
        (1, lambda: steps_of(output) >= 5),
        (1, lambda: len(pids(NAMES[1])) > 2),  # loop, torchrun and a process, which has not met the other yet
        (1, lambda: steps_of(output) >= 11 and any(states.glob("*.partial"))),
        (0, lambda: steps_of(output) >= 17),
    ):
        waited(reached, running)
        kill(NAMES[number])
        running[number].wait()
        running[number] = node(number, yaml, tmp_path / "said")
    assert [one.wait(400) for one in running] == [0, 0], (tmp_path / "said").read_text()[-3000:]
    assert (tmp_path / "said").read_text().count("resumed from step") >= 3
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert left.keys() == right.keys() and all(left[name].equal(right[name]) for name in right)
    assert [line["step"] for line in log_of(output) if "step" in line] == list(range(1, config.steps + 1))


@pytest.mark.slow
def test_a_node_of_other_settings_is_refused_in_one_line(nodes, extend_config, tmp_path):
    for number in (0, 1):
        config = extend_config(output=str(tmp_path / "out"))
        RunDirectory(tmp_path / f"node{number}", dataclasses.replace(config, seed=number))
    said = [tmp_path / f"said{number}" for number in (0, 1)]
    running = [node(number, tmp_path / f"node{number}" / "config.yaml", said[number], restarts=0) for number in (0, 1)]
    for one in running:
        assert one.wait(400) != 0
    lines = [line for path in said for line in path.read_text().splitlines() if line.startswith("endprompt: ")]
    assert len(lines) == 1 and "all processes must have the same settings: " in lines[0], lines


def another_version(rank, config):
    """Process 1 reads what all say when the others have had the time to leave."""
    slow = types.SimpleNamespace(
        dumps=json.dumps, loads=lambda text: (time.sleep(2 * (rank == 1)), json.loads(text))[1]
    )
    distributed.json, real = slow, run.environment()
    run.environment = lambda: real | {"packages": real["packages"] | {"transformers": f"5.{rank}"}}


def own_files(rank, config, changed):
    """Every node has files of its own under the same names; one of node 1's is another."""
    home = Path(f"{config.output}-{rank}")
    shutil.copytree(config.model, home / "model")
    shutil.copy(config.data[0], home / "documents.jsonl")
    if rank == 1 and changed == "documents.jsonl":
        (home / changed).write_text("".join((home / changed).read_text().splitlines(keepends=True)[:-1]))
    elif rank == 1:
        save_file({name: 2 * weight for name, weight in load_file(home / changed).items()}, home / changed)
    os.chdir(home)


def no_checkpoint(rank, config):
    def gone(path):
        raise ValueError(f"there is no checkpoint here: {path}")

    if rank == 1:
        start.checkpoint_path = gone


def other_folder(rank, config):
    """What node 0 writes is not there on node 1."""
    real = os.path.exists
    os.path.exists = lambda path: real(path) and not (rank == 1 and str(path).startswith(config.output))


def lost_folder(rank, config):
    """Its file system goes while a state is written."""

    def audited(kind, about):
        if rank == 1 and kind == "open" and "step-00000002.partial" in str(about[0]):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(about[0]))

    sys.addaudithook(audited)


def stays_away(rank, config):
    if rank == 1:
        sys.exit(3)


def uneven(rank, config):
    """Seven rows for three processes."""


def main_leaves(rank, config, how=lambda: os.kill(os.getpid(), 9)):
    """In its third step, and the store of all processes with it."""
    real = train.Trainer.train_step

    def stepped(self, *given):
        if rank == 0 and self.step == 2:
            how()
        return real(self, *given)

    train.Trainer.train_step = stepped


def raises():
    raise RuntimeError("it went wrong alone")


def gpus(rank, config, count=3, gib=(80, 80, 80)):
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: count
    torch.cuda.set_device = lambda device: None
    about = types.SimpleNamespace(name="GPU", total_memory=gib[rank] << 30, major=9, minor=0)
    torch.cuda.get_device_properties = lambda device=None: about


def nccl_that_hangs(rank, config):
    gpus(rank, config)
    real, zeros = dist.init_process_group, torch.zeros
    dist.init_process_group = lambda backend, **options: real("gloo", **options)
    torch.zeros = lambda *shape, device=None, **options: zeros(*shape, **options)
    dist.all_reduce = lambda *given: time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (another_version, "all processes must have the same transformers: '5.0' on "),
        (
            functools.partial(own_files, changed="model/model.safetensors"),
            "all processes must have the same checkpoint: ",
        ),
        (functools.partial(own_files, changed="documents.jsonl"), "all processes must have the same documents: "),
        (no_checkpoint, "there is no checkpoint here: "),
        (other_folder, "the output must be in a folder that every node sees: "),
        (lost_folder, "step-00000002: the state could not be written, earlier ones are intact: [Errno 116] Stale file"),
        (stays_away, "the processes have not met at localhost:"),
        (functools.partial(gpus, count=1), "each process needs a GPU of its own: process 1, 1 GPUs"),
        (uneven, "rows must be a multiple of the number of processes: rows=7, 3"),
        (main_leaves, "another process has ended or is out of reach: "),
        (functools.partial(main_leaves, how=raises), "RuntimeError: it went wrong alone (the traceback is in "),
        (functools.partial(gpus, gib=(80, 40, 80)), "all processes must have the same gpu_gib: 80 on "),
        (gpus, "the processes cannot talk to each other: Distributed package doesn't have NCCL"),
        (nccl_that_hangs, "NCCL has not started within 20 s: NCCL_DEBUG=WARN"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_with_one_process_ends_all_in_one_line(fault, rule, extend_config, tmp_path):
    """As soon as it is there, or after the time that a meeting takes at most: 60 s, here 20."""

    def started():
        distributed.START = timedelta(seconds=20)
        fault(int(os.environ["RANK"]), config)
        return cli.main(["extend", "--config", str(tmp_path / "config.yaml")])

    kind = getattr(fault, "func", fault)
    on_gpus = kind in (gpus, nccl_that_hangs)
    rows = 7 if fault is uneven else 6
    config = extend_config(save_every=1, rows=rows, device="cuda" if on_gpus else "cpu")
    names = {"model": "model", "data": ["documents.jsonl"]} if kind is own_files else {}
    RunDirectory(tmp_path, dataclasses.replace(config, **names))
    codes, said = several(3, started, seconds=100)
    assert codes == {stays_away: [1, 3, 1], main_leaves: [-9, 1, 1]}.get(fault, [1, 1, 1]), said
    lines = [line for line in said.splitlines() if line.startswith("endprompt: ") and "WARNING" not in line]
    assert len(lines) == 1 and rule in lines[0], said
