"""Two nodes as network namespaces of this machine: torchrun meets over a link, a node is killed, both go on."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from endprompt.config import ExtendConfig
from endprompt.runs import RunDirectory
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


def kill(name):
    """SIGKILL for all that runs on a node, at once."""
    for pid in ip("netns", "pids", name).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 9)


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
    command = [*torchrun, "-m", "endprompt.cli", "extend", "--config", str(config)]
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
@pytest.mark.xfail(strict=False, reason="restarts of both torchruns were not seen to the end on a loaded machine")
def test_a_node_that_is_killed_and_comes_back_changes_no_bit(nodes, extend_config, tmp_path):
    """The second node in a step, then in a save; then the first one, whose torchrun held the meeting of both."""

    def begun(name) -> tuple[ExtendConfig, list[subprocess.Popen]]:
        config = extend_config(
            output=str(tmp_path / name),
            steps=24,
            save_every=2,
            resume_or_start=True,
            dtype="bfloat16",
            optimizer="lean",
        )
        RunDirectory(tmp_path / f"config-{name}", config)
        return config, [
            node(number, tmp_path / f"config-{name}" / "config.yaml", tmp_path / "said") for number in (0, 1)
        ]

    config, running = begun("whole")
    assert [one.wait(400) for one in running] == [0, 0], (tmp_path / "said").read_text()[-3000:]
    config, running = begun("killed")
    output, yaml = Path(config.output), tmp_path / "config-killed" / "config.yaml"
    for number, steps, partial in ((1, 5, False), (1, 11, True), (0, 17, False)):
        states = output.with_name(f"{output.name}.partial") / "states"
        waited(lambda: steps_of(output) >= steps and (not partial or any(states.glob("*.partial"))), running)  # noqa: B023
        kill(NAMES[number])
        running[number].wait()
        if number == 0:  # the other ends by itself, or is ended with the job
            kill(NAMES[1])
            running[1].wait()
            running[1] = node(1, yaml, tmp_path / "said")
        running[number] = node(number, yaml, tmp_path / "said")
    assert [one.wait(400) for one in running] == [0, 0], (tmp_path / "said").read_text()[-3000:]
    assert (tmp_path / "said").read_text().count("resumed from step") >= 3
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert left.keys() == right.keys() and all(left[name].equal(right[name]) for name in right)
    assert [line["step"] for line in log_of(output)] == list(range(1, config.steps + 1))


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
    assert lines and all("all processes must have the same settings: " in line for line in lines)
