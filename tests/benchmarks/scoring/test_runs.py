"""One hash of what predictions depend on: runs in one output are kept apart; chat prompts stay those of their day."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re

import pytest
import transformers.utils.chat_template_utils as template_utils
from transformers import AutoTokenizer

from benchmarks import chat, ruler
from benchmarks.report import page, runs
from benchmarks.ruler import cache, tokens
from benchmarks.ruler.cell import samples_sha256
from benchmarks.scoring import ScoreConfig, fingerprint, predictions, score
from benchmarks.scoring import run as scoring
from endprompt import runs as rows
from tests.support import ruler_helpers as helpers
from tests.support.answering import answering

TURNS = (
    "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
CLOCK = "Today is {{ strftime_now('%A, %d %B %Y') }}.\n" + TURNS
#: As Llama 3.1's: a day of its own unless one is given.
OWN = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}Day: {{ date_string }}\n"
    + TURNS
)
GIVEN = "Day: {{ date_string }}\n" + TURNS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    helpers.checkpoint(folder / "llama")
    return folder


@pytest.fixture
def asked(monkeypatch):
    """(prompt, limit) of every request that reached a model, whose answer is the needle and the limit."""
    found = []

    def answer(request):
        prompt, limit = request.args[0], request.args[1]["max_gen_toks"]
        found.append((prompt, limit))
        return f"{request.doc['outputs'][0]} of {limit}"

    monkeypatch.setattr(scoring, "load", lambda *_: answering(answer))
    return found


@pytest.fixture
def day(monkeypatch):
    """Sets the clock that chat templates read."""

    def set_day(*date):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(*date)

        monkeypatch.setattr(template_utils, "datetime", Clock)

    return set_day


def config(place, output, **changes) -> ScoreConfig:
    usual = dict(checkpoint=str(place / "llama"), tasks="niah_single_1", lengths="512", samples=3, max_new_tokens=12,
                 cache_dir=str(place / "cache"), dtype="float32", device="cpu", output=str(output))  # fmt: skip
    usual["quiet"] = True
    return ScoreConfig(**usual | changes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_template(place, name, template):
    """A checkpoint with a chat template; the model is the same."""
    made = helpers.checkpoint(place / name)
    about = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": template}))
    return str(made)


def test_every_setting_is_an_ingredient_or_said_to_be_none():
    settings = {field.name for field in dataclasses.fields(ScoreConfig)}
    hashed = {field.name for field in dataclasses.fields(fingerprint.Fingerprint)} & settings
    groups = [hashed, fingerprint.PROMPTS, fingerprint.FREE]
    assert set().union(*groups) == settings and sum(map(len, groups)) == len(settings)


CHANGES = {
    "max_new_tokens": 13, "chat": True, "date": "2026-05-01", "template_args": "a=1", "trust_remote_code": True,
    "backend": "vllm", "backend_args": "x=1", "attn": "eager", "dtype": "bfloat16", "device": "cuda", "suite": "short",
    "whole_answers": True, "edition": "2024", "url": "http://a/v1", "model": "m", "api": "chat", "thinking": "off",
}  # fmt: skip


def test_every_ingredient_changes_the_hash_and_nothing_else_does(place):
    from endprompt.model import load_config

    model_config = load_config(str(place / "llama"))

    def digest(**changes):
        made = ScoreConfig(str(place / "llama"), dtype="float32", device="cpu")
        for name, value in changes.items():
            setattr(made, name, value)
        return fingerprint.fingerprint(made, model_config).sha256

    usual = digest()
    ingredients = {field.name for field in dataclasses.fields(fingerprint.Fingerprint)}
    assert CHANGES.keys() == ingredients - {"checkpoint", "generator", "asked", "served"}
    digests = [digest(**{name: value}) for name, value in CHANGES.items()]
    assert len({usual, *digests}) == len(CHANGES) + 1
    free = {"output": "o", "name": "n", "method": "m", "batch_size": 3, "samples": 7, "quiet": True, "overwrite": True}
    assert all(digest(**{name: value}) == usual for name, value in free.items())
    short = {"suite": "short"}
    assert len({digest(**short), digest(**short, samples=7), digest(**short, seed=1)}) == 3


@pytest.mark.parametrize("name", ["weights", "config.json", "generation_config.json", "chat_template.jinja", "code.py"])
def test_every_file_that_answers_depend_on_is_in_the_checkpoints_hash(place, tmp_path, name):
    import shutil

    made = shutil.copytree(place / "llama", tmp_path / "m")
    before = fingerprint.checkpoint_sha256(str(made), None)
    (made / "README.md").write_text("a card")
    (made / "endprompt.json").write_text("{}")
    assert fingerprint.checkpoint_sha256(str(made), None) == before
    path = made / ("model.safetensors" if name == "weights" else name)
    content = bytearray(path.read_bytes() if path.exists() else b"")
    if name == "weights":
        content[len(content) // 3] ^= 1  # one bit of one number, not at an end
    path.write_bytes(bytes(content) + (b"" if name == "weights" else b" "))
    assert fingerprint.checkpoint_sha256(str(made), None) != before


@pytest.mark.parametrize("name", ["adapter", "adapter/adapter_model.safetensors"])
def test_what_an_argument_of_the_backend_names_is_in_the_hash_by_its_content(place, tmp_path, name):
    from endprompt.model import load_config

    made, adapter = ScoreConfig(str(place / "llama"), device="cpu"), tmp_path / "adapter"
    made.backend_args, digests = f"max_batch_size=4,peft={tmp_path / name}", []
    for content in (None, b"one", b"other", b"one"):
        if content:
            adapter.mkdir(exist_ok=True)
            (adapter / "adapter_model.safetensors").write_bytes(content)
        digests.append(fingerprint.fingerprint(made, load_config(made.checkpoint)).sha256)
    assert len(set(digests)) == 3 and digests[1] == digests[3]


def test_another_generation_limit_is_another_answer(place, tmp_path, asked):
    (two,) = score(config(place, tmp_path, max_new_tokens=2))
    (many,) = score(config(place, tmp_path, max_new_tokens=64))
    assert {limit for _, limit in asked} == {2, 64} and two["run_sha256"] != many["run_sha256"]
    assert {e["prediction"].rpartition(" ")[2] for e in predictions.read_predictions(tmp_path).values()} == {"64"}


def test_first_second_first_again_in_one_output(place, tmp_path, asked, monkeypatch):
    """Summary, depths, lm-eval's file, configuration, environment and what is shown are the first run's again."""
    monkeypatch.setenv("ENDPROMPT_REVISION", "first")
    monkeypatch.setattr(rows, "git_revision", lambda: __import__("os").environ["ENDPROMPT_REVISION"])
    names = ("summary.jsonl", "depth.jsonl", "config.yaml", "environment.json")
    first = score(config(place, tmp_path, seed=1))
    kept = {name: (tmp_path / name).read_text() for name in names}
    monkeypatch.setenv("ENDPROMPT_REVISION", "second")
    second = score(config(place, tmp_path, seed=1, attn="eager"))
    assert json.loads((tmp_path / "environment.json").read_text())["revision"] == "second"
    count = len(asked)
    assert count == 6 and first[0]["samples_sha256"] == second[0]["samples_sha256"]
    # the second run's answers are made worse, so that they can be told from the first's
    path = tmp_path / "predictions.jsonl"
    run = second[0]["run_sha256"]
    path.write_text("".join(line.replace(" of 12", "") if run in line else line for line in path.open()))
    monkeypatch.setenv("ENDPROMPT_REVISION", "third")
    assert score(config(place, tmp_path, seed=1)) == first and len(asked) == count
    assert {name: (tmp_path / name).read_text() for name in names} == kept
    for name in ("summary.jsonl", "depth.jsonl"):
        assert {line["run_sha256"] for line in lines(tmp_path / name)} == {first[0]["run_sha256"]}
    assert len(lines(tmp_path / "results.jsonl")) == 2
    assert all(e["run"] == first[0]["run_sha256"] for e in predictions.read_predictions(tmp_path).values())
    assert all(e["prediction"].endswith(" of 12") for e in predictions.show(tmp_path, "niah_single_1"))
    (run_,) = runs.read_runs([str(tmp_path)])
    assert run_.parts[0].environment["revision"] == "first"
    assert {e["run"] for e in page.last_predictions(run_.parts[0])} == {first[0]["run_sha256"]}
    (facet,) = runs.facets([run_])
    assert len(facet.methods) == 2 and all(name.startswith(first[0]["method"]) for name in facet.methods)


def test_depths_and_averages_are_of_the_run_that_is_asked_for(place, tmp_path, monkeypatch):
    """A finds all, B nothing, then A again: nothing of B is in A's files."""
    model = answering(lambda request: " ".join(request.doc["outputs"]))
    monkeypatch.setattr(scoring, "load", lambda *_: model)
    score(config(place, tmp_path))
    model.answer = lambda request: "no"
    score(config(place, tmp_path, dtype="bfloat16"))
    assert {line["value"] for line in lines(tmp_path / "depth.jsonl")} == {0.0}
    score(config(place, tmp_path))
    assert {line["value"] for line in lines(tmp_path / "depth.jsonl")} == {100.0}
    assert {l["value"] for l in lines(tmp_path / "summary.jsonl") if l["metric"] == "mean_over_tasks"} == {100.0}
    (saved,) = (json.loads(path.read_text()) for path in tmp_path.glob("results_*.json"))
    assert saved["results"]["niah_single_1"]["512,none"] == 1.0


def test_another_name_is_the_rows_name_and_asks_no_model(place, tmp_path, asked):
    (first,) = score(config(place, tmp_path))
    (other,) = score(config(place, tmp_path, name="other", method="mine"))
    assert other == first | {"model": "other", "method": "mine"} and len(asked) == 3
    assert {line["model"] for line in lines(tmp_path / "summary.jsonl")} == {"other"}
    (saved,) = (json.loads(path.read_text()) for path in tmp_path.glob("results_*.json"))
    assert saved["model_name"] == "other"
    assert score(config(place, tmp_path)) == [first]
    assert len(lines(tmp_path / "results.jsonl")) == 2  # one of each name, and none twice


def test_more_samples_keep_the_answers_of_few(place, tmp_path, asked):
    score(config(place, tmp_path, samples=2))
    (made,) = score(config(place, tmp_path, samples=4))
    assert made["n"] == 4 and len(asked) == 4


def test_output_of_before_is_scored_anew_and_loses_nothing(place, tmp_path, asked):
    score(config(place, tmp_path))
    for name in ("results.jsonl", "predictions.jsonl"):
        path = tmp_path / name
        path.write_text(re.sub(r'"(run|run_sha256)": "\w+"', r'"\1": "0123"', path.read_text()))
    (tmp_path / fingerprint.RUNS).unlink()
    assert len(predictions.read_predictions(tmp_path)) == 3  # of one run, still to be read
    old = (tmp_path / "results.jsonl").read_text()
    score(config(place, tmp_path))
    assert len(asked) == 6 and (tmp_path / "results.jsonl").read_text().startswith(old)
    (tmp_path / fingerprint.RUNS).unlink()
    with pytest.raises(ValueError, match=r"holds answers of 2 runs, and no runs\.jsonl"):
        predictions.read_predictions(tmp_path)
    with pytest.raises(ValueError, match="score it again"):
        fingerprint.rows_of(place / "llama", tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "results.jsonl",
            lambda t: t.replace('"task": "niah_single_1"', '"task": ["x"]'),
            r"line 1: task must be text",
        ),
        ("results.jsonl", lambda t: "[1]\n" + t, r"line 1: must be a JSON object"),
        ("runs.jsonl", lambda t: "{}\n" + t, r"line 1: a run must have"),
        ("runs.jsonl", lambda t: "nonsense\n" + t, r"line 1: not valid JSON"),
        ("day.txt", lambda t: "yesterday", r"line 1: must hold the day"),
    ],
)
def test_a_damaged_file_of_the_output_is_named(place, tmp_path, asked, name, damage, message):
    asks = {"checkpoint": with_template(place, "clocked", CLOCK), "chat": True}
    score(config(place, tmp_path, **asks))
    path = tmp_path / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, {message}"):
        score(config(place, tmp_path, **asks))


def test_a_damaged_prediction_is_named_where_it_is_read_and_made_again_where_it_is_scored(place, tmp_path, asked):
    score(config(place, tmp_path))
    path = tmp_path / "predictions.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([whole[0][:-9], *whole[1:]]) + "\n")
    index = json.loads(whole[0])["index"]
    if index != 2:  # a last index that is missing cannot be told from one that was never asked for
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 1: not a whole prediction"):
            predictions.read_predictions(tmp_path)
    score(config(place, tmp_path))
    assert len(asked) == 4 and len(predictions.read_predictions(tmp_path)) == 3


def test_prompts_are_those_of_the_day_that_was_written_down(place, tmp_path, asked, day):
    """Against transformers' own rendering with its clock standing at that day."""
    checkpoint = with_template(place, "clock", CLOCK)
    about = {"checkpoint": checkpoint, "chat": True}
    day(2026, 5, 1, 13, 30)
    (may,) = score(config(place, tmp_path / "run", **about))
    assert may["date"] == "2026-05-01" and all(
        text.startswith("Today is Friday, 01 May 2026.\nUser") for text, _ in asked
    )
    assert samples_sha256(list(cell(checkpoint, place))) == may["samples_sha256"]
    count = len(asked)
    day(2026, 9, 30)  # a longer day: prompts sized in May would not fit
    assert score(config(place, tmp_path / "run", **about)) == [may] and len(asked) == count
    (autumn,) = score(config(place, tmp_path / "other", **about))
    assert autumn["date"] == "2026-09-30" and autumn["samples_sha256"] != may["samples_sha256"]
    given = asked[count:]
    assert all(text.startswith("Today is Wednesday, 30 September 2026.\n") for text, _ in given)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert all(len(tokenizer(text)["input_ids"]) + limit <= 512 for text, limit in given)
    assert samples_sha256(list(cell(checkpoint, place))) == autumn["samples_sha256"]
    question = given[0][0].split("User: ", 1)[1].rsplit("\nAssistant: ", 1)[0]
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert given[0][0].startswith(theirs)
    (same,) = score(config(place, tmp_path / "third", date="2026-05-01", **about))
    assert same["samples_sha256"] == may["samples_sha256"] and same["run_sha256"] == may["run_sha256"]
    assert fingerprint.read_day(tmp_path / "third") == "2026-05-01"


def cell(checkpoint, place):
    options = ruler.Options(max_new_tokens=12, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return cache.cells([("niah_single_1", 512)], tokenizer, 3, 0, None, options, place / "cache")[0]


def test_an_interrupted_run_goes_on_with_its_day_and_overwrite_begins_a_new_one(place, tmp_path, day, monkeypatch):
    prompts = []

    def answer(request):
        prompts.append(request.args[0])
        if len(prompts) == 2:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(scoring, "load", lambda *_: answering(answer))
    about = {"checkpoint": with_template(place, "cut", CLOCK), "chat": True, "batch_size": 1}
    day(2026, 5, 1)
    with pytest.raises(KeyboardInterrupt):
        score(config(place, tmp_path, **about))
    day(2026, 9, 30)
    (made,) = score(config(place, tmp_path, **about))
    assert made["date"] == "2026-05-01" and len(prompts) == 4 and all("01 May" in text for text in prompts)
    (again,) = score(config(place, tmp_path, overwrite=True, **about))
    assert again["date"] == "2026-09-30" and len(lines(tmp_path / "results.jsonl")) == 1
    day(2026, 10, 2)
    assert score(config(place, tmp_path, **about)) == [again]


def test_samples_prepared_on_one_day_are_scored_on_another(place, tmp_path, asked, day):
    about = {"checkpoint": with_template(place, "prepared", CLOCK), "chat": True}
    day(2026, 5, 1)
    score(config(place, tmp_path, prepare_only=True, **about))
    day(2026, 9, 30)
    assert score(config(place, tmp_path, **about))[0]["date"] == "2026-05-01"


@pytest.mark.parametrize(
    ("template", "date", "wanted"),
    [
        (TURNS, None, None),
        (TURNS, "2026-05-01", None),  # a day that nobody reads is in no row
        (OWN, None, "Day: 26 Jul 2024\n"),
        (OWN, "2026-05-01", "Day: 01 May 2026\n"),
        (GIVEN, None, "Day: 30 Sep 2026\n"),
        (GIVEN, "2026-05-01", "Day: 01 May 2026\n"),
        (CLOCK, "2026-05-01", "Today is Friday, 01 May 2026.\n"),
    ],
)
def test_where_a_template_takes_its_day_from(day, template, date, wanted):
    tokenizer = helpers.tokenizer()
    day(2026, 9, 30)
    tokenizer.chat_template = template
    options = ruler.Options(chat=True, date=date).dated(tokenizer)
    text = tokens.assembler(tokenizer, options)("question", " prefix")
    assert text == (wanted or "") + "User: question\nAssistant: prefix"
    assert (options.date is None) == (wanted is None or "2024" in wanted)
    tokenizer.chat_template = None


def test_arguments_of_the_template_are_part_of_prompt_and_hash(place, tmp_path, asked):
    thinks = with_template(
        place, "thinks", "{% if enable_thinking is defined and enable_thinking == false %}Quick.{% endif %}" + TURNS
    )
    about = {"checkpoint": thinks, "chat": True}
    (usual,) = score(config(place, tmp_path, **about))
    (quick,) = score(config(place, tmp_path, template_args="enable_thinking=false", **about))
    assert usual["run_sha256"] != quick["run_sha256"] and usual["samples_sha256"] != quick["samples_sha256"]
    assert [text.startswith("Quick.User") for text, _ in asked] == [False] * 3 + [True] * 3
    assert quick["template_args"] == "enable_thinking=false"
    for wrong, said in (
        ("enable_thinkin=false", "must be read by the chat template, which has no 'enable_thinkin'"),
        ("add_generation_prompt=false", "must be the template's own, and 'add_generation_prompt' is set here"),
        ("chat_template=x", "'chat_template' is set here"),
        ("enable_thinking=false,enable_thinking=true", "must give each name once: 'enable_thinking'"),
    ):
        with pytest.raises(ValueError, match=f"template_args .*{said}"):
            score(config(place, tmp_path, template_args=wrong, **about))
    for unread in ({"template_args": "a=1"}, {"date": "2026-05-01"}, {"chat_layout": "ruler"}, {"wrong": True}):
        with pytest.raises(ValueError, match=f"{next(iter(unread))} .*need chat|needs chat|wrong is for show"):
            config(place, tmp_path, **unread)
    with pytest.raises(ValueError, match="'enable_thinking' is read by no prompt made here"):
        config(place, tmp_path, backend_args="enable_thinking=False")
    assert chat.parse_arguments("a=true, b=2,c=0.5,d=none,e=high") == {
        "a": True,
        "b": 2,
        "c": 0.5,
        "d": None,
        "e": "high",
    }


def test_a_template_that_draws_lots_is_refused(place, tmp_path, asked):
    lots = with_template(place, "lots", "{{ range(99999) | random }} " + TURNS)
    with pytest.raises(ValueError, match="is not the one that was measured and hashed"):
        score(config(place, tmp_path, checkpoint=lots, chat=True))


def test_a_day_from_the_command_line(place, tmp_path, asked, capsys):
    from endprompt.cli import main

    checkpoint = with_template(place, "spoken", CLOCK)
    flags = f"--tasks niah_single_1 --lengths 512 --samples 1 --max-new-tokens 12 --chat --cache-dir {place / 'cache'}"
    arguments = ["score", checkpoint, *flags.split(), "--output", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert main([*arguments, "--date", "2026-05-01"]) == 0
    assert asked[0][0].startswith("Today is Friday, 01 May 2026.")
    capsys.readouterr()
    assert main([*arguments, "--date", "1 May"]) != 0
    assert "date must be a day as YYYY-MM-DD: date='1 May'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suite", "unread", "reader"),
    [
        ("longbench", {"lengths": "8192"}, "ruler or ruler-v2 or nolima or babilong or lm-eval"),
        ("longbench", {"edition": "2024"}, "ruler"),
        ("longbench", {"cache_dir": "cache"}, "ruler"),
        ("longbench", {"chat": True, "chat_layout": "ruler"}, "ruler"),
        ("short", {"whole_answers": True}, "ruler"),
        ("short", {"prompt_length": 3500}, "longbench or longbench-v2"),
        ("ruler", {"prompt_length": 3500}, "longbench or longbench-v2"),
        (
            "short",
            {"max_new_tokens": 8},
            "ruler or ruler-v2 or longbench or longbench-v2 or mrcr or nolima or babilong or infinitebench or lm-eval",
        ),
    ],
)
def test_a_setting_that_the_suite_does_not_read_is_refused(suite, unread, reader):
    key, value = list(unread.items())[-1]
    with pytest.raises(ValueError, match=f"^{key} is for suite {reader}, not {suite}: {key}={value!r}$"):
        ScoreConfig("checkpoint", suite=suite, **unread)
    ScoreConfig("checkpoint", suite=reader.split()[0], **unread)
