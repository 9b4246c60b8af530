"""What a prediction depends on, in one place and as one hash, and the runs that a directory holds.

`Fingerprint` lists every ingredient beside the prompt, which is hashed as the text that the model reads. Its hash is
the `run_sha256` of rows, summaries and depths and the `run` of predictions; all of them go by it. `runs.jsonl` of a
run directory says what each hash stands for, in what environment its answers were made, and by its last line which
run the directory's summary, depths, configuration and environment are of.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scoring.suite import suite_of
from endprompt import files, results
from endprompt import runs as rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from benchmarks.scoring.config import ScoreConfig

RUNS = "runs.jsonl"
DAY = "day.txt"
#: Settings that choose the prompts, which are hashed one by one as texts: with more samples, the answers of few stay.
#: (The short-text tasks make theirs inside lm-eval: for them `Fingerprint.asked` has what they depend on.)
PROMPTS = frozenset(
    {"tasks", "lengths", "samples", "seed", "data_dir", "haystack_text", "shots", "hops"}
    | {"window", "chat_layout", "prompt_length", "system"}
)
#: Settings that change no prediction: where and under what name it is kept, what is shown, how many run together.
FREE = frozenset(
    {"output", "name", "method", "cache_dir", "prepare_only", "overwrite", "show", "wrong", "compare", "json", "quiet"}
    | {"beyond_window", "batch_size", "tokenizer", "concurrency", "timeout", "retries"}
)
#: Files of a checkpoint that say something about it and change no answer.
NOTES = frozenset({"endprompt.json", "environment.json", "origin.json", "sources.json", "trainer_state.json"})
READ = frozenset({".json", ".model", ".jinja", ".txt", ".py", ".tiktoken", ".safetensors", ".bin", ".pt", ".pth"})


@dataclass(frozen=True)
class Fingerprint:
    """All that a prediction depends on beside its prompt's text.

    The first group is what is asked, the same for two models that are compared; the second is who answers.

    Args:
        suite: whose tasks.
        generator, edition: their version, and the state of RULER's.
        max_new_tokens: limit of an answer, where it is not the task's own.
        chat: whether prompts are wrapped in the chat template.
        date: day that the template was given, None if it reads none.
        template_args: further arguments of the template, such as thinking options.
        asked: of tasks whose prompts are made by lm-eval, what they depend on.
        checkpoint: hash of weights, configuration, generation configuration, tokenizer, template, own code.
        trust_remote_code: whether that code is run.
        backend, backend_args, attn, dtype, device: what computes, and in what precision; of a server nothing is known.
        whole_answers: whether answers go on when their score is settled.
        url, model, api, served: the server, its name of the model, how it is asked, and what it says of the model.
        thinking: whether and how long the model thinks before it answers.
            Fields with a default came later: at their default they are not hashed, so that older answers stay valid.
    """

    suite: str
    generator: str
    edition: str
    max_new_tokens: int | None
    chat: bool
    date: str | None
    template_args: str
    asked: str
    checkpoint: str
    trust_remote_code: bool
    backend: str
    backend_args: str
    attn: str | None
    dtype: str
    device: str
    whole_answers: bool
    url: str | None = None
    model: str | None = None
    api: str = "completions"
    served: str = ""
    thinking: str | None = None

    @property
    def sha256(self) -> str:
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        kept = {field.name: value for field, value in values if value != field.default}
        return files.sha256_of(json.dumps(kept, sort_keys=True))


#: The first group of the fingerprint's fields.
QUESTION = ("suite", "generator", "edition", "max_new_tokens", "chat", "date", "template_args", "asked")


def fingerprint(config: ScoreConfig, model_config: PretrainedConfig) -> Fingerprint:
    """Of a run whose `date` is settled (`benchmarks.scoring.run.settle_date`)."""
    suite, served = suite_of(config), getattr(model_config, "served", None)
    as_set = ("suite", "edition", "max_new_tokens", "chat", "date", "template_args", "trust_remote_code", "backend")
    return Fingerprint(
        **{name: getattr(config, name) for name in (*as_set, "url", "api", "thinking")},
        generator=suite.generator,
        asked=suite.asked,
        checkpoint="" if served else checkpoint_sha256(config.checkpoint, model_config),
        backend_args=with_files(config.backend_args),
        attn=config.attn if config.backend == "hf" else None,
        dtype="" if served else config.dtype,
        device="" if served else device_of(config.device).partition(":")[0],
        whole_answers=config.answers != "until settled",
        model=served.model if served else config.model,
        served=json.dumps(served.identity, sort_keys=True) if served else "",
    )


def with_files(arguments: str) -> str:
    """Arguments of the backend; behind one that names a folder or file (an adapter, a template) the hash of that."""
    parts = []
    for part in arguments.split(","):
        path = part.partition("=")[2].strip()
        digest = checkpoint_sha256(path, None) if os.path.isdir(path) else ""
        digest = files.remembered_sha256(path) if os.path.isfile(path) else digest
        parts.append(f"{part} ({digest})" if digest else part)
    return ",".join(parts)


def device_of(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def checkpoint_sha256(checkpoint: str, model_config: PretrainedConfig | None) -> str:
    """Hash of every file of a checkpoint that answers may depend on, whole; of a model of the hub, its revision."""
    directory = Path(checkpoint)
    if not directory.is_dir():
        return files.sha256_of(checkpoint, str(getattr(model_config, "_commit_hash", None)))
    read = {path for path in directory.iterdir() if path.suffix in READ and path.name not in NOTES and path.is_file()}
    paths = sorted(read | {*directory.glob("*chat_templates/*.jinja")})  # beside the one that is taken by default
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(files.remembered_sha256, paths)
        return files.sha256_of(*(f"{path.relative_to(directory)} {one}" for path, one in zip(paths, digests)))


def runs(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of runs.jsonl; none in a directory that was scored before there was one. Raises ValueError naming file
    and line if one is damaged."""
    path = Path(directory) / RUNS
    if not path.is_file():
        return []
    found, kinds = [], {"run_sha256": str, "fingerprint": dict, "environment": dict}
    for number, line in files.read_json_lines(path):
        if wrong := [key for key, kind in kinds.items() if not isinstance(line.get(key), kind)]:
            raise ValueError(f"{path}, line {number}: a run must have run_sha256, fingerprint and environment: {wrong}")
        found.append(line)
    return found


def last_run(directory: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the last line of runs.jsonl, the rows of that run). Raises ValueError for what no scoring has written."""
    path = Path(directory) / "results.jsonl"
    if not path.is_file() or not (known := runs(directory)):
        raise ValueError(f"{directory} must be the output of `endprompt score`, with rows and {RUNS}: score it again")
    return known[-1], [row for row in results.read_rows(path) if row.get("run_sha256") == known[-1]["run_sha256"]]


def rows_of(checkpoint: str | Path, run: str | Path) -> list[dict[str, Any]]:
    """The rows of a finished run that were scored on this very checkpoint, the latest of each task and length. Raises
    ValueError if the run has none: the checkpoint's configuration and weights must be those of the rows."""
    from endprompt import model

    about, rows = last_run(run)
    now = checkpoint_sha256(str(checkpoint), model.load_config(str(checkpoint)))
    same = about["fingerprint"].get("checkpoint") == now
    found = {(row["suite"], row["task"], row["length"]): row for row in rows if same}
    if not found:
        raise ValueError(f"{run}/results.jsonl: none of its rows was scored on {checkpoint} as it is now")
    return sorted(found.values(), key=lambda row: (row["suite"], row["task"], row["length"] or 0))


def begin(directory: Path, config: ScoreConfig, made_by: Fingerprint, computes: bool) -> rows.RunDirectory:
    """The directory with this run as its last; its environment is the earlier one where nothing is left to compute."""
    files.drop_cut_line(directory / RUNS)
    known = [line["environment"] for line in runs(directory) if line["run_sha256"] == made_by.sha256]
    environment = rows.environment() if computes or not known else known[-1]
    out = rows.RunDirectory(directory, config, environment)
    line = {"run_sha256": made_by.sha256, "fingerprint": dataclasses.asdict(made_by), "environment": environment}
    results.append_rows(directory / RUNS, [line])
    return out


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What two runs were asked that is not the same, as NAME: VALUE and VALUE."""
    one, other = first["fingerprint"], second["fingerprint"]
    return [f"{key}: {one.get(key)!r} and {other.get(key)!r}" for key in QUESTION if one.get(key) != other.get(key)]


def read_day(directory: Path) -> str | None:
    """The day that the directory's chat prompts are made for, as its first start wrote it down."""
    from benchmarks.chat import parse_day

    path = directory / DAY
    if not path.is_file():
        return None
    text = path.read_bytes().decode(errors="replace").strip()
    try:
        parse_day(text)
    except ValueError:
        rule = "must hold the day of the run's prompts as YYYY-MM-DD"
        raise ValueError(f"{path}, line 1: {rule}: {text[:40]!r}") from None
    return text
