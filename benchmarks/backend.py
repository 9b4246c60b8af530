"""lm-eval's models and tasks as `endprompt score` uses them.

`LongContextLM` is lm-eval's HFLM with the generation of `benchmarks.generate`.
`RecordingLM` wraps any lm-eval model: it appends each prediction to a file as it comes and answers from the file what
was predicted before. This module imports lm_eval; import it inside functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.models.huggingface import HFLM
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM

from benchmarks import generate, ruler
from benchmarks.compare import read_run
from benchmarks.settled import settled_text
from endprompt import rows, weights
from endprompt.text import Reader


class Complete:
    """Loads models whose weights are those of the checkpoint; transformers fills up with random numbers, or drops."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
        model, report = loaded
        weights.settle(model, report)
        return model


class LongContextLM(HFLM):
    """HFLM that generates greedily from unpadded prompts, last-position logits only.

    Raises ValueError for a prompt that with its generation is over `max_length`: nothing is ever cut off.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        if kwargs.get("device") == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=True)  # unless told so, Accelerate takes processes without a GPU for single ones
        super().__init__(*args, **kwargs)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            # HFLM shares the work only among processes that see several GPUs; others would each do all of it.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        found: Any = self.AUTO_MODEL_CLASS  # type: ignore[has-type]
        self.AUTO_MODEL_CLASS = Complete
        try:
            super()._create_model(*args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = found

    def get_model_info(self) -> dict[str, Any]:
        """Without asking the hub for a revision, which HFLM does even for local paths."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}

    #: Whether the text made so far settles a request's score: (what lm-eval knows of it, prompt, text).
    settled: Callable[[dict[str, Any], str, str], bool] | None = None

    @functools.cached_property
    def reader(self) -> Reader:
        return Reader(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """As prompts are measured: BOS once, no EOS behind; lm-eval's add_bos_token=False still takes BOS away."""
        if add_special_tokens is not None or self.add_bos_token is False:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return self.reader.prompts([string])[0][-(left_truncate_len or 0) :]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """As the model wrote it: some tokenizers would take spaces before punctuation away."""
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = dict(answer for batch in self.batches(requests) for answer in batch)
        return [answers[i] for i in range(len(requests))]

    def batches(self, requests: Sequence[Instance]) -> Iterator[list[tuple[int, str]]]:
        """(index of the request, answer) of each batch as it is done."""
        jobs: list[generate.Job] = []
        untils: list[tuple[str, ...]] = []
        for request in requests:
            prompt, settings = request.args
            settings = dict(settings)
            if settings.get("do_sample") or settings.get("num_beams", 1) > 1:
                raise ValueError(f"generation is greedy: {settings}")
            ids, kept = self.tok_encode(prompt), int(settings.get("max_gen_toks") or self.max_gen_toks)
            if len(ids) + kept > self.max_length:
                raise ValueError(
                    f"prompt and generation must fit the window: {len(ids)} + {kept} tokens, window {self.max_length}"
                )
            untils.append(tuple(settings.get("until") or ()))
            jobs.append(generate.Job(ids, kept, self.end_of(request, untils[-1])))
        stops = frozenset(self.stop_tokens)
        limit = int(self.batch_size)
        for batch in generate.run(self.model, jobs, stops=stops, batch_size=limit, found=self.way):
            yield [(i, self.text(tokens, untils[i])) for i, tokens in batch]

    @functools.cached_property
    def way(self) -> generate.Way:
        return generate.way(self.model)

    def end_of(self, request: Instance, until: tuple[str, ...]) -> Callable[[list[int]], bool]:
        """Whether tokens end the answer: a stop string is in them, or the score is settled."""
        if until:
            return lambda tokens: any(stop in self.tok_decode(tokens) for stop in until)
        if self.settled is None:
            return generate.never
        settled = self.settled
        return lambda tokens: settled(request.doc, request.args[0], settled_text(self.tokenizer, tokens))

    def text(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        text = self.tok_decode([token for token in tokens if token not in self.stop_tokens])
        return text[: min((text.find(stop) for stop in until if stop in text), default=None)]

    @functools.cached_property
    def stop_tokens(self) -> set[int]:
        named = getattr(self.model.generation_config, "eos_token_id", None)
        stops = set(named if isinstance(named, list) else [named]) | {self.tokenizer.eos_token_id}
        return {token for token in stops if token is not None}


# ------------------------------------------------------------------------------------------------------- predictions


class Predictions:
    """Predictions on disk, one JSON line each, appended as they come. Several processes write a file each.

    An entry answers for a request only if run, task, index, prompt and generation limit are the same: `run` is the hash
    of everything else that a prediction depends on (`benchmarks.fingerprint`).
    """

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
        rows.append_rows(self.path, lines)


def request_key(request: Instance) -> tuple[str, int, str, int | None]:
    """(task, index, hash of the prompt, generation limit)."""
    prompt, settings = request.args
    return str(request.task_name), int(request.doc_id or 0), ruler.text_sha256(prompt), settings.get("max_gen_toks")


class RecordingLM(LM):
    """Any lm-eval model, with predictions written down as they come and not made twice."""

    def __init__(
        self,
        inner: Any,
        predictions: Predictions,
        chunk: int,
        progress: Progress | None = None,
        note: Callable[[str, dict[str, Any], str], dict[str, Any]] = lambda task, doc, answer: {},
    ):
        """note: further columns of a prediction, from (task, doc, prediction)."""
        super().__init__()
        self.note = note
        self.inner, self.predictions, self.chunk = inner, predictions, chunk
        self.progress = progress or Progress(total=0, quiet=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    rank = property(lambda self: self.inner.rank)
    world_size = property(lambda self: self.inner.world_size)
    device = property(lambda self: self.inner.device)
    tokenizer_name = property(lambda self: self.inner.tokenizer_name)

    def all_gather(self, tensor: Any) -> Any:
        return self.inner.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        return self.inner.gather_object(obj, dst)

    def barrier(self) -> None:
        self.inner.barrier()

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        return self.inner.apply_chat_template(*args, **kwargs)

    def chat_template(self, *args: Any, **kwargs: Any) -> str | None:
        return self.inner.chat_template(*args, **kwargs)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.inner.loglikelihood(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self.inner.loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The longest first; requests of several tasks run together where the model makes up its own batches."""
        waiting: dict[str, dict[tuple[str, int], Instance]] = {}
        for request in requests:
            if self.known(request) is None:
                task, index = str(request.task_name), int(request.doc_id or 0)
                together = "" if isinstance(self.inner, LongContextLM) else task
                waiting.setdefault(together, {})[task, index] = request
        self.progress.skip(len(requests) - sum(len(own) for own in waiting.values()))
        for own in waiting.values():
            began = time.perf_counter()
            for group in self.answered(sorted(own.values(), key=lambda request: -prompt_tokens(request))):
                seconds = time.perf_counter() - began
                answers = [(request, without_echo(answer, request.args[0])) for request, answer in group]
                self.predictions.add([(r, answer, self.note(str(r.task_name), r.doc, answer)) for r, answer in answers])
                tokens = sum(prompt_tokens(request) for request, _ in group)
                self.progress.step(str(group[-1][0].task_name), len(group), tokens, seconds)
                began = time.perf_counter()
        return [answer for request in requests if (answer := self.known(request)) is not None]

    def answered(self, todo: Sequence[Instance]) -> Iterator[list[tuple[Instance, str]]]:
        """Requests with their answers as they come: by the model's own batches if it has them, else by chunks."""
        if isinstance(self.inner, LongContextLM):
            for batch in self.inner.batches(todo):
                yield [(todo[i], answer) for i, answer in batch]
            return
        for start in range(0, len(todo), self.chunk):
            group = list(todo[start : start + self.chunk])
            yield list(zip(group, self.inner.generate_until(group), strict=True))

    def known(self, request: Instance) -> str | None:
        return self.predictions.get(request)


def prompt_tokens(request: Instance) -> int:
    """Prompt tokens where the sample says so, else characters: for order and throughput."""
    return int(request.doc.get("length") or len(request.args[0]))


class Progress:
    """One line of state on stderr: rewritten on a terminal, else a line every few seconds."""

    def __init__(self, total: int, quiet: bool = False, every: float = 10.0):
        self.total, self.quiet, self.every = total, quiet, every
        self.done = self.tokens = 0
        self.seconds = self._shown = 0.0
        self.terminal = sys.stderr.isatty() and not os.environ.get("NO_COLOR")

    def skip(self, n: int) -> None:
        self.total -= n

    def step(self, task: str, n: int, tokens: int, seconds: float) -> None:
        self.done += n
        self.tokens += tokens
        self.seconds += seconds
        now, last = time.perf_counter(), self.done >= self.total
        if self.quiet or not (last or self.terminal or now - self._shown >= self.every):
            return
        self._shown = now
        left = (self.total - self.done) * self.seconds / self.done
        line = (
            f"{task}: {self.done}/{self.total} samples, {self.tokens / self.seconds:,.0f} tokens/s, {clock(left)} left"
        )
        end = "\n" if last or not self.terminal else ""
        print(f"\r\x1b[K{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------------------------------------------------- tasks


def without_echo(prediction: str, prompt: str) -> str:
    """The prediction less the prompt, which some backends give back: the answers stand in the prompt too."""
    return prediction.removeprefix(prompt)


class SampleTask(Task):
    """An lm-eval task over ready samples (dicts with input, outputs, max_new_tokens), read one by one.

    The prompt is the sample's `input` as it stands. Scores of single samples are kept, in their order, in `scores`.
    prompts: the hash of each sample's prompt. Asking for requests raises ValueError for a prompt that is another.
    """

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(self, name: str, samples: Sequence[dict[str, Any]], score: Any, prompts: Sequence[str] = ()):
        self.samples, self._score, self._prompts = samples, score, prompts
        self.scores: list[float] = []
        self._config = TaskConfig(
            task=name, generation_kwargs={"until": [], "do_sample": False}, metadata={"version": self.VERSION}
        )
        self._instances: list[Instance] = []
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> Any:
        return self.samples

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return doc["input"]

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return str(doc["outputs"])

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int = 0, **kwargs: Any) -> str:
        return self.doc_to_text(doc)

    def build_all_requests(
        self, *, limit: int | None = None, rank: int = 0, world_size: int = 1, **kwargs: Any
    ) -> None:
        """As lm-eval's, less its request cache (whose key holds neither length nor tokenizer) and progress bar."""
        self._instances = [
            self.construct_requests(doc, self.doc_to_text(doc), metadata=(self.config.task, index, 1))
            for index, doc in self.doc_iterator(rank=rank, limit=limit, world_size=world_size)
        ]

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        prompts = getattr(self, "_prompts", ())
        if prompts and ruler.text_sha256(ctx) != prompts[doc["index"]]:
            raise ValueError(
                f"{self.config.task}: prompt {doc['index']} is not the one that was measured and hashed: "
                "a chat template must give the same text every time"
            )
        settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": doc["max_new_tokens"]}
        about = {key: value for key, value in doc.items() if key != "input"}
        return Instance("generate_until", about, (ctx, settings), 0, metadata=kwargs["metadata"])

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        return {"score": (doc["index"], self._score(doc, without_echo(results[0], doc["input"])))}

    def aggregation(self) -> dict[str, Any]:
        return {"score": self.collect}

    def collect(self, items: list[tuple[int, float]]) -> float:
        """Mean over all samples of all processes."""
        self.scores = [value for _, value in sorted(items)]
        return sum(self.scores) / len(self.scores)

    def higher_is_better(self) -> dict[str, bool]:
        return {"score": True}


class RulerTask(Task):
    """A RULER task for plain lm-eval, with the samples and scores of `endprompt score`.

    `config` is the YAML file's, whose task is named `endprompt_<task>`; its metadata (lm-eval's --metadata and model
    arguments) give `max_seq_lengths` (4096), `samples` (500), `seed` (0), `data_dir`, `cache_dir`, the options of
    `ruler.Options`, and the tokenizer as `tokenizer`, `pretrained` or `model`. There is one metric a length that is
    run, named by it. With --apply_chat_template the template's tokens are part of the budget.
    """

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(self, config: dict[str, Any]):
        self.ruler_task = str(config["task"]).removeprefix("endprompt_")
        ruler.check_task(self.ruler_task)
        self.metadata = dict(config.get("metadata") or {})
        lengths = self.metadata.get("max_seq_lengths", [4096])
        self.lengths = [int(length) for length in (lengths if isinstance(lengths, list) else [lengths])]
        self.chat = bool(self.metadata.get("chat", False))
        self._config = TaskConfig(
            task=config["task"],
            generation_kwargs={"until": [], "do_sample": False},
            num_fewshot=0,
            metadata={**self.metadata, "version": self.VERSION},
        )
        self._instances: list[Instance] = []
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]

    has_training_docs = SampleTask.has_training_docs
    has_validation_docs = SampleTask.has_validation_docs
    has_test_docs = SampleTask.has_test_docs
    doc_to_text = SampleTask.doc_to_text
    doc_to_target = SampleTask.doc_to_target
    fewshot_context = SampleTask.fewshot_context
    construct_requests = SampleTask.construct_requests

    def test_docs(self) -> Any:
        return self.samples

    @functools.cached_property
    def samples(self) -> ConcatDataset[dict[str, Any]]:
        """All lengths one after the other, rendered when read."""
        from transformers import AutoTokenizer

        from benchmarks import cache

        given = self.metadata
        name = next((given[key] for key in ("tokenizer", "pretrained", "model") if given.get(key)), None)
        if name is None:
            raise ValueError(f"{self.config.task} sizes its prompts by tokens: name a tokenizer in the metadata")
        tokenizer = AutoTokenizer.from_pretrained(name)
        Reader(tokenizer).check_plain()
        names = {option.name for option in dataclasses.fields(ruler.Options)}
        options = ruler.Options(**{**{k: v for k, v in given.items() if k in names}, "chat": self.chat})
        common = (int(given.get("samples", 500)), int(given.get("seed", 0)), given.get("data_dir"), options)
        cells: list[Any] = [
            cache.cell(self.ruler_task, length, tokenizer, *common, given.get("cache_dir")) for length in self.lengths
        ]
        return ConcatDataset(cells)

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        **kwargs: Any,
    ) -> None:
        if system_instruction:
            raise ValueError(f"{self.config.task} fills its budget exactly: a system instruction does not fit")
        self.chat = self.chat or apply_chat_template
        self._instances = [
            self.construct_requests(doc, self.doc_to_text(doc), metadata=(self.config.task, index, 1))
            for index, doc in self.doc_iterator(rank=rank, limit=limit, world_size=world_size)
        ]

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        prediction = without_echo(results[0], doc["input"])
        return {str(doc["budget"]): ruler.score(self.ruler_task, prediction, doc["outputs"])}

    def aggregation(self) -> dict[str, Any]:
        return {str(length): mean for length in self.lengths}

    def higher_is_better(self) -> dict[str, bool]:
        return {str(length): True for length in self.lengths}


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
