"""A tiny tokenizer and tiny random checkpoints of several architectures."""

from __future__ import annotations

from pathlib import Path

import torch

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
