"""LongBench as an lm-eval task: one class, a task a set, which the files in `tasks/longbench` register for `lm_eval
--include_path`. lm-eval's metadata (its model arguments and `--metadata`) give data_dir (folder of the data), tokenizer
or pretrained (the tokenizer that cuts the prompts), max_length (the window, where it is not the checkpoint's own) and
prompt_length (cut prompts above this many tokens, as published tables do).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean  # its standard error is known to lm-eval

from benchmarks import longbench
from benchmarks.longbench import TASKS_E, dataset_of, load_documents, prompts
from benchmarks.longbench.sets import BUCKETS, bucket
from benchmarks.tasks.sample_task import SampleTask
from endprompt.text import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "endprompt_longbench_"


class LongBenchTask(SampleTask):
    """One set. Metrics a document: `score` in percent, and `truncated`, of which the sum counts the cut prompts.
    LongBench-E's tasks have `0-4k`, `4-8k` and `8k+` beside `score`: the mean over the documents of that length, nan if
    there is none. lm-eval's own request cache is not used: its key knows neither the window nor the tokenizer.
    """

    def __init__(self, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.metadata = dict(config.get("metadata") or {})
        self.set_name = str(config["task"]).removeprefix(PREFIX)
        rules = dataset_of(self.set_name)
        self.tokenizer = tokenizer
        self.documents = load_documents(self.set_name, self.metadata.get("data_dir"))
        # What lm-eval hands around and logs: no texts, which fill the requests already.
        self.docs = [
            {"index": i, "id": str(item.get("_id", i)), "answers": item["answers"], "words": item["length"]}
            | {"all_classes": item.get("all_classes") or None}
            for i, item in enumerate(self.documents.items)
        ]
        # (The benchmark stops SAMSum at a newline and forbids one as the first token. Its first line is all that is
        # scored, so the two differ only for a model that would begin with a newline.)
        about = {**self.metadata, "data_sha256": self.documents.sha256}
        self.configure(str(config["task"]), about, max_gen_toks=rules.max_new_tokens, temperature=0.0)

    def test_docs(self) -> list[dict[str, Any]]:
        return self.docs

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        return prompts.prompt_text(self.set_name, self.documents.items[doc["index"]])

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        return doc["answers"][0]

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **unused: Any,
    ) -> None:
        """Make this rank's requests: prompts cut in the middle to the window, then wrapped where the set is wrapped."""
        generation = self.config.generation_kwargs
        chosen = list(self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size))
        tokenizer = self.tokenizer or tokenizer_of(self.metadata)
        Reader(tokenizer).check_plain()
        built = longbench.build_samples(
            self.set_name,
            tokenizer,
            window=window_of(self.metadata),
            documents=dataclasses.replace(
                self.documents, items=[self.documents.items[doc["index"]] for _, doc in chosen]
            ),
            prompt_length=self.metadata.get("prompt_length"),
            chat_template=chat_template if apply_chat_template else None,
            system=system_instruction,
            add_special_tokens=self.metadata.get("add_bos_token"),
            max_new_tokens=generation["max_gen_toks"],
        )
        self._instances = []
        for (doc_id, doc), sample in zip(chosen, built, strict=True):
            doc |= {"truncated": sample["truncated"], "prompt_tokens": sample["length"]}
            self._instances += self.construct_requests(doc, sample["input"], metadata=(self.config.task, doc_id, 1))

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        arguments = (ctx, deepcopy(self.config.generation_kwargs))
        return [Instance(request_type="generate_until", doc=doc, arguments=arguments, idx=0, **kwargs)]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        score = longbench.score(self.set_name, results[0], doc["answers"], doc["all_classes"])
        values: dict[str, Any] = {"score": score, "truncated": int(doc["truncated"])}
        if self.set_name in TASKS_E:
            values |= {name: (bucket(doc["words"]), score) for name in BUCKETS}
        return values

    def aggregation(self) -> dict[str, Callable[[list[Any]], float]]:
        means: dict[str, Callable[[list[Any]], float]] = {"score": mean, "truncated": sum}
        if self.set_name in TASKS_E:
            means |= {name: bucket_mean(name) for name in BUCKETS}
        return means

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != "truncated" for name in self.aggregation()}


def bucket_mean(name: str) -> Callable[[list[tuple[str, float]]], float]:
    def mean_within(values: list[tuple[str, float]]) -> float:
        scores = [score for place, score in values if place == name]
        return mean(scores) if scores else float("nan")

    return mean_within


def tokenizer_of(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that lm-eval's model arguments name. Raises ValueError if they name none."""
    path = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(path, str):
        raise ValueError("LongBench's prompts are cut by the model's tokenizer: name it as tokenizer= in --metadata")
    return load_tokenizer(path, metadata.get("revision") or "main", bool(metadata.get("trust_remote_code")))


@cache
def load_tokenizer(path: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def window_of(metadata: Mapping[str, Any]) -> int:
    """The window that lm-eval's model arguments set (max_length, or vLLM's max_model_len), or the checkpoint's own."""
    if window := metadata.get("max_length") or metadata.get("max_model_len"):
        return int(window)
    from transformers import AutoConfig

    from endprompt.model import geometry

    if not isinstance(metadata.get("pretrained"), str):
        raise ValueError("LongBench's prompts are cut to the model's window: give it as max_length= in --metadata")
    trust = bool(metadata.get("trust_remote_code"))
    config = AutoConfig.from_pretrained(
        metadata["pretrained"], revision=metadata.get("revision") or "main", trust_remote_code=trust
    )
    return geometry.window_of(config).window
