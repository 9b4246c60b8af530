"""`endprompt generate` and `chat`: answers are transformers' own; window, places and cuts are those counted by hand."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import talk
from benchmarks.config import ChatConfig
from benchmarks.scoring import generate
from endprompt.cli import main
from tests.support.checkpoints import make_checkpoint

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 4.0,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
}  # fmt: skip
#: max_position_embeddings and rope_parameters of checkpoints whose frequencies depend on length, factor or neither.
SCALED = {
    "none": (256, {"rope_type": "default", "rope_theta": 1e4}),
    "yarn": (
        256,
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32},
    ),
    "dynamic": (64, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "longrope": (256, LONGROPE),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """`checkpoints(scaling, chat)`: directory of a tiny one, made once; its letters are tokens."""
    made = {}

    def make(scaling: str = "none", chat: bool = False):
        if (scaling, chat) not in made:
            window, rope = SCALED[scaling]
            directory = tmp_path_factory.mktemp("m") / f"{scaling}-{chat}"
            made[scaling, chat] = make_checkpoint(
                directory, max_position_embeddings=window, rope_parameters=rope, initializer_range=0.5
            )
            if chat:
                (directory / "chat_template.jinja").write_text(TEMPLATE)
        return made[scaling, chat]

    return make


def greedy(directory, prompt: str, new_tokens: int) -> str:
    """transformers' own answer on a fresh model."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    made = greedy_ids(directory, prompt, new_tokens)
    return tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def greedy_ids(directory, prompt: str, new_tokens: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()


LETTERS = "QXZJVKWYBF"  # no merges: each is a token of its own


@pytest.mark.parametrize(("scaling", "chat"), [*((name, False) for name in SCALED), ("yarn", True), ("dynamic", True)])
def test_the_answer_is_transformers_own(checkpoints, scaling, chat, tmp_path, capsys):
    directory = checkpoints(scaling, chat)
    (tmp_path / "a.txt").write_text(f"\n{LETTERS * 4}\n")
    (tmp_path / "b.txt").write_text(f"{LETTERS * 3}")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main(["generate", str(directory), "--file", *files, "--ask", "JJ", "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    content = f"{LETTERS * 4}\n\n{LETTERS * 3}\n\nJJ"
    prompt = f"[user]{content}\n[assistant]" if chat else content
    assert out == greedy(directory, prompt, 12) + "\n"
    window, rope = SCALED[scaling]
    window = 256 if scaling == "dynamic" else window
    assert f"window {window} tokens; RoPE scaling {rope['rope_type']}" in err
    lead = len("[user]") if chat else 0
    assert f"a.txt: tokens {lead} to {lead + 40} of the window's {window} (" in err
    assert f"b.txt: tokens {lead + 42} to {lead + 72} of the window's {window} (" in err
    assert re.search(r"\d+ tokens, (ended by itself|stopped at max_new_tokens=12), [\d,.]+ tokens/s; ", err)


def test_a_stop_token_ends_the_answer_and_is_not_written(checkpoints, monkeypatch, capsys):
    directory = checkpoints()
    prompt = "QXZ"
    whole = greedy_ids(directory, prompt, 12)
    monkeypatch.setattr(generate, "stop_tokens", lambda model, tokenizer: frozenset({whole[4]}))
    assert main(["generate", str(directory), "--ask", prompt, "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    end = whole.index(whole[4])
    assert (
        out == AutoTokenizer.from_pretrained(directory).decode(whole[:end]) + "\n"
        and f"{end} tokens, ended by itself" in err
    )


@pytest.mark.parametrize("part", ["start", "middle", "end"])
def test_what_is_left_out_is_what_was_asked_for_and_is_said(checkpoints, part, monkeypatch, capsys):
    text = "".join(LETTERS[i * i % 7] for i in range(300))
    given = []
    monkeypatch.setattr(talk.Checkpoint, "answer", lambda self, ids, out: given.append(ids) or talk.Answer("", 0))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    arguments = ["generate", str(checkpoints()), "--file", "-", "--ask", "JJ", "--max-new-tokens", "6"]
    assert main([*arguments, "--cut", part]) == 0
    err = capsys.readouterr().err
    ((*ids,),) = given
    read = AutoTokenizer.from_pretrained(checkpoints()).decode(ids)
    assert read.endswith("\n\nJJ") and len(ids) == 250 == 256 - 6
    body = read.removesuffix("\n\nJJ")
    left = 300 - len(body)
    first, last = map(int, re.search(r"characters (\d+) to (\d+)", err).groups())
    assert last - first == left and text[:first] + text[last:] == body
    assert {"start": first == 0, "end": last == 300, "middle": abs(first - (300 - last)) <= 1}[part]
    assert f"cut: {left} of 300 characters" in err and f"left out of the {part}" in err
    assert f"standard input: tokens 0 to {len(body)} of the window's 256" in err
    assert f"the prompt had 304 tokens, and has {len(ids)}" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(arguments) == 1
    assert "a prompt of 304 tokens with max_new_tokens=6 needs --cut" in capsys.readouterr().err


def test_places_of_texts_when_the_middle_is_left_out():
    texts = talk.Texts("aaaa\n\nbbbbbb\n\ncccc", ["a", "b", "c"], [0, 6, 14])
    texts.leave_out("middle", 8)  # characters 5 to 13
    assert texts.kept == "aaaa\n\ncccc" and texts.spans() == [("a", 0, 4), ("b", 5, 5), ("c", 6, 10)]


def test_a_file_that_is_left_out_whole_is_named(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(talk.Checkpoint, "answer", lambda self, ids, out: talk.Answer("", 0))
    for name, text in (("a", "Q" * 300), ("b", "X" * 9)):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["generate", str(checkpoints()), "--file", *files, "--cut", "end", "--max-new-tokens", "6"]) == 0
    err = capsys.readouterr().err
    assert f"{files[0]}: tokens 0 to 250 of the window's 256 (0% to 98%)" in err and f"{files[1]}: left out\n" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give file or ask"),
        (["--file", "empty.txt"], "a text must not be empty: file='empty.txt'"),
        (["--file", "none.txt"], "none.txt: No such file"),
        (["--file", "latin.txt"], "latin.txt: not UTF-8"),
        (
            ["--ask", "J", "--max-new-tokens", "256"],
            "max_new_tokens must be at least 1 and below the window of 256",
        ),
        (["--ask", "J", "--system", "S"], "system, date and template_args are for a chat template with a question"),
        (["--ask", "J" * 300], "leaves no room for any text"),
        (["--file", "-", "-", "--ask", "J"], "standard input can be read once"),
    ],
)
def test_what_cannot_be_answered_is_a_line(checkpoints, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert main(["generate", str(checkpoints()), *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("endprompt: ") and said in last


def test_an_answer_is_written_as_it_comes_and_characters_are_whole():
    """Bytes of a character are tokens; a batch that is made again writes nothing twice."""
    out = io.StringIO()
    stream = talk.Stream(lambda tokens: bytes(tokens).decode(errors="replace"), out)
    seen = []
    for tokens in (b"a", b"a\xc3", b"a", b"a\xc3", b"a\xc3\xa9", b"a\xc3\xa9b\xc3"):
        assert stream([*tokens]) is False
        seen.append(out.getvalue())
    assert seen == ["a", "a", "a", "a", "aé", "aé"]
    assert stream.finish([*b"a\xc3\xa9b\xc3"]) == "aéb\ufffd" and out.getvalue() == "aéb\ufffd\n"


def test_ctrl_c_keeps_what_was_answered(checkpoints, monkeypatch, capsys):
    checkpoint = talk.Checkpoint(ChatConfig(str(checkpoints()), max_new_tokens=12))
    real, wanted = talk.Stream.__call__, greedy(checkpoints(), "QXZ", 5)

    def press(self, tokens):
        real(self, tokens)
        if len(tokens) == 5:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(talk.Stream, "__call__", press)
    answer = checkpoint.answer(checkpoint.ids("QXZ"), out := io.StringIO())
    assert answer == (wanted, 5) and out.getvalue() == wanted + "\n"
    assert "5 tokens, stopped by Ctrl-C" in capsys.readouterr().err


def talked(directory, lines, capsys, *, file=(), **settings):
    """(answers, what was said) of a conversation of these lines."""
    said = iter(lines)

    def ask(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    talk.converse(ChatConfig(str(directory), file=list(file), max_new_tokens=6, **settings), ask)
    return capsys.readouterr()


def test_a_conversation_remembers_its_turns_and_its_text(checkpoints, tmp_path, capsys):
    directory = checkpoints("yarn", True)
    (tmp_path / "t.txt").write_text("VVV")
    out, err = talked(
        directory, ["QX", "", "ZJ", "/clear", "KW", "/quit", "YB"], capsys, file=[str(tmp_path / "t.txt")]
    )
    first = greedy(directory, "[user]VVV\n\nQX\n[assistant]", 6)
    second = greedy(directory, f"[user]VVV\n\nQX\n[assistant]{first.strip()}\n[user]ZJ\n[assistant]", 6)
    third = greedy(directory, "[user]VVV\n\nKW\n[assistant]", 6)
    assert out == f"{first}\n{second}\n{third}\n"
    assert "the conversation is forgotten" in err and "of the window's 256 tokens are taken" in err


def test_a_full_window_is_said_and_nothing_is_dropped_unasked(checkpoints, capsys):
    directory = checkpoints("none", True)
    lines = ["Q" * 100, "X" * 110, "Z"]
    out, err = talked(directory, lines, capsys)
    first = greedy(directory, f"[user]{lines[0]}\n[assistant]", 6)
    third = greedy(directory, f"[user]{lines[0]}\n[assistant]{first.strip()}\n[user]Z\n[assistant]", 6)
    assert out == f"{first}\n{third}\n" and "this turn is not taken" in err
    out, err = talked(directory, lines[:2], capsys, forget=True)
    second = greedy(directory, f"[user]{lines[1]}\n[assistant]", 6)
    assert out == f"{first}\n{second}\n" and "the oldest 1 of the turns are forgotten" in err


def test_a_long_text_leaves_room_for_a_turn(checkpoints, tmp_path, capsys):
    directory = checkpoints("none", True)
    (tmp_path / "t.txt").write_text("Q" * 240)
    settings = {"file": [str(tmp_path / "t.txt")]}
    with pytest.raises(ValueError, match="max_new_tokens=6 and 6 for a turn needs --cut"):
        talked(directory, ["J"], capsys, **settings)
    out, err = talked(directory, ["JJ"], capsys, cut="end", **settings)
    kept = 240 - int(re.search(r"cut: (\d+) of 240", err)[1])
    assert out == greedy(directory, f"[user]{'Q' * kept}\n\nJJ\n[assistant]", 6) + "\n"
    tokens = AutoTokenizer.from_pretrained(directory)(f"[user]{'Q' * kept}\n[assistant]").input_ids
    assert len(tokens) == 256 - 2 * 6


def test_chat_needs_a_template_and_its_own_input(checkpoints, capsys):
    for arguments, said in (([], "chat needs a tokenizer with a chat template"), (["--file", "-"], "file must name")):
        assert main(["chat", str(checkpoints()), *arguments]) == 1
        assert said in capsys.readouterr().err
