"""Training documents: RULER's wording, exact lengths, answers that follow from the text."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.base.documents import (
    KINDS,
    NEEDLE,
    NIAH,
    NOISE,
    RETRIEVAL_KINDS,
    SAMPLE_PATH,
    VT,
    Prose,
    Words,
    document,
    sample_haystack_sentences,
    sample_training_sentences,
    write_documents,
)

FOLDER = SAMPLE_PATH.parents[2] / "benchmarks" / "base"
WORDS = Words(("fat", "odd", "dry", "teeny-tiny"), ("ox", "t-shirt", "raven", "community"))


@pytest.fixture(scope="module")
def trained():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "256")


@pytest.fixture(scope="module")
def sample_prose(trained):
    return Prose.from_sentences(sample_training_sentences(), trained)


def lm_eval_constants(file: str) -> dict[str, object]:
    """Top-level constants of one of lm-eval's RULER files, read without importing it."""
    package = Path(importlib.util.find_spec("lm_eval").origin).parent
    tree = ast.parse((package / "tasks" / "ruler" / file).read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def test_needle_wording_is_that_of_lm_eval():
    template = lm_eval_constants("niah_utils.py")["TEMPLATE"]
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is")):
        template = template.replace(old, new)
    prefix = " The special magic number for fat-ox mentioned in the provided text is"
    expected = template.format(type_needle_v="number", context="CONTEXT", query="fat-ox") + prefix
    assert NIAH.format(context="CONTEXT", key="fat-ox") == expected
    needle = lm_eval_constants("prepare_niah.py")["NEEDLE"]
    assert NEEDLE.format(key="a", value="1") == needle.format(type_needle_v="numbers", key="a", value="1")


def test_chain_wording_is_that_of_lm_eval():
    config = lm_eval_constants("vt_utils.py")["CONFIG"]["variable_tracking"]
    expected = (config["template"] + config["answer_prefix"]).format(context="C", query="12345", num_v=5).rstrip()
    assert VT.format(context="C", value="12345", count=5, assigned="assgined") == expected


def test_tokenizer_spells_digits_singly_and_adds_nothing(trained):
    assert len(trained) == 4096
    assert trained.tokenize("is 1234567.")[-8:] == [*"1234567", "."]
    assert trained("a").input_ids == trained("a", add_special_tokens=False).input_ids
    text = "def f(x):\n    return x  # ünï — 12\n\n<|endoftext|>VAR A = VAR B \n"
    assert trained.decode(trained(text).input_ids) == text
    assert trained.eos_token == trained.pad_token == "<|endoftext|>"
    assert len(trained("<|eot_id|>").input_ids) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [160, 256, 700])
def test_length_is_exact_and_tokens_concatenate(kind, tokens, trained, sample_prose):
    rng = np.random.default_rng(tokens)
    for _ in range(6):
        made = document(kind, tokens, trained, rng, prose=sample_prose, words=WORDS)
        text, completion = trained(made["text"]).input_ids, trained(made["completion"]).input_ids
        assert text + completion == trained(made["text"] + made["completion"]).input_ids
        assert len(text) + len(completion) == tokens
        assert (made["text"] + made["completion"]).endswith("<|endoftext|>")


def answer(text: str) -> str:
    """The right completion, found by reading the prompt as a person would."""
    if "Memorize and track" in text:
        context, question = text.split("Memorize and track", 1)[1].split("\nQuestion:")
        value, names = re.search(r"assigned the value (\d+)", question)[1], []
        for name, right in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)", context):
            if right == value or right in names:
                names.append(name)
        assert f"{len(names)} variables" in question
        return f" {' '.join(names)}."
    key = re.search(r"number for (\S+) mentioned in the provided text is$", text)[1]
    values = re.findall(rf"One of the special magic numbers for {re.escape(key)} is: (\d{{7}})\.", text)
    assert len(values) == 1
    return f" {values[0]}."


@pytest.mark.parametrize("kind", RETRIEVAL_KINDS)
def test_answer_follows_from_the_text(kind, trained, sample_prose):
    rng = np.random.default_rng(3)
    for _ in range(40):
        made = document(kind, 256, trained, rng, prose=sample_prose, words=WORDS)
        assert made["completion"] == answer(made["text"]) + "<|endoftext|>"


def test_needle_depth_and_prompt_length_cover_their_ranges(trained, sample_prose):
    rng = np.random.default_rng(5)
    depths, lengths = [], []
    for _ in range(100):
        text = document("niah_single_1", 512, trained, rng, prose=sample_prose, words=WORDS)["text"]
        prompt = text[text.index("A special magic number") :]
        lengths.append(len(trained(prompt).input_ids))
        context = prompt.split("\n")[1:-1]
        depths.append([line == NOISE for line in context].index(False) / (len(context) - 1))
    assert min(lengths) < 180 and max(lengths) > 470
    quarters = np.histogram(lengths, bins=4, range=(128, 512))[0]
    assert quarters.min() > 10  # 25 expected, standard deviation 4.3
    assert 0.3 < np.mean(depths) < 0.55 and min(depths) == 0  # a needle never follows the last noise line


def test_keys_of_a_multikey_document_differ(trained, sample_prose):
    rng = np.random.default_rng(6)
    counts = set()
    for _ in range(60):
        text = document("niah_multikey_1", 400, trained, rng, prose=sample_prose, words=WORDS)["text"]
        keys = re.findall(r"magic numbers for (\S+) is: \d{7}\.", text)
        assert len(set(keys)) == len(keys)
        counts.add(len(keys))
    assert counts == {2, 3, 4}


def test_halves_of_the_sample_share_no_sentence():
    training, haystack = sample_training_sentences(), sample_haystack_sentences()
    assert not {s for s in training if len(s) >= 30} & set(haystack)
    assert min(sum(map(len, training)), sum(map(len, haystack))) > 200_000


def test_written_documents_repeat_with_the_seed(trained, sample_prose, tmp_path):
    first, again, other = (
        write_documents(tmp_path / name, 20, trained, seed, 256, words=WORDS, prose=sample_prose)
        for name, seed in zip("abc", (1, 1, 2))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    for line in first.read_text(encoding="utf-8").splitlines():
        made = json.loads(line)
        assert len(trained(made["text"] + made["completion"]).input_ids) == 256


def test_errors_name_what_is_wrong(trained, sample_prose):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="kind='niah_single_9'"):
        document("niah_single_9", 256, trained, rng, prose=sample_prose, words=WORDS)
    with pytest.raises(ValueError, match=r"does not fit.*tokens=64"):
        document("vt", 64, trained, rng, prose=sample_prose, words=WORDS)


def test_sample_is_plain_prose():
    text = SAMPLE_PATH.read_text(encoding="utf-8")
    assert 400_000 <= len(text) <= 600_000 and text.isascii()
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    assert letters > 0.93
    paragraphs = text.strip().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
