"""Records with messages: the template's own text, and loss on what the assistant wrote."""

import copy
import json

import numpy as np
import pytest

from endprompt import train
from endprompt.config import PrepareConfig
from endprompt.data import Rows, RowSpec, prepare, read_shard
from endprompt.data.documents import document_of, tokenize
from tests.support.checkpoints import make_checkpoint

OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"
TURN = "<{{ turn.role }}>{{ turn.content }}!"
MARKED = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}<assistant>{% generation %}{{ turn.content }}!"
    "{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}" + OPEN
)
PLAIN = "{% for turn in messages %}" + TURN + "{% endfor %}" + OPEN
CHAT = [
    *({"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is blue"}),
    *({"role": "user", "content": "the sun"}, {"role": "assistant", "content": "is yellow"}),
]
WRITTEN = "<user>the sky!<assistant>is blue!<user>the sun!<assistant>is yellow!"


@pytest.fixture
def chatty(tokenizer):
    def get(template):
        made = copy.deepcopy(tokenizer)
        made.chat_template = template
        return made

    return get


def read(tokenizer, record, **options):
    return tokenize([document_of(record, "chat.jsonl, line 3")], tokenizer, **options)


@pytest.mark.parametrize(
    ("template", "loss", "learned", "completion"),
    [
        (MARKED, "assistant", ["is blue!", "is yellow!"], ""),
        (MARKED, "completion", ["is yellow!"], "is yellow!"),
        (PLAIN, "completion", ["is yellow!"], "is yellow!"),
    ],
)
def test_what_the_assistant_wrote_is_learned_and_nothing_else(chatty, template, loss, learned, completion):
    tokenizer = chatty(template)
    made = read(tokenizer, {"messages": CHAT}, chat_loss=loss)
    assert tokenizer.decode(made.tokens) == WRITTEN  # no EOS that the template did not write
    runs = np.split(made.tokens, np.flatnonzero(np.diff(made.weights.astype(int))) + 1)
    assert [tokenizer.decode(run) for run in runs[1::2]] == learned and not made.weights[0]
    assert tokenizer.decode(made.tokens[made.completions[0] :]) == completion


def test_weights_of_a_row_are_the_marks_and_text_may_weigh(chatty):
    made = read(chatty(MARKED), {"messages": CHAT})
    n = len(made.tokens)
    for text, low in ((None, 0.0), (0.25, 0.25)):
        _, _, weights = Rows(made, RowSpec(n, 4 * n, "contiguous", text_weight=text)).row(0)
        assert weights[1:].tolist() == [1.0 if mark else low for mark in made.weights[1:]] and weights[0] == 0
    last = read(chatty(PLAIN), {"messages": CHAT}, chat_loss="completion")
    _, _, weights = Rows(last, RowSpec(n, 4 * n, "contiguous", completion_weight=3.0, text_weight=0.5)).row(0)
    assert weights[1:].tolist() == [3.0 if mark else 0.5 for mark in last.weights[1:]]


def test_text_in_front_of_a_completion_may_weigh_less_packed_or_not(tokenizer):
    made = tokenize([document_of({"text": "the sky is", "completion": " blue"}, "x")] * 2, tokenizer)
    split = int(made.completions[0])
    half = made.lengths[0]
    for row, short in ((half, "drop"), (2 * half, "pack")):
        rows = Rows(made, RowSpec(int(row), 512, "contiguous", text_weight=0.5, short=short))
        weights = rows.row(0)[2]
        expected = ([0.5] * split + [1.0] * (half - split)) * (row // half)
        assert weights[1:].tolist() == expected[1:]
    plain = tokenize([document_of({"text": "the sky is blue"}, "x")], tokenizer)
    assert set(Rows(plain, RowSpec(3, 512, "contiguous", text_weight=0.5)).row(0)[2][1:]) == {1.0}


def test_a_shard_of_conversations_trains_as_its_file_does(chatty, extend_config, documents, tmp_path):
    base = make_checkpoint(tmp_path / "base")
    chatty(MARKED).save_pretrained(base)
    path = tmp_path / "chat.jsonl"
    lines = [{"messages": [*CHAT * 2, *CHAT[: 2 * (i % 2)]]} for i in range(8)] + [{"text": "here we go " * 30}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"model": str(base), "steps": 2, "rows": 2, "text_weight": 0.5}
    shard = prepare(PrepareConfig(data=[str(path)], tokenizer=str(base), output=str(tmp_path / "shard")))
    assert 0 < read_shard(shard).weights.mean() < 1
    outs = [
        train.extend(extend_config(data=[str(data)], output=str(tmp_path / name), **settings))
        for name, data in (("a", path), ("b", shard))
    ]
    assert outs[0].joinpath("model.safetensors").read_bytes() == outs[1].joinpath("model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="prepared for another chat_loss, assistant: chat_loss='completion'"):
        train.extend(extend_config(data=[str(shard)], output=str(tmp_path / "c"), chat_loss="completion", **settings))


@pytest.mark.parametrize(
    ("template", "messages", "loss", "rule"),
    [
        (PLAIN, CHAT, "assistant", r"has no \{% generation %\} mark.*chat_loss=completion"),
        (None, CHAT, "assistant", "needs a tokenizer with a chat template"),
        (MARKED, CHAT[:1], "assistant", "must have a turn of the assistant"),
        (MARKED, CHAT[:3], "completion", "last turn of messages must be the assistant's: role='user'"),
        (MARKED, [], "assistant", "a list of at least one turn"),
        (MARKED, ["hello"], "assistant", "turn 1 of messages must be an object with a role"),
        (MARKED, [CHAT[0], {"role": "assistant", "content": [{"type": "image"}]}], "assistant", "turn 2.*as text"),
        ("{{ raise_exception('no system') }}{% generation %}", CHAT, "assistant", "chat template fails: .*"),
        ("{{ messages|length }}" + OPEN, CHAT, "completion", "does not write the last turn behind its own opening"),
        (MARKED.replace("'assistant'", "'model'"), CHAT, "assistant", "marks nothing of this conversation"),
    ],
)
def test_conversations_that_cannot_be_learned_from_name_file_and_line(chatty, template, messages, loss, rule):
    with pytest.raises(ValueError, match=f"^chat.jsonl, line 3: .*{rule}"):
        read(chatty(template), {"messages": messages}, chat_loss=loss)


def test_a_data_set_that_needs_code_is_refused(llama, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("import datasets\n")
    with pytest.raises(ValueError, match=r"hub:.*set: .*needs Python code of its own, which is not run \(set.py\)"):
        prepare(PrepareConfig([f"hub:{tmp_path / 'set'}"], str(tmp_path / "shard"), str(llama)))
