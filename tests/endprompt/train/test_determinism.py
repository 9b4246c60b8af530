"""Runs that repeat on a GPU: what is set while they train, what is refused, and that they do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch._inductor.config as inductor

from endprompt.config import ExtendConfig, check_config
from endprompt.model.attention import attention_backends
from endprompt.train import determinism


def state():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        inductor.deterministic,
    )


def test_everything_is_as_it_was_afterwards(monkeypatch):
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(inductor, "deterministic", False)
    try:
        before = state()
        with pytest.raises(KeyError), determinism.repeatable():
            assert state() == (True, False, False, True)
            raise KeyError
        assert state() == before == (True, True, True, False)
    finally:
        torch.use_deterministic_algorithms(False)
    before = state()
    with determinism.repeatable(False):
        assert state() == before and not before[0]


def test_a_workspace_with_which_cublas_does_not_repeat_is_refused(monkeypatch):
    monkeypatch.setenv(determinism.WORKSPACE, ":32:2")
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG.*:4096:8.*':32:2'"), determinism.repeatable():
        pass
    monkeypatch.setenv(determinism.WORKSPACE, ":16:8")
    with determinism.repeatable():
        assert torch.are_deterministic_algorithms_enabled()


def test_attentions_that_add_in_no_fixed_order_are_refused():
    settings = {"model": "m", "output": "o", "steps": 1, "deterministic": True}
    for attention in ("cudnn", "flash_attention_4", "flex"):
        with pytest.raises(ValueError, match=f"deterministic=True attention='{attention}'"):
            check_config(ExtendConfig(**settings, attention=attention))
    for attention in ("sdpa", "eager", "shifted"):
        check_config(ExtendConfig(**settings, attention=attention))


def test_cudnn_s_attention_is_left_out_where_runs_must_repeat():
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    def backends():
        with attention_backends(torch.device("cuda")):
            return set(_cur_sdpa_kernel_backends())

    assert SDPBackend.CUDNN_ATTENTION in backends()
    with determinism.repeatable():
        assert backends() == {SDPBackend.FLASH_ATTENTION, SDPBackend.MATH}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_processes_on_a_gpu_end_with_the_same_weights():
    command = [sys.executable, "-m", "tests.support.train_on_a_gpu"]
    said = {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)}
    assert len(said) == 1 and len(said.pop()) == 64
