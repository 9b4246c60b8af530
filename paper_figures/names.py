"""Names as printed: tasks, methods, and which rows of results carry the same experiment as a row of the paper."""

from __future__ import annotations

import re
from typing import NamedTuple

#: The paper's column heads, and the task that each is in RULER.
RULER = {
    "niah_s1": "niah_single_1",
    "niah_s2": "niah_single_2",
    "niah_s3": "niah_single_3",
    "niah_m1": "niah_multikey_1",
    "niah_m2": "niah_multikey_2",
    "niah_m3": "niah_multikey_3",
    "niah_mv": "niah_multivalue",
    "niah_mq": "niah_multiquery",
    "vt": "vt",
    "cwe": "cwe",
    "fwe": "fwe",
    "qa_1": "qa_1",
    "qa_2": "qa_2",
}
TASKS = {
    "niah_single_1": "needle in noise",
    "niah_single_2": "needle in text",
    "niah_single_3": "needle in text (UUID)",
    "niah_multikey_1": "one of several keys",
    "niah_multikey_2": "one of many keys",
    "niah_multikey_3": "one of many UUIDs",
    "niah_multivalue": "several values",
    "niah_multiquery": "several queries",
    "vt": "variable tracking",
    "cwe": "common words",
    "fwe": "frequent words",
    "qa_1": "SQuAD",
    "qa_2": "HotpotQA",
}
#: LongBench's 16 English sets by category, as the paper averages them.
LONGBENCH = {
    "single_doc_qa": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi_doc_qa": ("hotpotqa", "2wikimqa", "musique"),
    "summarization": ("gov_report", "qmsum", "multi_news"),
    "few_shot": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_count", "passage_retrieval_en"),
    "code": ("lcc", "repobench-p"),
}
#: Its Chinese sets; there are none of code.
LONGBENCH_ZH = {
    "single_doc_qa": ("multifieldqa_zh",),
    "multi_doc_qa": ("dureader",),
    "summarization": ("vcsum",),
    "few_shot": ("lsht",),
    "synthetic": ("passage_retrieval_zh",),
}
#: Columns of Table 3 and the RULER tasks that each averages.
TASK_GROUPS = {
    "niah_single": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "niah_multikey": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "niah_multivalue": ("niah_multivalue",),
    "niah_multiquery": ("niah_multiquery",),
    "vt": ("vt",),
    "cwe": ("cwe",),
    "fwe": ("fwe",),
    "qa": ("qa_1", "qa_2"),
}
SHORT = ("mmlu", "gsm8k", "hellaswag", "humaneval")
#: The tasks of each suite that averages are taken over.
SUITE_TASKS = {
    "ruler": tuple(TASKS),
    "longbench": tuple(name for names in LONGBENCH.values() for name in names),
    "short": SHORT,
}
SCALINGS = {
    "none": "no scaling",
    "linear": "PI",
    "ntk": "NTK",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "llama3": "Llama 3",
    "longrope": "LongRoPE",
}


#: Schemes whose name in the rows is not their name in a picture.
SCHEMES = {"full": "full length", "longlora": "LongLoRA"}


class Method(NamedTuple):
    """A method as its rows name it: `base`, or scheme, prompt kind and scaling joined by `+`.

    conditions: what tells two runs of one method apart (data.distinguish), as `steps=300`.
    """

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
