"""Training states: complete or absent, the last few kept, damage noticed."""

import errno
import json

import pytest
import torch

from endprompt import files
from endprompt.train import states


def model_and_optimizer(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(directory, step, seed=0, keep=2):
    tensors = states.collect(*model_and_optimizer(seed))
    return states.save_state(directory, step, tensors, {"config": {"lr": 0.01}}, keep)


def test_state_restores_weights_and_optimizer_exactly(tmp_path):
    model, optimizer = model_and_optimizer(1)
    states.save_state(tmp_path, 5, states.collect(model, optimizer), {"config": {}}, keep=2)
    other, other_optimizer = model_and_optimizer(2)
    state = states.newest_state(tmp_path)
    assert state.step == 5
    states.restore(other, other_optimizer, state)
    for (name, left), right in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(left, right), name
        for key, value in optimizer.state[left].items():
            assert torch.equal(value, other_optimizer.state[right][key]), (name, key)


def test_last_states_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert [path.name for path in states.states(tmp_path)] == ["step-00000003", "step-00000010"]


def test_unfinished_state_is_no_state(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000002.partial").mkdir()
    assert [path.name for path in states.states(tmp_path)] == ["step-00000001"]
    save(tmp_path, 2)  # and is no hindrance
    assert states.newest_state(tmp_path).step == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "no record", "half a record"])
def test_damaged_state_is_named_and_the_one_before_used(tmp_path, capsys, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    tensors = next(path for path in sorted(newest.iterdir()) if path.name != states.STATE)
    raw = bytearray(tensors.read_bytes())
    if damage == "flip":
        raw[-3] ^= 4
        tensors.write_bytes(raw)
    elif damage == "cut":
        tensors.write_bytes(raw[:-7])
    elif damage == "no record":
        (newest / states.STATE).unlink()
    else:
        (newest / states.STATE).write_text('{"step": 2')
    assert states.newest_state(tmp_path).step == 1
    said = capsys.readouterr().err
    assert "step-00000002" in said and "damaged" in said


def test_no_state_is_none(tmp_path):
    assert states.newest_state(tmp_path) is None


def test_full_disk_is_an_error_and_leaves_the_earlier_state(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match=r"earlier ones are intact: .*No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert states.newest_state(tmp_path).step == 1


def test_state_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1)
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 7))
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(ValueError, match="of another model"):
        states.restore(other, optimizer, states.newest_state(tmp_path))


def test_record_says_what_was_saved(tmp_path):
    record = json.loads((save(tmp_path, 7) / states.STATE).read_text())
    assert record["step"] == 7 and record["config"] == {"lr": 0.01}
