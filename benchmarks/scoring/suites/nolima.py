"""Needle sets in NoLiMa's layout in `endprompt score`: the user's own, since NoLiMa's texts are not free.

A set is a JSON list of needles, each with `id`, `needle`, `questions` by kind, `tests` by name with their `input_args`
(which stand for {1}, {2} ... in needle and questions), and `character_set`, of which one stands for {CHAR} and is the
answer, or `gold_answers` of each test. `task_template` has the places {haystack} and {question}. Haystacks are texts.
A needle stands on a line of its own at 26 depths, and what `distractors` have for the kind of question a fifth of the
text or more away from it. An answer counts if one of the right ones occurs in it. The base score is the mean over 250,
500 and 1,000 tokens, and the effective length the longest that has 85% of it.
Modarressi et al. 2025, arXiv:2502.05167; rules as in adobe-research/NoLiMa at 7532e4e.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scoring.evaluate import MeanSuite
from benchmarks.scoring.units import Asker, Unit, asked, mean_rows
from benchmarks.summary import average, effective_length
from endprompt.files import parse_json, read_text, remembered_sha256
from endprompt.results import write_rows
from endprompt.runs import RunDirectory
from endprompt.text import Reader

SET, HAYSTACKS = "needle_set.json", "haystack"
DEPTHS, NEW_TOKENS, SEED = 26, 192, 42
BASE_LENGTHS, SHARE, FREE = (250, 500, 1000), 0.85, 0.2
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

    def summarise(self, out: RunDirectory, made: list[dict[str, Any]], units: list[Unit], settings: str) -> None:
        rows = mean_rows(self.config, made, settings)
        scores = {row["length"]: row["value"] for row in rows}
        if scores.keys() >= {*BASE_LENGTHS}:
            base = average({length: scores[length] for length in BASE_LENGTHS})
            found = {"base_score": base, "effective_length": effective_length(scores, SHARE * base)}
            rows += [{**rows[0], "length": None, "metric": name, "value": value} for name, value in found.items()]
        write_rows(out.path / "summary.jsonl", rows)


def tests_of(path: Path) -> Iterator[dict[str, Any]]:
    """Each test of each question of a set: kind, needle, question, answers (or characters), template, seed."""
    listed = parse_json(read_text(path), str(path))
    for number, entry in enumerate(listed if isinstance(listed, list) else [listed], 1):
        where = f"{path}, needle {number}"
        try:
            for kind, question in entry["questions"].items():
                for test in entry["tests"].values():
                    texts = [question, entry["needle"], entry.get("distractors", {}).get(kind, "")]
                    for place, argument in enumerate(test["input_args"], 1):
                        texts = [text.replace(f"{{{place}}}", argument) for text in texts]
                    (words, needle, distractor), answers = texts, test.get("gold_answers") or []
                    found = {"kind": kind, "needle": needle, "question": words, "answers": answers}
                    found |= {"characters": entry.get("character_set") or [], "seed": int(entry["id"][:4])}
                    found |= {"template": entry.get("task_template", TEMPLATE), "distractor": distractor}
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

    def distracted(self, text: str, distractor: str, length: int, depth: float, drawn: float) -> str:
        """The text with the distractor at a line's end. drawn: in [0, 1), where in what is free of the needle."""
        left, right = max(0.0, depth - 2 * FREE), max(0.0, 1 - (depth + 2 * FREE))
        place = drawn * (left + right)
        place = depth + FREE + place - left if place > left else place + FREE
        before, into = 50, 49
        if length < 500:  # as there: at one of three places, and one character before the line's end
            place = 0.7 if depth < 0.6 else 0.6 if depth > 0.75 else 0.5
            before, into = 25, 23
        alone = self.text(distractor, length, place)
        end = alone.index(distractor)
        words = alone[max(end - before, 0) : end - 1]
        if text.count(words) != 1:
            raise ValueError(f"{self.path}: the words before a distractor must stand in the text once: {words!r}")
        cut = text.index(words) + into
        return f"{text[:cut]} {distractor}\n{text[cut:]}"


def placed(test: Mapping[str, Any], book: Haystack, length: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.RandomState(seed + test["seed"])
    for depth in np.linspace(0, 100, DEPTHS) / 100:
        needle, question, answers = test["needle"], test["question"], test["answers"]
        if "{CHAR}" in needle:
            chosen = str(rng.choice(test["characters"]))
            needle, question, answers = needle.replace("{CHAR}", chosen), question.replace("{CHAR}", chosen), [chosen]
        text = book.text(needle, length, float(depth))
        if test["distractor"]:
            text = book.distracted(text, test["distractor"], length, float(depth), rng.uniform())
        filled = test["template"].format(haystack=text, question=question)
        yield {"text": filled, "outputs": answers, "depth": [round(100 * float(depth), 4)]}


def contains(sample: dict[str, Any], answer: str) -> float:
    return float(any(one in answer for one in sample["outputs"]))


SUITE = NoLiMa
