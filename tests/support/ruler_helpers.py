"""Small tokenizers, a tiny model and data in the suites' layouts, made on the spot."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

STORY = (
    "The old harbour lay quiet under a low sun. Nobody had rowed out since Tuesday, and the nets hung dry. "
    '"We will wait," said Mara, "until the wind turns." Her brother counted the boats again: there were nine. '
    "Special numbers, magic words, the grass and the sky: all of it was hidden in the text of an afternoon. "
    "What are we to do? He mentioned the provided rope, the yellow lamp, and a letter that had come back again. "
)


def corpus() -> list[str]:
    from benchmarks.ruler import texts

    words = texts.common_words()
    needle = texts.needle().format(type_needle_v="numbers", key="long-winter", value="1234567")
    return (
        [STORY] * 20
        + ["".join(texts.noise())] * 20
        + [" ".join(words[i : i + 40]) for i in range(0, 8000, 40)]
        + [needle] * 20
    )


@functools.cache
def tokenizer(kind: str = "bytes", size: int = 2048, bos: bool = True) -> PreTrainedTokenizerFast:
    """kind: "bytes" (byte-level BPE), "metaspace" (SentencePiece-like), "wordpiece", "glued" (merges across words)."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
    elif kind == "metaspace":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))])
    elif kind == "glued":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    made.train_from_iterator(corpus(), trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def essay_file(directory: Path, repeats: int = 40) -> Path:
    path = directory / "story.txt"
    path.write_text(STORY * repeats)
    return path


def checkpoint(directory: Path, window: int = 512, kind: str = "llama", seed: int = 0) -> Path:
    """A tiny random model with its tokenizer, as a checkpoint directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    tok = tokenizer()
    shape = dict(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=window,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    torch.manual_seed(seed)
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=64))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    return directory


def qa_files(directory: Path, articles: int = 12, paragraphs: int = 4) -> Path:
    """SQuAD and HotpotQA in miniature: our own texts in the sets' layouts."""
    places = ["harbour", "mill", "orchard", "quarry", "chapel", "market", "bridge", "tower"]
    data, hotpot = [], []
    for a in range(articles):
        entries = []
        for p in range(paragraphs):
            number = 1000 + 37 * a + p
            context = (
                f"The {places[a % len(places)]} of district {a} was rebuilt in the year {number}. "
                f"Part {p} of its story tells of the {places[p % len(places)]} and its {p + 2} gates. "
                + "Nothing else is known. "
                * (3 * a + p)
            )
            entries.append(
                {
                    "context": context,
                    "qas": [
                        {
                            "question": f"When was part {p} of district {a} rebuilt?",
                            "answers": [{"text": str(number)}, {"text": f"the year {number}"}],
                            "is_impossible": False,
                        },
                        {"question": "Who built it?", "answers": [], "is_impossible": True},
                    ],
                }
            )
        data.append({"title": f"District {a}", "paragraphs": entries})
        context = [[f"Title {a}-{i}", [f"Fact {i} of {a}. ", "It is small."]] for i in range(3)]
        hotpot.append({"question": f"What is fact 1 of {a}?", "answer": f"Fact 1 of {a}", "context": context})
    (directory / "squad.json").write_text(json.dumps({"version": "v2.0", "data": data}))
    (directory / "hotpotqa.json").write_text(json.dumps(hotpot))
    return directory
