"""Conversations as `messages` records, from two free sets: GSM8K (MIT) and the Schema-Guided Dialogues (CC BY-SA 4.0).

    python examples/conversations.py gsm8k grade_school_math/data/train.jsonl > gsm8k.jsonl
    python examples/conversations.py sgd dstc8-schema-guided-dialogue/train/dialogues_*.json > sgd.jsonl

The files are in the repositories openai/grade-school-math and google-research-datasets/dstc8-schema-guided-dialogue.
GSM8K's notes for a calculator, <<48/2=24>>, are left out, and its last line `#### 72` says that 72 is the answer.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROLES = {"USER": "user", "SYSTEM": "assistant"}


def gsm8k(path: Path) -> Iterator[list[dict[str, str]]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", record["answer"]).replace("#### ", "The answer is ") + "."
        yield [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": answer}]


def sgd(path: Path) -> Iterator[list[dict[str, str]]]:
    for dialogue in json.loads(path.read_text(encoding="utf-8")):
        yield [{"role": ROLES[turn["speaker"]], "content": turn["utterance"]} for turn in dialogue["turns"]]


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    for path in paths:
        for messages in {"gsm8k": gsm8k, "sgd": sgd}[kind](Path(path)):
            print(json.dumps({"messages": messages}, ensure_ascii=False))
