"""RULER's second edition: 12 tasks over numbered needles, MMLU questions and HotpotQA documents.

Samples are those of the generator in NeMo-Skills (branch chsieh/ruler2, 991a743): one generator of random numbers,
seeded with 42 (+ seed), serves a task; a binary search on the first question finds the size of the haystack, and a
sample that is too long loses a step of it. Lengths are those of the prompt's text: what is generated comes on top. The
original's documents stand in the order of a set, which changes with every start of Python; ours are in order.
"""

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks import originals
from benchmarks.ruler import texts
from benchmarks.ruler.replay import SEED, TRIES, most_expected, searched
from endprompt.files import read_json_lines, read_parquet, remembered_sha256

GENERATOR = "ruler-v2-1"
SAMPLES, NEW_TOKENS = 100, 16384
WORDING = yaml.safe_load((Path(__file__).parent / "wording-v2.yaml").read_text(encoding="utf-8"))
TASKS: dict[str, dict[str, Any]] = WORDING["tasks"]
ORDINALS = ("1st", "2nd", "3rd", "4th")
FILES = {"needles": (), "questions": ("mmlu_test", "mmlu_train"),
         "documents": ("hotpot_dev", "hotpot_train", "hotpot_train_rest")}  # fmt: skip


class Library(NamedTuple):
    """asked: questions with their answers. haystack: texts. sha256: of the files."""

    asked: list[dict[str, Any]]
    haystack: list[Any]
    sha256: dict[str, str]


def records(path: Path, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    found = []
    for number, record in (read_parquet if path.suffix == ".parquet" else read_json_lines)(path):
        try:
            found.append(read(record))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            where = f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {number}"
            raise ValueError(f"{where}: not a record of its data set as the hub has it: {error!r}") from None
    if not found:
        raise ValueError(f"{path}: holds no records")
    return found


@functools.lru_cache(2)
def library(kind: str, data_dir: str | None) -> Library:
    """The texts of a kind of tasks. Raises ValueError with file and line, and what `originals.data_file` does."""
    paths = [originals.data_file("ruler-v2", name, data_dir) for name in FILES[kind]]
    sha256 = {path.name: remembered_sha256(path) for path in paths}
    if kind == "needles":
        return Library([], [], {})
    if kind == "questions":
        asked, haystack = (records(path, mmlu_question) for path in paths)
        return Library(asked, haystack, sha256)
    trains = [text for path in paths[1:] for own in records(path, hotpot_texts) for text in own.values()]
    return Library(records(paths[0], hotpot_question), sorted(set(trains)), sha256)


def mmlu_question(record: dict[str, Any]) -> dict[str, Any]:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", record["choices"], strict=True))
    letter = "ABCD"[record["answer"]]
    text = re.sub(r"\s+", " ", record["question"] + choices)
    return {"text": text, "letter": letter, "solution": f" \\boxed{{{letter}}}"}


def hotpot_texts(record: dict[str, Any]) -> dict[str, str]:
    pairs = zip(record["context"]["title"], record["context"]["sentences"], strict=True)
    return {title: f"{title}\n{''.join(sentences)}" for title, sentences in pairs}


def hotpot_question(record: dict[str, Any]) -> dict[str, Any]:
    supporting, found = record["supporting_facts"]["title"], hotpot_texts(record)
    right = [text for title, text in found.items() if title in supporting]
    wrong = [text for title, text in found.items() if title not in supporting]
    return {"question": str(record["question"]), "answer": str(record["answer"]), "right": right, "wrong": wrong}


class Maker:
    """Draws a task's samples one after the other."""

    def __init__(self, task: str, seed: int, data_dir: str | None):
        self.about = TASKS[task]
        self.kind, self.library = self.about["kind"], library(self.about["kind"], data_dir)
        self.seed, self.rng = SEED + seed, random.Random(SEED + seed)
        self.step = 10 if self.kind == "questions" else 5

    def number(self, digits: int = 7) -> str:
        return str(self.rng.randint(10 ** (digits - 1), 10**digits - 1))

    def make(self, index: int, size: int) -> tuple[str, list[str]]:
        """(prompt, answers) with a haystack of `size`."""
        if self.kind != "needles" and size > len(self.library.haystack):
            raise ValueError(
                f"RULER v2 needs {size} texts for its haystack, and there are {len(self.library.haystack)}"
            )
        return getattr(self, self.kind)(index, size)

    def needles(self, index: int, size: int) -> tuple[str, list[str]]:
        rng, values = self.rng, self.about["orders"]

        def line(key: str, value: str) -> str:
            return str(WORDING["needle"].format(key=key, value=value))

        def word() -> str:
            return texts.sorted_key_word(rng.randrange(texts.sorted_key_words()))

        key, answers = word(), [self.number(10) for _ in range(values)]
        hidden = [line(key, value) for value in answers]
        random.Random(self.seed).shuffle(hidden)
        if values == 1:
            lines = [line(word(), self.number(10)) for _ in range(size)]
        else:
            numbers = [self.number(10) for _ in range(size)]
            keys = [word() for _ in range(math.ceil(size / values))] * values
            lines = [line(other, number) for other, number in zip(keys, numbers)]
            rng.shuffle(lines)
        for place, one in zip(sorted(rng.sample(range(size), values), reverse=True), hidden):
            lines.insert(place, one)
        rng.sample(range(1), 1)  # which key is asked for: there is one
        template = WORDING["niah"]["one" if values == 1 else "several"]
        return template.format(needles="\n".join(lines), query=key), answers

    def questions(self, index: int, size: int) -> tuple[str, list[str]]:
        rng, about, haystack = self.rng, self.about, self.library.haystack
        chosen = [haystack[i] for i in rng.sample(range(len(haystack)), size)]
        orders = about["orders"] or 1
        numbers = [self.number() for _ in range(math.ceil((size + 1) / orders))] * orders
        rng.shuffle(numbers)
        shown = [{**one, "i": number} for one, number in zip(chosen, numbers)]
        rng.shuffle(shown)
        examples = rng.sample(shown, about["shots"])
        asked = {**self.library.asked[index], "i": numbers[size]}
        shown.insert(rng.randint(0, size), asked)
        seen: Counter[str] = Counter()
        for one in shown:
            seen[one["i"]] += 1
            one["order"] = f"{ORDINALS[seen[one['i']] - 1]} (1 indexed) " if about["orders"] else ""
        golds = {"text": [asked["text"]], "letter": [asked["letter"]],
                 "texts": [one["text"] for one in shown if one["i"] == asked["i"]]}  # fmt: skip
        problem = ""
        if examples:
            pattern = about["problem"] + about["example"]
            problem = WORDING["examples"].format(examples="\n\n".join(pattern.format(**one) for one in examples))
        return self.prompt("question", shown, problem + about["problem"].format(**asked)), golds[about["gold"]]

    def documents(self, index: int, size: int) -> tuple[str, list[str]]:
        rng, asked, haystack = self.rng, self.library.asked[index], self.library.haystack
        right, wrong = ([{"text": text, "i": self.number()} for text in asked[side]] for side in ("right", "wrong"))
        shown = [{"text": haystack[i]} for i in rng.sample(range(len(haystack)), size)]
        shown = [{**one, "i": self.number()} for one in shown] + right + wrong
        rng.shuffle(shown)
        golds = {"first": [right[0]["i"]], "indices": [one["i"] for one in right], "answer": [asked["answer"]]}
        problem = self.about["problem"].format(text=right[0]["text"], question=asked["question"])
        return self.prompt("document", shown, problem), golds[self.about["gold"]]

    def prompt(self, kind: str, shown: Sequence[Mapping[str, Any]], problem: str) -> str:
        listed = "\n\n".join(WORDING[kind].format(**one) for one in shown)
        return f"{WORDING['contexts'][self.about['context']].format(needles=listed)}\n\n{problem}"


def samples(
    task: str, count: Callable[[str], int], length: int, n: int, seed: int = 0, data_dir: str | None = None
) -> list[tuple[str, list[str]]]:
    """(prompt, answers) of n samples, each of `length` tokens at most as `count` counts a text's. Raises ValueError for
    a length that not even the smallest haystack fits, and what `library` raises.
    """
    maker = Maker(task, seed, data_dir)

    def measure(made: tuple[str, list[str]]) -> int:
        return count(made[0])

    def first(size: int) -> tuple[str, list[str]]:
        return maker.make(0, size)

    most = most_expected(length, maker.step, measure(first(maker.step)))
    size = searched(first, measure, length, maker.step, most)
    indices: Sequence[int] = range(n)
    if maker.kind == "questions":
        indices = maker.rng.sample(range(known := len(maker.library.asked)), min(known, n))
    elif maker.kind == "documents":
        indices = range(min(n, len(maker.library.asked)))
    made = []
    for index in indices:
        own = size
        for _ in range(TRIES + size // maker.step):
            if measure(one := maker.make(index, own)) <= length:
                made.append(one)
                break
            own -= maker.step if own > maker.step else 0
        else:
            raise ValueError(f"length must hold a prompt of {task} with {maker.step} texts: {length}")
    return made


def score(task: str, answer: str, outputs: Sequence[str]) -> float:
    """In [0, 1]: of each text sought whether it occurs, or one less the word error rate if that is more."""
    match = TASKS[task]["match"]
    if match == "letter":
        return float(letter(answer) == outputs[0])
    text = answer.split("</think>")[-1].split("Answer:")[-1]
    if match == "2steps":
        text = text.split("\n\n")[-1]
    if match == "part":
        text = re.sub(r"Document \d+:(?:.*\n)+?\n", "", text)
    found = [closeness(text.lower(), sought.lower()) for sought in outputs]
    return max(found) if match == "part" else sum(found) / len(found)


def closeness(text: str, sought: str) -> float:
    from nltk import edit_distance

    if sought in text:
        return 1.0
    words, wanted = text.split(), sought.split()
    if len(words) >= 2 * len(wanted):  # at least as many insertions as there are words: none is left
        return 0.0
    return max(0.0, 1 - edit_distance(words, wanted) / len(wanted))


def letter(answer: str) -> str | None:
    """The letter in the last box, else behind the last "Answer:"."""
    begun, depth, boxed = answer.rfind("\\boxed"), 0, None
    for place in range(max(begun, 0), len(answer) if begun >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(answer[place], 0)
        if answer[place] == "}" and depth == 0:
            whole = answer[begun : place + 1]
            boxed = whole[7:-1] if whole.startswith("\\boxed{") else None
            break
    if boxed is None:
        found = re.findall(r"(?i)[\*\_]{0,2}Answer[\*\_]{0,2}\s*:[\s\*\_]{0,2}\s*([A-Z])(?![a-zA-Z0-9])", answer)
        return found[-1].strip() if found else None
    letters = re.findall(r"\b[A-J]\b(?!.*\b[A-J]\b)", boxed, re.DOTALL) if len(boxed) != 1 else []
    return letters[-1] if letters else boxed
