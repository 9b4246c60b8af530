"""The method as a library: `extend`, `score` and `verify` as calls, with the settings of the commands of that name."""

import dataclasses
import difflib
import importlib
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What does a command's work, and takes its settings; by name, since the packages above may not be imported here.
WORK = {"extend": "endprompt.train:extend", "score": "benchmarks.scoring:score", "verify": "analysis.verify:verify"}


def extend(
    model: str | Path, data: str | Path | Sequence[str | Path], output: str | Path, target: int, **settings: Any
) -> Path:
    """Extend a checkpoint's window to `target` tokens; returns the finished checkpoint's directory.

    model: a directory, a hub's ORG/NAME (@REVISION), or a GGUF file. data: files, token shards, or a mixture
    (`FILE:WEIGHT`). output: appears when the run is finished. settings: the other flags of `endprompt extend`, fields
    of `endprompt.config.ExtendConfig` (steps or tokens among them). Raises ValueError naming key, value and rule.

        endprompt.extend("base", "books.jsonl", "extended", 65536, scheme="pose", scaling="yarn", steps=1000)
    """
    return call("extend", model=model, data=data, output=output, target=target, **settings)


def score(checkpoint: str | Path, **settings: Any) -> list[dict[str, Any]]:
    """Score a checkpoint on RULER, LongBench or short-text tasks; returns the rows of results, scores in percent.

    settings: the other flags of `endprompt score`, fields of `benchmarks.scoring.ScoreConfig`. The rows are also in the
    run's directory (`output`), from which the same call goes on. Raises ValueError naming key, value and rule.

        endprompt.score("extended", tasks="niah_single_1,vt", lengths="4096,65536", samples=100)
    """
    return call("score", checkpoint=checkpoint, **settings)


def verify(checkpoint: str | Path, **settings: Any) -> Any:
    """Check the certified bounds on a checkpoint's own weights; returns an `analysis.findings.VerifyReport`: `.holds`,
    `.rows` of results, and `.table()`, what the command prints.

    settings: the other flags of `endprompt verify`, fields of `analysis.config.VerifyConfig`. Raises ValueError naming
    key, value and rule.

        assert endprompt.verify("extended", against="base", output="runs/verify").holds
    """
    return call("verify", checkpoint=checkpoint, **settings)


def call(command: str, /, **settings: Any) -> Any:
    """What a command's work returns for these settings, which are checked as the command checks its flags."""
    module, _, function = WORK[command].partition(":")
    work = getattr(importlib.import_module(module), function)
    return work(configured(command, typing.get_type_hints(work)["config"], settings))


def configured(name: str, kind: type, settings: dict[str, Any]) -> Any:
    """The settings as the command's dataclass. Raises ValueError for an unknown one, or a value of another type."""
    import jsonargparse

    from endprompt.cli import bad_usage, is_list

    hints, given = typing.get_type_hints(kind), {}
    for key, value in settings.items():
        if key not in {field.name for field in dataclasses.fields(kind)}:
            near = difflib.get_close_matches(key, hints, n=1)
            raise ValueError(f"{name} has no setting {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if is_list(hints[key]) and isinstance(value, (str, os.PathLike)):
            value = [value]
        several = isinstance(value, (list, tuple))
        given[key] = [_plain(item) for item in value] if several else _plain(value)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        values = parser.parse_object(given)
    except (jsonargparse.ArgumentError, TypeError, KeyError) as error:
        raise ValueError(f"{name}: {bad_usage(str(error), [])}") from None
    return kind(**values.as_dict())


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
