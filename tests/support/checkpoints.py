"""A tiny tokenizer and tiny random checkpoints of several architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    own = {
        "Llama": {"tie_word_embeddings": True},
        "Mistral": {"sliding_window": None},
        "Qwen2": {},
        "Qwen3": {"head_dim": 16},
        "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "Gemma": {"head_dim": 16},
        "Gemma3Text": {
            "head_dim": 16,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    }[architecture]
    return getattr(transformers, f"{architecture}Config")(**(common | own | changes))


def small_config(model: Path, documents: Path, output: str, /, **changes):
    """A small configuration of `train.extend`, any field changed."""
    from endprompt.config import ExtendConfig

    values = {"model": str(model), "data": [str(documents)], "output": output, "target": TARGET, "prompt": "EP_3"}
    values |= {"rows": 4, "steps": 4, "warmup": 2, "lr": 1e-3, "device": "cpu", "log_every": 1}
    return ExtendConfig(**(values | changes))


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


def odd_checkpoint(directory):
    """Biases, an untied head, a vocabulary that two processes cannot halve, and several files with an index."""
    from transformers import AutoModelForCausalLM

    make_checkpoint(directory, "Qwen2", vocab_size=321)
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.generation_config.temperature, model.generation_config.do_sample = 0.25, True
    model.save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def renamed_checkpoint(source, directory):
    """The base model's own names, without `model.`: transformers knows what they mean."""
    shutil.copytree(source, directory)
    weights = load_file(directory / "model.safetensors")
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    return directory


def checkpoint_with_a_head_of_its_own(directory):
    """The config says that head and embeddings are one, the file has both and they differ."""
    make_checkpoint(directory, tie_word_embeddings=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return directory


def checkpoint_of_experts(directory):
    """A weight of the model is put together from several tensors of the file, one an expert."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "sliding_window": None}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads, **experts)).save_pretrained(directory)
    assert any("experts.3." in name for name in load_file(directory / "model.safetensors"))
    make_tokenizer().save_pretrained(directory)
    return directory


def checkpoint_of_kinds(directory):
    """Gemma 3: a layer that slides over 8 tokens and one that sees everything, each with its own frequencies."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": WINDOW}
    kinds = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    AutoModelForCausalLM.from_config(Gemma3TextConfig(**sizes, **kinds)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def damaged_checkpoint(directory):
    path = make_checkpoint(directory) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    return directory


def checkpoint_of_other_shapes(directory):
    path = make_checkpoint(directory) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, path, {"format": "pt"})
    return directory
