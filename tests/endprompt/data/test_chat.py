"""Records with messages: the template's own text, and loss on what the assistant wrote."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

from endprompt import train
from endprompt.config import PrepareConfig
from endprompt.data import Rows, RowSpec, prepare, read_shard
from endprompt.data.documents import document_of, tokenize
from endprompt.train import evaluate
from tests.support.checkpoints import TARGET, make_checkpoint
from tests.support.runs import lines_of, losses_of

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


def test_an_extended_checkpoint_is_tuned_at_its_own_window(chatty, extend_config, tmp_path):
    """Nothing of RoPE changes; the first loss is transformers' own over what the assistant wrote, each conversation
    read by itself; the held-out loss is over the assistant's words, too."""
    base = make_checkpoint(tmp_path / "base")
    chatty(MARKED).save_pretrained(base)
    extended = train.extend(extend_config(model=str(base), scaling="yarn", steps=1, output=str(tmp_path / "extended")))
    chats = [{"messages": [*CHAT, *CHAT[: 2 * (i % 3)]]} for i in range(12)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    settings = {"model": str(extended), "data": [str(path)], "scheme": "contiguous", "prompt": None, "scaling": "none"}
    settings |= {"short_documents": "apart", "row_tokens": TARGET, "rows": 1, "steps": 1}
    settings |= {"eval_data": [str(path)], "eval_lengths": [48], "eval_rows": 2}
    tuned = train.extend(extend_config(**settings, output=str(tmp_path / "tuned")))
    before, after = (json.loads((out / "config.json").read_text()) for out in (extended, tuned))
    assert before == after and after["max_position_embeddings"] == TARGET
    assert json.loads((tuned / "endprompt.json").read_text())["method"] == "endprompt+EP_3+yarn@tuned"
    assert f"tuned at its window of {TARGET} tokens" in (tuned / "README.md").read_text()

    model = transformers.AutoModelForCausalLM.from_pretrained(extended).eval()
    whole = tokenize([document_of(chat, "x") for chat in chats], chatty(MARKED))
    rows = Rows(whole, RowSpec(TARGET, TARGET, "contiguous", short="apart"))
    total = count = 0.0
    assert len(rows._packs) == len(rows) > 1
    for document in rows._packs[rows.unit(0)]:
        one = whole.one(document)
        ids = torch.from_numpy(one.tokens.astype(np.int64))[None]
        labels = ids.masked_fill(torch.from_numpy(one.weights == 0)[None], -100)
        scored = int((labels[:, 1:] >= 0).sum())
        total, count = total + model(ids, labels=labels).loss.item() * scored, count + scored
    assert losses_of(tuned) == pytest.approx([total / count], abs=1e-5)
    ids, weights = evaluate.held_out_rows(whole, 48, 2)[1]
    assert 0 < weights.mean() < 1 and weights[1:].tolist() == whole.weights[-47:].tolist()
    with torch.no_grad():
        stock = transformers.AutoModelForCausalLM.from_pretrained(tuned).eval()
        held = [
            (torch.from_numpy(ids)[None], torch.from_numpy(w > 0)[None])
            for ids, w in evaluate.held_out_rows(whole, 48, 2)
        ]
        losses = [
            stock(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0][w[:, 1:]] for ids, w in held
        ]
    (row,) = lines_of(tuned / "results.jsonl")
    assert row["value"] == pytest.approx(-float(torch.cat(losses).mean()), abs=1e-5)
    assert row["method"] == "endprompt+EP_3+yarn@tuned"
    with pytest.raises(ValueError, match=r"equal to it with scaling=none: .*scaling='yarn'"):
        train.extend(extend_config(**settings | {"scaling": "yarn"}, output=str(tmp_path / "no")))


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
