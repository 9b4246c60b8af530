"""Documents to rows: what is read, what a row holds, what is dropped, and that a row depends on (seed, index) alone."""

import gzip
import json

import numpy as np
import pytest

from endprompt import data
from endprompt.data import Document, Documents, Rows, RowSpec, read_documents, shards
from endprompt.data.documents import tokenize
from endprompt.data.rows import prefetch
from endprompt.positions import SCHEMES, WITH_PROMPT
from endprompt.prompts import Cues, Question, Recall


def make_documents(*lengths, completions=None) -> Documents:
    """Documents whose tokens are 1000 * document + place, so a token says where it is from."""
    tokens = np.concatenate([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]).astype(np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ends = offsets[1:] - np.asarray(completions or [0] * len(lengths))
    return Documents(tokens, offsets, ends)


def spec(**changes) -> RowSpec:
    return RowSpec(**({"row_tokens": 8, "target": 64, "scheme": "contiguous", "seed": 5} | changes))


CUE = Cues(((7, 8),))


# Files


def test_all_formats_give_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"text": "grün", "completion": " ja"}, {"text": "sky", "completion": ""}]
    lines = "".join(json.dumps(r) + "\n\n" for r in records)  # empty lines are no documents
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    expected = [Document("grün", " ja"), Document("sky", "")]
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert list(read_documents(tmp_path / name)) == expected
    left_out = pyarrow.table({"text": ["a", "b"], "completion": [None, "c"]})
    pyarrow.parquet.write_table(left_out, tmp_path / "null.parquet")
    assert list(read_documents(tmp_path / "null.parquet")) == [Document("a"), Document("b", "c")]
    ids = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ids))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ids), tmp_path / "ids.parquet")
    for name in ("ids.jsonl", "ids.parquet"):
        assert list(read_documents(tmp_path / name)) == [Document(input_ids=[5, 6, 7]), Document(input_ids=[8])]
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    assert list(read_documents(tmp_path / "a.txt")) == [Document("one\ntwo")]


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: must be a JSON object"),
        ("a.jsonl", b'{"words": "x"}\n', r"a\.jsonl, line 1: a document must have `text`"),
        ("a.jsonl", b'{"input_ids": [1, -2]}\n', r"a\.jsonl, line 1: input_ids must be"),
        ("a.jsonl", b'{"input_ids": [true, false]}\n', r"a\.jsonl, line 1: input_ids must be"),
        ("a.jsonl", b'{"input_ids": [1], "completion": "b"}\n', r"a\.jsonl, line 1: completion goes with text"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: a data file must hold at least one document"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"te', mtime=0), r"a\.jsonl\.gz, line 2: not valid JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.parquet", b"PAR1 but not really", r"a\.parquet: not a whole Parquet file"),
        ("a.docx", b"", "must end in one of"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        list(read_documents(tmp_path / name))


def test_tokenize_marks_where_a_completion_starts(tokenizer):
    got = tokenize([Document("the sky", " is blue"), Document("go"), Document(input_ids=[5, 6])], tokenizer)
    text, completion, go = (tokenizer(t)["input_ids"] for t in ("the sky", " is blue", "go"))
    eos = tokenizer.eos_token_id
    assert got.tokens.tolist() == [*text, *completion, eos, *go, eos, 5, 6, eos]
    ends = np.cumsum([len(text) + len(completion) + 1, len(go) + 1, 3])
    assert got.offsets.tolist() == [0, *ends]
    assert got.completions.tolist() == [len(text), ends[1], ends[2]]


# Shards


def test_shard_comes_back_as_written_and_notices_changes(tmp_path, tokenizer):
    made = tokenize([Document("the sky", " is blue"), Document("go there")], tokenizer)
    own = shards.tokenizer_sha256(tokenizer)
    shards.write_shard(made, tmp_path, own)
    read = data.read_shard(tmp_path, own)
    assert isinstance(read.tokens, np.memmap) and read.tokens.dtype == np.uint16
    for name in ("tokens", "offsets", "completions"):
        assert (getattr(read, name) == getattr(made, name)).all()
    with pytest.raises(ValueError, match="another tokenizer"):
        data.read_shard(tmp_path, "0" * 64)
    raw = bytearray((tmp_path / "tokens.bin").read_bytes())
    raw[1] ^= 1
    (tmp_path / "tokens.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=r"tokens\.bin: missing or changed"):
        data.read_shard(tmp_path, own)
    (tmp_path / "manifest.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match=r"manifest\.json: not valid JSON"):
        data.read_shard(tmp_path, own)
    (tmp_path / "manifest.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"manifest\.json: a manifest must have dtype, sha256"):
        data.read_shard(tmp_path, own)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="must have a manifest"):
        data.read_shard(tmp_path, own)


def test_several_shards_and_files_are_read_as_one_without_a_copy(tmp_path, tokenizer):
    texts = [Document("the sky is blue " * 9), Document("go there " * 9, " now"), Document("the sun " * 20)]
    for number in (0, 1):
        made = tokenize(texts[number : number + 1], tokenizer)
        weights = np.arange(len(made.tokens), dtype=np.uint8) if number else None
        weighted = Documents(made.tokens, made.offsets, made.completions, weights)
        shards.write_shard(weighted, tmp_path / str(number), shards.tokenizer_sha256(tokenizer))
    (tmp_path / "2.jsonl").write_text(json.dumps({"text": texts[2].text}))
    joined = data.load_documents([str(tmp_path / name) for name in ("0", "1", "2.jsonl")], tokenizer)
    whole = tokenize(texts, tokenizer)
    assert (joined.offsets == whole.offsets).all() and (joined.completions == whole.completions).all()
    assert joined.sha256 != whole.sha256  # which has no weights
    assert [isinstance(part, np.memmap) for part in joined.tokens.parts] == [True, True, False]
    ends = whole.offsets
    weights = np.concatenate([np.ones(ends[1]), np.arange(ends[2] - ends[1]), np.ones(ends[3] - ends[2])])
    with_weights = Documents(whole.tokens, whole.offsets, whole.completions, weights.astype(np.uint8))
    assert joined.sha256 == with_weights.sha256
    for short in ("drop", "pack"):
        for made in (spec(short=short, row_tokens=16), spec(short=short, scheme="pose", row_tokens=24)):
            one, other = Rows(joined, made), Rows(with_weights, made)
            assert len(one) == len(other) > 0
            for left, right in zip(one.batch(0, 20).__dict__.values(), other.batch(0, 20).__dict__.values()):
                assert (left == right).all()


def test_empty_shard_is_refused(tmp_path):
    empty = Documents(np.zeros(0, np.uint32), np.zeros(1, np.int64), np.zeros(0, np.int64))
    shards.write_shard(empty, tmp_path, "x")
    with pytest.raises(ValueError, match="holds no tokens"):
        data.read_shard(tmp_path)


# Rows


def test_row_of_one_exact_document_is_typed():
    rows = Rows(make_documents(6), spec(scheme="endprompt", prompt=CUE, prompt_weight=0.25))
    ids, positions, weights = rows.row(0)
    assert ids.tolist() == [1000, 1001, 1002, 1003, 1004, 1005, 7, 8]
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 62, 63]
    assert weights.tolist() == [0, 1, 1, 1, 1, 1, 0.25, 0.25]


def test_completion_is_kept_to_its_end_and_weighted():
    rows = Rows(make_documents(20, completions=[2]), spec(completion_weight=10.0))
    assert len(rows) == 1
    ids, _, weights = rows.row(0)
    assert ids.tolist() == list(range(1012, 1020))
    assert weights.tolist() == [0, 1, 1, 1, 1, 1, 10, 10]


def test_recall_rows_quote_their_own_context():
    recall = Recall(cue=(7, 8), span=4, given=1)
    rows = Rows(make_documents(30, 30), spec(row_tokens=16, scheme="endprompt", prompt=recall, prompt_weight=1.0))
    for index in range(20):
        ids, _, weights = rows.row(index)
        context, span = ids[:10].tolist(), ids[12:].tolist()
        assert any(context[i : i + 4] == span for i in range(7))
        assert weights[10:].tolist() == [0, 0, 0, 1, 1, 1]


QUESTION = Question(cue=(7, 8), span=3, given=1)


def test_question_of_the_document_is_the_end_prompt():
    """A line ends at 1003 and at 1009; the completion is 1013 .. 1015: the last line is 1010 .. 1012."""
    made = spec(row_tokens=16, scheme="endprompt", prompt=QUESTION, completion_weight=10.0, line_ends={1003, 1009})
    rows = Rows(make_documents(16, completions=[3]), made)
    ids, places, weights = rows.row(0)
    assert ids.tolist() == list(range(1000, 1016))
    assert places.tolist() == [*range(10), *range(58, 64)]
    assert weights.tolist() == [0, *[1] * 12, 10, 10, 10]


@pytest.mark.parametrize(("line_end", "terminal"), [(1015, 8), (1020, 8), (1021, 8), (1022, 7), (1027, 2)])
def test_question_is_at_most_half_a_row(line_end, terminal):
    made = spec(row_tokens=16, scheme="endprompt", prompt=QUESTION, line_ends={line_end})
    rows = Rows(make_documents(30, completions=[2]), made)  # the row holds 1014 .. 1029
    assert rows.row(0)[1].tolist() == [*range(16 - terminal), *range(64 - terminal, 64)]


def test_documents_without_a_question_are_quoted():
    made = spec(row_tokens=16, scheme="endprompt", prompt=QUESTION, prompt_weight=1.0, line_ends={1003})
    documents = make_documents(16, 16, 15, 15, completions=[3, 0, 3, 0])
    rows = Rows(documents, made)
    assert rows.dropped == 1  # the question of the third one is part of it: it needs a whole row
    seen = set()
    for index in range(3):
        ids, _, weights = rows.row(index)
        seen.add(int(ids[0]) // 1000)
        if ids[0] // 1000 == 1:
            assert ids.tolist() == list(range(1000, 1016))
        else:
            assert ids[11:13].tolist() == [7, 8] and set(ids[13:].tolist()) < set(ids[:11].tolist())
            assert weights[11:].tolist() == [0, 0, 0, 1, 1]
    assert seen == {1, 2, 4}


def test_sentences_are_not_torn():
    """Only the tokens in the sets may stand before a jump, and the question stays in one piece."""
    made = spec(
        row_tokens=32, target=512, scheme="sentences", line_ends={1008, 1020}, sentence_ends={1003, 1012, 1025, 1031}
    )
    rows = Rows(make_documents(32, completions=[3]), made)
    cut = set()
    for index in range(200):
        ids, places, _ = rows.row(index)
        assert ids.tolist() == list(range(1000, 1032))
        cut |= set(ids[:-1][np.diff(places) > 1].tolist())
    assert cut == {1003, 1008, 1012, 1020}
    plain = Rows(make_documents(32), spec(row_tokens=32, target=512, scheme="sentences"))  # nothing to cut at
    assert plain.row(0)[1].tolist() == list(range(32))


def test_sentences_with_the_question_at_the_end():
    made = spec(
        row_tokens=32,
        target=512,
        scheme="endprompt-sentences",
        prompt=QUESTION,
        line_ends={1008, 1020},
        sentence_ends={1003, 1025, 2003, 2007},
    )
    rows = Rows(make_documents(32, 32, completions=[3, 0]), made)
    cut = {1: set(), 2: set()}
    for index in range(100):
        ids, places, _ = rows.row(index)
        terminal = 11 if ids[0] < 2000 else 5  # the last line and its answer, or a cue and a span
        assert places[-terminal:].tolist() == list(range(512 - terminal, 512))
        cut[int(ids[0]) // 1000] |= set(ids[: -terminal - 1][np.diff(places[:-terminal]) > 1].tolist())
    assert cut == {1: {1003, 1008}, 2: {2003, 2007}}


def test_pose_takes_the_first_chunk_from_the_start_and_skips_text_and_positions_apart():
    rows = Rows(make_documents(40), spec(scheme="pose", target=256))
    text_skips, position_skips = [], []
    for index in range(400):
        ids, positions, _ = rows.row(index * len(rows))  # any unit
        jumps = np.flatnonzero(np.diff(positions) > 1)
        breaks = np.flatnonzero(np.diff(ids) > 1)
        assert len(jumps) <= 1 and len(breaks) <= 1
        if len(jumps) and len(breaks):
            assert jumps[0] == breaks[0] and jumps[0] + 1 <= 4  # r1 in 1..(n+1)//2
            text_skips.append(ids[breaks[0] + 1] - ids[breaks[0]] - 1)
            position_skips.append(positions[jumps[0] + 1] - positions[jumps[0]] - 1)
        assert ids[0] % 8 == 0  # the start of a stretch of `row_tokens`
    assert abs(np.corrcoef(text_skips, position_skips)[0, 1]) < 5 / np.sqrt(len(text_skips))
    assert max(position_skips) <= 256 - 8 and max(text_skips) <= 32


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_rows_depend_on_seed_and_index_alone(scheme):
    prompt = Cues(((7, 8), (9,))) if scheme in WITH_PROMPT else None
    made = spec(scheme=scheme, prompt=prompt)
    documents = make_documents(30, 17, 64, 9)
    one, other = Rows(documents, made), Rows(documents, made)
    wanted = [23, 4, 100, 0]  # in any order, by any worker, in batches of any size
    apart = {i: other.row(i) for i in reversed(wanted)}
    for index in wanted:
        for left, right in zip(one.row(index), apart[index]):
            assert (left == right).all()
        batch = other.batch(index, 3)
        for left, right in zip(one.row(index), (batch.input_ids[0], batch.position_ids[0], batch.weights[0])):
            assert (left == right).all()
    different = Rows(documents, spec(scheme=scheme, prompt=prompt, seed=6))
    assert any((different.row(i)[0][:5] != one.row(i)[0][:5]).any() for i in wanted)


def test_each_pass_is_another_permutation_of_all_units():
    rows = Rows(make_documents(*[8] * 30), spec())
    first = [int(rows.row(i)[0][0]) for i in range(30)]
    second = [int(rows.row(i)[0][0]) for i in range(30, 60)]
    assert sorted(first) == sorted(second) == [1000 * (i + 1) for i in range(30)]
    assert first != second


def test_long_documents_may_come_first():
    """Lengths of the documents in the order of their rows: falling in each pass, and otherwise as they are drawn."""
    lengths = [24, 8, 40, 8, 16, 40]
    made = Rows(make_documents(*lengths), spec(row_tokens=8, target=64, order="long-first"))
    rows = [[made._document[made.unit(epoch * len(made) + i)] for i in range(len(made))] for epoch in (0, 1)]
    for order in rows:
        assert [lengths[document] for document in order] == sorted((lengths[d] for d in order), reverse=True)
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]


def test_epochs_draw_positions_anew():
    rows = Rows(make_documents(8), spec(scheme="pose", target=4096))
    assert len({tuple(rows.row(i)[1]) for i in range(20)}) > 15


def test_short_documents_are_counted_and_dropped_or_packed():
    documents = make_documents(3, 20, 4, 4, 5, 2)
    dropped = Rows(documents, spec())
    assert (len(dropped), dropped.dropped) == (2, 5)
    assert dropped.dropped_tokens == 18
    packed = Rows(documents, spec(short="pack"))
    assert (len(packed), packed.dropped) == (4, 0)  # two rows of the long document, 18 tokens of the others
    assert packed.documents.tokens.tolist() == [
        *range(2000, 2020), *range(1000, 1003), *range(3000, 3004), *range(4000, 4004), *range(5000, 5005), 6000, 6001,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="completion_weight must be 1"):
        Rows(make_documents(3, 20, completions=[1, 0]), spec(short="pack", completion_weight=10.0))


def test_long_documents_are_split_or_truncated():
    documents = make_documents(20, 8, 33)
    assert len(Rows(documents, spec())) == 2 + 1 + 4
    rows = Rows(documents, spec(long="truncate"))
    assert len(rows) == 3 and rows.truncated_tokens == 12 + 25
    assert sorted(int(rows.row(i)[0][0]) for i in range(3)) == [1000, 2000, 3000]


def test_sequence_that_is_too_short_never_becomes_contiguous():
    rows = Rows(make_documents(*range(1, 40)), spec(scheme="endprompt", prompt=CUE))
    for index in range(len(rows)):
        ids, positions, _ = rows.row(index)
        assert len(ids) == 8 and positions[-1] == 63


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"scheme": "zigzag"}, "scheme must be one of"),
        ({"scheme": "endprompt"}, "needs an end prompt"),
        ({"prompt": CUE}, "takes no end prompt"),
        ({"scheme": "endprompt", "prompt": Cues(((1,) * 5,))}, "does not fit: it has 5 tokens"),
        ({"row_tokens": 65}, "must fit into the target window"),
        ({"scheme": "anchors", "prompt": CUE, "anchors": 32}, "first of 32 anchors"),
        ({"short": "merge"}, "short_documents must be drop, pack or apart"),
        ({"long": "fold"}, "long_documents must be split or truncate"),
        ({"scheme": "endprompt", "prompt": CUE, "prompt_weight": -1.0}, "prompt_weight=-1.0"),
    ],
)
def test_row_spec_refuses(changes, rule):
    with pytest.raises(ValueError, match=rule):
        spec(**changes)


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(prefetch(lambda i: i * i, range(20))) == [i * i for i in range(20)]

    def fails(step):
        if step == 3:
            raise ValueError("row 3 is bad")
        return step

    got = []
    with pytest.raises(ValueError, match="row 3 is bad"):
        for item in prefetch(fails, range(10)):
            got.append(item)
    assert got == [0, 1, 2]
