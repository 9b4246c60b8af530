"""Predictions are appended to a file as they come, and what is there is not asked again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from benchmarks import chat
from benchmarks.ruler import cell
from benchmarks.scoring.predictions import read_run
from benchmarks.tasks.sample_task import without_echo
from endprompt.results import append_rows
from endprompt.text import Reader
from endprompt.train.progress import clock


class Predictions:
    """Predictions on disk, one JSON line each, appended as they come. Several processes write a file each. An entry
    answers for a request only if run, task, index, prompt and generation limit are the same: `run` is the hash of
    everything else that a prediction depends on (`benchmarks.scoring.fingerprint`)."""

    def __init__(self, directory: Path, run: str, rank: int = 0):
        self.path = directory / ("predictions.jsonl" if rank == 0 else f"predictions.rank{rank}.jsonl")
        self.run = run
        self._known = {key: entry["prediction"] for key, entry in read_run(directory, run).items()}

    def get(self, request: Instance) -> str | None:
        return self._known.get(request_key(request))

    def add(self, entries: Sequence[tuple[Instance, str, dict[str, Any]]]) -> None:
        """(request, prediction, further columns) of each."""
        lines = []
        for request, prediction, more in entries:
            key = request_key(request)
            self._known[key] = prediction
            named = dict(zip(("task", "index", "prompt_sha256", "max_new_tokens"), key))
            lines.append({"run": self.run, **named, "prediction": prediction, **more})
        append_rows(self.path, lines)


def request_key(request: Instance) -> tuple[str, int, str, int | None]:
    """(task, index, hash of the prompt, generation limit)."""
    prompt, settings = request.args
    return str(request.task_name), int(request.doc_id or 0), cell.text_sha256(prompt), settings.get("max_gen_toks")


class RecordingLM(LM):
    """Any lm-eval model, with predictions written down as they come and not made twice."""

    def __init__(
        self,
        inner: Any,
        predictions: Predictions,
        chunk: int,
        progress: Progress | None = None,
        note: Callable[[str, dict[str, Any], str], dict[str, Any]] = lambda task, doc, answer: {},
        thoughts: Mapping[str, int] | None = None,
    ):
        """note: further columns of a prediction, from (task, doc, prediction). thoughts: of tasks whose answers begin
        with a thought, the tokens for it beside the answer's; it is kept in a column of its own."""
        super().__init__()
        self.thoughts = thoughts or {}
        self.note = note
        self.inner, self.predictions, self.chunk = inner, predictions, chunk
        self.progress = progress or Progress(total=0, quiet=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    rank = property(lambda self: self.inner.rank)
    world_size = property(lambda self: self.inner.world_size)
    device = property(lambda self: self.inner.device)
    tokenizer_name = property(lambda self: self.inner.tokenizer_name)

    # what the base class has of its own would hide the model's
    all_gather = property(lambda self: self.inner.all_gather)
    gather_object = property(lambda self: self.inner.gather_object)
    barrier = property(lambda self: self.inner.barrier)
    apply_chat_template = property(lambda self: self.inner.apply_chat_template)
    chat_template = property(lambda self: self.inner.chat_template)
    loglikelihood = property(lambda self: self.inner.loglikelihood)
    loglikelihood_rolling = property(lambda self: self.inner.loglikelihood_rolling)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The longest first; requests of several tasks run together where the model makes up its own batches."""
        waiting: dict[str, dict[tuple[str, int], Instance]] = {}
        for request in requests:
            if self.known(request) is None:
                task, index = str(request.task_name), int(request.doc_id or 0)
                together = "" if hasattr(self.inner, "batches") else task
                waiting.setdefault(together, {})[task, index] = request
        self.progress.skip(len(requests) - sum(len(own) for own in waiting.values()))
        reader = Reader(known) if (known := getattr(self.inner, "tokenizer", None)) else None
        for own in waiting.values():
            began = time.perf_counter()
            for group in self.answered(sorted(own.values(), key=lambda request: -prompt_tokens(request))):
                seconds = time.perf_counter() - began
                if reader is not None:
                    self.progress.made += sum(map(len, reader.ids([answer for _, answer in group])))
                answers = [(request, *self.parted(request, answer)) for request, answer in group]
                self.predictions.add([(r, a, self.note(str(r.task_name), r.doc, a) | more) for r, a, more in answers])
                tokens = sum(prompt_tokens(request) for request, _ in group)
                self.progress.step(str(group[-1][0].task_name), len(group), tokens, seconds)
                began = time.perf_counter()
        return [answer for request in requests if (answer := self.known(request)) is not None]

    def answered(self, todo: Sequence[Instance]) -> Iterator[list[tuple[Instance, str]]]:
        """Requests with their answers as they come: by the model's own batches if it has them, else by chunks."""
        asked = [self.with_thought(request) for request in todo]
        if hasattr(self.inner, "batches"):
            for batch in self.inner.batches(asked):
                yield [(todo[i], answer) for i, answer in batch]
            return
        for start in range(0, len(todo), self.chunk):
            group = asked[start : start + self.chunk]
            yield list(zip(todo[start : start + self.chunk], self.inner.generate_until(group), strict=True))

    def with_thought(self, request: Instance) -> Instance:
        prompt, settings = request.args
        if not (more := self.thoughts.get(str(request.task_name))):
            return request
        asked = {**settings, "max_gen_toks": settings["max_gen_toks"] + more}
        return dataclasses.replace(request, arguments=(prompt, asked))

    def parted(self, request: Instance, text: str) -> tuple[str, dict[str, Any]]:
        """(answer, columns of its thought). Tokens that the thought left over are not the answer's to use."""
        answer = without_echo(text, request.args[0])
        if str(request.task_name) not in self.thoughts:
            return answer, {}
        thought, found = chat.cut_thought(answer)
        if found is None:
            return "", {"thought": thought, "unfinished": True}
        reader, limit = Reader(self.inner.tokenizer), request.args[1]["max_gen_toks"]
        if len(ids := reader.ids([found])[0]) > limit:
            found = reader.decode(ids[:limit])
        return found, {"thought": thought}

    def known(self, request: Instance) -> str | None:
        return self.predictions.get(request)


def prompt_tokens(request: Instance) -> int:
    """Prompt tokens where the sample says so, else characters: for order and throughput."""
    return int(request.doc.get("length") or len(request.args[0]))


class Progress:
    """One line of state on stderr: rewritten on a terminal, else a line every few seconds."""

    def __init__(self, total: int, quiet: bool = False, every: float = 10.0):
        self.total, self.quiet, self.every = total, quiet, every
        self.done = self.tokens = self.made = 0  # samples, tokens of their prompts and of their answers
        self.seconds = self._shown = 0.0
        self.terminal = sys.stderr.isatty() and not os.environ.get("NO_COLOR")

    def skip(self, n: int) -> None:
        self.total -= n
        if self.terminal and not self.quiet and self.done < self.total:  # the first batch may take minutes
            print(f"\r\x1b[K{self.done}/{self.total} samples", end="", file=sys.stderr, flush=True)

    def step(self, task: str, n: int, tokens: int, seconds: float) -> None:
        self.done += n
        self.tokens += tokens
        self.seconds += seconds
        now, last = time.perf_counter(), self.done >= self.total
        if self.quiet or not (last or self.terminal or now - self._shown >= self.every):
            return
        self._shown = now
        left = (self.total - self.done) * self.seconds / self.done
        speed = f"{self.tokens / self.seconds:,.0f} tokens/s"
        line = f"{task}: {self.done}/{self.total} samples, {speed}, {clock(left)} left"
        end = "\n" if last or not self.terminal else ""
        print(f"\r\x1b[K{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def no_environment_report() -> Iterator[None]:
    """lm-eval asks torch and git for reports after each run, seconds of work: ours are in environment.json."""
    from unittest import mock

    with (
        mock.patch("torch.utils.collect_env.get_pretty_env_info", lambda: "see environment.json"),
        mock.patch("lm_eval.evaluator.get_git_commit_hash", lambda: None),
        mock.patch("lm_eval.loggers.utils.get_commit_from_path", lambda path: None),
    ):
        yield
