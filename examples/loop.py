"""Extend a checkpoint in a loop of one's own.

    python examples/loop.py --model CHECKPOINT --data documents.jsonl --target 65536 --output extended

A line of the data is {"text": ...}. A row that is drawn for a document is a pure function of the seed and `index`.
"""

from __future__ import annotations

import argparse
import json

import torch
import transformers

from endprompt.collate import PositionalCollator, prepare_model


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the loss of each step."""
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--data", "--output"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--row-tokens", type=int, required=True, help="of a row, the end prompt included")
    parser.add_argument("--scheme", default="endprompt")
    parser.add_argument("--prompt", default="EP_1", help="none for schemes without one")
    parser.add_argument("--scaling", default="yarn")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--lr", type=float, default=2e-5)
    given = parser.parse_args(argv)

    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    prepare_model(model, given.scaling, given.target).train()
    collator = PositionalCollator(
        tokenizer,
        scheme=given.scheme,
        target=given.target,
        prompt=given.prompt,
        row_tokens=given.row_tokens,
        prompt_weight=0.1,
        weights=True,
    )
    with open(given.data, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(given.steps):
        samples = []
        for index in range(step * given.rows, (step + 1) * given.rows):
            ids = tokenizer(texts[index % len(texts)], add_special_tokens=False)["input_ids"]
            samples.append({"input_ids": [*ids, tokenizer.eos_token_id], "index": index})
        loss = model(**collator(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    return losses


if __name__ == "__main__":
    main()
