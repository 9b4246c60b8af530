"""Fixtures that several test files share: a tiny tokenizer, tiny checkpoints of several architectures, documents."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process and of those that tests start: others run beside them

import pytest
import torch

from tests.support.checkpoints import WORDS, make_checkpoint, make_tokenizer, small_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


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
    return functools.partial(small_config, llama, documents, str(tmp_path / "out"))
