"""`endprompt env`: what a bug report needs, and nothing of its writer."""

import getpass
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from endprompt import commands, env

SECRETS = {"HF_TOKEN": "hf_SecretSecretSecret", "WANDB_API_KEY": "0123456789abcdef", "OPENAI_API_KEY": "sk-secret"}


@pytest.fixture
def printed(monkeypatch, capsys):
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(as_json: bool) -> str:
        assert commands.env(env.EnvConfig(json=as_json)) is None
        return capsys.readouterr().out

    return run


def test_versions_and_device(printed):
    found = json.loads(printed(True))
    assert found["python"]["version"] == platform.python_version()
    assert found["packages"]["torch"] == version("torch") and found["packages"]["lm-eval"] == version("lm-eval")
    assert {"flash-attn", "liger-kernel", "torchao", "python-flint", "vllm"} <= set(found["optional"])
    assert found["device"]["cuda"] is torch.cuda.is_available()
    assert found["variables"]["OMP_NUM_THREADS"] == "1" and found["system"]["cpus"] >= 1


@pytest.mark.parametrize("as_json", [True, False])
def test_no_secret_and_no_home_is_shown(printed, as_json, monkeypatch):
    root = Path(env.__file__).resolve().parent.parent
    monkeypatch.setenv("HOME", str(root.parent))  # as if the checkout lay in the user's home
    shown = printed(as_json)
    assert not [name for name in (*SECRETS, *SECRETS.values()) if name in shown]
    assert str(root.parent) + "/" not in shown and f"~/{root.name}" in shown


@pytest.mark.slow  # a new Python imports torch
@pytest.mark.parametrize(
    ("package", "given", "spins"),
    [
        ("endprompt", {}, "0"),
        ("benchmarks", {}, "0"),
        ("analysis", {}, "0"),
        ("endprompt", {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_threads_wait_asleep_unless_the_user_says_otherwise(package, given, spins):
    """By what torch's own OpenMP prints of itself when it is loaded; numpy's OpenBLAS starts no threads of its own."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OPENBLAS_NUM_THREADS")
    around = {name: value for name, value in os.environ.items() if name not in names}
    counted = "import os, numpy; print(len(os.listdir('/proc/self/task')))"
    work = [sys.executable, "-c", f"import {package}\n{counted}\nimport torch"]
    done = subprocess.run(work, env=around | {"OMP_DISPLAY_ENV": "verbose"} | given, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert platform.machine() != "x86_64" or done.stdout == "1\n"


def test_paths_lose_the_user_wherever_they_lie(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    assert env.without_user("/home/alice/env/bin/python") == "~/env/bin/python"
    assert env.without_user("/scratch/alice/env") == "/scratch/USER/env"
    assert env.without_user("/opt/alicea/env") == "/opt/alicea/env"

    def nameless():
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert env.without_user("/home/alice/x") == "~/x" and env.without_user("/opt/x") == "/opt/x"


def test_absent_packages_are_said(printed, monkeypatch):
    monkeypatch.setattr(env, "OPTIONAL", ("no-such-package",))
    assert "  no-such-package         not installed" in printed(False).splitlines()
