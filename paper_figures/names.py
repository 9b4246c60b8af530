"""Names as printed: tasks, methods, and which rows of results carry the same experiment as a row of the paper."""

from __future__ import annotations

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
SCALINGS = {
    "none": "no scaling",
    "linear": "PI",
    "ntk": "NTK",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "llama3": "Llama 3",
    "longrope": "LongRoPE",
}


class Method(NamedTuple):
    """A method as its rows name it: `base`, or scheme, prompt kind and scaling joined by `+`."""

    scheme: str
    prompt: str
    scaling: str

    @property
    def label(self) -> str:
        if self.scheme == "base":
            return "base, unextended" if not self.scaling else f"base, {SCALINGS.get(self.scaling, self.scaling)}"
        first = self.arm if self.prompt == "recall" else " ".join(part for part in (self.scheme, self.prompt) if part)
        return ", ".join(part for part in (first, SCALINGS.get(self.scaling, self.scaling)) if part)

    @property
    def arm(self) -> str:
        """What is drawn in one colour: the scheme, or `recall` where the prompt is copied from the context."""
        if self.prompt == "recall":
            return "recall" if self.scheme == "endprompt" else f"{self.scheme} recall"
        return self.scheme


def parse_method(method: str) -> Method:
    parts = method.split("+")
    scaling = parts.pop() if parts[-1] in SCALINGS else ""
    return Method(parts[0] if parts else "base", " ".join(parts[1:]), scaling)


def short_length(length: float) -> str:
    """4096 -> 4K, 65536 -> 64K, 256 -> 256."""
    length = int(length)
    return f"{length // 1024}K" if length >= 4096 and length % 1024 == 0 else f"{length}"
