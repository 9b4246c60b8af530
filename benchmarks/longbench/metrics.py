"""LongBench's metrics: functions of one prediction and one answer, in [0, 1].

Bai et al. 2023, arXiv:2308.14508, as the benchmark's own `metrics.py` defines them, quirks included: published tables
were made with them. jieba is loaded by the Chinese metrics alone, and only when one is called.
"""

import difflib
import functools
import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

ASCII_PUNCTUATION = frozenset(string.punctuation)
CHINESE_PUNCTUATION = ASCII_PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words, as in SQuAD: lower case, no punctuation, no articles."""
    return bag_f1(english_words(prediction), english_words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of the bags of jieba's words, lower case, without Chinese and ASCII punctuation."""
    return bag_f1(chinese_words(prediction), chinese_words(answer))


def english_words(text: str) -> list[str]:
    bare = "".join(char for char in text.lower() if char not in ASCII_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def chinese_words(text: str) -> list[str]:
    # Segmented first and cleaned word by word: punctuation takes part in the segmentation.
    words = ("".join(char for char in word.lower() if char not in CHINESE_PUNCTUATION) for word in segment(text))
    return [bare for word in words if (bare := "".join(word.split()))]


def bag_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    shared = (Counter(prediction) & Counter(answer)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, answer: str) -> float:
    """Summary-level ROUGE-L F1 with the conventions of the `rouge` package (1.0.1): sentences end at full stops; an
    answer's are matched to all of the prediction's, and the union of the matched words is counted, each distinct word
    once. `rouge` recurses once a word, so that two texts of about a thousand words without a full stop exhaust Python's
    stack and score 0, how long depending on the caller's depth; here they get the value that the definition gives.
    """
    predicted, expected = sentences(prediction), sentences(answer)
    if not predicted or not expected:
        return 0.0
    union = {word for ours in expected for theirs in predicted for word in common_subsequence(ours, theirs)}
    recall = len(union) / len({word for sentence in expected for word in sentence})
    precision = len(union) / len({word for sentence in predicted for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L of jieba's words."""
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))


def sentences(text: str) -> list[list[str]]:
    # A sentence of white space alone holds one empty word, as in `rouge`.
    return [part.split() or [""] for part in text.split(".") if part]


def common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """Words of the longest common subsequence, last first, that `rouge`'s backtracking picks among equals. The table of
    lengths is held as one integer a row: bit j of rows[i] is 0 where length[i, j+1] = length[i, j] + 1 (Crochemore et
    al. 2001), so a row costs one addition.
    """
    places: dict[str, int] = {}
    for j, word in enumerate(y):
        places[word] = places.get(word, 0) | 1 << j
    everywhere = (1 << len(y)) - 1
    rows = [everywhere]
    for word in x:
        row = rows[-1]
        matches = row & places.get(word, 0)
        rows.append((row + matches | row - matches) & everywhere)

    def length(i: int, j: int) -> int:
        return j - (rows[i] & (1 << j) - 1).bit_count()

    words = []
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.append(x[i - 1])
            i, j = i - 1, j - 1
        elif length(i - 1, j) > length(i, j - 1):
            i -= 1
        else:
            j -= 1
    return words


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes named in the prediction if the right one is among them, else 0. A class that is a part of
    the right one ("Other" in "Other entity") does not count against it. As published, the list shrinks while it is
    walked through, so the class after a dropped one is not looked at.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        name = named[position]
        if name in answer and name != answer:
            named.remove(name)
        position += 1
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that equal the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, label: str = "Paragraph ") -> float:
    """Share of the numbers in the prediction that equal the paragraph's. Raises ValueError if the answer has none."""
    paragraph = re.search(re.escape(label) + r"(\d+)", answer)
    if paragraph is None:
        raise ValueError(f"an answer must name a paragraph as {label + '7'!r}: {answer=}")
    return count(prediction, paragraph[1])


def retrieval_zh(prediction: str, answer: str) -> float:
    return retrieval(prediction, answer, label="段落")


def code_similarity(prediction: str, answer: str) -> float:
    """Edit similarity of the answer to the first line of the prediction that holds no comment and no code fence. Only
    newlines at the start are passed over: a line of white space is a prediction.
    """
    return edit_ratio(code_line(prediction), answer) / 100


def code_line(prediction: str) -> str:
    lines = prediction.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


def edit_ratio(a: str, b: str) -> int:
    """fuzzywuzzy's `ratio` as LongBench's requirements install it, percent: without python-Levenshtein, which they do
    not name, it takes difflib's matching blocks. The indel ratio that python-Levenshtein and rapidfuzz compute is
    another number: "ababab" and "aaaaab" have 33 here and 67 there.
    """
    if a == b:
        return 100
    if not a or not b:
        return 0
    return round(100 * difflib.SequenceMatcher(None, a, b).ratio())


def code_similarity_levenshtein(prediction: str, answer: str) -> float:
    """`code_similarity` where python-Levenshtein is installed beside fuzzywuzzy, as some publishers had it."""
    line = code_line(prediction)
    return indel_ratio(line, answer) / 100


def indel_ratio(a: str, b: str) -> int:
    """Percent: 2 x longest common subsequence / characters of both, in the order of python-Levenshtein's `ratio`, which
    tells where a half is rounded: 2 x 1 of 80 characters are 2.5, and 3 there.
    """
    if a == b:
        return 100
    characters = len(a) + len(b)
    return round(100 * (1 - (characters - 2 * len(common_subsequence(a, b))) / characters))


def segment(text: str) -> list[str]:
    return jieba_cut()(text)


@functools.cache
def jieba_cut() -> Callable[[str], list[str]]:
    """jieba's segmentation with the dictionary of its package (about a second, once a process). jieba itself prints
    while it loads, and trusts whatever copy of the dictionary it finds in the temporary folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba

        jieba.setLogLevel(logging.WARNING)
        tokenizer = jieba.Tokenizer()
        tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
        tokenizer.initialized = True
    return tokenizer.lcut
