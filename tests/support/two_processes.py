"""What each of two processes does, by configurations by name.

Whole runs, of which `compiled` goes through torch.compile but for the code that it writes (a minute of C++), a run that
one process has begun, one that is cut off after the second step for one process to resume, one that both resume, and
some that must fail. Of `whole` it counts what is read of the checkpoint, of some how often weights are gathered.
"""

import json
from unittest import mock

import safetensors
import torch
import torch.distributed as dist

from endprompt import config, model, train
from tests.support.runs import cut_off

REFUSED = (
    "uneven",
    "short",
    "shifted",
    "documents",
    "thirds",
    "cut",
    "lengths",
    "windows",
    "masters whole",
    "graph",
    "damaged",
    "shapes",
    "other",
)
read: list[int] = []


class Counted:
    """A file of weights whose read bytes are counted."""

    def __init__(self, *args, **kwargs):
        self.file = opened(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountedSlice(self.file.get_slice(name))


class CountedSlice:
    def __init__(self, stored):
        self.stored = stored

    def get_shape(self):
        return self.stored.get_shape()

    def get_dtype(self):
        return self.stored.get_dtype()

    def __getitem__(self, place):
        part = self.stored[place]
        read.append(part.nbytes)
        return part


def runs(configs: list[config.ExtendConfig], begun: list[config.ExtendConfig] = ()) -> None:
    """Whole runs, and some that are cut off before their last step."""
    for one in configs:
        train.extend(one)
    for one in begun:
        cut_off(one, step=one.steps - 1)


def gathers(one: config.ExtendConfig) -> list[int]:
    """How often each step of a run gathers a unit's weights."""
    name = next(
        one for one in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, one)
    )  # since torch 2.13
    gather, step, made, counts = getattr(dist, name), train.Trainer.train_step, [], []

    def counted(*given, **named):
        made.append(name)
        return gather(*given, **named)

    def stepped(self, *given):
        made.clear()
        outcome = step(self, *given)
        counts.append(len(made))
        return outcome

    with mock.patch.object(dist, name, counted), mock.patch.object(train.Trainer, "train_step", stepped):
        train.extend(one)
    return counts


def main(jobs: dict[str, dict]) -> None:
    def config_of(name, **changes):
        return config.ExtendConfig(**jobs[name] | changes)

    if "whole" in jobs:
        safetensors.safe_open = Counted
        train.extend(config_of("whole"))
        safetensors.safe_open = opened
        print(json.dumps({"rank": dist.get_rank(), "read": sum(read)}), flush=True)
    others = {"whole", "compiled", "begun", "broken", "again", "moments begun", *REFUSED}
    for name in (name for name in jobs if name not in others):
        counts = gathers(config_of(name))
        print(json.dumps({"run": name, "gathers": counts}), flush=True)
    if "compiled" in jobs:
        real = torch.nn.Module.compile
        torch.nn.Module.compile = lambda self: real(self, backend="aot_eager", fullgraph=False)
        train.extend(config_of("compiled"))
        torch.nn.Module.compile = real
    if "begun" not in jobs:
        return
    train.extend(config_of("begun", resume=True))
    for name in ("broken", "again"):
        cut_off(config_of(name), step=2)
    cut_off(config_of("moments begun"), step=1)
    train.extend(config_of("again", resume=True))
    model.ATTENTIONS["eager"] = model.ATTENTIONS["shifted"]  # for `other`, whose data are damaged too
    for name in REFUSED:
        try:
            train.extend(config_of(name))
        except ValueError as error:
            print(error)


opened = safetensors.safe_open
