"""lm-eval's own groups by name, `--suite lm-eval:GROUP`, as samples of this project's recording.

So answers are kept and not asked for again, rows have intervals over samples, two runs can be compared, and a prompt
over the window loses its middle instead of its start. For tasks that generate, and whose score is a mean over samples.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import logging
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.tasks import TaskManager

from benchmarks.originals import command, say_version
from benchmarks.scoring.config import ScoreConfig
from benchmarks.scoring.evaluate import MeanSuite
from benchmarks.scoring.suite import GROUPS
from benchmarks.scoring.units import Asker, Unit
from endprompt.files import sha256_of
from endprompt.text import Reader

#: Groups whose tasks exist at several lengths: how lm-eval's metadata name one.
LENGTHS: dict[str, Callable[[int], str]] = {"babilong": lambda length: f"{length // 1024}k"}
NEW_TOKENS = 256  # where a task does not say, as in lm-eval


@functools.cache
def manager(folder: str | None) -> TaskManager:
    """All of lm-eval's tasks, and those of task files in the folder. Reading their names takes seconds."""
    return TaskManager(include_path=folder)


class LmEval(MeanSuite):
    generator = f"lm-eval {version('lm_eval')}"

    def __init__(self, config: ScoreConfig):
        super().__init__(config)
        self.group = GROUPS.get(config.suite) or config.suite.partition(":")[2]
        self.data = config.data_dir if config.suite in GROUPS else None  # copies of the hub's data, no task files
        self.tasks = None if self.data else config.data_dir
        self.named = next((name for start, name in LENGTHS.items() if self.group.startswith(start)), None)
        known = manager(self.tasks).task_index
        if self.group not in known:
            near = difflib.get_close_matches(self.group, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"lm-eval knows no group or task {self.group!r}{hint}")
        if self.named is None and config.lengths != type(config).lengths:
            groups = ", ".join(LENGTHS)
            raise ValueError(f"lengths are for groups of {groups}, and not for {self.group}: {config.lengths}")

    @property
    def asked(self) -> str:
        """Task files of the user's own, which say where answers end."""
        paths = sorted(Path(self.tasks).rglob("*.yaml")) if self.tasks else []
        return sha256_of(*(path.read_bytes() for path in paths)) if paths else ""

    def units(self, asker: Asker) -> list[Unit]:
        """Raises ValueError for tasks that do not generate, data that are not to be had, a window that is too small."""
        made = []
        for length in self.config.length_list if self.named else [None]:
            asked = {"max_seq_lengths": self.named(length)} if self.named and length else {}
            metadata = {"tokenizer": asker.tokenizer.name_or_path, **asked}
            for name, task in load(self.group, self.tasks, metadata, self.data).items():
                made.append(self.unit(name, task, length, asker))
        return made

    def unit(self, name: str, task: Any, length: int | None, asker: Asker) -> Unit:
        config, reader, window, template = self.config, asker.reader, asker.window, asker.template
        metric = str(next(iter(task.aggregation())))
        task.set_fewshot_seed(seed=config.seed)
        task.build_all_requests(
            limit=config.limit,
            apply_chat_template=config.chat,
            fewshot_as_multiturn=config.chat,
            chat_template=template and functools.partial(template, add_generation_prompt=True),
            tokenizer_name=reader.name,
        )
        kept = config.max_new_tokens or int(task.config.generation_kwargs.get("max_gen_toks", NEW_TOKENS))
        if window - kept < 2:
            raise ValueError(f"{name}: the window must hold a prompt beside {kept} tokens for the answer: {window}")
        samples: list[dict[str, Any]] = []
        for request in task.instances:
            text, tokens, cut = cut_middle(reader, request.args[0], window - kept)
            about = {"outputs": [str(task.doc_to_target(request.doc))], "until": request.args[1].get("until") or []}
            about |= {"length": tokens, "max_new_tokens": kept, "truncated": cut, "document": request.doc}
            samples.append({"input": text, **about})
        if not samples:
            raise ValueError(f"{name}: it has no samples")
        generator, score = f"{self.generator}, version {task.VERSION}", functools.partial(score_of, task, metric)
        columns: dict[str, Any] = {"group": self.group, "shots": task.config.num_fewshot or 0}
        return asker.unit(name, length, metric, samples, score, generator, **columns)


def load(group: str, folder: str | None, metadata: Mapping[str, Any], data: str | None = None) -> dict[str, Any]:
    """The group's tasks by name, with their data: the hub's, or its copy in the folder `data`."""
    import datasets

    tasks = manager(folder)
    try:
        with (
            mock.patch.object(tasks._factory, "_meta", dict(metadata)),
            mock.patch.object(datasets, "load_dataset", functools.partial(read_data, data)),
            # BABILong's tasks advise on --metadata, which is given here
            mock.patch.object(logging.getLogger("lm_eval.api.task"), "disabled", True),
        ):
            found = tasks.load(group)["tasks"]
    except Exception as error:  # the hub's and the datasets package's are of many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        brings = [f"; {command(suite, data)} brings the data" for suite, name in GROUPS.items() if name == group]
        what = "".join([first, *brings])
        raise ValueError(f"lm-eval:{group}: a task or its data cannot be loaded: {what}") from error
    if others := [name for name, task in found.items() if task.OUTPUT_TYPE != "generate_until"]:
        raise ValueError(
            f"lm-eval:{group}: tasks that generate are scored, and these ask for something else: "
            f"{', '.join(others[:5])}"
        )
    return found


def read_data(data: str | None, path: str, name: str | None = None, features: Any = None, **options: Any) -> Any:
    """A hub's data set, or its copy in the folder `data`.

    lm-eval's InfiniteBench states its columns by a mapping that the package does not take, and calls splits _en that
    the data call _eng.
    """
    from datasets import Features, List, Value
    from datasets.load import load_dataset  # the package's own name is replaced meanwhile

    if features and not isinstance(features, Features):
        kinds = {column: Value(about["dtype"]) for column, about in features.items()}
        features = Features({c: List(kind) if features[c].get("sequence") else kind for c, kind in kinds.items()})
    where = (path, name) if data is None else local_copy(Path(data), path, name, options)
    found = load_dataset(*where, features=features, **options)
    if isinstance(found, dict):
        found.update({split[:-1]: rows for split, rows in found.items() if split.endswith("_eng")})
    return found


def local_copy(data: Path, path: str, name: str | None, options: dict[str, Any]) -> tuple[str, str | None]:
    """What `load_dataset` is asked for: `data`/the set's name, a copy of its repository, or files SPLIT.jsonl (.json,
    .parquet; SPLIT-00000-of-00002 and so on are one), which `options` then names, in a folder of the configuration's
    name if there are several."""
    folder, split = data / path.rpartition("/")[2], options.get("split")
    if not folder.is_dir():
        raise ValueError(f"--data-dir {data} must hold the folder {folder.name}, a copy of the hub's data set {path}")
    if (folder / "README.md").is_file():
        return str(folder), name
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    files: dict[str, list[str]] = {}
    for one in filter(lambda one: one.suffix in kinds, sorted((folder / (name or "")).glob("*"))):
        files.setdefault(re.sub(r"-\d{5}-of-\d{5}$", "", one.stem), []).append(str(one))
    if not files or (split and split not in files):
        raise ValueError(f"{folder / (name or '')}: must hold {split or 'SPLIT'}.jsonl, .json or .parquet")
    options["data_files"] = files = {split: files[split]} if split else files
    for suite, file in itertools.product(GROUPS, itertools.chain(*files.values())):
        say_version(suite, Path(file))
    return kinds[Path(next(iter(files.values()))[0]).suffix], None


def score_of(task: Any, metric: str, sample: Mapping[str, Any], answer: str) -> float:
    """The task's own score of an answer, behind its first filter."""
    from lm_eval.api.instance import Instance

    request = Instance("generate_until", sample["document"], ("", {}), 0)
    request.resps = [answer]
    task._filters[0].apply([request])
    value = task.process_results(sample["document"], [request.filtered_resps[task._filters[0].name]])[metric]
    if not isinstance(value, (int, float)):
        raise ValueError(f"{task.config.task}: {metric} is no number of single samples: {type(value).__name__}")
    return float(value)


def cut_middle(reader: Reader, prompt: str, room: int) -> tuple[str, int, bool]:
    """(the prompt, its middle cut out if it has over `room` tokens; its tokens; whether it was cut)."""
    (ids,) = reader.ids([prompt])
    lead = len(reader.lead(ids))
    text, tokens, keep = prompt, lead + len(ids), room - lead
    while tokens > room:
        text = reader.decode(ids[: keep // 2]) + reader.decode(ids[len(ids) - keep // 2 :])
        tokens = len(reader.prompts([text])[0])
        keep -= max(1, tokens - room)
    return text, tokens, text is not prompt


SUITE = LmEval
