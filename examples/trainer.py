"""Extend a checkpoint in transformers' own Trainer.

    python examples/trainer.py --model CHECKPOINT --data documents.jsonl --target 65536 --output extended

A line of the data is {"text": ...}. The result is a standard checkpoint: `endprompt score extended` reads it.
"""

from __future__ import annotations

import argparse

import datasets
import transformers

from endprompt.collate import PositionalCollator, WeightedSteps, prepare_model


class Trainer(WeightedSteps, transformers.Trainer):
    """Divides a step's loss by the total of its weights."""


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
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=64, help="micro-batches of a step")
    parser.add_argument("--lr", type=float, default=2e-5)
    given = parser.parse_args(argv)

    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    prepare_model(model, given.scaling, given.target)
    collator = PositionalCollator(
        tokenizer,
        scheme=given.scheme,
        target=given.target,
        prompt=given.prompt,
        row_tokens=given.row_tokens,
        prompt_weight=0.1,
        weights=True,
    )

    def tokenized(record: dict, index: int) -> dict:
        ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [*ids, tokenizer.eos_token_id], "index": index}

    documents = datasets.load_dataset("json", data_files=given.data, split="train")
    documents = documents.map(tokenized, with_indices=True, remove_columns=documents.column_names)
    settings = transformers.TrainingArguments(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=given.rows,
        gradient_accumulation_steps=given.accumulate,
        learning_rate=given.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        train_sampling_strategy="sequential",  # the documents as they come; "random" shuffles them
        remove_unused_columns=False,  # keeps `index`, by which the collator draws
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=documents, data_collator=collator)
    trainer.train()
    model.config.use_cache = True  # a Trainer turns it off, and it would be saved so
    trainer.save_model(given.output)
    tokenizer.save_pretrained(given.output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
