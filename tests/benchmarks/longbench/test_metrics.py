"""LongBench's metrics against other implementations of the published definitions, and against values worked by hand."""

from __future__ import annotations

import importlib
import logging
import random
import sys
import types

import pytest

from benchmarks import longbench
from benchmarks.longbench import metrics
from tests.support.longbench_fixtures import ANSWERS, CLASSES, HAN

SMALL = ["the", "a", "an", "Cat", "cat,", "sat", "on.", "Mat", "mats;", "x", "3.5", ".", "...", "don't", "A-b", "\n"]
SMALL += ["Ünï", "東京"]


def phrases(n: int, alphabet: list[str], longest: int, joined: str = " ", seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    draw = lambda: joined.join(rng.choices(alphabet, k=rng.randint(0, longest)))  # noqa: E731
    return [(draw(), draw()) for _ in range(n)]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """lm-eval's metrics, which follow the published ones but for code; its fuzzywuzzy is not needed here."""
    import jieba

    before = logging.getLogger("jieba").level
    jieba.dt.tmp_dir = str(tmp_path_factory.mktemp("jieba"))
    jieba.setLogLevel(logging.ERROR)
    stub = types.ModuleType("fuzzywuzzy")
    stub.fuzz = None
    sys.modules.setdefault("fuzzywuzzy", stub)
    yield importlib.import_module("lm_eval.tasks.longbench.metrics")
    if sys.modules["fuzzywuzzy"] is stub:
        del sys.modules["fuzzywuzzy"], sys.modules["lm_eval.tasks.longbench.metrics"]
    logging.getLogger("jieba").setLevel(before)


def naive_f1(predicted: list[str], expected: list[str]) -> float:
    left, shared = list(expected), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def test_qa_f1_is_the_dice_coefficient_of_the_cleaned_words(upstream):
    for prediction, answer in phrases(400, SMALL, 12):
        value = metrics.qa_f1(prediction, answer)
        words = [metrics.english_words(side) for side in (prediction, answer)]
        assert value == pytest.approx(naive_f1(*words), abs=1e-12)
        assert value == upstream.qa_f1_score(prediction, answer)
    assert metrics.english_words("The cat's A-b, an (x) ﹏.") == ["cats", "ab", "x", "﹏"]
    assert metrics.qa_f1("Paris, in the North of France", "the north France") == pytest.approx(2 * 2 / (5 + 2))


def test_rouge_l_is_that_of_the_rouge_package(upstream):
    pairs = phrases(150, SMALL, 60) + phrases(100, ["w1", "w2", "w3", "w4.", "w5"], 40, seed=1)
    expected = [upstream.rouge_score(*pair) for pair in pairs]
    assert sum(value > 0 for value in expected) > 200
    assert [metrics.rouge_l(*pair) for pair in pairs] == pytest.approx(expected, abs=1e-12)


def test_rouge_l_by_hand():
    # the union of the matches counts each word once: {a, c, d} of 4 distinct words here and 4 there
    assert metrics.rouge_l("a c. d x", "a b c d") == pytest.approx(0.75, abs=1e-6)
    assert metrics.rouge_l("", "a") == metrics.rouge_l("...", "a") == metrics.rouge_l("a", "") == 0.0
    # of two longest subsequences (a, b) backtracking takes one, so only one word of two is matched
    assert metrics.rouge_l("a b", "b a") == pytest.approx(0.5, abs=1e-6)


def test_rouge_l_does_not_depend_on_the_stack():
    rng = random.Random(2)
    long = [f"w{rng.randint(0, 300)}" for _ in range(1100)]
    assert metrics.rouge_l(" ".join(long), " ".join(long)) == pytest.approx(1, abs=1e-7)


def test_common_subsequence_has_the_length_of_the_table():
    rng = random.Random(3)
    for _ in range(300):
        x, y = (rng.choices("abcd", k=rng.randint(1, 30)) for _ in range(2))
        table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
        for i, a in enumerate(x, 1):
            for j, b in enumerate(y, 1):
                table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
        found = metrics.common_subsequence(x, y)[::-1]
        assert len(found) == table[-1][-1]
        for side in (x, y):
            rest = iter(side)
            assert all(word in rest for word in found)  # a subsequence of both


def test_chinese_metrics_agree_with_the_published_ones(upstream):
    import jieba

    alphabet = [*HAN, "，", "。", "《", "》", "、", " ", "2024", "AI", "3.5", "中国", "科学技术", "研究"]
    scored = 0
    for prediction, answer in phrases(200, alphabet, 30, joined="", seed=4):
        assert metrics.segment(prediction) == jieba.lcut(prediction)
        assert metrics.qa_f1_zh(prediction, answer) == upstream.qa_f1_zh_score(prediction, answer)
        value = metrics.rouge_l_zh(prediction, answer)
        assert value == pytest.approx(upstream.rouge_zh_score(prediction, answer), abs=1e-12)
        scored += value > 0
    assert scored > 50
    assert metrics.chinese_words("《北京》，AI。") == ["《", "北京", "ai"]  # the published list closes a title, no more
    assert metrics.qa_f1_zh("首都是北京", "北京") == pytest.approx(2 * 1 / (3 + 1))


def test_classification_agrees_with_the_published_one(upstream):
    rng = random.Random(5)
    classes = ["Other", "Other entity", "Entity", "Number", "Number of", "Number of things", "ent"]
    values = set()
    for _ in range(600):
        rng.shuffle(classes)
        prediction, answer = " ".join(rng.choices([*classes, "x"], k=rng.randint(0, 4))), rng.choice(classes)
        value = metrics.classification(prediction, answer, classes)
        assert value == upstream.classification_score(prediction, answer, all_classes=classes)
        values.add(value)
    assert {0.0, 0.5, 1.0} <= values


def test_classification_by_hand():
    assert metrics.classification("It is a Place.", "Place", CLASSES) == 1
    # "Place" is a part of the right label and does not count against it
    assert metrics.classification("Place name", "Place name", CLASSES) == 1
    # the label that contains the right one does
    assert metrics.classification("Place name", "Place", CLASSES) == 0.5
    assert metrics.classification("Person or Number or Reason", "Number", CLASSES) == pytest.approx(1 / 3)
    assert metrics.classification("place", "Place", CLASSES) == 0
    # two parts of the right label in a row: the second stands after a dropped one and is not looked at
    assert metrics.classification("a ab abc", "abc", ["a", "ab", "abc"]) == 0.5


def test_counts_and_paragraphs_by_hand(upstream):
    cases = [("7", 1), ("There are 7, not 8", 1 / 2), ("seven", 0), ("", 0), ("07", 0), ("7 7 12", 2 / 3), ("77", 0)]
    for prediction, value in cases:
        assert metrics.count(prediction, "7") == pytest.approx(value)
        assert metrics.retrieval(prediction, "Paragraph 7") == pytest.approx(value)
        assert metrics.retrieval_zh(prediction, "段落7") == pytest.approx(value)
        assert upstream.count_score(prediction, "7") == pytest.approx(value)
    with pytest.raises(ValueError, match="Paragraph 7"):
        metrics.retrieval("7", "7")


def ratcliff(a: str, b: str) -> int:
    """Matching characters by Ratcliff and Obershelp: the longest common block, leftmost in a, then in b; both sides."""
    best = (0, 0, 0)
    for i in range(len(a)):
        for j in range(len(b)):
            size = 0
            while i + size < len(a) and j + size < len(b) and a[i + size] == b[j + size]:
                size += 1
            if size > best[0]:
                best = (size, i, j)
    size, i, j = best
    return size and size + ratcliff(a[:i], b[:j]) + ratcliff(a[i + size :], b[j + size :])


def test_edit_ratio_is_difflib_s_not_the_indel_ratio():
    different = 0
    for a, b in phrases(300, ["x", "y", "(", ")", " ", "=", "return", "self."], 10, joined="", seed=6):
        if a and b:
            assert metrics.edit_ratio(a, b) == round(200 * ratcliff(a, b) / (len(a) + len(b)))
            indel = 200 * len(metrics.common_subsequence(a, b)) / (len(a) + len(b))  # as rapidfuzz has it
            different += metrics.edit_ratio(a, b) != round(indel)
    assert different > 20
    assert metrics.edit_ratio("ababab", "aaaaab") == 33  # python-Levenshtein: 67
    assert metrics.indel_ratio("ababab", "aaaaab") == 67 and metrics.indel_ratio("", "") == 100
    assert metrics.indel_ratio("", "x") == 0 == metrics.indel_ratio("ab", "cd")


@pytest.mark.parametrize(("same", "percent"), [(1, 3), (3, 7), (17, 43), (23, 57)])
def test_a_half_percent_is_rounded_as_python_levenshtein_does(same, percent):
    """Values of python-Levenshtein 0.27.5 with fuzzywuzzy 0.18.0; the halves are 2.5, 7.5, 42.5 and 57.5."""
    assert metrics.indel_ratio("x" * same + "y" * (40 - same), "x" * same + "z" * (40 - same)) == percent
    assert metrics.edit_ratio("", "x") == metrics.edit_ratio("x", "") == 0 and metrics.edit_ratio("", "") == 100
    # from 200 characters on difflib starts no block at a character that makes up more than 1% of the second string
    assert metrics.edit_ratio("ab" * 120, "x" + "ab" * 120) == 0
    assert metrics.edit_ratio("ab" * 90, "x" + "ab" * 90) == 100  # 99.7, rounded


def test_code_similarity_takes_the_first_line_that_is_code():
    answer = "return x"
    for prediction in (
        "return x",
        "\n\nreturn x\ny",
        "```python\nreturn x",
        "# why\n// why\nreturn x\n",
        "\n#\nreturn x",
    ):
        assert metrics.code_similarity(prediction, answer) == 1
    assert metrics.code_similarity("    return x", answer) == pytest.approx(round(100 * 16 / 20) / 100)
    assert metrics.code_similarity("# return x", answer) == 0  # no line is left


@pytest.mark.parametrize("task", longbench.TASKS)
def test_score_takes_the_best_answer_in_percent(task):
    rules = longbench.dataset_of(task)
    answers = ANSWERS[rules.metric]
    classes = CLASSES if rules.metric == "classification" else None
    wrong = {"classification": ["Person"], "count": ["3"], "retrieval": ["Paragraph 3"], "retrieval_zh": ["段落3"]}
    other = wrong.get(rules.metric, ["!!!"])
    assert longbench.score(task, answers[0], [*other, *answers], classes) == pytest.approx(100, abs=1e-5)
    assert longbench.score(task, "", answers, classes) == 0
    assert 0 <= longbench.score(task, other[0], answers, classes) < 100


def test_score_names_what_is_wrong():
    assert longbench.score("qasper_e", "yes", "yes") == 100
    with pytest.raises(ValueError, match=r"unknown LongBench task 'qaspar'; did you mean qasper"):
        longbench.score("qaspar", "x", ["x"])
    with pytest.raises(ValueError, match="unknown LongBench task 'narrativeqa_e'"):
        longbench.score("narrativeqa_e", "x", ["x"])
    with pytest.raises(ValueError, match="all_classes"):
        longbench.score("trec", "x", ["x"])
    with pytest.raises(ValueError, match="at least one answer"):
        longbench.score("qasper", "x", [])


@pytest.mark.slow
def test_only_chinese_needs_jieba():
    import subprocess

    program = (
        "import sys; from benchmarks.longbench.samples import TASKS, dataset_of, score\n"
        "heavy = ('jieba', 'lm_eval', 'torch', 'transformers', 'rouge', 'rapidfuzz')\n"
        "[score(t, 'a', ['Paragraph 1'], ['a']) for t in TASKS if dataset_of(t).language != 'zh']\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "score('dureader', '北京', ['北京']); print('jieba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\nTrue\n", "")
