"""Text to ids where texts meet and end, on tokenizers that were made by hand: pieces typed, texts decoded again."""

import shutil

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks import ruler
from benchmarks.ruler import tasks as ruler_tasks
from endprompt import data, prompts
from endprompt.data import Document, Documents, Rows, RowSpec
from endprompt.data.documents import tokenize, tokens_ending
from endprompt.model.load import check_vocabulary
from endprompt.text import Reader, vocabulary
from endprompt.train import evaluate
from tests.support import odd_tokenizers as odd

S = odd.SPACE
PREFIXED = {kind: (lambda kind=kind: odd.llama(kind)) for kind in ("prepend", "always", "first")} | {
    "unigram": odd.unigram,
    "wordpiece": odd.wordpiece,
    "byte-level with a space": lambda: odd.byte_level(prefix_space=True),
}
RECORDS = [
    ("def f(", "x):"),
    ("2 + 2 =", " 4"),
    ("Answer:", "yes"),
    ("a ", "yes"),
    ("", "yes"),
    ("so it", " is so"),
    ("no", ""),
]


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def test_the_tokenizers_put_together_what_the_tests_take_them_for():
    tokenizer = odd.llama()
    assert tokenizer("is 1", add_special_tokens=False)["input_ids"] == [356, 259, 262]  # ▁is ▁ 1
    assert pieces(tokenizer, tokenizer("is  1")["input_ids"]) == [S + "is", 2 * S, "1"]
    assert pieces(tokenizer, tokenizer("\n")["input_ids"]) == [S, "<0x0A>"]


@pytest.mark.parametrize("kind", PREFIXED)
def test_a_record_is_read_as_one_text(kind):
    """The ids are those of text and completion together, and the completion's say the completion."""
    tokenizer = PREFIXED[kind]()
    made = tokenize([Document(*record) for record in RECORDS], tokenizer, append_eos=False)
    for number, (text, completion) in enumerate(RECORDS):
        ids = made.tokens[made.offsets[number] : made.offsets[number + 1]].tolist()
        assert ids == tokenizer(text + completion, add_special_tokens=False)["input_ids"]
        own = made.tokens[made.completions[number] : made.offsets[number + 1]].tolist()
        said = "".join(pieces(tokenizer, own)).replace("##", "").replace(S, " ").replace("Ġ", " ")
        assert said.replace(" ", "") == completion.replace(" ", ""), (text, completion)
        if kind != "wordpiece":  # which gives back no spaces
            assert tokenizer.decode(ids).removeprefix(" ") == text + completion


def test_the_completion_starts_at_its_first_character():
    """A token of both is the completion's: no part of it is left to the text."""
    tokenizer = odd.llama()
    found = {record: Reader(tokenizer).pairs([record])[0] for record in RECORDS}
    own = {record: pieces(tokenizer, ids[len(ids) - n :]) for record, (ids, n) in found.items()}
    assert own == {
        ("def f(", "x):"): ["x", ")", ":"],
        ("2 + 2 =", " 4"): [S, "4"],
        ("Answer:", "yes"): ["yes"],
        ("a ", "yes"): [S + "yes"],  # the space before it is in the same token
        ("", "yes"): [S + "yes"],
        ("so it", " is so"): [S + "is", S, "s", "o"],
        ("no", ""): [],
    }


@pytest.mark.parametrize("make", [odd.byte_level, lambda: odd.llama("never")])
def test_without_a_space_in_front_the_two_are_read_apart(make):
    """The border is then where the model meets it, and what was trained before stays bit for bit."""
    tokenizer = make()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for (text, completion), (ids, n) in zip(RECORDS, Reader(tokenizer).pairs(RECORDS)):
        assert ids == encode(text) + encode(completion) and n == len(encode(completion))
        assert tokenizer.decode(ids) == text + completion
    assert data.encoder(tokenizer)(" is 1") == encode(" is 1")


def test_a_tokenizer_without_offsets():
    """What python tokenizers are: the ids themselves say where the completion starts."""

    class Slow:
        bos_token_id = None

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, text, **options):
            return self.inner(text, **options)

        def decode(self, *args, **options):
            return self.inner.decode(*args, **options)

    for kind in ("prepend", "always", "first"):
        slow, fast = Reader(Slow(odd.llama(kind))), Reader(odd.llama(kind))
        assert slow._offsets is None and fast._offsets is not None
        assert slow.pairs(RECORDS) == fast.pairs(RECORDS)
        assert slow.inside(" is 1") == fast.inside(" is 1") and slow.inside("End.") == fast.inside("End.")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: odd.llama(), ([], [])),
        (lambda: odd.llama(bos=True), ([1], [])),
        (lambda: odd.llama(bos=True, eos=True), ([1], [2])),
        (lambda: odd.llama("never", eos=True), ([], [2])),
        (odd.wordpiece, ([1], [2])),
        (lambda: odd.byte_level(template="[g] [s] $A"), ([257, 258], [])),
    ],
)
def test_a_prompt_begins_once_and_has_no_end(make, told):
    tokenizer = make()
    reader = Reader(tokenizer)
    assert (reader.begin, reader.end) == told
    bare = tokenizer("yes is", add_special_tokens=False)["input_ids"]
    assert reader.prompts(["yes is"]) == [told[0] + bare]
    written = "".join(pieces(tokenizer, told[0])) + "yes is"  # by a chat template
    assert reader.prompts([written])[0][: len(told[0]) + 1].count(told[0][0] if told[0] else -1) == bool(told[0])
    if len(told[0]) == 2:  # a template that writes the second of them alone
        assert reader.prompts(["[s]yes is", "[g][s]yes is"]) == [[257, 258, *bare]] * 2


def test_bos_twice_is_refused():
    tokenizer = odd.byte_level(template="[s] [s] $A")
    tokenizer.bos_token = "[s]"
    with pytest.raises(ValueError, match=r"puts BOS in front of a text 2 times, where once is right: \[s\]"):
        Reader(tokenizer)


def test_ids_with_holes():
    """259 entries of which the largest id is 265: an embedding must have 266."""
    tokenizer = odd.byte_level(holes=9)
    assert len(tokenizer) == 259 and vocabulary(tokenizer) == 266
    good = tokenize([Document(input_ids=[265, 3])], tokenizer, append_eos=False)
    assert good.tokens.tolist() == [265, 3]
    with pytest.raises(ValueError, match=r"id 266 is not below its size 266 \(its largest id \+ 1\)"):
        tokenize([Document(input_ids=[266])], tokenizer)

    config = LlamaConfig(vocab_size=255)
    with pytest.raises(ValueError, match="the model's vocab_size is 255, and its largest id is 265"):
        check_vocabulary(config, tokenizer)
    config.vocab_size = 266
    assert check_vocabulary(config, tokenizer) == []
    ends = tokens_ending(tokenizer, ("]", "|>"))
    assert {257, 258, 265} <= ends and all(tokenizer.decode([i]).endswith(("]", "|>")) for i in ends)


def test_a_shard_of_a_tokenizer_with_an_id_above_16_bits(llama, tmp_path):
    from endprompt import data as prepare
    from endprompt.config import PrepareConfig

    folder = tmp_path / "t"
    shutil.copytree(llama, folder)
    odd.byte_level(holes=70_000).save_pretrained(folder)
    source, shard = str(tmp_path / "a.txt"), str(tmp_path / "s")
    (tmp_path / "a.txt").write_text("ab")
    prepare.prepare(PrepareConfig(data=[source], tokenizer=str(folder), output=shard))
    made = data.read_shard(shard).tokens
    assert made.dtype == np.uint32 and made.tolist() == [*odd.byte_level()("ab")["input_ids"], 70_256]


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
def test_end_prompts_and_needles_stand_in_the_text(kind):
    """As the whole text reads: no space in front of a cue, and the number behind "is" as in "is 12345"."""
    tokenizer = odd.llama(kind)
    encode = data.encoder(tokenizer)
    cue = prompts.prompt_kind(["EP_3"], encode).token_lists[0]
    assert pieces(tokenizer, cue) == ["E", "n", "d", "."]
    assert pieces(tokenizer, prompts.prompt_kind(["recall"], encode).cue)[:3] == ["<0x0A>", "Q", "u"]
    assert pieces(tokenizer, encode(" 12345")) == [S, *"12345"]
    text = Documents(np.full(400, odd.CHARACTERS["x"], dtype=np.uint32), np.array([0, 400]), np.array([400]))
    for ids, weights in evaluate.needle_rows(text, 300, 3, encode, seed=3):
        answer = pieces(tokenizer, ids[weights > 0])
        assert answer[0] == S and len(answer) == 6 and "".join(answer[1:]).isdigit()
        words = tokenizer.decode(ids.tolist())
        key = "".join(answer[1:])
        assert f"x The pass key is {key}. Remember it: {key} is the pass key. x" in words
        assert words.endswith(f"x What is the pass key? The pass key is {key}")


def spec(**changes):
    return RowSpec(**({"row_tokens": 8, "target": 64, "scheme": "contiguous", "bos": 1} | changes))


def test_input_ids_that_begin_with_bos_get_no_other():
    tokenizer = odd.llama(bos=True)
    ids = tokenizer("a is b is c is")["input_ids"]
    assert ids[0] == 1 and len(ids) == 10
    with_bos, without = (
        Rows(tokenize([Document(input_ids=own)], tokenizer, append_eos=False), spec(long="truncate"))
        for own in (ids, ids[1:])
    )
    for rows in (with_bos, without):
        assert rows.row(0)[0].tolist() == ids[:8]
        assert (rows.truncated_tokens, rows.row(0)[2].tolist()) == (2, [0.0] + [1.0] * 7)
    # as long as a row: nothing stands in front, and none is dropped
    exact = Rows(tokenize([Document(input_ids=ids[:8])], tokenizer, append_eos=False), spec())
    assert len(exact) == 1 and exact.row(0)[0].tolist() == ids[:8]


def test_bos_inside_documents_that_were_joined_stays_single():
    """Every window of a text that is BOS and six others, over and over; only the last one has no room to move."""
    document = np.tile([1, 11, 12, 13, 14, 15, 16], 9)
    for scheme in ("contiguous", "pose"):
        rows = Rows(Documents(document, np.array([0, 63]), np.array([63])), spec(scheme=scheme))
        made = [rows.row(index)[0].tolist() for index in range(200)]
        assert {len(ids) for ids in made} == {8}
        assert not [ids for ids in made if [1, 1] in [ids[i : i + 2] for i in range(7)]]
        assert all(ids[0] == 1 or ids == [16, 1, 11, 12, 13, 14, 15, 16] for ids in made)
        assert sum(ids[0] == 1 for ids in made) > 180
    # a completion that is kept to its end: no room to move, so the token before stands in front
    rows = Rows(Documents(np.array([1, 11, 1, 2, 3, 4, 5, 6, 7]), np.array([0, 9]), np.array([8])), spec())
    assert rows.row(0)[0].tolist() == [11, 1, 2, 3, 4, 5, 6, 7]


def test_several_ids_in_front():
    documents = Documents(np.array([8, 9, 1, 2, 3, 4, 5, 6]), np.array([0, 8]), np.array([8]))
    assert Rows(documents, spec(bos=(8, 9))).row(0)[0].tolist() == [8, 9, 1, 2, 3, 4, 5, 6]
    assert Rows(documents, spec(bos=(9, 8), row_tokens=10)).row(0)[0].tolist() == [9, 8, 8, 9, 1, 2, 3, 4, 5, 6]


def test_notes_name_what_a_tokenizer_does_to_text():
    def said(tokenizer):
        return " / ".join(Reader(tokenizer).notes())

    assert said(odd.byte_level()) == said(odd.llama(bos=True)) == ""
    assert "puts </s> behind every text" in said(odd.llama(eos=True))
    assert "gives some texts back changed" in said(odd.wordpiece()) and "changed" in said(odd.unigram())
    bytes_, words = odd.byte_level().backend_tokenizer, Tokenizer(models.WordLevel({"[UNK]": 0, "One": 1}, "[UNK]"))
    bytes_.normalizer = normalizers.Strip(left=False)
    assert "gives some texts back changed" in said(PreTrainedTokenizerFast(tokenizer_object=bytes_))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert "1234.' as [UNK]: such text is lost" in said(wrapped) and "changed" not in said(wrapped)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("byte_level", set()),
        ("llama", set()),
        ("wordpiece", {"niah_single_3", "niah_multikey_3"}),  # its words end at hyphens
        ("digits", {task for task in ruler.TASKS if task not in ("vt", "cwe", "fwe", "qa_1", "qa_2")}),
    ],
)
def test_a_task_whose_answers_the_tokenizer_cannot_write_is_refused(kind, lost):
    if kind == "digits":  # are no part of its vocabulary
        inner = Tokenizer.from_str(odd.byte_level().backend_tokenizer.to_str())
        inner.normalizer = normalizers.Replace(Regex("[0-9]"), "")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    else:
        tokenizer = getattr(odd, kind)()
    found = set()
    for task in ruler.TASKS:
        try:
            ruler_tasks.check_writable(task, Reader(tokenizer))
        except ValueError as error:
            assert str(error).startswith(f"{task}: the tokenizer must be able to write the task's answers")
            found.add(task)
    assert found == lost


def test_a_prompt_has_no_end_in_any_suite():
    """A tokenizer that puts </s> behind every text: sizes, what the model is given and the lab leave it out."""
    from tokenizers import processors

    from benchmarks.lab import predict
    from benchmarks.longbench import Prompter
    from benchmarks.ruler import tokens
    from tests.support.ruler_helpers import tokenizer as made

    plain = made("bytes", bos=True)
    inner = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    ending = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert ending("a")["input_ids"][-1] == 2 and plain("a")["input_ids"][-1] != 2
    for task in ("niah_single_1", "vt"):
        mine, theirs = (ruler.build_samples(task, 400, one, 2, max_new_tokens=30, shots=0) for one in (ending, plain))
        assert mine == theirs
        assert mine[0]["length"] == len(plain(mine[0]["input"])["input_ids"])
    texts = [mine[0]["input"], "<s>" + mine[0]["input"]]
    expected = [plain(texts[0])["input_ids"]] * 2
    assert predict.prompt_ids(ending, [{"input": text} for text in texts]) == expected
    assert Prompter("qasper", ending, 4096).encode(texts) == expected
    assert tokens.counter(ending)(texts) == [len(expected[0])] * 2
    with pytest.raises(ValueError, match="puts </s> behind every text, and so would lm-eval"):
        Reader(ending).check_plain()
    Reader(plain).check_plain()
