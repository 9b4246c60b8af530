"""Crashes for real: kill -9 in the middle of a save and at random moments, and a disk that is full."""

import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from endprompt import runs, train
from endprompt.train.states import newest_state
from tests.support.processes import Forked
from tests.support.runs import interrupted, same_weights


def killed_in_save(config):
    """Trains, and kills itself when the second state has been written aside but not renamed."""
    real, renames = os.replace, []

    def replace(source, target):
        if "step-" in str(target):
            renames.append(target)
            if len(renames) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    train.extend(config)


def test_killed_in_the_middle_of_a_save_and_resumed_bitwise(extend_config, tmp_path):
    config = extend_config(output=str(tmp_path / "killed"), steps=6, save_every=2, scheme="endprompt-random")
    assert Forked(killed_in_save, config).ended()[0] == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    states = tmp_path / "killed.partial" / "states"
    assert sorted(path.name for path in states.iterdir()) == ["step-00000002", "step-00000004.partial"]
    resumed = train.extend(dataclasses.replace(config, resume=True))
    whole = train.extend(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert same_weights(whole, resumed)


def test_killed_before_its_first_state_starts_again(extend_config, tmp_path):
    config = extend_config(steps=3, save_every=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "fit", interrupted)
        train.extend(config)
    resumed = train.extend(dataclasses.replace(config, resume=True))
    whole = train.extend(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert same_weights(whole, resumed)


@pytest.fixture
def full_disk():
    """`full_disk(size)`: no file can grow beyond that many bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_stops_the_run_with_the_earlier_state_intact(extend_config, tmp_path, full_disk):
    config = extend_config(steps=6, save_every=2)
    save, saves = train.Trainer.save, []

    def fills_up(self, states, beside):
        saves.append(self.step)
        if len(saves) == 2:
            self.settle()  # the first one is whole
            full_disk(50_000)
        save(self, states, beside)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "save", fills_up)
        with pytest.raises(OSError, match=r"step-00000004: the state could not be written, earlier ones are intact"):
            train.extend(config)
    full_disk(resource.RLIM_INFINITY)
    states = tmp_path / "out.partial" / "states"
    assert [path.name for path in states.iterdir()] == ["step-00000002"]
    assert newest_state(states).step == 2
    resumed = train.extend(dataclasses.replace(config, resume=True))
    whole = train.extend(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert same_weights(whole, resumed)


@pytest.mark.slow
def test_killed_at_random_moments_until_it_ends(extend_config, tmp_path):
    config = extend_config(output=str(tmp_path / "killed"), steps=400, save_every=3)
    command = [sys.executable, "-m", "endprompt.cli", "extend", "--config", str(tmp_path / "config.yaml")]
    runs.RunDirectory(tmp_path, config)  # writes config.yaml
    draw, kills = random.Random(3), 0
    for attempt in range(40):
        resume = ["--resume", "true"] if list(tmp_path.glob("killed*")) else []
        process = subprocess.Popen([*command, *resume], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + draw.uniform(3, 7) + attempt
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0:
            break
    assert kills >= 2 and process.returncode == 0
    whole = train.extend(dataclasses.replace(config, output=str(tmp_path / "whole"), save_every=0))
    assert same_weights(whole, tmp_path / "killed")
