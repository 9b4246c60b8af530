"""Suites of whole texts and conversations: an oracle gains all, an empty answer and an echo nothing."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest

from benchmarks.scoring import ScoreConfig, run, score
from benchmarks.scoring.suites import mrcr, nolima
from endprompt.results import read_rows
from endprompt.text import Reader
from tests.benchmarks.ruler.test_v2 import write_data
from tests.support import ruler_helpers as helpers
from tests.support.answering import answering

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
NEEDLES = [
    {"id": "0401", "needle": "In {1} lives {CHAR}.", "character_set": ["Ada", "Ben"], "reasoning_type": "x",
     "questions": {"onehop": "Who lives in {1}?", "twohop": "Who lives north of {2}?"},
     "distractors": {"onehop": "Nobody was born in {1}."},
     "tests": {"T1": {"input_args": ["Ulm", "Rome"]}}, "task_template": "{haystack}\nQ: {question}"},
    {"id": "0402", "needle": "The key is {1}.", "questions": {"onehop": "Where is the key?"},
     "tests": {"T1": {"input_args": ["under the mat"], "gold_answers": ["mat", "rug"]}}},
]  # fmt: skip


#: Files of InfiniteBench as its authors call them; lm-eval's group asks for splits that end in _en.
INFINITE = ["code_debug", "code_run", "kv_retrieval", "longbook_choice_eng", "longbook_qa_chn", "longbook_qa_eng"]
INFINITE += ["longbook_sum_eng", "longdialogue_qa_eng", "math_find", "number_string", "passkey"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    made = helpers.checkpoint(folder / "llama", window=4096)
    about = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": CHAT}))
    write_data(folder)
    for needles in mrcr.NEEDLES:
        for part in (0, 1):
            rows = [conversation(needles, size) for size in (1, 3, 200)]
            path = folder / f"{needles}needle_{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "haystack").mkdir()
    (folder / "haystack" / "a.txt").write_text("\n".join(f"It rains on day {i} and on the next." for i in range(120)))
    (folder / "needle_set.json").write_text(json.dumps(NEEDLES))
    (folder / "InfiniteBench").mkdir()
    for task in INFINITE:
        answer = 71432 if task in ("code_run", "math_find") else "71432"
        row = {"id": 0, "context": "The pass key is 71432. " * 3, "input": "What is the key?", "answer": [answer],
               "options": ["a", "b", "71432", "d"]}  # fmt: skip
        (folder / "InfiniteBench" / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "babilong-1k-samples" / "1k").mkdir(parents=True)
    for place in range(1, 21):
        row = {"input": "Mary went to the garden. " * 3, "question": "Where is Mary?", "target": "garden"}
        (folder / "babilong-1k-samples" / "1k" / f"qa{place}.json").write_text(json.dumps(row) + "\n")
    (folder / "babilong-1k-samples" / "1k" / "qa2.json").unlink()  # as the hub calls its own files, in two parts
    for part, rows in enumerate(([row], [row, row])):
        path = folder / "babilong-1k-samples" / "1k" / f"qa2-0000{part}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return folder


def conversation(needles, size):
    turns = [
        {"role": role, "content": f"{text} {i} " * size}
        for i in range(needles)
        for role, text in (("user", "Write a poem, please,"), ("assistant", "The rain of verse"))
    ]
    asked = {"role": "user", "content": "Prepend abc123 to the last poem."}
    return {"prompt": json.dumps([*turns, asked]), "answer": f"abc123{turns[-1]['content']}", "n_needles": needles,
            "random_string_to_prepend": "abc123"}  # fmt: skip


@pytest.fixture
def asked(monkeypatch, tmp_path_factory):
    made = answering(lambda request: " and ".join(request.doc["outputs"]))
    monkeypatch.setattr(run, "load", lambda *args, **kwargs: made)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    return made


def config(place, output, suite, **changes):
    settings = dict(
        checkpoint=str(place / "llama"), suite=suite, data_dir=str(place), output=str(output), dtype="float32",
        device="cpu", quiet=True, samples=4,
    )  # fmt: skip
    more = {
        "ruler-v2": {
            "lengths": 3000,
            "max_new_tokens": 64,
            "tasks": "mk_niah_easy,mk_niah_hard,mv_niah_medium,qa_easy",
        },
        "mrcr": {"chat": True, "max_new_tokens": 64},
        "nolima": {"lengths": "300,600", "samples": 500},
        "infinitebench": {"tasks": "all"},
        "babilong": {"lengths": 1024},
    }
    return ScoreConfig(**{**settings, **more[suite], **changes})


def oracle(request):
    """The right answer as a model would give it: of MMLU the boxed letter, of InfiniteBench's choices the letter."""
    golds = request.doc["outputs"]
    if "choice" in request.task_name:
        return "C"
    return rf"\boxed{{{golds[0]}}}" if len(golds[0]) == 1 else "\n".join(golds)


slow = pytest.mark.slow  # reads the names of all of lm-eval's tasks


@pytest.mark.parametrize(
    "suite",
    ["ruler-v2", "mrcr", "nolima", pytest.param("babilong", marks=slow), pytest.param("infinitebench", marks=slow)],
)
def test_an_oracle_gains_all_and_an_empty_answer_or_an_echo_nothing(place, tmp_path, asked, suite):
    for name, answer, value in (("oracle", oracle, 100), ("empty", lambda r: "", 0), ("echo", lambda r: r.args[0], 0)):
        asked.answer = answer
        made = score(config(place, tmp_path / name, suite))
        assert {row["value"] for row in made} == {value}, name
        assert {row["n_truncated"] for row in made} == {0}
        assert suite in ("babilong", "infinitebench") or all(row["data_sha256"] for row in made)
    means = [row for row in read_rows(tmp_path / "oracle" / "summary.jsonl") if row["metric"] == "mean_over_tasks"]
    assert {row["value"] for row in means} == {100}


def test_mrcr_leaves_out_what_does_not_fit_and_grades_as_its_card_says(place, tmp_path, asked):
    made = score(config(place, tmp_path, "mrcr", samples=500))
    assert [(row["task"], row["n"], row["n_over_window"]) for row in made] == [
        ("mrcr_2", 4, 2), ("mrcr_4", 4, 2), ("mrcr_8", 4, 2),
    ]  # fmt: skip
    assert asked.requests[0].args[0].count("<user>") in (3, 5, 9) and asked.requests[0].args[0].endswith("<a>")
    sample = {"begin": "ab", "outputs": ["abwxyz"]}
    assert [mrcr.grade(sample, text) for text in ("abwxyz", "abwx", " abwxyz", "wxyz")] == [
        1,
        pytest.approx(2 / 3),
        0,
        0,
    ]


def test_nolima_places_a_needle_on_a_line_of_its_own_at_26_depths(place, tmp_path, asked):
    made = score(config(place, tmp_path, "nolima"))
    assert [(row["task"], row["length"], row["n"]) for row in made] == [
        ("onehop", 300, 52), ("twohop", 300, 26), ("onehop", 600, 52), ("twohop", 600, 26),
    ]  # fmt: skip
    reader = Reader(helpers.tokenizer())
    first = [r for r in asked.requests if r.task_name == "twohop@600"]
    places = []
    for request in sorted(first, key=lambda r: r.doc["index"]):
        text, (name,) = request.args[0], request.doc["outputs"]
        (line,) = [line for line in text.splitlines() if "lives" in line and "?" not in line]
        assert line.endswith(f"In Ulm lives {name}.") and text.endswith("Q: Who lives north of Rome?")
        before = text[: text.index("In Ulm")]
        places.append(len(reader.ids([before])[0]))
        around = text[: text.rindex("\nQ:")].replace(f"In Ulm lives {name}.", "")
        assert abs(len(reader.ids([around])[0]) - 600) < 8
    assert all(abs(place - 600 * i / 25) < 30 for i, place in enumerate(places)) and places[-1] > 560
    assert {r.doc["outputs"][0] for r in first} == {"Ada", "Ben"}
    others = [r for r in asked.requests if r.task_name == "onehop@600" and "Ulm" in r.args[0]]
    for request in others:  # the distractor is on a line's end, a fifth of the text away from the needle
        text = request.args[0]
        (line,) = [line for line in text.splitlines() if "born" in line]
        assert line.endswith("and on the next. Nobody was born in Ulm.")
        apart = [len(reader.ids([text[: text.index(words)]])[0]) for words in ("In Ulm lives", "Nobody was")]
        assert abs(apart[0] - apart[1]) > 0.2 * 600 - 20
    assert len(others) == 26 and not any("born" in r.args[0] for r in first)
    assert nolima.contains({"outputs": ["mat", "rug"]}, "on the rug") == 1
    assert nolima.contains({"outputs": ["mat"]}, "Mat") == 0


def test_nolimas_effective_length_is_measured_by_the_score_at_short_lengths(place, tmp_path, asked):
    """Right up to 500 tokens, every other time at 1,000: the base is 250 / 3, and 85% of it more than 50."""
    asked.answer = lambda r: r.doc["outputs"][0] if "1000" not in r.task_name or r.doc["index"] % 2 else "no"
    score(config(place, tmp_path, "nolima", lengths="250,500,1000", tasks="onehop"))
    found = {(row["metric"], row["length"]): row["value"] for row in read_rows(tmp_path / "summary.jsonl")}
    assert found == {
        ("mean_over_tasks", 250): 100, ("mean_over_tasks", 500): 100, ("mean_over_tasks", 1000): 50,
        ("base_score", None): pytest.approx(250 / 3), ("effective_length", None): 500,
    }  # fmt: skip


@slow
def test_babilong_and_infinitebench_ask_for_all_their_tasks_at_the_length(place, tmp_path, asked):
    made = score(config(place, tmp_path / "b", "babilong"))
    assert {row["task"]: row["n"] for row in made} == {f"babilong_qa{i}": 3 if i == 2 else 1 for i in range(1, 6)}
    assert {(row["length"], row["shots"]) for row in made} == {(1024, 2)}
    assert "hidden in some random text" in asked.requests[0].args[0]
    made = score(config(place, tmp_path / "i", "infinitebench"))
    names = {name.replace("_eng", "_en") for name in INFINITE}
    assert {row["task"] for row in made} == {f"infinitebench_{name}" for name in names}


BAD = {
    "no template": ("mrcr", {"chat": False}, "made of conversations: it needs chat"),
    "no room": ("ruler-v2", {"max_new_tokens": 3500}, r"at most the window 4096: 3000 \+ 3500 tokens"),
    "a window that holds none": ("mrcr", {"max_new_tokens": 4090}, "no conversation fits the window 4096"),
    "a task that is none": ("ruler-v2", {"tasks": "vt"}, "tasks of suite ruler-v2 must be all, or of mk_niah_basic"),
    "no set": ("nolima", {"data_dir": None}, "needs --data-dir with needle_set.json and haystack"),
    "a haystack that is short": ("nolima", {"lengths": 3800}, "a.txt: must hold 3800 tokens around a line's end"),
    "RULER's settings": ("nolima", {"hops": 2}, "hops is for suite ruler, not nolima"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_refused_in_one_line(place, tmp_path, asked, name):
    suite, changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        score(config(place, tmp_path, suite, **changes))
    assert not asked.requests and "\n" not in str(raised.value)
