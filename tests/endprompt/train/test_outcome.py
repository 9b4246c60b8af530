"""What a run leaves: tried before the first step, kept when something fails after the last, and Ctrl-C of a new run."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
from collections import namedtuple
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file

from endprompt import cli, files, runs, train
from endprompt.config import ExtendConfig, check_output
from endprompt.distributed import World
from endprompt.model import load_model, load_tokenizer, training_attention
from endprompt.train import curves, loop, outcome, run, start
from endprompt.train import states as checkpoint
from tests.support.checkpoints import make_checkpoint, small_config
from tests.support.runs import interrupted, lines_of, same_weights

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Without the picture of the losses, which has its own tests."""
    monkeypatch.setattr(curves, "draw", lambda *_: None)


@pytest.fixture
def no_step(monkeypatch):
    def never(*_):
        raise AssertionError("a step was made")

    monkeypatch.setattr(train.Trainer, "train_step", never)


def refused(config, tmp_path, match):
    with pytest.raises(ValueError, match=match) as caught:
        train.extend(config)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_dtype_that_no_export_has_is_refused_and_another_may_be_chosen(extend_config, tmp_path):
    path = make_checkpoint(tmp_path / "m")
    weights = {name: weight.to(torch.float8_e4m3fn) for name, weight in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text()) | {"dtype": "float8_e4m3fn"}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Rows", None)  # refused before any data are looked at
        refused(extend_config(model=str(path)), tmp_path, r"/m: .*set export_dtype to one of .*'float8_e4m3fn'")
    done = train.extend(extend_config(model=str(path), export_dtype="bfloat16", steps=1))
    assert {weight.dtype for weight in load_file(done / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("stated", [None, "float16"])
def test_the_export_has_the_dtype_of_the_config_or_else_of_the_files(extend_config, tmp_path, stated):
    path = make_checkpoint(tmp_path / "m")
    weights = {name: weight.bfloat16() for name, weight in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text()) | {"dtype": stated}
    (path / "config.json").write_text(json.dumps(settings))
    done = train.extend(extend_config(model=str(path), steps=1))
    wanted = stated or "bfloat16"
    assert {str(weight.dtype) for weight in load_file(done / "model.safetensors").values()} == {f"torch.{wanted}"}
    assert json.loads((done / "config.json").read_text())["dtype"] == wanted


@pytest.mark.parametrize("what", ["tokenizer", "generation config", "card"])
def test_what_cannot_be_written_is_found_out_before_the_first_step(what, extend_config, tmp_path, monkeypatch, no_step):
    import transformers

    def broken(*_, **__):
        raise TypeError(f"the {what}\nis of no use")

    owner, name = {
        "tokenizer": (transformers.PreTrainedTokenizerBase, "save_pretrained"),
        "generation config": (transformers.GenerationConfig, "save_pretrained"),
        "card": (outcome, "write_card"),
    }[what]
    monkeypatch.setattr(owner, name, broken)
    refused(extend_config(), tmp_path, f"Llama: a run on this checkpoint could not be written: the {what} is of no use")


def test_the_rehearsal_changes_nothing_and_leaves_nothing(extend_config, tmp_path):
    model = load_model(extend_config().model, attention=training_attention("sdpa"))
    before = model.config.to_dict(), model.config._attn_implementation
    tokenizer = load_tokenizer(extend_config().model)
    about = dict.fromkeys(("method", "model", "window", "target", "steps", "tokens", "row_tokens", "seconds"), 1)
    about |= {"config": dataclasses.asdict(extend_config()), "environment": runs.environment()}
    outcome.rehearse(tmp_path, model, tokenizer, "float16", about)
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert tokenizer.model_max_length == int(1e30) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "exports", "states"),
    [
        ({"steps": 1}, 1, 0),
        ({"steps": 4, "save_every": 1, "keep": 1}, 0, 2),  # steps 1 to 3 are saved, two are there at once
        ({"steps": 2, "save_every": 1, "keep": 3}, 1, 1),
        ({"steps": 9, "save_every": 2, "keep": 2, "dtype": "bfloat16", "optimizer": "masters"}, 0, 3),
        ({"steps": 9, "save_every": 2, "keep": 2, "dtype": "bfloat16", "optimizer": "lean"}, 0, 3),
        ({"steps": 3, "save_every": 1, "keep": 2, "lora_rank": 4}, 0, 0),
    ],
)
def test_a_disk_with_too_little_room_is_refused(extend_config, tmp_path, monkeypatch, changes, exports, states):
    """Needed is what the tensors of a state that was really made take, and those of the export."""
    config = extend_config(export_dtype="float16", **changes)
    real, found = train.Trainer.fit, {}

    def fit(self, directory):
        config.save_every = 0
        real(self, directory)
        tensors = checkpoint.collect(self.model, self.optimizer)
        found["state"] = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(".step"))
        found["model"] = sum(2 * parameter.numel() for parameter in self.model.parameters())
        raise KeyboardInterrupt

    every = config.save_every
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "fit", fit)
        train.extend(config)
    shutil.rmtree(tmp_path / "out.partial")
    config.save_every = every
    needed = exports * found["model"] + states * found["state"]
    if config.lora_rank:  # two states and the export are more than three states of little beside the weights
        needed = max(2 * found["state"], 2 * found["state"] + found["model"])
    patched = {"free": needed}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, patched["free"]))

    def begins(*_):
        raise RuntimeError("the run begins")

    monkeypatch.setattr(train.Trainer, "fit", begins)
    with pytest.raises(RuntimeError, match="the run begins"):
        train.extend(config)
    patched["free"] = needed - 1
    shutil.rmtree(tmp_path / "out.partial")
    refused(config, tmp_path, r"too little room for this run: .* GiB needed and .* GiB free: .*save_every=\d+ keep=\d")


@pytest.mark.parametrize(("keep", "states", "exports"), [(5, 6, 0), (6, 6, 1), (2, 3, 0)])
def test_room_for_states_that_several_processes_save_before_evaluations(monkeypatch, tmp_path, keep, states, exports):
    """Steps 2, 4, 6, 8 before evaluations, 3 and 6 as asked, the last one: six, by hand; 64 bytes of weights."""
    model = torch.nn.Linear(4, 4, bias=False)
    config = ExtendConfig(save_every=3, eval_every=2, eval_data=["text"], keep=keep)
    needed = states * 3 * 64 + exports * 32
    for free, held in ((needed, contextlib.nullcontext()), (needed - 1, pytest.raises(ValueError, match="too little"))):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        with held:
            about = (config, 9, model, torch.optim.AdamW(model.parameters()), "float16", 2)
            outcome.check_room(tmp_path, *about)


def test_an_output_that_cannot_be_renamed_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for name, target in (("link", "there"), ("dangling", "nowhere")):
        os.symlink(tmp_path / target, tmp_path / name)
        with pytest.raises(ValueError, match=f"not a link or a mount point: output='.*{name}'"):
            check_output(str(tmp_path / name), True, "endprompt.json", "run")
    with pytest.raises(ValueError, match="not a link or a mount point: output='/proc'"):
        check_output("/proc", True, "endprompt.json", "run")


def command(config, *flags):
    words = f"extend --model {config.model} --data {config.data[0]} --output {config.output} --target 128 --prompt EP_3"
    return [*words.split(), *["--rows", "4", "--steps", "4", "--device", "cpu", "--lr", "1e-3"], *flags]


def stopping_at(step):
    """Ctrl-C at a step, as `stop_asked` reports it."""
    import contextlib

    @contextlib.contextmanager
    def asked(here):
        made = iter(range(1, 100))
        yield lambda: next(made) == step

    return asked


def printed(capsys):
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("endprompt: interrupted, what is done is kept; go on with: ")
    return shlex.split(line.partition("go on with: ")[2])


def run_printed(words):
    return cli.main(words[words.index("extend") :])


@pytest.mark.parametrize("stopped", [2, 4])
def test_overwrite_and_ctrl_c_go_on_with_the_new_run(stopped, extend_config, tmp_path, monkeypatch, capsys):
    """An old output of the same configuration stands there, and the states of a run that was never finished."""
    config = extend_config()
    assert cli.main(command(config)) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "old").touch()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_asked", stopping_at(2))
        assert cli.main(command(config, "--overwrite")) == 130  # the unfinished one
        (tmp_path / "out.partial" / "old").touch()
        patch.setattr(loop, "stop_asked", stopping_at(stopped))
        assert cli.main(command(config, "--overwrite")) == 130
    words = printed(capsys)
    assert words[-2:] == ["--overwrite", "--resume"]
    assert (tmp_path / "out" / "old").exists() == (stopped == 2) and not (tmp_path / "out.partial" / "old").exists()
    assert run_printed(words) == 0
    said = capsys.readouterr().err
    assert "resumed from step 2 of 4" in said if stopped == 2 else "this run is finished already" in said
    assert not (tmp_path / "out" / "old").exists() and not (tmp_path / "out.partial").exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert run_printed(words) == 0 and "this run is finished already" in capsys.readouterr().err


def test_overwrite_stopped_before_it_has_begun_does_not_go_on_with_the_old_run(
    extend_config, tmp_path, monkeypatch, capsys
):
    config = extend_config()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_asked", stopping_at(2))
        assert cli.main(command(config)) == 130
        assert printed(capsys)[-1] == "--resume"
        patch.setattr(start, "load_documents", interrupted)
        assert cli.main(command(config, "--overwrite")) == 130
    words = printed(capsys)
    assert words[-1] == "--overwrite"
    assert run_printed(words) == 0 and "resumed" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def held(documents):
    return {"eval_data": [str(documents)], "eval_lengths": [24, 96], "eval_rows": 1, "eval_every": 2}


@pytest.fixture(scope="module")
def evaluated(llama, documents, held, tmp_path_factory):
    """The output of the small configuration with evaluations."""
    output = str(tmp_path_factory.mktemp("evaluated") / "out")
    return train.extend(small_config(llama, documents, output, **held))


@pytest.mark.parametrize("what", ["evaluation", "evaluation in mid-run", "export", "the host's memory"])
def test_what_fails_after_a_step_loses_nothing(what, extend_config, held, evaluated, tmp_path, monkeypatch):
    """The steps are there, and so are all rows of all evaluations when the run has gone on."""
    whole = evaluated
    real, last = train.Trainer.evaluate, 2 if "mid-run" in what else 4

    def broken(*given, **__):
        if "evaluation" not in what:
            raise OSError("no space left")
        if given[0].step == last:
            given[0].log.add([lines_of(whole / "results.jsonl")[last - 2]])  # cut off between its two rows
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        real(*given)

    owner, name = {
        "evaluation": (train.Trainer, "evaluate"),
        "evaluation in mid-run": (train.Trainer, "evaluate"),
        "export": (files, "sync_tree"),
        "the host's memory": (run, "whole_weights"),
    }[what]
    config = extend_config(**held)
    with monkeypatch.context() as patch, pytest.raises((ValueError, OSError), match=r"memory is too small|no space"):
        patch.setattr(owner, name, broken)
        train.extend(config)
    assert [path.name for path in checkpoint.states(tmp_path / "out.partial/states")] == [f"step-0000000{last}"]
    with monkeypatch.context() as patch:
        if last == 4:
            patch.setattr(train.Trainer, "train_step", interrupted)
        resumed = train.extend(dataclasses.replace(config, resume=True))
    assert same_weights(whole, resumed)
    rows = [[(row["step"], row["value"]) for row in lines_of(path / "results.jsonl")] for path in (whole, resumed)]
    assert rows[0] == rows[1] and [step for step, _ in rows[0]] == [2, 2, 4, 4]
    ends = [json.loads((path / "endprompt.json").read_text())["final_loss"] for path in (whole, resumed)]
    assert ends[0] == ends[1] is not None


@pytest.mark.parametrize("step", [2, 4])
def test_several_processes_save_before_an_evaluation_and_the_step_once(step, tmp_path, monkeypatch):
    """In which one of them may fail alone: then no state can be made any more."""
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.step, trainer.steps, trainer.saved, trainer.saving, trainer.here = step, 4, None, None, World(size=2)
    done = []
    monkeypatch.setattr(checkpoint, "save_state", lambda *given: done.append("saved"))
    monkeypatch.setattr(checkpoint, "collect", lambda *given: {})
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *given: done.append("evaluated"))
    for name in ("model", "optimizer", "rows", "config", "guard", "source"):
        setattr(trainer, name, MagicMock())
    monkeypatch.setattr(loop, "identity", lambda config: {})
    trainer.seconds = trainer.last_loss = 0.0
    trainer.evaluate_kept([], tmp_path / "states")
    trainer.keep(tmp_path / "states")  # what save_every asks for after it
    assert done == ["saved", "evaluated"]


def test_a_refusal_of_the_main_process_is_said_by_all(monkeypatch):
    from endprompt import distributed

    sent = []
    monkeypatch.setattr(distributed, "from_main", lambda value, *group: sent.append(value) or "no room")
    with pytest.raises(ValueError, match="no room"):
        distributed.by_main(distributed.World(rank=1, size=2), interrupted)  # does not do the work itself

    def fails():
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        distributed.by_main(distributed.World(rank=0, size=2), fails)
    assert sent == [None, "no room"]
