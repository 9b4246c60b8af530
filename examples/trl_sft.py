"""Extend a checkpoint in TRL's SFTTrainer (pip install trl).

    python examples/trl_sft.py --model CHECKPOINT --data documents.jsonl --target 65536 --output extended

A line of the data is {"text": ...}. SFTTrainer has a loss of its own, which takes no weights: every scored token
counts 1, the end prompt's too (prompt_weight 1), or not at all (prompt_weight 0).
"""

from __future__ import annotations

import argparse

import datasets
import transformers
import trl

from endprompt.collate import PositionalCollator, prepare_model


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the loss of each step."""
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--data", "--output"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--row-tokens", type=int, required=True, help="of a row, the end prompt included")
    parser.add_argument("--scheme", default="pose")
    parser.add_argument("--prompt", default="none", help="EP_1, recall ..., for schemes with one")
    parser.add_argument("--scaling", default="yarn")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=64, help="micro-batches of a step")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--packed", action="store_true", help="several short documents in a row, kept apart")
    given = parser.parse_args(argv)

    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    prepare_model(model, given.scaling, given.target, packed=given.packed)
    collator = PositionalCollator(
        tokenizer, scheme=given.scheme, target=given.target, prompt=given.prompt, row_tokens=given.row_tokens
    )

    def tokenized(record: dict, index: int) -> dict:
        ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [*ids, tokenizer.eos_token_id], "index": index}

    documents = datasets.load_dataset("json", data_files=given.data, split="train")
    documents = documents.map(tokenized, with_indices=True, remove_columns=documents.column_names)
    if given.packed:  # here, since SFTTrainer's own packing takes no collator but its own
        documents = trl.pack_dataset(documents.remove_columns("index"), given.row_tokens)
        documents = documents.add_column("index", range(len(documents)))
    settings = trl.SFTConfig(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=given.rows,
        gradient_accumulation_steps=given.accumulate,
        learning_rate=given.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        max_length=None,  # the collator cuts rows, at another place of the document each time
        packing=False,
        train_sampling_strategy="sequential",  # the documents as they come; "random" shuffles them
        remove_unused_columns=False,  # keeps `index`, by which the collator draws
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=documents, data_collator=collator, processing_class=tokenizer
    )
    trainer.train()
    model.config.use_cache = True  # a Trainer turns it off, and it would be saved so
    trainer.save_model(given.output)
    tokenizer.save_pretrained(given.output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
