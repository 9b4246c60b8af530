"""LongBench v2: 503 questions with four choices each, from documents to prompts, and from answers to scores.

Bai et al. 2024, arXiv:2412.15204; prompt, cut and reading of answers as in the benchmark's own repository
(THUDM/LongBench, `pred.py` of 2e00731). lm-eval's task file has the prompt with another end; it is known by its hash.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import originals
from benchmarks.longbench.prompts import Fit, Prompter, lm_eval_folder
from benchmarks.longbench.sets import OPTION, Documents, is_unicode, placed
from endprompt.files import check_fetched, parse_json, read_json_lines, read_parquet, read_text, remembered_sha256

GENERATOR = "longbench-v2-1"
TASK = "longbench-v2"
QUESTIONS = 503
NEW_TOKENS = 128
PROMPT_SHA256 = "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950"  # of prompts/0shot.txt
ENDING = 'Format your response as follows: "The correct answer is (insert answer here)".'
CHOICES = ("A", "B", "C", "D")
#: Groups of questions that the benchmark's table has: a field and its values.
GROUPS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}
FIELDS = ("_id", "domain", "sub_domain", "question", "context", *(f"choice_{letter}" for letter in CHOICES))
NAMES = ("longbench_v2.jsonl", "longbench_v2.json", "data.json", "longbench_v2.parquet")
ANSWERS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


@cache
def prompt_template() -> str:
    """The published prompt with $DOC$, $Q$ and $C_A$ to $C_D$ as places. Raises ValueError if lm-eval's is unknown."""
    import yaml

    path = lm_eval_folder() / "tasks" / "longbench2" / "_longbench_common_yaml"
    if not path.is_file():
        raise FileNotFoundError(f"LongBench v2's prompt is read from lm-eval's task file, missing: {path}")
    text = yaml.safe_load(path.read_text(encoding="utf-8"))["doc_to_text"]
    places = {"{{context}}": "$DOC$", "{{question.strip()}}": "$Q$"}
    places |= {f"{{{{choices[{i}]}}}}": f"$C_{letter}$" for i, letter in enumerate(CHOICES)}
    for place, name in places.items():
        text = text.replace(place, name)
    text = text.removesuffix("Answer:") + ENDING
    if hashlib.sha256(text.encode()).hexdigest() != PROMPT_SHA256:
        raise ValueError(f"the prompt of LongBench v2 made from lm-eval's task file is not the published one: {path}")
    return text


def prompt_text(item: Mapping[str, Any]) -> str:
    """The whole prompt of a question. Places are filled one after the other, as the benchmark does."""
    text = prompt_template().replace("$DOC$", item["context"].strip()).replace("$Q$", item["question"].strip())
    for letter in CHOICES:
        text = text.replace(f"$C_{letter}$", item[f"choice_{letter}"].strip())
    return text


def load_documents(data_dir: str | Path | None) -> Documents:
    """The questions in the folder. FileNotFoundError says where to get them, ValueError which is not as published."""
    if data_dir is None:
        brings = originals.command(TASK, None)
        raise FileNotFoundError(
            f"LongBench v2's data are needed: give their folder with {OPTION}; {brings} brings them"
        )
    path = next((found for name in NAMES if (found := Path(data_dir) / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"LongBench v2 is missing in {data_dir}: none of {', '.join(NAMES)}; {originals.command(TASK, data_dir)} "
            f"brings it"
        )
    check_fetched(path)
    originals.say_version(TASK, path)
    if path.suffix == ".json":
        listed = parse_json(read_text(path), str(path))
        if not isinstance(listed, list):
            raise ValueError(f"{path}: must be a list of questions: {type(listed).__name__}")
        records = placed(path, "question", enumerate(listed, 1))
    else:
        reader = read_parquet if path.suffix == ".parquet" else read_json_lines
        records = placed(path, "row" if path.suffix == ".parquet" else "line", reader(path))
    items, known = [], set()
    for where, item in records:
        items.append(check_question(item, where))
        if item["_id"] in known:
            raise ValueError(f"{where}: a question of this _id stands before: {item['_id']!r}")
        known.add(item["_id"])
    if not items:
        raise ValueError(f"{path}: holds no question")
    return Documents(TASK, items, {path.name: remembered_sha256(path)})


def check_question(item: Any, where: str) -> dict[str, Any]:
    allowed = {**GROUPS, "answer": CHOICES}
    for key in (*FIELDS, *allowed):
        value = item.get(key) if isinstance(item, dict) else None
        if not isinstance(value, str) or not is_unicode(value):
            raise ValueError(f"{where}: {key} must be text, got {type(value).__name__}")
        if key in allowed and value not in allowed[key]:
            raise ValueError(f"{where}: {key} must be one of {', '.join(allowed[key])}: {value!r}")
    return dict(item)


@dataclass(frozen=True)
class QuestionPrompter(Prompter):
    """Makes the prompts. `prompt_length`: the published tables have 120000."""

    chats = True
    prompt_sha256 = PROMPT_SHA256

    @property
    def new_tokens(self) -> int:
        return NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def text(self, item: Mapping[str, Any]) -> str:
        return prompt_text(item)

    def cut(self, tokens: Sequence[int], limit: int) -> str:
        """The ends are decoded as one; of an odd limit the second one has a token more."""
        kept = [*tokens[: limit // 2], *tokens[-limit // 2 :]]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def samples(self, items: Sequence[Mapping[str, Any]], fits: Sequence[Fit]) -> list[dict[str, Any]]:
        return [
            {
                "input": self.wrap(fit.text),
                "outputs": [item["answer"]],
                "length": fit.tokens,
                "max_new_tokens": self.new_tokens,
                "truncated": fit.truncated,
                "index": index,
                "id": item["_id"],
                "domain": item["domain"],
                "groups": [item[field] for field in GROUPS],
            }
            for index, (item, fit) in enumerate(zip(items, fits, strict=True))
        ]


def chosen(answer: str) -> str | None:
    """The letter that an answer names in the words that the prompt asks for."""
    text = answer.strip().replace("*", "")
    return next((found[1] for pattern in ANSWERS if (found := pattern.search(text))), None)


def score(sample: Mapping[str, Any], answer: str) -> float:
    return float(chosen(answer) == sample["outputs"][0])


def compensated(sample: Mapping[str, Any], answer: str) -> float:
    """The benchmark's other reading: an answer that names no letter counts as a guess."""
    return 0.25 if chosen(answer) is None else score(sample, answer)
