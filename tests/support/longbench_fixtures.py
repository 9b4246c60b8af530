"""Small documents of our own in LongBench's schema, tokenizers of three kinds, and language models that answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.longbench import TASKS, TASKS_E, dataset_of

WORDS = [
    *("river", "stone", "lantern", "harbour", "ledger", "copper", "valley", "winter", "engine", "garden", "letter"),
    *("bridge", "signal", "market", "window", "captain", "orchard", "thunder", "marble", "canvas", "meadow", "needle"),
    *("timber", "anchor", "beacon", "silver", "hollow", "parcel", "ribbon", "saddle", "tunnel", "velvet"),
]
HAN = "山水风云日月星河春夏秋冬东西南北中国人民城市学校老师学生工作生活时间问题方法研究发展经济文化历史科学技术"
CLASSES = ["Person", "Place", "Place name", "Number", "Reason"]


def text(rng: random.Random, words: int) -> str:
    """Sentences of random words, so that no answer below can be found in them by chance."""
    out = []
    for start in range(0, words, 11):
        out.append(" ".join(rng.choices(WORDS, k=min(11, words - start))).capitalize() + ".")
    return " ".join(out)


def chinese(rng: random.Random, chars: int) -> str:
    return "".join(rng.choice(HAN) + ("，" if i % 13 == 12 else "。" if i % 31 == 30 else "") for i in range(chars))


def code(rng: random.Random, lines: int) -> str:
    return "".join(f"def {a}_{b}({c}):\n    return {c} + {rng.randint(0, 9)}\n" for a, b, c in triples(rng, lines // 2))


def triples(rng: random.Random, n: int) -> list[list[str]]:
    return [rng.choices(WORDS, k=3) for _ in range(n)]


ANSWERS = {
    "qa_f1": ["Zebra Quartz Kayak", "the quartz kayak"], "qa_f1_zh": ["熊猫吃竹子", "竹子"],
    "rouge_l": ["A zebra rowed the quartz kayak home. It rained."], "rouge_l_zh": ["熊猫在竹林里吃竹子", "熊猫吃竹子"],
    "classification": ["Place name"], "count": ["7"], "retrieval": ["Paragraph 7"], "retrieval_zh": ["段落7"],
    "code_similarity": ["    return zebra_kayak(quartz)"],
}  # fmt: skip


def documents(task: str, n: int = 4, words: int = 400, seed: int = 0) -> list[dict]:
    """`n` documents; in LongBench-E their lengths fall in turn into 0-4k, 4-8k and 8k+."""
    rules = dataset_of(task)
    rng = random.Random(f"{task} {seed}")
    make = {"zh": chinese, "code": code}.get(rules.language, text)
    lengths = (3999, 4000, 7999, 8000)
    return [
        {
            "input": "" if rules.name in ("lcc", "gov_report", "passage_count") else f"Which one is number {i}?",
            "context": make(rng, words),
            "answers": ANSWERS[rules.metric],
            "length": lengths[i % 4] if task in TASKS_E else words,
            "dataset": rules.name,
            "language": rules.language,
            "all_classes": CLASSES if rules.metric == "classification" else None,
            "_id": f"{task}-{i}",
        }
        for i in range(n)
    ]


def write_data(folder: Path, tasks=TASKS + TASKS_E, **options) -> Path:
    folder.mkdir(exist_ok=True)
    for task in tasks:
        (folder / f"{task}.jsonl").write_bytes(jsonl(documents(task, **options)))
    return folder


def jsonl(items: list[dict]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("byte_bpe", "metaspace", "wordpiece")


def tokenizer(kind: str, vocabulary: int = 600):
    """A fast tokenizer trained on the fixtures' kind of text, with the special tokens that such models have."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(1)
    corpus = [text(rng, 200), chinese(rng, 300), code(rng, 40), "Answer the question based on the given passages."]
    special = ["<s>", "</s>", "<unk>"]
    if kind == "byte_bpe":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "metaspace":
        inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=vocabulary + 256, special_tokens=special + bytes_)
    else:
        special = ["[CLS]", "[SEP]", "[UNK]"]
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special)
    inner.train_from_iterator(corpus, trainer)
    start, end, unknown = special[:3]
    tail = f" {end}" if kind == "wordpiece" else ""
    ids = [(token, inner.token_to_id(token)) for token in (start, end)]
    inner.post_processor = processors.TemplateProcessing(single=f"{start} $A{tail}", special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=start, eos_token=end, unk_token=unknown, pad_token=end
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def answering_model(answer):
    """An lm-eval model that answers by a function of the request (input text, document)."""
    from lm_eval.api.model import LM

    class Answering(LM):
        def generate_until(self, requests):
            return [answer(request.args[0], request.doc) for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        @property
        def tokenizer_name(self):
            return "fixture"

        def apply_chat_template(self, messages, add_generation_prompt=True):
            tail = "<|assistant|>" if add_generation_prompt else ""
            return "<s>" + "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + tail

    return Answering()


def tasks(names, *, data_dir, tokenizer, window, **more):
    """lm-eval tasks of these sets, for a tokenizer and a window as lm-eval's model arguments would give them."""
    from benchmarks.tasks.longbench_task import PREFIX, LongBenchTask

    metadata = {"data_dir": str(data_dir), "max_length": window, **more}
    return [
        LongBenchTask({"task": PREFIX + name, "metadata": dict(metadata)}, tokenizer=tokenizer) for name in list(names)
    ]
