"""Needle sets in NoLiMa's layout in `endprompt score`: the user's own, since NoLiMa's texts are not free.

A set is a JSON list of needles, each with `id`, `needle`, `questions` by kind, `tests` by name with their `input_args`
(which stand for {1}, {2} ... in needle and questions), and `character_set`, of which one stands for {CHAR} and is the
answer, or `gold_answers` of each test. `task_template` has the places {haystack} and {question}. Haystacks are texts.
A needle stands on a line of its own at 26 depths; an answer counts if one of the right ones occurs in it.
Modarressi et al. 2025, arXiv:2502.05167; rules as in adobe-research/NoLiMa at 7532e4e.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scoring.evaluate import MeanSuite
from benchmarks.scoring.units import Asker, Unit, asked
from endprompt.files import parse_json, read_text, remembered_sha256
from endprompt.text import Reader

SET, HAYSTACKS = "needle_set.json", "haystack"
DEPTHS, NEW_TOKENS, SEED = 26, 192, 42
TEMPLATE = "{haystack}\n\nAnswer the question from the text above, with the name alone.\n\nQuestion: {question}"


class NoLiMa(MeanSuite):
    generator = "nolima-1"

    def units(self, asker: Asker) -> list[Unit]:
        """A cell for each kind of question and length. Raises ValueError for sets and haystacks that do not fit."""
        config, folder = self.config, Path(self.config.data_dir or "")
        new = config.max_new_tokens or NEW_TOKENS
        path, books = folder / SET, sorted((folder / HAYSTACKS).glob("*.txt"))
        if config.data_dir is None or not path.is_file() or not books:
            raise ValueError(f"suite nolima needs --data-dir with {SET} and {HAYSTACKS}/*.txt: {config.data_dir}")
        asker.check_room(max(config.length_list), new)
        tests = list(tests_of(path))
        names = asker.names([*dict.fromkeys(test["kind"] for test in tests)])
        read = [Haystack(book, asker.reader) for book in books]
        columns: dict[str, Any] = {"data_sha256": {one.name: remembered_sha256(one) for one in (path, *books)}}
        made = []
        for length in config.length_list:
            for kind in names:
                cases = [case for seed, book in enumerate(read) for test in tests if test["kind"] == kind
                         for case in placed(test, book, length, SEED + config.seed + seed)]  # fmt: skip
                own = cases[: config.limit]
                samples = [asker.sample(asked(c["text"]), c["outputs"], new, depth=c["depth"]) for c in own]
                made.append(asker.unit(kind, length, "contains", samples, contains, self.generator, **columns))
        return made


def tests_of(path: Path) -> Iterator[dict[str, Any]]:
    """Each test of each question of a set: kind, needle, question, answers (or characters), template, seed."""
    listed = parse_json(read_text(path), str(path))
    for number, entry in enumerate(listed if isinstance(listed, list) else [listed], 1):
        where = f"{path}, needle {number}"
        try:
            for kind, question in entry["questions"].items():
                for test in entry["tests"].values():
                    words, needle = question, entry["needle"]
                    for place, argument in enumerate(test["input_args"], 1):
                        words, needle = (text.replace(f"{{{place}}}", argument) for text in (words, needle))
                    answers = test.get("gold_answers") or []
                    found = {"kind": kind, "needle": needle, "question": words, "answers": answers}
                    found |= {"characters": entry.get("character_set") or [], "seed": int(entry["id"][:4])}
                    found["template"] = entry.get("task_template", TEMPLATE)
                    if not (answers or ("{CHAR}" in needle and found["characters"])):
                        raise ValueError("needs gold_answers, or {CHAR} in the needle and a character_set")
                    if not all(f"{{{name}}}" in found["template"] for name in ("haystack", "question")):
                        raise ValueError("task_template must have the places {haystack} and {question}")
                    yield found
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}: not in NoLiMa's layout: {error!r}") from None


class Haystack:
    """A text as tokens, and the places behind which a line ends."""

    def __init__(self, path: Path, reader: Reader):
        self.path, self.reader = path, reader
        (self.ids,) = reader.ids([read_text(path)])
        pieces = [reader.decode([token]) for token in self.ids]
        self.ends = np.array([0, *(place for place, piece in enumerate(pieces) if "\n" in piece)])

    def text(self, needle: str, length: int, depth: float) -> str:
        """`length` tokens with the needle on a line of its own, at the first line's end from `depth` (0 to 1) on."""
        ahead = self.ends / (length + 1) - depth
        end = int(self.ends[np.argmin(np.where(ahead < 0, np.inf, ahead))])
        first = end - round(length * depth)
        if ahead.max() < 0 or first < 0 or first + length > len(self.ids):
            raise ValueError(f"{self.path}: must hold {length} tokens around a line's end at depth {depth:.2f}")
        before = self.reader.decode(self.ids[first : end + 1])
        before = before[: max(before.rfind("\n"), 0)]
        return f"{before} {needle}\n{self.reader.decode(self.ids[end + 1 : first + length])}"


def placed(test: Mapping[str, Any], book: Haystack, length: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.RandomState(seed + test["seed"])
    for depth in np.linspace(0, 100, DEPTHS) / 100:
        needle, question, answers = test["needle"], test["question"], test["answers"]
        if "{CHAR}" in needle:
            chosen = str(rng.choice(test["characters"]))
            needle, question, answers = needle.replace("{CHAR}", chosen), question.replace("{CHAR}", chosen), [chosen]
        text = book.text(needle, length, float(depth))
        filled = test["template"].format(haystack=text, question=question)
        yield {"text": filled, "outputs": answers, "depth": [round(100 * float(depth), 4)]}


def contains(sample: dict[str, Any], answer: str) -> float:
    return float(any(one in answer for one in sample["outputs"]))


SUITE = NoLiMa
