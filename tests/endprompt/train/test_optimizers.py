"""float32 masters of bfloat16 weights against AdamW in float32, and what is lost without them."""

import pytest
import torch

from endprompt import config as configuration
from endprompt import train
from endprompt.fast import float8
from endprompt.train import optimizers
from endprompt.train.optimizers import MasterAdamW
from tests.support.runs import losses_of

STEPS, RATE = 200, 2e-5


def drift(make, dtype):
    """How far weights of about 1 move under gradients that always point the same way."""
    weight = torch.nn.Parameter(torch.linspace(0.5, 2.0, 64).to(dtype))
    start, optimizer = weight.detach().float().clone(), make([weight])
    for _ in range(STEPS):
        (weight.float().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (start - weight.detach().float()), optimizer


def test_small_updates_add_up_in_masters_and_vanish_without():
    exact, _ = drift(lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.0), torch.float32)
    torch.testing.assert_close(exact, torch.full((64,), STEPS * RATE), rtol=1e-2, atol=0)
    lost, _ = drift(lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.0), torch.bfloat16)
    assert not lost.any()  # the trap: 2e-5 is below half a unit in the last place of every one of them
    kept, optimizer = drift(lambda p: MasterAdamW(p, lr=RATE, weight_decay=0.0), torch.bfloat16)
    (master,) = optimizer.masters.values()
    moved = torch.linspace(0.5, 2.0, 64).bfloat16().float() - master.detach()
    torch.testing.assert_close(moved, exact, rtol=1e-2, atol=0)
    assert (kept - exact).abs().max() <= 2.0 * 2**-8  # and the weights are the masters, rounded


def test_gradients_of_micro_batches_are_summed_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=0.1)
    for factor in (256.0, 1.0, 1.0):  # in bfloat16 256 + 1 is 256
        (weight * factor).sum().backward()
    assert optimizer.masters[weight].grad.item() == 258.0 and weight.grad is None


def test_adamw_alone_on_bfloat16_is_warned_about(extend_config, capsys):
    train.extend(extend_config(steps=1, dtype="bfloat16", optimizer="adamw"))
    assert "loses small updates" in capsys.readouterr().err


def test_autocast_trains_float32_weights_with_products_in_bfloat16(extend_config, tmp_path):
    runs = [train.extend(extend_config(output=str(tmp_path / str(a)), steps=8, autocast=a)) for a in (False, True)]
    exact, rounded = map(losses_of, runs)
    assert rounded == pytest.approx(exact, rel=2e-2) and rounded != exact


def test_names_of_the_configuration_are_those_of_the_modules():
    assert set(configuration.ONE_OF["optimizer"]) - {"auto"} == set(optimizers.OPTIMIZERS)
    assert configuration.FLOAT8 == float8.FLOAT8


@pytest.mark.parametrize("optimizer", ["auto", "lean"])
def test_run_in_bfloat16_follows_the_one_in_float32(extend_config, tmp_path, optimizer):
    options = {"dtype": "bfloat16", "optimizer": optimizer, "export_dtype": "float32"}
    exact = train.extend(extend_config(output=str(tmp_path / "exact"), steps=12))
    rounded = train.extend(extend_config(output=str(tmp_path / "rounded"), steps=12, **options))
    assert losses_of(rounded) == pytest.approx(losses_of(exact), rel=2e-2)
