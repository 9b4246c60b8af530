"""The output of a run: OUTPUT, which appears when it is whole, OUTPUT.partial until then, and whose they are."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from endprompt import distributed, files
from endprompt.config import ExtendConfig, check_output
from endprompt.data import Mixture, Rows
from endprompt.distributed import World, say
from endprompt.files import read_object
from endprompt.results import RECORD
from endprompt.runs import plain
from endprompt.train import states as checkpoint
from endprompt.train.states import TrainingState


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run. flags: what the run goes on with, beside its own."""

    def __init__(self, flags: dict[str, bool]):
        super().__init__()
        self.flags = flags


def resumed_if_begun(config: ExtendConfig, here: World) -> ExtendConfig:
    """With `resume_or_start` the configuration that resumes where there is something of this output."""
    path = Path(config.output)
    begun = config.resume_or_start and ((path / RECORD).is_file() or files.aside(path).exists())
    return dataclasses.replace(config, resume=config.resume or bool(distributed.from_main(begun)))


class Output:
    """A run's paths, which it claims, resumes or starts, and commits. path: OUTPUT, a finished checkpoint. work:
    OUTPUT.partial, which everything is written to. states: the training states in it.
    """

    def __init__(self, config: ExtendConfig, here: World):
        self.config, self.here = config, here
        self.path = Path(config.output)
        self.work = files.aside(self.path)
        self.states = self.work / "states"

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        """Hold the output for this run; yields whether it is finished already. Raises ValueError if it is another's."""
        with distributed.only_run(self.path, self.here):
            finished = self.finished()
            if not finished:
                self.check()
            yield finished

    def finished(self) -> bool:
        """Whether a resumed run ended after all: its output is whole and of the same configuration. With `overwrite` an
        output beside an unfinished run is the one that this run is to replace.
        """
        config, record = self.config, self.path / RECORD
        if not (config.resume and record.is_file()) or (config.overwrite and self.work.exists()):
            return False
        saved = read_object(record).get("config")
        if not isinstance(saved, dict):
            raise ValueError(f"{record}: must hold the run's configuration, an object `config`")
        return all(saved.get(key) == value for key, value in identity(config).items())

    def check(self) -> None:
        """Refuse to mix runs: a finished output needs `overwrite`, an unfinished one `resume` (or `overwrite`)."""
        config = self.config
        check_output(config.output, config.overwrite, RECORD, "run")
        if config.resume and not self.work.exists():
            raise ValueError(f"there is no unfinished run to resume: {self.work} does not exist")
        if not (config.resume or config.overwrite) and self.work.exists() and checkpoint.states(self.states):
            raise ValueError(
                f"an unfinished run has states in {self.work}; set resume to go on, or overwrite to start again"
            )

    def resume(self, rows: Rows | Mixture, source: dict[str, Any]) -> TrainingState | None:
        """The state to go on from; without one nothing is left of an earlier run. The last check of all processes.
        source: `endprompt.model.load.identity` of the checkpoint that is extended.
        """
        config = self.config
        state = checkpoint.newest_state(self.states, self.here) if config.resume else None
        if state is not None:
            check_identity(config, rows, source, state.about)
        distributed.gathered(None)  # nothing is written before every process has made its checks
        if self.here.main and state is None and self.work.exists():
            if config.resume:
                say(f"no whole training state in {self.states}: starting at the first step")
            shutil.rmtree(self.work)
        return state

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """From where the output is ours: Ctrl-C tells how to go on with this run, not with one that was before it."""
        try:
            yield
        except KeyboardInterrupt:
            kept = checkpoint.states(self.states) or not self.work.exists()  # it is renamed when it is whole
            raise Interrupted({"resume": True} if kept and not self.config.resume else {}) from None

    def drop_unless_kept(self) -> None:
        """Leave nothing of a run that has no training state."""
        if not checkpoint.states(self.states):
            shutil.rmtree(self.work)

    def commit(self, write: Callable[[], None]) -> None:
        """Let the main process write what the run leaves into `work`, and rename that to `path`."""

        def whole() -> None:
            write()
            files.sync_tree(self.work)
            if self.path.exists():
                shutil.rmtree(self.path)
            os.replace(self.work, self.path)
            shutil.rmtree(self.path / "states", ignore_errors=True)  # last, so that a crash before can be resumed

        distributed.by_main(self.here, whole)


def check_identity(config: ExtendConfig, rows: Rows | Mixture, source: dict[str, Any], about: dict[str, Any]) -> None:
    """Refuse a state of another configuration, or of a checkpoint or data that have changed since."""
    ours = identity(config)
    saved = identity(ExtendConfig()) | about.get("config", {})  # a setting that is newer than the state
    different = sorted(key for key in ours if saved.get(key) != ours[key])
    if different:
        key = different[0]
        raise ValueError(
            f"resume needs the configuration that the run was started with: {key}={ours[key]!r}, the state has "
            f"{saved.get(key)!r} ({', '.join(different)} differ)"
        )
    known = about.get("checkpoint", source)
    for key in sorted(source.keys() & known.keys()):  # a key that only one release of transformers has is no change
        if known[key] != source[key]:
            raise ValueError(
                f"resume needs the checkpoint that the run was started with, and model={config.model!r} has changed: "
                f"{key}={source[key]!r}, the state has {known[key]!r}"
            )
    if about.get("documents") != rows.sha256:
        raise ValueError(f"resume needs the documents that the run was started with: data={config.data} have changed")


def identity(config: ExtendConfig) -> dict[str, Any]:
    """What must agree between a run and the state it resumes from."""
    free = {"output", "resume", "overwrite", "micro_rows", "log_every", "save_every", "keep", "device", "compile"}
    free |= {"report", "max_epochs", "divergence", "checkpointing", "fused", "context_parallel", "keep_gathered"}
    free |= {"shard", "async_save", "resume_or_start"}
    free |= {key for key in vars(config) if key.startswith("eval_")}
    return {key: plain(value) for key, value in dataclasses.asdict(config).items() if key not in free}
