"""Names as printed: tasks, methods, and which rows of results carry the same experiment as a row of the paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import yaml

#: The paper's column heads and sets, by part (data/names.yaml says what each is).
NAMES = yaml.safe_load(Path(__file__).with_name("data").joinpath("names.yaml").read_text(encoding="utf-8"))
RULER, TASKS, SCALINGS, QUESTIONS = NAMES["ruler"], NAMES["tasks"], NAMES["scalings"], NAMES["questions"]
LONGBENCH, LONGBENCH_ZH, CATEGORIES = NAMES["longbench"], NAMES["longbench_zh"], NAMES["categories"]
TASK_GROUPS = NAMES["task_groups"]
SAID_BY = {"paper": "the paper", "prototypes": "our prototypes", "theory": "the theory", "aim": "our aim"}
SHORT = ("mmlu", "gsm8k", "hellaswag", "humaneval")
#: The tasks of each suite that averages are taken over.
SUITE_TASKS = {
    "ruler": tuple(TASKS),
    "longbench": tuple(name for names in LONGBENCH.values() for name in names),
    "short": SHORT,
}
CUE_WEIGHT = 0.1  # loss weight of an end prompt whose words are fixed, where rows do not say
#: Pieces of a context and tokens of a quotation that a lab's labels do not tell, because most arms have them.
PIECES, SPAN = 3, 40
#: Schemes whose name in the rows is not their name in a picture.
SCHEMES = {"full": "full length", "longlora": "LongLoRA"}


class Method(NamedTuple):
    """A method as its rows name it: `base`, or scheme, prompt kind and scaling joined by `+`. conditions: what tells
    two runs of one method apart (data.distinguish), as `steps=300`."""

    scheme: str
    prompt: str
    scaling: str
    conditions: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        scaling = SCALINGS.get(self.scaling, self.scaling)
        if self.scheme == "base":
            first, scaling = "base", scaling or "unextended"
        elif self.prompt == "recall":
            first = self.arm
        else:
            first = " ".join(part for part in (SCHEMES.get(self.scheme, self.scheme), self.prompt) if part)
        return ", ".join(part for part in (first, scaling, *(c.replace("=", " ") for c in self.conditions)) if part)

    @property
    def arm(self) -> str:
        """What is drawn in one colour: the scheme, or `recall` where the prompt is copied from the context."""
        if self.prompt == "recall":
            return "recall" if self.scheme == "endprompt" else f"{self.scheme} recall"
        return "anchors" if re.fullmatch(r"anchors\d+", self.scheme) else self.scheme  # their number is in the name


def parse_method(method: str) -> Method:
    name, *conditions = method.split("@")
    parts = name.split("+")
    scaling = parts.pop() if parts[-1] in SCALINGS and len(parts) > 1 else ""
    return Method(parts[0], " ".join(parts[1:]), scaling, tuple(conditions))


def short_length(length: float) -> str:
    """4096 -> 4K, 65536 -> 64K, 256 -> 256."""
    length = int(length)
    return f"{length // 1024}K" if length >= 4096 and length % 1024 == 0 else f"{length}"
