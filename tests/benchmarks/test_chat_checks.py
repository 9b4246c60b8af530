"""Chat templates that checkpoints come with: faults are one line, before any work."""

import json
import shutil

import pytest

from benchmarks import chat, ruler
from benchmarks.longbench import Prompter
from endprompt.text import Reader
from tests.support.ruler_helpers import tokenizer as made

USER = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
GOOD = USER + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
)
FAULTS = [
    (SYSTEM_FIRST + GOOD, "a system message must come first"),
    ("{% for m in messages %}{{ m['content'] }", "unexpected '}'"),
    ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
    ("{{ messages[0]['text'].strip() }}", "has no attribute 'text'"),
    ("{{ strftime_now }}" + GOOD, "writes a function where its result is meant"),
    ("<|user|><|assistant|>", "leaves the user's text out, or changes it"),
    (GOOD.replace("m['content'] }}", "m['content'] | e }}"), "leaves the user's text out, or changes it"),
    (GOOD.replace("m['content'] }}", "m['content'] | replace('\\n', ' ') }}"), "leaves the user's text out"),
    ("{{ messages[0]['content'] }}" + GOOD, "has the user's text 2 times"),
    (USER, "ends in EOS (</s>), so that nothing follows"),
    (USER + "\n", "ends in EOS (</s>), so that nothing follows"),
    ("<s><s>" + GOOD, "has BOS more than once"),
    ("\n<s>" + GOOD, "has BOS more than once"),
]
ALLOWED = [
    GOOD,
    "<s>" + GOOD,
    GOOD.replace("m['content'] }}", "m['content'] | trim }}"),
    "[INST] {{ messages[0]['content'] }} [/INST]",
]


def with_template(template, bos=True):
    from transformers import PreTrainedTokenizerFast

    plain = made("bytes", bos=bos)
    own = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    own.chat_template = template
    return own


@pytest.mark.parametrize(("template", "said"), FAULTS, ids=[said[:24] + str(i) for i, (_, said) in enumerate(FAULTS)])
def test_a_template_that_fails_is_named_in_its_own_words(template, said):
    with pytest.raises(ValueError, match="template") as raised:
        chat.renderer(with_template(template))
    assert said in str(raised.value) and "\n" not in str(raised.value).strip()


@pytest.mark.parametrize("template", ALLOWED)
@pytest.mark.parametrize("bos", [True, False])
def test_what_templates_may_do(template, bos):
    """The user's text is in the prompt once; BOS once if the tokenizer or the template puts it."""
    tokenizer = with_template(template, bos)
    sample, *_ = ruler.build_samples("niah_single_1", 400, tokenizer, 1, chat=True, max_new_tokens=30)
    ids = Reader(tokenizer).prompts([sample["input"]])[0]
    assert ids.count(1) == int(bos or template.startswith("<s>")) and ids[-1] != 2
    assert sample["input"].count("What is the special magic number") == 1
    assert sample["length"] == len(ids)


def test_without_a_template_chat_is_refused():
    with pytest.raises(ValueError, match="chat needs a tokenizer with a chat template; this one has none"):
        chat.renderer(with_template(None))


def test_lm_evals_own_template_is_checked_prompt_by_prompt():
    def drops(messages, add_generation_prompt):
        return "<|user|><|assistant|>"

    def fails(messages, add_generation_prompt):
        raise KeyError("role")

    for template, said in ((drops, "leaves the user's text out"), (fails, r"template fails: 'role' \(KeyError\)")):
        with pytest.raises(ValueError, match=said):
            Prompter("qasper", with_template(None), 4096, chat_template=template).wrap("What is it?")


@pytest.mark.parametrize("template", [FAULTS[0][0], FAULTS[1][0]])
def test_score_says_it_in_one_line(llama, tmp_path, capsys, template):
    from endprompt import cli

    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    with_template(template).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2048}))  # the tokenizer's
    words = f"score {folder} --tasks niah_single_1 --lengths 400 --samples 1 --chat --prepare-only --beyond-window"
    assert cli.main([*words.split(), "--output", str(tmp_path / "o"), "--cache-dir", str(tmp_path / "c")]) == 1
    said = capsys.readouterr().err
    assert "template fails" in said and len(said.splitlines()) == 1
