"""The model as transformers runs it for lm-eval: prompts of like length together.

`LongContextLM` is lm-eval's HFLM with the generation loop of `benchmarks.scoring.generate`. This module imports
lm_eval; import it inside functions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from benchmarks.scoring import generate
from benchmarks.scoring.settled import end_of
from benchmarks.scoring.units import contexts_cut
from endprompt.model import length_rope, parity, weights
from endprompt.model.load import check_tokens
from endprompt.text import Reader


class Complete:
    """Loads models whose weights are the checkpoint's, where transformers fills up with random numbers or drops some,
    and which compute what transformers' own do."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
        model, report = loaded
        weights.settle(model, report)
        length_rope.rows_alone(model)
        parity.check_loaded(model.eval())
        return model


class LongContextLM(HFLM):
    """HFLM that generates greedily from unpadded prompts, last-position logits only. Raises ValueError for a prompt
    that with its generation is over `max_length`: nothing is ever cut off."""

    def __init__(self, *args: Any, **kwargs: Any):
        if kwargs.get("device") == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=True)  # unless told so, Accelerate takes processes without a GPU for single ones
        super().__init__(*args, **kwargs)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            # HFLM shares the work only among processes that see several GPUs; others would each do all of it.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        """Puts an adapter on by itself: HFLM would first make the embeddings as many as the tokenizer's entries."""
        with mock.patch.object(self, "AUTO_MODEL_CLASS", Complete):
            super()._create_model(*args, **kwargs)
        if peft:
            from peft import PeftModel

            model: Any = PeftModel.from_pretrained(getattr(self, "_model"), peft)  # noqa: B009
            model.tie_weights = lambda: None  # HFLM's next step: a head in the adapter is tied to nothing
            self._model = model

    def get_model_info(self) -> dict[str, Any]:
        """Without asking the hub for a revision, which HFLM does even for local paths."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}

    settles = False  # whether answers end when their score is settled

    @functools.cached_property
    def reader(self) -> Reader:
        return Reader(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """As prompts are measured: BOS once, no EOS behind; lm-eval's add_bos_token=False still takes BOS away."""
        if add_special_tokens is not None or self.add_bos_token is False:
            ids = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        else:
            ids = self.reader.prompts([string])[0][-(left_truncate_len or 0) :]
        check_tokens(ids, self.model.config, self.tokenizer, f"the prompt {string[:40]!r}")
        return ids

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """As the model wrote it: some tokenizers would take spaces before punctuation away."""
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """lm-eval pads the texts of a batch, where frequencies may depend on the length: such texts go one by one."""
        self.cut |= contexts_cut(requests, self.max_length + 1)  # the last token is asked for and not read
        alone = any(map(length_rope.length_kinds, self.model.modules()))
        with mock.patch.object(self, "batch_size_per_gpu", 1 if alone else self.batch_size_per_gpu):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    @functools.cached_property
    def cut(self) -> set[str]:
        """Contexts of log-likelihoods that lm-eval cut on their left."""
        return set()

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
        stops = self.stop_tokens
        limit = int(self.batch_size)
        for batch in generate.run(self.model, jobs, stops=stops, batch_size=limit, found=self.way):
            yield [(i, self.text(tokens, untils[i])) for i, tokens in batch]

    @functools.cached_property
    def way(self) -> generate.Way:
        return generate.way(self.model, self.tokenizer)

    def end_of(self, request: Instance, until: tuple[str, ...]) -> Callable[[list[int]], bool]:
        """Whether tokens end the answer: a stop string is in them, or the score is settled."""
        if until:
            return lambda tokens: any(stop in self.tok_decode(tokens) for stop in until)
        return end_of(self.tokenizer, request.doc, request.args[0]) if self.settles else generate.never

    def text(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        text = self.tok_decode([token for token in tokens if token not in self.stop_tokens])
        return text[: min((text.find(stop) for stop in until if stop in text), default=None)]

    @functools.cached_property
    def stop_tokens(self) -> frozenset[int]:
        return generate.stop_tokens(self.model, self.tokenizer)
