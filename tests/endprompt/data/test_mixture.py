"""Mixtures: shares of the tokens, a pure function of seed and index, each source's own rows in their order."""

import json
import re

import numpy as np
import pytest

from endprompt import train
from endprompt.config import PrepareConfig, Source, mixture
from endprompt.data import Documents, Mixture, RowSpec, prepare, shards
from endprompt.train.start import to_extend
from tests.support.runs import resumed, same_weights

WEIGHTS = {"books": 0.6, "code": 0.4, "chat": 0.1}


def documents_of(name, count=40, length=32):
    """Documents of one row each, whose tokens are the source's own number and the document's."""
    first = 1000 * list(WEIGHTS).index(name)
    tokens = np.repeat(first + np.arange(count), length)
    offsets = np.arange(count + 1) * length
    return Documents(tokens, offsets, offsets[1:])


def made(seed=0, weights=WEIGHTS, **sizes):
    sources = [Source(name, weight) for name, weight in weights.items()]
    return Mixture(sources, lambda name: documents_of(name, **sizes), RowSpec(32, 128, "contiguous", seed=seed))


def test_shares_of_a_million_tokens_are_the_weights():
    rows = made()
    places = np.array([rows.place(index)[0] for index in range(1_000_000 // 32)])
    assert (rows.batch(0, 300).input_ids[:, 0] // 1000 == places[:300]).all()
    found = np.bincount(places) / len(places)
    np.testing.assert_allclose(found, np.array([0.6, 0.4, 0.1]) / 1.1, atol=0.0002)
    for record, share in zip(rows.record(31250), found):
        assert record["share"] == pytest.approx(share) and record["epochs"] == pytest.approx(share * 31250 / 40)


@pytest.mark.parametrize(("kind", "across"), [("exact", 1), ("near", 2)])
def test_duplicates_across_sources_stay_where_they_are_first_and_are_counted(llama, tmp_path, capsys, kind, across):
    if kind == "near":
        pytest.importorskip("datasketch")
    one, two, three = np.random.default_rng(0).integers(1, 300, (3, 200)).tolist()
    held = {"a": [one, two], "b": [one, three, [*two[:-1], 301], three], "c": [two, one]}
    for name, documents in held.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    a, b, c = (f"{tmp_path / name}.jsonl:1" for name in held)
    mix = prepare(PrepareConfig([a, b], str(tmp_path / "mix"), str(llama), duplicates=kind))
    counts = [json.loads((mix / shard / "manifest.json").read_text()) for shard in ("00", "01")]
    found = [(n["documents"], n["documents_duplicate"], n["documents_duplicate_elsewhere"]) for n in counts]
    assert found == [(2, 0, 0), (3 - across, 1, across)]
    said = capsys.readouterr().err
    assert "; dropped as duplicates: 1 (" in said and f"; dropped as duplicates of other sources: {across} (" in said
    with pytest.raises(ValueError, match=r"no document is left of 2 \(.*duplicates=.* in other sources.*c\.jsonl"):
        prepare(PrepareConfig([a, c], str(tmp_path / "none"), str(llama), duplicates=kind))


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (None, r"the data file must exist: data='.*b\.jsonl'"),
        ({"messages": [{"role": "assistant", "content": "Hello."}]}, r"b\.jsonl, line 1: .*chat template"),
        ({"messages": [{"role": "user", "content": "Hello?"}]}, r"b\.jsonl, line 1: "),
    ],
)
@pytest.mark.parametrize("weight", ["", ":1"])
def test_a_source_that_cannot_be_read_is_said_before_another_is_written(
    llama, tmp_path, monkeypatch, record, rule, weight
):
    (tmp_path / "a.jsonl").write_text('{"text": "A book."}')
    if record:
        (tmp_path / "b.jsonl").write_text(json.dumps(record))
    monkeypatch.setattr(shards, "write", lambda *_: pytest.fail("the first source was written"))
    with pytest.raises(ValueError, match=rule):
        prepare(
            PrepareConfig(
                [f"{tmp_path / name}{weight}" for name in ("a.jsonl", "b.jsonl")], str(tmp_path / "mix"), str(llama)
            )
        )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_beginning_has_its_shares_and_each_source_its_rows_in_order(seed):
    rows = made(seed)
    places = [rows.place(index) for index in range(600)]
    for source, weight in enumerate(np.array([0.6, 0.4, 0.1]) / 1.1):
        own = [place for of, place in places if of == source]
        assert own == list(range(len(own)))
        counts = np.cumsum([of == source for of, _ in places])
        assert np.abs(counts - weight * np.arange(1, 601)).max() < 2
        assert [rows.counts(n + 1)[source] for n in range(600)] == counts.tolist()
        for index, (of, place) in enumerate(places[:50]):
            if of == source:
                for one, other in zip(rows.row(index), rows.rows[source].row(place)):
                    np.testing.assert_array_equal(one, other)


def test_a_row_is_of_a_source_with_exactly_its_share_as_probability():
    """Over 1,000 seeds the share of seeds in which row 7 is of a source is its weight, within 4 standard errors."""
    sources = [Source(name, weight) for name, weight in WEIGHTS.items()]
    held = {name: documents_of(name, 1) for name in WEIGHTS}
    found = np.zeros(3)
    for seed in range(1000):
        found[Mixture(sources, held.get, RowSpec(32, 128, "contiguous", seed=seed)).place(7)[0]] += 1 / 1000
    share = np.array([0.6, 0.4, 0.1]) / 1.1
    assert (np.abs(found - share) < 4 * np.sqrt(share * (1 - share) / 1000)).all()


def test_sources_do_not_draw_alike():
    """The same documents twice: the permutations differ."""
    rows = Mixture([Source("books", 0.5), Source("books", 0.5)], documents_of, RowSpec(32, 128, "contiguous", seed=0))
    one, other = ([rows.rows[source].unit(i) for i in range(40)] for source in (0, 1))
    assert sorted(one) == sorted(other) and one != other


def test_a_source_without_a_row_is_named():
    with pytest.raises(ValueError, match=r"runs dry.*32 tokens \(dropped 40 shorter ones; short_documents=pack or"):
        made(length=31)
    with pytest.raises(ValueError, match=r"keeps them\): data='books'"):
        made(length=31)


def test_weights_stand_behind_the_files(tmp_path):
    assert mixture(["a.jsonl:0.6", "s3://b/c:2"]) == [Source("a.jsonl", 0.6), Source("s3://b/c", 2.0)]
    assert mixture(["a.jsonl", "hub:ORG/NAME"]) == []
    named = tmp_path / "x:1"
    named.mkdir()
    assert mixture([str(named)]) == []


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (["a.jsonl:0", "b.jsonl:1"], "above 0: data='a.jsonl:0'"),
        (["a.jsonl:0.5", "b.jsonl:-1"], "above 0: data='b.jsonl:-1'"),
        (["a.jsonl:nan"], "finite number above 0: data='a.jsonl:nan'"),
        (["a.jsonl:0.5", "b.jsonl"], "every source has a weight.*data='b.jsonl'"),
    ],
)
def test_weights_that_are_none_are_refused(data, rule, extend_config):
    with pytest.raises(ValueError, match=rule):
        train.extend(extend_config(data=data))
    with pytest.raises(ValueError, match="eval_data"):
        train.extend(extend_config(eval_data=["a.jsonl:1"]))


@pytest.fixture
def two(documents, tmp_path):
    lines = documents.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "b.jsonl").write_text("".join(lines[40:]))
    return [f"{tmp_path / 'a.jsonl'}:3", f"{tmp_path / 'b.jsonl'}:1"]


def test_a_resumed_mixture_is_the_uninterrupted_one_bitwise(extend_config, two, tmp_path, capsys):
    whole = train.extend(extend_config(data=two, steps=5, output=str(tmp_path / "whole")))
    said = capsys.readouterr().err
    assert re.search(r"a\.jsonl: 7[05]\.\d\d% of the tokens, 1[45] rows, 0\.\d\d epochs", said)
    again = resumed(extend_config(data=two, steps=5, save_every=2, output=str(tmp_path / "again")), 3)
    assert same_weights(whole, again)
    about = json.loads((whole / "endprompt.json").read_text())["mixture"]
    assert [one["source"] for one in about] == [text.rpartition(":")[0] for text in two]
    assert sum(one["rows"] for one in about) == 20 and abs(about[0]["share"] - 0.75) < 0.051


def test_a_source_that_would_be_read_too_often_is_named(extend_config, two):
    with pytest.raises(ValueError, match=r"runs dry: .* passes over it, max_epochs=0.1: data='.*a.jsonl'"):
        train.extend(extend_config(data=two, max_epochs=0.1))
    with pytest.raises(ValueError, match=r"max_epochs=0\.1"):
        train.extend(extend_config(max_epochs=0.1, steps=50))


def test_a_prepared_mixture_is_the_mixture_of_its_files(extend_config, two, llama, tmp_path):
    """One folder, whose rows are those of the files; a source of it that is damaged is named."""
    settings = {"tokenizer": str(llama), "output": str(tmp_path / "mix")}
    mix = prepare(PrepareConfig(data=two, **settings))
    config = extend_config(data=[str(mix)])
    one, other = (to_extend(extend_config(data=data)).rows() for data in (two, [str(mix)]))
    assert [source.weight for source in mixture(config.data)] == [3.0, 1.0]
    assert [one["source"] for one in other.record(1)] == [text.rpartition(":")[0] for text in two]
    for index in (0, 1, 17):
        for ours, theirs in zip(one.row(index), other.row(index)):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="above 0: data="):
        prepare(PrepareConfig(data=["a.jsonl:-1"], **settings | {"output": str(tmp_path / "other")}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "mix"]
