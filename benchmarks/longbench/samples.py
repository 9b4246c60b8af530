"""LongBench's samples: documents to prompts that fit the model's window, and predictions to percent.

Bai et al. 2023, arXiv:2308.14508; rules, prompts and metrics as in the benchmark's own repository (THUDM/LongBench).
Needs no lm-eval until prompts are read, no jieba until Chinese is scored, and no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.longbench import metrics
from benchmarks.longbench.prompts import Prompter
from benchmarks.longbench.sets import TASKS, TASKS_E, Documents, dataset_of, load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score(dataset: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None) -> float:
    """Percent that one prediction earns: the best over all answers, after the set's own post-processing. `all_classes`
    are the labels of a classification set (trec, lsht). Raises ValueError if they are missing, if there is no answer,
    or if the set is unknown.
    """
    rules = dataset_of(dataset)
    answers = [answers] if isinstance(answers, str) else list(answers)
    if not answers:
        raise ValueError(f"a prediction needs at least one answer to be scored: {dataset=}")
    if rules.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if rules.metric == "classification":
        if not all_classes:
            raise ValueError(f"a classification set needs all_classes: {dataset=}")
        return 100 * max(metrics.classification(prediction, answer, all_classes) for answer in answers)
    metric: Callable[[str, str], float] = getattr(metrics, rules.metric)
    return 100 * max(metric(prediction, answer) for answer in answers)


def build_samples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    data_dir: str | Path | None = None,
    documents: Documents | None = None,
    n: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """What the model is given for the first `n` documents of a task (all by default), in the documents' order.

    Each sample has `input` (the text for the tokenizer, which adds BOS itself if it does so by default), `outputs` (the
    answers), `all_classes`, `length` (tokens of the input, special ones included), `max_new_tokens`, `truncated`
    (whether the middle was cut out), `words` (the document's own length), `index` and `id`. Documents are read from
    `data_dir` unless they are given; `options` are those of `Prompter`. Raises what `load_documents` does, and
    ValueError if the window leaves no room for the prompt.
    """
    prompter = Prompter(task, tokenizer, window, **options)
    items = (documents or load_documents(task, data_dir)).items[:n]
    return prompter.samples(items, prompter.fit(items))


def select(names: Sequence[str]) -> list[str]:
    """Tasks by name; `all` are the 21 sets, `english` the 16 that papers average, `extended` LongBench-E. Raises
    ValueError with the nearest names for an unknown one, and if none is named.
    """
    groups = {
        "all": list(TASKS),
        "english": [name for name in TASKS if dataset_of(name).language != "zh"],
        "extended": list(TASKS_E),
    }
    chosen = [task for name in names for task in groups.get(name, [name])]
    if not chosen:
        raise ValueError("tasks must name at least one LongBench set, or be all, english or extended")
    for task in chosen:
        dataset_of(task)
    return list(dict.fromkeys(chosen))
