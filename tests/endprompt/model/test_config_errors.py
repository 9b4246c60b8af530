"""A config that transformers itself refuses is an error of one line, whatever class of exception it raises."""

import json
import shutil

import pytest

from endprompt.model import load_config, load_tokenizer


def test_config_with_wrong_field_is_named(llama, tmp_path):
    directory = tmp_path / "broken"
    shutil.copytree(llama, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"config\.json: transformers cannot read it"):
        load_config(directory)


def test_tokenizer_reads_texts_over_the_window_without_a_warning(llama, caplog):
    tokenizer = load_tokenizer(llama)
    assert len(tokenizer("the grass is green " * 500)["input_ids"]) > 500
    assert "longer than the specified maximum" not in caplog.text
