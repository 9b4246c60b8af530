"""Where lm-eval's RULER departs from the original: each check fails on lm-eval's version and passes on ours."""

from __future__ import annotations

import json
import random
import re

import pytest

from benchmarks import ruler
from benchmarks.ruler import texts
from tests.support import ruler_helpers as helpers

LENGTH = 4096
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


def upstream_vt(n=4, length=LENGTH):
    from lm_eval.tasks.ruler import vt_utils

    tokenizer = helpers.tokenizer()
    example = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)[0]
    return vt_utils.sys_vartrack_w_noise_random(tokenizer, n, length, icl_example=example)


def upstream_prompts(samples):
    """Prompt as lm-eval gives it to the model: the delimiter is a space."""
    return [f"{s['input'].rstrip()} {s['gen_prefix']}" for s in samples]


def tokens(prompt):
    return len(helpers.tokenizer()(prompt)["input_ids"])


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def test_row_1_qa_counts_one_answer_found_as_right():
    from lm_eval.tasks.ruler import common_utils

    doc = {"outputs": ["Denver", "Denver Broncos", "The Broncos"], "max_length": 4096}

    def check(score):
        assert score("It was Denver.") == 1.0

    check(lambda prediction: ruler.score("qa_1", prediction, doc["outputs"]))
    fails(check, lambda prediction: common_utils.process_results_part(doc, [prediction])["4096"])


def test_row_2_common_words_come_with_a_worked_example(folder):
    from lm_eval.tasks.ruler import cwe_utils

    question = "What are the 10 most common words in the above list?"

    def check(prompts):
        for prompt in prompts:
            example, asked = prompt.split(question)[:2]
            assert prompt.count(question) == 2
            answer = re.search(r"in the list are: (1\. .*?)\n", asked).group(1)
            listed = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", example.splitlines()[-2])
            frequent = sorted(set(listed), key=lambda word: (-listed.count(word), word))[:10]
            assert sorted(frequent) == sorted(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", answer))

    check([s["input"] for s in ours("cwe", folder, length=6000)])
    theirs = cwe_utils.sys_word_pair_random(2, 6000, helpers.tokenizer())
    fails(check, upstream_prompts(theirs))


def test_row_3_the_budget_is_filled(folder):
    def check(used):
        assert sum(used) / len(used) >= 0.995 * LENGTH

    check([s["length"] + s["max_new_tokens"] for s in ours("vt", folder)])
    fails(check, [s["length"] for s in upstream_vt()])


def test_row_4_the_length_counts_all_that_the_model_gets(folder):
    tokenizer = helpers.tokenizer(size=2047)  # an own copy, since it gets a chat template
    tokenizer.chat_template = LLAMA_CHAT

    def check(samples):
        for prompt, stated in samples:
            assert tokenizer(prompt, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id) == 1
            assert len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) == stated <= LENGTH - 30

    def chatted(question):
        turns = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    made = ours("vt", folder, tokenizer=tokenizer, chat=True)
    check([(s["input"], s["length"]) for s in made])
    for s in made:
        question, _, prefix = s["input"].rpartition("[assistant] ")
        assert question.startswith("<s>[user] Memorize") and prefix.startswith("Answer: According to")
    fails(check, [(chatted(s["input"]) + s["gen_prefix"], s["length"] - 30) for s in upstream_vt()])


def test_row_5_frequent_words_keep_room_for_the_answer(folder):
    from lm_eval.tasks.ruler import fwe_utils

    lengths = range(1000, 2000, 50)
    random.seed(0)

    def check(prompt_of):
        for length in lengths:
            assert tokens(prompt_of(length)) + 50 <= length

    check(lambda length: ours("fwe", folder, n=1, length=length)[0]["input"])
    fails(check, lambda length: upstream_prompts(fwe_utils.sys_kwext(helpers.tokenizer(), length, 1))[0])


def test_row_6_samples_do_not_depend_on_what_ran_before(folder):
    def check(build):
        random.seed(1)
        first = build()
        random.seed(2)
        assert build() == first

    check(lambda: [s["input"] for s in ours("vt", folder, n=2)])
    fails(check, lambda: [s["input"] for s in upstream_vt(n=2)])


def test_row_7_variable_tracking_is_spelled_and_its_example_redrawn(folder):
    def spelled(prompts):
        assert all("assgined" not in prompt and prompt.count("assigned the value") == 4 for prompt in prompts)

    def newlines(prompts):
        assert all("\n\n\n" not in prompt and "\n " not in prompt for prompt in prompts)

    def redrawn(prompts):
        values = [re.search(r"VAR [A-Z]+ = (\d{5})", prompt.split("Question:")[0]).group(1) for prompt in prompts]
        assert len(set(values)) == len(values)

    mine = [s["input"] for s in ours("vt", folder)]
    theirs = upstream_prompts(upstream_vt())
    for check in (spelled, newlines, redrawn):
        check(mine)
        fails(check, theirs)


def test_row_8_essays_and_documents_are_repeated(folder, tmp_path):
    from lm_eval.tasks.ruler import qa_utils

    short = tmp_path / "short.txt"
    short.write_text("The tide was out. Nobody came. Then it rained for a week.")
    s = ours("niah_single_2", folder, n=1, haystack_text=str(short))[0]
    assert s["length"] + s["max_new_tokens"] >= 0.995 * LENGTH
    assert s["input"].count("Nobody came.") > 100

    def check(used):
        assert min(used) >= 0.98 * LENGTH * 2

    library = texts.library("hotpotqa", folder, "qa_2")
    check([s["length"] + s["max_new_tokens"] for s in ours("qa_2", folder, n=3, length=2 * LENGTH)])
    qas = [{"query": q.text, "outputs": list(q.answers), "context": list(q.context)} for q in library.questions]
    theirs = qa_utils.generate_samples(helpers.tokenizer(), list(library.documents), qas, 2 * LENGTH, 3)
    fails(check, [s["length"] for s in theirs])


def test_row_9_common_words_go_on_in_a_longer_list(folder, tmp_path, monkeypatch):
    from lm_eval.tasks.ruler import cwe_utils

    everything = texts.common_words()
    few = everything[:60]
    monkeypatch.setattr(texts, "common_words", lambda: few)
    with pytest.raises(ValueError, match=r"english_words\.json .*--data-dir"):
        ours("cwe", folder, length=6000, n=1)
    longer = everything[60:5000]
    words = {str(i): word for i, word in enumerate(longer)}
    (tmp_path / "english_words.json").write_text(json.dumps(words))

    def check(samples):
        assert all(s["length"] + s.get("max_new_tokens", 0) >= 0.995 * 6000 for s in samples)

    made = ruler.build_samples("cwe", 6000, helpers.tokenizer(), 2, 0, tmp_path)
    check(made)
    assert made[0]["haystack"] == "english_words.json"
    # RULER's rule: the words of a sample are all from the one list or all from the other.
    assert set(made[0]["outputs"]) <= set(longer) and set(made[1]["outputs"]) <= set(longer)
    asked = made[0]["input"].split("\nQuestion")[1].split("appear most often.\n", 1)[1]
    assert not set(few) & set(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", asked))
    shorter = ruler.build_samples("cwe", 1200, helpers.tokenizer(), 1, 0, tmp_path, max_new_tokens=600, shots=0)
    assert set(shorter[0]["outputs"]) <= set(few) and shorter[0]["haystack"] == "words"
    monkeypatch.setattr(cwe_utils, "WORDS", list(few))
    fails(check, cwe_utils.sys_word_pair_random(2, 6000, helpers.tokenizer()))


def test_row_10_a_length_that_was_not_run_has_no_score():
    from lm_eval.tasks.ruler import common_utils

    from benchmarks.tasks.ruler_task import RulerTask

    def check(lengths):
        assert lengths == {"8192"}

    task = RulerTask({"task": "endprompt_vt", "metadata": {"max_seq_lengths": [8192]}})
    doc = {"outputs": ["ABCDE"], "budget": 8192, "max_length": 8192, "input": "?"}
    check(set(task.process_results(doc, ["ABCDE"])))
    check(set(task.aggregation()))
    fails(check, set(common_utils.process_results(doc, ["ABCDE"])))


def test_row_18_a_prompt_can_do_without_the_chat_template(folder):
    tokenizer = helpers.tokenizer(size=2047)
    tokenizer.chat_template = LLAMA_CHAT
    plain = ours("vt", folder, n=1, tokenizer=tokenizer)[0]["input"]
    assert plain.startswith("Memorize") and "[assistant]" not in plain


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
    words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed)
    assert [words.count(word) for word in s["outputs"]] == [30] * 10
    assert {words.count(word) for word in set(words) - set(s["outputs"])} == {3}
