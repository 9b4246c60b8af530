"""Samples held against those of RULER's own generator: tests/benchmarks/ruler/ruler_golden.json, which
docs/parity.md explains.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

import benchmarks
from benchmarks import ruler
from benchmarks.ruler import tasks
from benchmarks.ruler import texts as haystack
from benchmarks.ruler.cell import samples_sha256
from endprompt.files import file_sha256
from endprompt.model import load_tokenizer
from tests.support import ruler_helpers as helpers

GOLDEN = json.loads((Path(__file__).parent / "ruler_golden.json").read_text(encoding="utf-8"))
BASE = Path(benchmarks.__file__).parent / "base" / "256"
# What RULER's "meta-chat" template is, in a tokenizer's own form.
META_CHAT = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def cells(data: str) -> list:
    chosen = [cell for cell in GOLDEN["cells"] if cell["data"] == data]
    names = ("edition", "task", "length", "template", "random_seed", "tokenizer")
    return [
        pytest.param(
            cell,
            id="-".join(str(cell.get(name, "256")) for name in names),
            # Shorter ones go the same way as with 4096; of another tokenizer or longer: too slow for every day.
            marks=[pytest.mark.slow] * ("tokenizer" in cell or cell["length"] != 4096),
        )
        for cell in chosen
    ]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Essays and question sets that can be made anywhere."""
    folder = helpers.qa_files(tmp_path_factory.mktemp("own"))
    paragraphs = haystack.shipped_sample().read_text(encoding="utf-8").split("\n\n")
    text = "\n\n".join(paragraphs[len(paragraphs) // 2 :]).strip()
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    return folder


def known_sentences(text: str) -> list[str]:
    """As NLTK splits the essays of `own`: by the ends that are written down."""
    words = text.split(" ")
    ends = [end for end in GOLDEN["sentence_ends"] if end < len(words)] + [len(words)]
    return [" ".join(words[a:b]) for a, b in zip([0, *ends], ends)]


@functools.cache
def tokenizer_for(template: str, folder: Path = BASE):
    tokenizer = load_tokenizer(folder)
    if template == "meta-chat":
        tokenizer.chat_template = META_CHAT
    return tokenizer


def built(cell, folder):
    place = folder / cell["tokenizer"] if "tokenizer" in cell else BASE
    tokenizer, n = tokenizer_for(cell["template"], place), len(cell["sha256"])
    options = {"edition": cell["edition"], "chat": cell["template"] != "base"}
    return ruler.build_samples(cell["task"], cell["length"], tokenizer, n, cell["random_seed"] - 42, folder, **options)


@pytest.mark.parametrize("cell", cells("own"))
def test_samples_are_those_of_rulers_generator(cell, own, monkeypatch):
    monkeypatch.setattr(haystack, "sentences", known_sentences)
    samples = built(cell, own)
    assert [samples_sha256([sample])[:16] for sample in samples] == cell["sha256"]


@pytest.mark.parametrize("cell", cells("real"))
def test_samples_of_real_data_are_those_of_rulers_generator(cell):
    """ENDPROMPT_RULER_DATA: a folder with the files whose sha256 stand in the golden file, tokenizers in folders."""
    folder = Path(os.environ.get("ENDPROMPT_RULER_DATA", "none"))
    needed = {"qa_1": ["squad.json"], "qa_2": ["hotpotqa.json"], "vt": [], "fwe": [], "niah_single_1": []}
    needed |= {"niah_multikey_2": [], "niah_multikey_3": []}
    needed["cwe"] = ["english_words.json"] if cell["length"] > 131072 else []
    names = needed.get(cell["task"], ["PaulGrahamEssays.json"])
    for name in [*names, *([f"{cell['tokenizer']}/tokenizer.json"] if "tokenizer" in cell else [])]:
        if not (folder / name).is_file() or file_sha256(folder / name) != GOLDEN["data"]["real"][name]:
            pytest.skip(f"needs {name} of this very content in ENDPROMPT_RULER_DATA")
    if "PaulGrahamEssays.json" in names and cell["edition"] != "2025" and not haystack.has_punkt():
        pytest.skip("needs NLTK's punkt_tab")
    assert [samples_sha256([sample])[:16] for sample in built(cell, folder)] == cell["sha256"]


def test_every_task_and_both_generators_are_held():
    held = {(cell["edition"], cell["task"]) for cell in GOLDEN["cells"] if cell["data"] == "own"}
    replayed = {(edition, task) for edition in ("2024", "2025-ruler") for task in ruler.TASKS}
    families = ("niah_single_1", "niah_multikey_2", "niah_multivalue", "vt", "cwe", "fwe", "qa_1")
    assert held == replayed | {("2025", task) for task in families}  # one of each that has code of its own


def test_the_keys_are_drawn_from_rulers_list(monkeypatch):
    """Alphabetical over whole pairs: adjectives that begin with another adjective mix with it."""
    lists = {
        "noun": ("ant", "bee", "free-for-all", "zoo"),
        "adjective": ("able", "able-bodied", "ill", "well", "well-bred"),
    }
    monkeypatch.setattr(haystack, "word_list", lists.__getitem__)
    haystack._word_blocks.cache_clear()
    every = sorted({f"{a}-{b}" for a in lists["adjective"] for b in lists["noun"]})
    assert [haystack.sorted_key_word(i) for i in range(haystack.sorted_key_words())] == every
    haystack._word_blocks.cache_clear()


def test_a_sample_is_made_again_alone(own):
    """From a recipe, in any order: the bytes that the whole cell had."""
    tokenizer = load_tokenizer(BASE)
    for task, edition in (("vt", "2024"), ("vt", "2025-ruler"), ("qa_1", "2024"), ("cwe", "2025-ruler")):
        cell = ruler.Cell.build(task, 2048, tokenizer, 4, 1, own, ruler.Options(edition=edition))
        whole = list(cell)
        again = ruler.Cell(json.loads(json.dumps(cell.recipe)), tokenizer, own)
        assert [again[i] for i in (3, 0, 2)] == [whole[i] for i in (3, 0, 2)]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:affcd6d45fdf3cc8\nsize 8564991\n"


def test_missing_files_and_pointers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"qa_2 needs hotpotqa\.json .* `endprompt fetch ruler --data-dir \S+` brings"):
        haystack.library("hotpotqa", tmp_path, "qa_2")
    for name, read in (
        ("squad.json", lambda: haystack.library("squad", tmp_path, "qa_1")),
        ("english_words.json", lambda: haystack.data_file("words", tmp_path, "cwe")),
        ("PaulGrahamEssays.json", lambda: haystack.essay(None, tmp_path)),
        ("story.txt", lambda: haystack.essay(tmp_path / "story.txt", None)),
    ):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ValueError, match=rf"{name}: must hold the data, and is a Git LFS pointer .*git lfs pull"):
            read()


def test_a_part_of_a_question_set_is_told_from_the_whole(own, monkeypatch):
    """By its hash or by the number of its questions."""
    assert not haystack.library("squad", own, "qa_1").whole
    cell = ruler.Cell.build("qa_1", 2048, helpers.tokenizer(), 1, 0, own)
    assert cell.recipe["questions"] == {"count": 48, "whole": False}
    known = dict(haystack.SOURCES)
    source = known["squad"]
    for change in ({"questions": 48}, {"copies": {"": file_sha256(own / "squad.json")}}):
        monkeypatch.setitem(haystack.SOURCES, "squad", tasks.dataclasses.replace(source, **change))
        haystack._library.cache_clear()
        assert haystack.library("squad", own, "qa_1").whole
    haystack._library.cache_clear()


def test_an_edition_that_cannot_be_is_named():
    tokenizer = helpers.tokenizer()
    with pytest.raises(ValueError, match=r"edition must be one of 2025, 2025-ruler, 2024, lab-2026: '2023'"):
        ruler.build_samples("vt", 4096, tokenizer, 1, edition="2023")
    with pytest.raises(ValueError, match=r"shots must be 1 with edition 2024"):
        ruler.build_samples("vt", 4096, tokenizer, 1, edition="2024", shots=0)
    for task in ("vt", "niah_single_1", "fwe", "cwe"):
        with pytest.raises(ValueError, match=rf"too short for task {task} of edition 2024"):
            ruler.build_samples(task, 120, tokenizer, 1, edition="2024")
