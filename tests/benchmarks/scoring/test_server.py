"""Scoring a model behind an address, held against a server on this machine that has the faults of real ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.scoring import ScoreConfig, score, server
from tests.support import ruler_helpers as helpers
from tests.support.openai_stand_in import Server, serve

KEY = "sk-never-to-be-written-7d3f"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    helpers.checkpoint(folder / "llama")
    made = helpers.checkpoint(folder / "chat")
    about = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": CHAT}))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    monkeypatch.setenv(server.KEY, KEY)


def needle(prompt, body):
    """The number that the prompt hides, found as a reader finds it."""
    found = re.findall(r"special magic numbers for [\w-]+ is: (\d+)", prompt)
    return found[-1] if found else "x"


@pytest.fixture
def served():
    with Server(helpers.tokenizer(), needle, window=512) as made:
        yield made


def config(place, output, served, **changes):
    settings = dict(
        checkpoint=str(place / "llama"), tasks="niah_single_1", lengths="400,512", samples=10, shots=0,
        max_new_tokens=12, cache_dir=str(place / "cache"), output=str(output), quiet=True, backend="server",
        url=served if isinstance(served, str) else served.url, model="tiny", concurrency=4,
    )  # fmt: skip
    return ScoreConfig(**{**settings, **changes})


def lines(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def test_answers_are_asked_for_together_and_written_once_and_the_key_nowhere(place, tmp_path, served, capfd):
    served.fault = lambda number, prompt: 0.02
    made = score(config(place, tmp_path / "run", served, quiet=False))
    assert [(row["value"], row["n"], row["backend"], row["dtype"]) for row in made] == [(100.0, 10, "server", None)] * 2
    assert 2 < served.most <= 4 and len(served.asked) == 21  # one asks whether tokens are counted alike
    assert len({(e["task"], e["index"]) for e in lines(tmp_path / "run")}) == len(lines(tmp_path / "run")) == 20
    assert set(served.keys) == {f"Bearer {KEY}"}
    body = served.asked[1]
    assert (body["max_tokens"], body["temperature"], body["model"]) == (12, 0, "tiny") and "stop" not in body
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 6 and not any(KEY.encode() in path.read_bytes() for path in written)
    assert KEY not in "".join(capfd.readouterr())
    score(config(place, tmp_path / "run", served, concurrency=1, retries=0))
    assert len(served.asked) == 21  # all is there


def test_answers_are_those_of_the_own_backend(place, tmp_path):
    """The stand-in answers with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32), helpers.tokenizer()

    def answer(prompt, body):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    with Server(tokenizer, answer, window=512) as served:
        served.change = lambda reply: reply | {"usage": {"prompt_tokens": reply["usage"]["prompt_tokens"]}}
        score(config(place, tmp_path / "server", served, samples=4))
    own = dict(backend="hf", model=None, concurrency=16, dtype="float32", device="cpu")
    score(config(place, tmp_path / "hf", served, samples=4, **own | {"url": None}))

    def texts(run):
        return {(e["task"], e["index"]): e["prediction"] for e in lines(tmp_path / run)}

    assert texts("server") == texts("hf") and len(set(texts("hf").values())) > 3


def test_a_server_that_penalises_repeated_tokens_is_told_not_to(place, tmp_path, served):
    """llama-cpp-python's, which multiplies by 1.1 where a request does not say 1."""
    score(config(place, tmp_path / "other", served, lengths="400", samples=2))
    served.entry["owned_by"] = "me"
    (row,) = score(config(place, tmp_path / "own", served, lengths="400", samples=2))
    assert [body.get("repeat_penalty") for body in served.asked] == [None] * 3 + [1.0] * 3
    score(config(place, tmp_path / "asked", served, lengths="400", samples=2, backend_args="repeat_penalty=1.2"))
    assert served.asked[-1]["repeat_penalty"] == 1.2 and row["value"] == 100


FAULTS = {
    "a burst of 500": lambda number, prompt: 500 if 3 <= number < 9 else None,
    "429 that names seconds": lambda number, prompt: (429, {"Retry-After": "0.05"}) if number % 3 == 1 else None,
    "the connection is reset": lambda number, prompt: "reset" if number in (1, 4, 5) else None,
    "a reply is cut in the middle": lambda number, prompt: "cut" if number in (1, 4, 5) else None,
    "slow answers": lambda number, prompt: 5.0 if number in (2, 3) else None,
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass_lose_nothing_and_repeat_nothing(place, tmp_path, served, name):
    served.fault = FAULTS[name]
    (row,) = score(config(place, tmp_path, served, lengths="400", timeout=2 if name == "slow answers" else 30))
    assert (row["value"], row["n"]) == (100.0, 10)
    assert [e["index"] for e in sorted(lines(tmp_path), key=lambda e: e["index"])] == list(range(10))
    assert 12 <= len(served.asked) <= 17


def test_waits_grow_and_are_at_least_what_the_server_asks_for(place, tmp_path, served, monkeypatch):
    from email.utils import formatdate

    assert (
        server.retry_after({"Retry-After": "7"}) == 7
        and server.retry_after({}) == server.retry_after({"Retry-After": "soon"}) == 0
    )
    assert 3000 < server.retry_after({"Retry-After": formatdate(time.time() + 3600, usegmt=True)}) < 3601
    waited, sleep = [], server.asyncio.sleep

    async def note(seconds):
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(server, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(server.asyncio, "sleep", note)
    served.fault = lambda number, prompt: 503
    with pytest.raises(ValueError, match=r"/v1/completions: no answer after 9 tries: HTTP 503: no, says the server"):
        score(config(place, tmp_path, served))
    waits = [seconds for seconds in waited if seconds]
    assert len(waits) == 8 and all(0.75 <= wait / min(60, 2**i) <= 1.25 for i, wait in enumerate(waits))


def test_what_was_answered_before_a_failure_is_kept_and_the_rest_is_asked_later(place, tmp_path, served):
    served.fault = lambda number, prompt: 400 if number == 6 else 0.5 if number > 6 else None
    with pytest.raises(ValueError, match=r"niah_single_1@\d+, sample \d+: http.*HTTP 400: no, says the server to Bear"):
        score(config(place, tmp_path, served))
    kept, asked = len(lines(tmp_path)), len(served.asked)
    assert 5 <= kept < asked < 20
    served.fault = lambda number, prompt: None
    made = score(config(place, tmp_path, served))
    assert len(served.asked) - asked == 20 - kept + 1 and len(lines(tmp_path)) == 20
    assert {row["value"] for row in made} == {100.0}


def test_two_runs_at_once_both_end_right_and_one_output_is_for_one_of_them(place, tmp_path, served):
    served.fault = lambda number, prompt: 0.02
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(score, config(place, tmp_path / name, served)) for name in ("a", "b", "b")]
    errors = [one.exception() for one in found if one.exception()]
    assert len(errors) == 1 and "another run writes to this output now" in str(errors[0])
    assert len(lines(tmp_path / "a")) == len(lines(tmp_path / "b")) == 20


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_where_it_was(place, tmp_path, served, stop):
    gate = threading.Event()
    served.fault = lambda number, prompt: None if number < 10 else gate.wait(60) and None
    fields = [f"--{name.replace('_', '-')}={value}" for name, value in (
        ("tasks", "niah_single_1"), ("lengths", "400"), ("samples", 40), ("shots", 0), ("max_new_tokens", 12),
        ("cache_dir", place / "cache"), ("output", tmp_path), ("backend", "server"), ("url", served.url),
        ("concurrency", 2),
    )]  # fmt: skip
    command = [sys.executable, "-m", "endprompt.cli", "score", str(place / "llama"), *fields]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}) as process:
        while len(served.asked) < 12 or not (tmp_path / "predictions.jsonl").is_file() or len(lines(tmp_path)) < 9:
            time.sleep(0.02)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(stop)
        process.communicate(timeout=20)
    gate.set()
    assert len(lines(tmp_path)) == 9  # the first request asks how tokens are counted
    (row,) = score(config(place, tmp_path, served, lengths="400", samples=40))
    assert len(served.asked) == 12 + 1 + 31 and (row["n"], row["value"]) == (40, 100.0)


@pytest.mark.slow
def test_a_server_killed_twice_in_200_samples_and_started_again_loses_and_repeats_nothing(place, tmp_path, monkeypatch):
    """Processes that are killed while they answer, beside bursts of 500 and 429, and a reply that is cut."""
    faults = {
        **dict.fromkeys(range(10, 20), 500),
        **dict.fromkeys(range(30, 40), (429, {"Retry-After": "0.1"})),
        45: "cut",
    }
    context, processes = multiprocessing.get_context("fork"), []
    for _ in range(3):  # before there are threads; each begins when it is told its port
        ours, theirs = context.Pipe()
        arguments = (theirs, lambda number, prompt: faults.get(number, 0.05), helpers.tokenizer(), needle, 512)
        processes.append((context.Process(target=serve, args=arguments, daemon=True), ours))
        processes[-1][0].start()

    def start(number, port):
        processes[number][1].send(port)
        return processes[number][1].recv()

    monkeypatch.setattr(server, "FIRST_WAIT", 0.2)
    url = start(0, 0)
    asked = config(place, tmp_path / "run", url, lengths="400", samples=200, concurrency=16, retries=30)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(score, asked)
        for number, answers in enumerate((60, 130)):
            while not (tmp_path / "run" / "predictions.jsonl").is_file() or len(lines(tmp_path / "run")) < answers:
                time.sleep(0.02)
                assert not made.done(), made.exception()
            processes[number][0].kill()
            processes[number][0].join()
            assert not made.done() and len(lines(tmp_path / "run")) < 200
            start(number + 1, int(url.split(":")[2].split("/")[0]))
        (row,) = made.result(timeout=120)
    processes[2][0].kill()
    assert (row["n"], row["value"]) == (200, 100.0)
    assert sorted(entry["index"] for entry in lines(tmp_path / "run")) == list(range(200))
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_server_that_states_no_window_is_asked_the_longest_prompt_first_and_alone(place, tmp_path):
    with Server(helpers.tokenizer(), needle) as served:
        limit = 450
        served.fault = lambda number, prompt: 400 if len(helpers.tokenizer()(prompt)["input_ids"]) > limit else None
        with pytest.raises(ValueError, match=r"niah_single_1@512, sample \d+: .*HTTP 400"):
            score(config(place, tmp_path / "a", served))
        assert len(served.asked) == 2 and not (tmp_path / "a" / "predictions.jsonl").exists()
        with pytest.raises(ValueError, match=r"lengths must be at most the window 450: \[512\]"):
            score(config(place, tmp_path / "b", served, window=450))
        assert len(served.asked) == 2


def changed(**entries):
    def change(served):
        for name, value in entries.items():
            setattr(served, name, value)

    return change


REFUSED = {
    "a window below the length": (changed(entry={"id": "tiny", "max_model_len": 511}), {}, "window 511", 0),
    "another window than the server's": (changed(), {"window": 600}, "at most what the server states, 512: 600", 0),
    "a wrong name": (changed(), {"model": "other"}, "model must be one of the server's, tiny: model='other'", 0),
    "no models": (changed(entry={}), {}, r"/models must list the server's models", 0),
    "a tokenizer that does not fit": (
        changed(tokenizer=helpers.tokenizer(size=1024)), {}, r"has \d+ tokens by .*, the server read \d+ tok", 1,
    ),
    "prompts that are cut": (changed(usage=lambda n: min(n, 300)), {}, r"512, sample \d.* server read 300 tokens", 5),
    "no counts": (changed(change=lambda reply: reply | {"usage": None}), {}, "does not say how many it read", 1),
    "another model answers": (changed(change=lambda reply: reply | {"model": "b"}), {}, "'tiny' was asked, and 'b'", 1),
    "answers that end early": (
        changed(change=lambda r: r | {"choices": [{"text": "a", "finish_reason": "length"}]} if r["usage"].update(
            completion_tokens=1) is None else r), {}, "12 tokens were asked for, and the server ended after 1", 5,
    ),
    "a key that is wrong": (changed(fault=lambda *_: 401), {}, r"HTTP 401: .*\[key\] \(the key is read from END", 1),
    "no reply of this kind": (changed(change=lambda reply: {"a": 1}), {}, r"a reply must have choices\[0\]", 1),
    "several processes": (changed(), {"env": "2"}, "runs in one process", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_server_that_is_not_what_is_asked_for_is_refused(place, tmp_path, served, name, monkeypatch):
    change, changes, message, asked = REFUSED[name]
    change(served)
    if "env" in changes:
        monkeypatch.setenv("WORLD_SIZE", changes.pop("env"))
    with pytest.raises(ValueError, match=message) as raised:
        score(config(place, tmp_path, served, **changes))
    assert "\n" not in str(raised.value) and KEY not in str(raised.value)
    assert len(served.asked) <= asked and not (tmp_path / "results.jsonl").exists()


SETTINGS = {
    "no address": ({"url": None}, "url must be the server's address"),
    "an address with a password": ({"url": "http://me:hush@host/v1"}, "url must hold no name, password"),
    "an address with a key": ({"url": "http://host/v1?key=hush"}, "url must hold no name, password"),
    "nothing there": (
        {"url": "http://127.0.0.1:9/v1", "retries": 0},
        "/v1/models: no answer after one try: Cannot",
    ),
    "a dtype": ({"dtype": "float32"}, "dtype is for backend hf or vllm, not server"),
    "a chat address without chat": ({"api": "chat"}, "api=chat .* needs chat"),
    "an adapter": ({"backend_args": "peft=folder"}, r"an adapter is the server's to load, .*: \['peft'\]"),
    "no requests": ({"concurrency": 0}, "concurrency must be at least 1: 0"),
    "no time": ({"timeout": 0}, "timeout must be over 0"),
    "log-likelihoods": ({"suite": "short", "tasks": "mmlu"}, "suite short asks for log-likelihoods"),
    "an address of another backend": ({"backend": "hf"}, "url is for backend server, not hf"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_servers_are_checked(place, tmp_path, name):
    changes, message = SETTINGS[name]
    if changes.get("suite"):
        changes |= {"lengths": "4096", "shots": 1, "max_new_tokens": None, "cache_dir": None}
    with pytest.raises(ValueError, match=message) as raised:
        score(config(place, tmp_path, "http://127.0.0.1:9/v1", **changes))
    assert "hush" not in str(raised.value)


def test_a_chat_is_asked_by_messages_whose_tokens_are_counted_with_the_template(place, tmp_path, served):
    """RULER's prompts without an answer prefix; the text is that between head and tail of the template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "chat")
    served.render = lambda messages: tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )[3:]
    asked = dict(checkpoint=str(place / "chat"), chat=True, lengths="400")
    (row,) = score(config(place, tmp_path / "chat", served, **asked, api="chat"))
    assert row["value"] == 100 and row["chat_layout"] == "no-prefix"
    messages = served.asked[-1]["messages"]
    assert [m["role"] for m in messages] == ["user"] and messages[0]["content"].endswith("in the provided text?")
    first = len(served.asked)
    (same,) = score(config(place, tmp_path / "texts", served, **asked, chat_layout="no-prefix"))
    assert same["samples_sha256"] == row["samples_sha256"] and same["run_sha256"] != row["run_sha256"]
    assert served.asked[first + 1]["prompt"].startswith("<user>")  # the server puts BOS in front itself
    served.render = lambda messages: "another template " + messages[-1]["content"]
    with pytest.raises(ValueError, match="tokens by the tokenizer"):
        score(config(place, tmp_path / "other", served, **asked, api="chat"))


# ----------------------------------------------------------------------------------------------------------- thinking

#: Of Qwen3's shape: a thought that is turned off is written into the prompt as an empty one.
THINKS = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
ALWAYS = THINKS.replace(SWITCH, "<think>{# </think> #}")


def thinker(prompt, body):
    """Thinks of other numbers first; told not to, it answers at once."""
    return needle(prompt, body) if "<think></think>" in prompt else f"<think>1 2</think> {needle(prompt, body)}"


def with_thoughts(place, name, template=THINKS):
    if not (place / name).exists():
        made = helpers.checkpoint(place / name)
        about = json.loads((made / "tokenizer_config.json").read_text())
        (made / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": template}))
    return dict(checkpoint=str(place / name), chat=True, lengths="400", samples=4)


def ids(text):
    return helpers.tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("thinking", "value", "limit"), [("off", 100, 12), ("cut", 100, 30), ("budget 20", 100, 32)])
def test_a_model_that_thinks_is_scored_by_what_stands_behind_its_thought(
    place, tmp_path, served, thinking, value, limit
):
    served.answer = thinker
    asked = with_thoughts(place, "thinks") | dict(max_new_tokens=30 if thinking == "cut" else 12)
    (row,) = score(config(place, tmp_path, served, **asked, thinking=thinking))
    assert (row["value"], row["thinking"]) == (value, thinking) and {b["max_tokens"] for b in served.asked[1:]} == {
        limit
    }
    assert row["template_args"] == f"enable_thinking={str(thinking != 'off').lower()}"
    assert [row["chat_layout"], row.get("n_unfinished")] == (
        ["one-turn", None] if thinking == "off" else ["no-prefix", 0]
    )
    kept = lines(tmp_path)
    assert {e.get("thought") for e in kept} == {None if thinking == "off" else "<think>1 2"}
    assert all("think" not in e["prediction"] for e in kept)


def test_answers_in_thoughts_and_thoughts_without_end_score_nothing(place, tmp_path, served):
    asked = with_thoughts(place, "always", ALWAYS) | dict(thinking="budget 20")
    served.answer = lambda prompt, body: f"it is {needle(prompt, body)}</think> unknown"
    (row,) = score(config(place, tmp_path / "inside", served, **asked))
    assert (row["value"], row["n_unfinished"]) == (0, 0)
    served.answer = lambda prompt, body: f"it is {needle(prompt, body)}"
    (row,) = score(config(place, tmp_path / "open", served, **asked))
    assert (row["value"], row["n_unfinished"]) == (0, 4) and {e["prediction"] for e in lines(tmp_path / "open")} == {""}
    filler = "one two three four five six seven eight nine ten eleven twelve "
    assert len(ids(filler)) > 12
    served.answer = lambda prompt, body: f"so</think> {filler}{needle(prompt, body)}"  # behind its 12 tokens
    (row,) = score(config(place, tmp_path / "late", served, **asked))
    assert row["value"] == 0 and {len(ids(e["prediction"])) for e in lines(tmp_path / "late")} == {12}


def test_a_server_that_parts_thought_and_answer_is_put_together_again():
    assert server.spoken({"content": "5", "reasoning_content": "hm"}) == "<think>hm</think>5"
    assert server.spoken({"content": None, "reasoning": "hm"}) == "<think>hm" and server.spoken({"content": "5"}) == "5"


UNTHINKABLE = {
    "a template that has none": ("chat", {"thinking": "cut"}, "has no </think>"),
    "off where nothing turns it off": ("always", {"thinking": "off"}, "reads one of enable_thinking, thinking"),
    "no room": ("thinks", {"thinking": "budget 113"}, r"window 399, less 113 tokens of thought: \[400\]"),
    "a prefix": ("thinks", {"thinking": "cut", "chat_layout": "ruler"}, "which has no prefix: chat_layout='ruler'"),
    "no chat": ("thinks", {"thinking": "cut", "chat": False}, "thinking is for a chat template, it needs chat"),
    "no number": ("thinks", {"thinking": "budget"}, "must be off, cut, or 'budget N' in tokens: 'budget'"),
    "against the arguments": ("thinks", {"thinking": "cut", "template_args": "enable_thinking=false"}, "must agree"),
}


@pytest.mark.parametrize("name", UNTHINKABLE)
def test_thinking_that_cannot_be_is_refused_before_the_first_request(place, tmp_path, served, name):
    checkpoint, changes, message = UNTHINKABLE[name]
    with_thoughts(place, "thinks"), with_thoughts(place, "always", ALWAYS)
    asked = dict(checkpoint=str(place / checkpoint), chat=True, lengths="400") | changes
    with pytest.raises(ValueError, match=message):
        score(config(place, tmp_path, served, **asked))
    assert not served.asked


def test_a_system_message_is_in_every_prompt_and_in_the_row(place, tmp_path, served):
    asked = with_thoughts(place, "thinks") | dict(system="Be brief.")
    (row,) = score(config(place, tmp_path, served, **asked))
    assert row["system"] == "Be brief." and row["value"] == 100
    assert all(body["prompt"].startswith("<system>Be brief.</system><user>") for body in served.asked[1:])
