"""Families of transformers taken the whole way; the page says what the rows say."""

from __future__ import annotations

import pytest

from tests.support import families, models_page


def test_the_page_is_written_from_the_rows():
    page = models_page.page(models_page.read_rows())
    assert families.PAGE.read_text(encoding="utf-8") == page, "run python -m tests.support.models_page"


def test_no_row_is_wrong_or_a_traceback():
    rows = models_page.read_rows()
    assert len({row["family"] for row in rows}) == len(rows) >= 180
    assert [row for row in rows if any(str(value).startswith(("WRONG", "FAILS")) for value in row.values())] == []


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next", "gpt2", "falcon"])
def test_some_families_are_as_their_rows_say(family):
    (row,) = [row for row in models_page.read_rows() if row["family"] == family]
    (now,) = families.sweep([family])
    assert now | {"versions": None} == row | {"versions": None}


def test_a_family_that_transformers_adds_has_no_row(monkeypatch):
    """What the slow test would find: the list is transformers' own, less what the rows know."""
    from transformers.models.auto import modeling_auto

    known = {row["family"] for row in models_page.read_rows()} | set(families.families())
    monkeypatch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "later", "LaterForCausalLM")
    assert set(families.families()) - known == {"later"}
    (found,) = families.sweep(["later"])
    assert found["built"].startswith("no: KeyError")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_family_is_as_its_row_says():
    """A family that transformers has added since has no row: sweep it and write the page again."""
    rows = {row["family"]: row | {"versions": None} for row in models_page.read_rows()}
    found = {row["family"]: row | {"versions": None} for row in families.sweep(families.families())}
    assert [name for name in found if rows.get(name) != found[name]] == []
    assert sorted(rows) == sorted(found)
