"""A config that transformers itself refuses is an error of one line, whatever class of exception it raises."""

import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM

from endprompt.model import load_config, load_model, load_tokenizer


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rope_theta": "1e4"}, "rope_theta must be a number, not text: rope_theta='1e4'"),
        ({"long_factor": [1.0, 2.0, 0.0, 4.0]}, r"long_factor\[2\] must be a positive number: long_factor\[2\]=0.0"),
        ({"short_factor": [1.0, "2", 3.0, 4.0]}, r"short_factor\[1\]='2'"),
    ],
)
def test_numbers_of_rope_that_are_none_are_named(llama, tmp_path, wrong, said):
    """A divisor of 0 would be a model that answers with what is no number, beyond its original window alone."""
    shutil.copytree(llama, tmp_path / "text")
    path = tmp_path / "text" / "config.json"
    own = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    own |= {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": own | wrong}))
    with pytest.raises(ValueError, match=f"text: .*{said}"):
        load_config(tmp_path / "text")


def test_tokenizer_reads_texts_over_the_window_without_a_warning(llama, caplog):
    tokenizer = load_tokenizer(llama)
    assert len(tokenizer("the grass is green " * 500)["input_ids"]) > 500
    assert "longer than the specified maximum" not in caplog.text


def to_folder(path):
    path.unlink()
    path.mkdir()


def to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


#: What can happen to a file, and what is said of it. JSON: only to those that must be an object.
DAMAGE = {
    "a folder": (to_folder, "Is a directory"),
    "a link to nothing": (to_nowhere, "No such file or directory"),
    "a Git LFS pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        "is a Git LFS pointer",
    ),
    "not UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'), "not UTF-8"),
    "a mark in front": (lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()), "byte order mark"),
    "JSON: empty": (lambda path: path.write_bytes(b""), "not valid JSON"),
    "JSON: cut in half": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "not valid JSON",
    ),
    "JSON: words": (lambda path: path.write_text("hello"), "not valid JSON"),
    "JSON: a list": (lambda path: path.write_text("[1]"), "must be a JSON object, got list"),
    "JSON: null": (lambda path: path.write_text("null"), "must be a JSON object, got NoneType"),
}


FILES = [
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"),
    "model-00001-of-00003.safetensors",
]


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """A checkpoint with every file that one may have."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(directory)
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(directory, max_shard_size="40KB")
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (directory / "added_tokens.json").write_text('{"<|endoftext|>": 0}')
    load_model(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for i, name in enumerate(FILES) for j, damage in enumerate(DAMAGE) if (i + j) % 2],
)
def test_a_damaged_file_is_named_in_one_line(whole, tmp_path, name, damage):
    """By what reads it first, and nothing that reads the checkpoint fails in another way."""
    text, (change, said) = not name.endswith(".safetensors"), DAMAGE[damage]
    if (damage.startswith("JSON") and not name.endswith(".json")) or (damage == "a mark in front" and "index" in name):
        pytest.skip("it may be so")
    directory = tmp_path / "copy"
    shutil.copytree(whole, directory)
    change(directory / name)
    errors = []
    for load in (load_config, load_tokenizer, load_model):
        try:
            load(directory)
        except ValueError as error:
            errors.append(str(error))
    assert errors and all(name in error and "\n" not in error for error in errors), errors
    assert all(re.search(said, error) for error in errors) or not text, errors
