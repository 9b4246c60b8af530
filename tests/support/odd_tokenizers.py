"""Tokenizers that do what published ones do at the ends of a text, small enough to type their ids by hand."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
BYTES = {f"<0x{i:02X}>": 3 + i for i in range(256)}
LETTERS = string.digits + string.ascii_letters + string.punctuation
#: Ids of `llama`: 259 the space, 260 two of them, then the characters of LETTERS, then the merged words.
CHARACTERS = {SPACE: 259, 2 * SPACE: 260} | {c: 261 + i for i, c in enumerate(LETTERS)}
MERGED = ("is", SPACE + "is", "yes", SPACE + "yes", "ye")


def wrapped(inner: Tokenizer, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def llama(kind: str = "prepend", bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE with bytes for unknown characters. kind: "prepend" (a normalizer, as Llama 2's), or Metaspace
    with the scheme "always", "first" or "never".
    """
    vocab = SPECIAL | BYTES | CHARACTERS
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(MERGED)}
    merges = [(SPACE, SPACE), ("i", "s"), (SPACE, "is"), ("y", "e"), ("ye", "s"), (SPACE, "yes")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    ends = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        made.decoder = decoders.Sequence([*ends, decoders.Strip(" ", 1, 0)])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        made.decoder = decoders.Sequence([*ends, *([] if kind == "never" else [decoders.Strip(" ", 1, 0)])])
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return wrapped(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model, NFKC and runs of spaces made one, as T5's and XLNet's kind."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), (SPACE, -4.0)]
    pieces += [(c, -5.0) for c in LETTERS] + [(SPACE + "is", -3.0), ("is", -4.5)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return wrapped(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """Lower case, accents stripped, [CLS] and [SEP] around every text, as BERT's kind."""
    words = ["[UNK]", "[CLS]", "[SEP]", *LETTERS, *("##" + c for c in string.ascii_lowercase + string.digits)]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return wrapped(made, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


def byte_level(
    prefix_space: bool = False, holes: int = 0, merges: tuple = (), template: str = ""
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: 256 bytes from id 0 on, <|eot|> 256 + holes. template: of its post-processor, e.g. "[g] [s] $A"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<|eot|>": 256 + holes}
    vocab |= {a + b: max(vocab.values()) + 1 + i for i, (a, b) in enumerate(merges)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|eot|>", special=True), AddedToken("[g]"), AddedToken("[s]")])
    if template:
        names = [word for word in template.split() if word != "$A"]
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, made.token_to_id(name)) for name in dict.fromkeys(names)]
        )
    elif prefix_space:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrapped(made, eos_token="<|eot|>")
