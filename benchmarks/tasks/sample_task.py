"""Samples that are there already as an lm-eval task."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble

from benchmarks.ruler import cell


def without_echo(prediction: str, prompt: str) -> str:
    """The prediction less the prompt, which some backends give back: the answers stand in the prompt too."""
    return prediction.removeprefix(prompt)


class SampleTask(Task):
    """An lm-eval task over ready samples (dicts with input, outputs, max_new_tokens), read one by one. The prompt is
    the sample's `input` as it stands. Scores of single samples are kept, in their order, in `scores`. prompts: the hash
    of each sample's prompt; asking for requests raises ValueError for a prompt that is another.
    """

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(self, name: str, samples: Sequence[dict[str, Any]], score: Any, prompts: Sequence[str] = ()):
        self.samples, self._score, self._prompts = samples, score, prompts
        self.scores: list[float] = []
        self.configure(name)

    def configure(self, name: str, metadata: Mapping[str, Any] | None = None, **generation: Any) -> None:
        """As lm-eval's own configurable task, without the base class's __init__, which would make a config of its own.
        Everything is generated: a stop at the first newline would leave nothing of an answer that starts with one.
        """
        self._config = TaskConfig(
            task=name,
            output_type=self.OUTPUT_TYPE,
            generation_kwargs={"until": [], "do_sample": False, **generation},
            num_fewshot=0,
            metadata={**(metadata or {}), "version": self.VERSION},
        )
        self._instances: list[Instance] = []
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]

    def has_training_docs(self) -> bool:
        return False

    has_validation_docs = has_training_docs

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
        if prompts and cell.text_sha256(ctx) != prompts[doc["index"]]:
            raise ValueError(
                f"{self.config.task}: prompt {doc['index']} is not the one that was measured and hashed: "
                "a chat template must give the same text every time"
            )
        settings = {
            "until": doc.get("until", []),
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": doc["max_new_tokens"],
        }
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
