"""What RULER's samples must be where versions of them have been otherwise: scoring, budgets, lists, repeats, wording.

Whole samples are held to RULER's own generator by test_replay.py.
"""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import ruler
from benchmarks.ruler import texts
from benchmarks.tasks.ruler_task import RulerTask
from tests.support import ruler_helpers as helpers

LENGTH = 4096
LISTED = re.compile(r"\d+\. (.+?)(?= \d+\. |$)")
LLAMA_CHAT = (
    "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    helpers.essay_file(folder)
    return helpers.qa_files(folder)


def ours(task, folder, n=4, length=LENGTH, seed=0, tokenizer=None, **options):
    options.setdefault("haystack_text", str(folder / "story.txt"))
    return ruler.build_samples(task, length, tokenizer or helpers.tokenizer(), n, seed, folder, **options)


def test_one_answer_found_is_right_in_qa_and_a_share_elsewhere():
    outputs = ["Denver", "Denver Broncos", "The Broncos"]
    assert ruler.score("qa_1", "It was DENVER.", outputs) == 1.0
    assert ruler.score("niah_multivalue", "It was DENVER.", outputs) == pytest.approx(1 / 3)
    assert ruler.score("qa_1", "It was Boulder.", outputs) == 0.0


def test_common_words_come_with_a_worked_example(folder):
    question = "What are the 10 most common words in the above list?"
    for sample in ours("cwe", folder, n=2, length=6000):
        example, asked = sample["input"].split(question)[:2]
        assert sample["input"].count(question) == 2
        answer = re.search(r"in the list are: (1\. .*?)\n", asked).group(1)
        listed = LISTED.findall(example.splitlines()[-2])
        frequent = sorted(set(listed), key=lambda word: (-listed.count(word), word))[:10]
        assert sorted(frequent) == sorted(LISTED.findall(answer))


def test_a_chat_has_bos_once_and_its_template_is_part_of_the_length(folder):
    tokenizer = helpers.tokenizer(size=2047)  # an own copy, since it gets a chat template
    tokenizer.chat_template = LLAMA_CHAT
    for sample in ours("vt", folder, n=2, tokenizer=tokenizer, chat=True):
        ids = tokenizer(sample["input"], add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1 and len(ids) == sample["length"] <= LENGTH - 30
        question, _, prefix = sample["input"].rpartition("[assistant] ")
        assert question.startswith("<s>[user] Memorize") and prefix.startswith("Answer: According to")
    plain = ours("vt", folder, n=1, tokenizer=tokenizer)[0]["input"]
    assert plain.startswith("Memorize") and "[assistant]" not in plain


def test_variable_tracking_is_spelled_and_its_example_redrawn(folder):
    prompts = [sample["input"] for sample in ours("vt", folder)]
    assert all("assgined" not in prompt and prompt.count("assigned the value") == 4 for prompt in prompts)
    assert all("\n\n\n" not in prompt and "\n " not in prompt for prompt in prompts)
    values = [re.search(r"VAR [A-Z]+ = (\d{5})", prompt.split("Question:")[0]).group(1) for prompt in prompts]
    assert len(set(values)) == len(values)


def test_essays_and_documents_are_repeated(folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("The tide was out. Nobody came. Then it rained for a week.")
    s = ours("niah_single_2", folder, n=1, haystack_text=str(short))[0]
    assert s["length"] + s["max_new_tokens"] >= 0.995 * LENGTH
    assert s["input"].count("Nobody came.") > 100
    s = ours("qa_2", folder, n=1, length=2 * LENGTH)[0]
    assert s["length"] + s["max_new_tokens"] >= 0.98 * LENGTH * 2


def test_common_words_go_on_in_a_longer_list(folder, tmp_path, monkeypatch):
    everything = texts.common_words()
    few = everything[:60]
    monkeypatch.setattr(texts, "common_words", lambda: few)
    with pytest.raises(ValueError, match=r"english_words\.json .*--data-dir"):
        ours("cwe", folder, length=6000, n=1)
    longer = everything[60:5000]
    words = {str(i): word for i, word in enumerate(longer)}
    (tmp_path / "english_words.json").write_text(json.dumps(words))
    made = ruler.build_samples("cwe", 6000, helpers.tokenizer(), 2, 0, tmp_path)
    assert all(s["length"] + s["max_new_tokens"] >= 0.995 * 6000 for s in made)
    assert made[0]["haystack"] == "english_words.json"
    # RULER's rule: the words of a sample are all from the one list or all from the other.
    assert set(made[0]["outputs"]) <= set(longer) and set(made[1]["outputs"]) <= set(longer)
    asked = made[0]["input"].split("\nQuestion")[1].split("appear most often.\n", 1)[1]
    assert not set(few) & set(LISTED.findall(asked))
    shorter = ruler.build_samples("cwe", 1200, helpers.tokenizer(), 1, 0, tmp_path, max_new_tokens=600, shots=0)
    assert set(shorter[0]["outputs"]) <= set(few) and shorter[0]["haystack"] == "words"


def test_a_length_that_was_not_run_has_no_score():
    task = RulerTask({"task": "endprompt_vt", "metadata": {"max_seq_lengths": [8192]}})
    doc = {"outputs": ["ABCDE"], "budget": 8192, "max_length": 8192, "input": "?"}
    assert set(task.process_results(doc, ["ABCDE"])) == set(task.aggregation()) == {"8192"}


def test_templates_are_the_suites_own(folder):
    single = ours("niah_single_1", folder, n=1)[0]
    assert single["input"].startswith("A special magic number is hidden within the following text.")
    key = re.search(r"What is the special magic number for (\S+) mentioned in the provided text\?", single["input"])
    assert single["input"].endswith(f" The special magic number for {key.group(1)} mentioned in the provided text is")
    assert f"One of the special magic numbers for {key.group(1)} is: {single['outputs'][0]}." in single["input"]
    many = ours("niah_multiquery", folder, n=1)[0]
    assert many["input"].startswith("Some special magic numbers are hidden") and len(many["outputs"]) == 4
    assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned in the provided text are$", many["input"])
    assert single["max_new_tokens"] == 128


def test_frequent_words_have_the_zeta_counts(folder):
    s = ours("fwe", folder, n=1)[0]
    text = s["input"].split("coded words. ", 1)[1].split("\nQuestion")[0].split()
    counts = sorted(((text.count(word), word) for word in set(text)), reverse=True)
    assert counts[0][1] == "..." and [word for _, word in counts[1:4]] == s["outputs"]
    total = counts[0][0] * 3.14159265**2 / 6  # the first rank stands total / zeta(2) times
    for rank, (count, _) in enumerate(counts[:6], 1):
        assert abs(count - total / (3.14159265**2 / 6) / rank**2) <= 1


def test_common_words_stand_thirty_times_and_others_three(folder):
    s = ours("cwe", folder, n=1, length=6000)[0]
    listed = s["input"].split("\nQuestion")[1].split("appear most often.\n", 1)[1]
    words = LISTED.findall(listed)
    assert [words.count(word) for word in s["outputs"]] == [30] * 10
    assert {words.count(word) for word in set(words) - set(s["outputs"])} == {3}
