"""Answers that end when their score is settled score as whole ones do: all tasks, several tokenizers, odd texts."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from benchmarks import ruler
from benchmarks.scoring import ScoreConfig, generate, score, settled
from tests.support import ruler_helpers as helpers


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = helpers.qa_files(tmp_path_factory.mktemp("qa"))
    story = helpers.essay_file(folder)
    found = {}
    for task in ruler.TASKS:
        length = 7000 if task == "cwe" else 2048
        given = dict(data_dir=str(folder), haystack_text=str(story))
        found[task] = ruler.build_samples(task, length, helpers.tokenizer(), 2, 0, **given)
    return found


def texts_of(sample: dict) -> list[str]:
    """What a model may say: all answers at once or late, some, none, in capitals, the prompt again first."""
    outputs = sample["outputs"]
    listed = ", ".join(outputs)
    return [
        f" {listed}.\nAnd then it went on about other things for quite a while, 1234567 among them.",
        " I do not know. " * 3 + " and ".join(outputs[::-1]).upper() + "!",
        f"{outputs[0]}",
        f"{outputs[0][:-1]}",
        f"\x07\t {outputs[-1]} \x0b" + " ".join(outputs) + " caf\u00e9 \u65e5\u672c",
        "",
        sample["input"] + " " + listed,
        sample["input"][:400] + listed,
    ]


@pytest.mark.parametrize(("task", "other"), [*zip(ruler.TASKS, itertools.cycle(["metaspace", "wordpiece"]))])
def test_scores_of_all_tasks_are_the_same_in_either_way(samples, task, other):
    shorter = 0
    for sample in samples[task]:
        for kind in ("bytes", other):
            tokenizer = helpers.tokenizer(kind)
            end = settled.end_of(tokenizer, sample, sample["input"])
            for text in texts_of(sample):
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                if len(tokens) > 400:  # an echo: the checks at all its places take long
                    checked = [0, 1, 50, len(tokens) - 1, len(tokens)]
                else:
                    checked = range(len(tokens) + 1)
                cut = next((n for n in checked if end(tokens[:n])), len(tokens))
                shorter += cut < len(tokens)
                scores = [
                    ruler.score(task, tokenizer.decode(part, skip_special_tokens=True).removeprefix(sample["input"]),
                                sample["outputs"])
                    for part in (tokens[:cut], tokens)
                ]  # fmt: skip
                assert scores[0] == scores[1], (kind, text[-200:])
    assert shorter >= 6  # and it ended early where it could


def byte_tokenizer(**settings) -> PreTrainedTokenizerFast:
    """Words, and single bytes that are decoded together with their neighbours."""
    words = ["\u2581" + word for word in ("it", "is", "caf", "7", "'", "s", "x", "do", "n't", ".")]
    vocabulary = {piece: i for i, piece in enumerate([*words, *(f"<0x{i:02X}>" for i in range(256))])}
    made = Tokenizer(models.WordLevel(vocabulary))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, **settings)


def ids(tokenizer, *pieces: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def test_what_a_further_token_may_change_is_not_settled():
    tokenizer = byte_tokenizer()
    whole = ids(tokenizer, "\u2581caf", "<0xC3>", "<0xA9>")
    assert tokenizer.decode(whole) == " caf\u00e9"
    assert "\u00e9" not in tokenizer.decode([*whole, *ids(tokenizer, "<0xE2>")])  # the bytes are spoilt together
    assert settled.settled_text(tokenizer, whole) == " caf"
    assert settled.settled_text(tokenizer, [*whole, *ids(tokenizer, "\u2581x")]) == " caf\u00e9 x"
    plain = helpers.tokenizer("bytes")
    cut = plain("a \u65e5", add_special_tokens=False)["input_ids"][:-1]
    assert plain.decode(cut).endswith("\ufffd") and settled.settled_text(plain, cut) == "a "
    tidy = byte_tokenizer(clean_up_tokenization_spaces=True)  # answers are decoded without the tidying
    said = ids(tidy, "\u2581it", "\u2581'", "\u2581s", "\u2581x")
    assert settled.settled_text(tidy, said) == " it ' s x"


def test_an_answer_is_settled_when_all_are_there_or_any_for_questions():
    many = {"task": "niah_multivalue", "outputs": ["111", "222"]}
    any_of = {"task": "qa_1", "outputs": ["111", "222"]}
    assert not settled.settled(many, "prompt", "so: 111") and settled.settled(many, "prompt", "so: 222 and 111")
    assert settled.settled(any_of, "prompt", "so: 111")
    assert not settled.settled(any_of, "say 111 or 222", "say 111")  # the prompt again, which is taken off
    assert settled.settled(any_of, "say 111 or 222", "say 111 or 222: 222")
    sigma = {"task": "qa_1", "outputs": ["\u039f\u0394\u039f\u03a3"]}
    assert ruler.score("qa_1", "\u039f\u0394\u039f\u03a3", sigma["outputs"]) == 1
    assert ruler.score("qa_1", "\u039f\u0394\u039f\u03a3\u0391", sigma["outputs"]) == 0
    assert not settled.settled(sigma, "prompt", "\u039f\u0394\u039f\u03a3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settled")
    helpers.checkpoint(folder / "llama")
    return folder


def test_rows_of_both_ways_have_the_same_values_and_say_which_it_was(place, tmp_path, monkeypatch):
    """A model that says what the script has: the answers, then more."""
    tokenizer = helpers.tokenizer()
    made: dict[bool, int] = {}

    def scripted(model, jobs, *, stops, batch_size, found):
        for i, job in enumerate(jobs):
            prompt = tokenizer.decode(job.prompt, skip_special_tokens=True)
            numbers = [word.strip(".") for word in prompt.split() if word.strip(".").isdigit()]
            script = tokenizer(f" {numbers[0]} and {numbers[-1]} are what was asked for", add_special_tokens=False)
            tokens = script["input_ids"][: job.new_tokens]
            end = next((n for n in range(1, len(tokens)) if job.ended(tokens[:n])), len(tokens))
            made[whole] = made.get(whole, 0) + end
            yield [(i, tokens[:end])]

    monkeypatch.setattr(generate, "run", scripted)
    found = {}
    for whole in (True, False):
        config = ScoreConfig(
            str(place / "llama"), tasks="niah_single_1,niah_multikey_2", lengths="400", samples=4, device="cpu",
            cache_dir=str(place / "cache"), output=str(tmp_path / "out"), quiet=True, whole_answers=whole,
        )  # fmt: skip
        found[whole] = score(config)
    assert [row["value"] for row in found[True]] == [row["value"] for row in found[False]]
    assert any(row["value"] > 0 for row in found[True]) and made[False] < made[True]
    assert {row["answers"] for row in found[True]} == {"whole"}
    assert {row["answers"] for row in found[False]} == {"until settled"}
    assert found[True][0]["run_sha256"] != found[False][0]["run_sha256"]
