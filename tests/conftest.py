"""Fixtures that several test files share: a tiny tokenizer, tiny checkpoints of several architectures, documents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

WINDOW, TARGET, VOCABULARY = 32, 128, 320
SENTENCE = "the grass is green the sky is blue the sun is yellow here we go there and back again"
WORDS = SENTENCE.split()


def make_tokenizer():
    """A byte-level BPE tokenizer of 320 entries, made from a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 50 + ["End. This is the end of text, please pay attention"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_config(architecture: str, **changes):
    """A config of two small layers for one of the architectures that the tests cover."""
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    own = {
        "Llama": {"tie_word_embeddings": True},
        "Mistral": {"sliding_window": None},
        "Qwen2": {},
        "Qwen3": {"head_dim": 16},
        "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "Gemma": {"head_dim": 16},
    }[architecture]
    return getattr(transformers, f"{architecture}Config")(**(common | own | changes))


def make_checkpoint(directory: Path, architecture: str = "Llama", seed: int = 0, **changes) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    with torch.no_grad():  # biases and norms are made with constants, which would hide an error in them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`checkpoints("Mistral")` is a directory with a tiny random checkpoint, made once a session."""
    made: dict[str, Path] = {}

    def get(architecture: str = "Llama") -> Path:
        if architecture not in made:
            made[architecture] = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / architecture, architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def llama(checkpoints):
    return checkpoints("Llama")


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """A JSONL file of 60 documents of 30 to 150 words; the generator is seeded."""
    import random

    draw = random.Random(7)
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(60):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(30, 150)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def extend_config(llama, documents, tmp_path):
    """`extend_config(steps=3, ...)`: a small configuration of `train.extend`, any field changed."""
    from endprompt.train import ExtendConfig

    def make(**changes) -> ExtendConfig:
        values = {
            "model": str(llama),
            "data": [str(documents)],
            "output": str(tmp_path / "out"),
            "target": TARGET,
            "prompt": "EP_3",
            "rows": 4,
            "steps": 4,
            "warmup": 2,
            "lr": 1e-3,
            "device": "cpu",
            "log_every": 1,
        }
        return ExtendConfig(**(values | changes))

    return make
