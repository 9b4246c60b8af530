"""Trains a small compiled model on a GPU and prints the hash of its weights."""

import hashlib

import torch
from transformers import LlamaConfig

from endprompt.model import new_model, training_attention
from endprompt.model.attention import attention_backends
from endprompt.train import determinism
from endprompt.train.loss import linear_cross_entropy


def main() -> None:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=4096,
    )
    with determinism.repeatable():
        model = new_model(config, seed=0, dtype="float32", attention=training_attention("sdpa"), device="cuda")
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator("cuda").manual_seed(0)
        for _ in range(20):
            ids = torch.randint(1024, (4, 2048), device="cuda", generator=generator)
            with attention_backends(ids.device), torch.autocast("cuda", torch.bfloat16):
                hidden = model.model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
                labels = ids[:, 1:].flatten()
                weights = torch.full(labels.shape, 1 / len(labels), device="cuda")
                linear_cross_entropy(hidden, model.lm_head.weight, labels, weights).backward()
            optimizer.step()
            optimizer.zero_grad()
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
