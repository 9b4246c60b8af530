"""LongBench's files: every way that they come in gives the same documents, and every fault is named with its place."""

from __future__ import annotations

import hashlib
import json
import zipfile

import pytest

from benchmarks.longbench import load_documents
from benchmarks.longbench.sets import bucket
from tests.support.longbench_fixtures import documents, jsonl, write_data


def archive(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def parquet(path, items):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    return path


def renamed(items):
    return [{"question" if key == "input" else key: value for key, value in item.items()} for item in items]


@pytest.mark.parametrize("form", ["jsonl", "folder data", "zip", "zip in folder", "parquet", "two parquets"])
def test_every_form_holds_the_same_documents(tmp_path, form):
    items = documents("qasper", n=5)
    data = jsonl(items)
    folder = tmp_path
    if form == "jsonl":
        files = {"qasper.jsonl": data}
        (tmp_path / "qasper.jsonl").write_bytes(data)
    elif form == "folder data":
        files = {"qasper.jsonl": data}
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "qasper.jsonl").write_bytes(data)
    elif form.startswith("zip"):
        path = archive(tmp_path / "data.zip", {"data/qasper.jsonl": data, "data/hotpotqa.jsonl": b"{}"})
        files = {"data.zip": path.read_bytes(), "data.zip:data/qasper.jsonl": data}
        folder = path if form == "zip" else tmp_path
    elif form == "parquet":
        path = parquet(tmp_path / "qasper" / "test-00000-of-00001.parquet", renamed(items))
        files = {"qasper/test-00000-of-00001.parquet": path.read_bytes()}
    else:
        names = [f"data/qasper/test-0000{i}-of-00002.parquet" for i in range(2)]
        paths = [parquet(tmp_path / name, part) for name, part in zip(names, (items[:2], renamed(items[2:])))]
        files = {name: path.read_bytes() for name, path in zip(names, paths)}
    loaded = load_documents("qasper", folder)
    assert loaded.items == items
    assert loaded.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_the_extended_set_is_another_file(tmp_path):
    write_data(tmp_path, ["qasper", "qasper_e"])
    assert [item["_id"] for item in load_documents("qasper_e", tmp_path).items] == [f"qasper_e-{i}" for i in range(4)]


def test_separators_of_lines_inside_a_document_are_text(tmp_path):
    item = {**documents("qasper", n=1)[0], "context": "one\u2028two\x0bthree\x85four"}
    (tmp_path / "qasper.jsonl").write_bytes(jsonl([item]) + b"\n  \n")
    assert load_documents("qasper", tmp_path).items == [item]


def test_a_missing_file_says_what_from_where_and_by_which_option(tmp_path):
    for folder in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load_documents("qasper", folder)
        assert "`endprompt fetch longbench --data-dir" in str(error.value)
    assert "qasper.jsonl" in str(error.value)
    archive(tmp_path / "data.zip", {"data/hotpotqa.jsonl": b"{}"})
    with pytest.raises(FileNotFoundError, match=r"qasper is missing"):
        load_documents("qasper", tmp_path)


GOOD = documents("qasper", n=1)[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input": "x", "cont', r"line 2: not valid JSON"),
        (b"\xff\xfe", r"line 2: not UTF-8"),
        (b'"text"', r"line 2: must be a JSON object, got str"),
        (json.dumps({**GOOD, "context": None}).encode(), r"line 2: context must be str, got NoneType"),
        (json.dumps({**GOOD, "answers": "yes"}).encode(), r"line 2: answers must be list, got str"),
        (json.dumps({**GOOD, "answers": []}).encode(), r"line 2: answers must not be empty"),
        (json.dumps({**GOOD, "length": "3"}).encode(), r"line 2: length must be int \| None, got str"),
        (json.dumps({**GOOD, "dataset": "hotpotqa"}).encode(), r"line 2: a document of hotpotqa, in a file of qasper"),
        (json.dumps({**GOOD, "context": "\ud800"}).encode(), r"line 2: context holds half of a surrogate pair"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path, line, message):
    (tmp_path / "qasper.jsonl").write_bytes(jsonl([GOOD]) + line + b"\n")
    with pytest.raises(ValueError, match=r"qasper\.jsonl, " + message):
        load_documents("qasper", tmp_path)
    (tmp_path / "qasper.jsonl").unlink()
    archive(tmp_path / "data.zip", {"data/qasper.jsonl": jsonl([GOOD]) + line})
    with pytest.raises(ValueError, match=r"data\.zip:data/qasper\.jsonl, " + message):
        load_documents("qasper", tmp_path)


def test_what_some_copies_leave_out_is_not_missed(tmp_path):
    """A null question where the prompt asks none, no length but in LongBench-E, a name that is no set's."""
    item = {**documents("lcc", n=1)[0], "input": None, "dataset": "LCC (Python)"}
    del item["length"], item["_id"]
    (tmp_path / "lcc.jsonl").write_bytes(jsonl([item]))
    (loaded,) = load_documents("lcc", tmp_path).items
    assert loaded["input"] == "" and loaded["length"] is None
    (tmp_path / "lcc_e.jsonl").write_bytes(jsonl([item]))
    with pytest.raises(ValueError, match=r"lcc_e\.jsonl, line 1: length must be int, got NoneType"):
        load_documents("lcc_e", tmp_path)
    (tmp_path / "qasper.jsonl").write_bytes(jsonl([{**GOOD, "input": None}]))
    with pytest.raises(ValueError, match=r"qasper\.jsonl, line 1: input must be str, got NoneType"):
        load_documents("qasper", tmp_path)


def test_classification_needs_its_labels_and_a_file_its_documents(tmp_path):
    (tmp_path / "trec.jsonl").write_bytes(jsonl([{**documents("trec", n=1)[0], "all_classes": None}]))
    with pytest.raises(ValueError, match=r"trec\.jsonl, line 1: all_classes"):
        load_documents("trec", tmp_path)
    (tmp_path / "qasper.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="holds no document of qasper"):
        load_documents("qasper", tmp_path)


@pytest.mark.parametrize("name", ["../qasper.jsonl", "/etc/qasper.jsonl", "data/../../x", "data\\..\\x", "C:x"])
def test_an_archive_whose_paths_lead_out_is_refused(tmp_path, name):
    path = archive(tmp_path / "data.zip", {"data/qasper.jsonl": jsonl([GOOD]), name.replace("\\", "!"): b""})
    if "\\" in name:  # zipfile writes and reads no backslash on its own
        path.write_bytes(path.read_bytes().replace(name.replace("\\", "!").encode(), name.encode()))
    with pytest.raises(ValueError, match="must stay inside the archive"):
        load_documents("qasper", tmp_path)


def test_a_damaged_archive_is_refused(tmp_path):
    path = archive(tmp_path / "data.zip", {"data/qasper.jsonl": jsonl(documents("qasper", n=9))})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole zip archive"):
        load_documents("qasper", tmp_path)
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"data/qasper\.jsonl: cannot be read"):
        load_documents("qasper", tmp_path)
    archive(path, {"data/qasper.jsonl": jsonl([GOOD]), "qasper.jsonl": jsonl([GOOD])})
    with pytest.raises(ValueError, match=r"holds qasper\.jsonl twice"):
        load_documents("qasper", tmp_path)


def test_a_changed_archive_is_hashed_again(tmp_path):
    for n in (1, 2):
        path = archive(tmp_path / "data.zip", {"data/qasper.jsonl": jsonl(documents("qasper", n=n))})
        assert load_documents("qasper", tmp_path).sha256["data.zip"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "qasper" / "test-0.parquet"
    path.parent.mkdir()
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"test-0\.parquet: not a whole Parquet file"):
        load_documents("qasper", tmp_path)
    parquet(path, [{key: value for key, value in GOOD.items() if key != "context"}])
    with pytest.raises(ValueError, match=r"test-0\.parquet, row 1: context must be str"):
        load_documents("qasper", tmp_path)


def test_buckets_are_those_of_the_published_evaluation():
    assert [bucket(n) for n in (0, 3999, 4000, 7999, 8000, 10**6)] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+", "8k+"]


def test_an_archive_is_read_in_place(tmp_path):
    archive(tmp_path / "data.zip", {"data/qasper.jsonl": jsonl([GOOD])})
    load_documents("qasper", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data.zip"]
