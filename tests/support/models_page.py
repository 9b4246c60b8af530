"""docs/models.md from the rows of the sweep over families, which writes it.

`python -m tests.support.models_page` writes it again from rows that are there.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tests.support.families import NARROW, PAGE, ROWS

STEPS = {"extend": "extend", "score": "score", "verify": "verify", "plan": "plan"}

HEAD = """# Which models work

Every causal family of transformers {transformers}, {count} by their `model_type`, made tiny with random weights and
taken the whole way (torch {torch}, CPU). {rope} were tried, the others have no RoPE in their own config; {tried}
could be made tiny. Of these {extended} can be extended, {scored} scored, {verified} read by `verify` and {planned}
planned. Everything else is an error of one line, and these are below. The page is written from
`paper_figures/data/measured/pages/models.jsonl`; the sweep makes both again:

    python -m tests.support.families

What a yes means, each against transformers' own code on the same weights:

- **extend**: YaRN times 4, or the scaling that the family takes alone (none where the layers that see everything have
  no RoPE). The training loss at positions that jump over three quarters of the target is that of transformers' eager
  attention under a causal mask that is written out (for layers that know no such mask, one of ones), the gradient is
  finite, the export loads with the same logits and says the new window. "eager" is `--attention eager`.
- **score**: answers of prompts alone and in one batch are those of `generate()`, and `endprompt score` gives a row.
  "eager" is `--attn eager`; * marks families that transformers generates by itself, one prompt at a time, which is
  slower.
- **verify**: the score of query and key as RoPE's theory has it is the layer's own. With a fraction, so many layers
  have it, and the others, which turn nothing, are left out.
- **plan**: its count of parameters is the model's.

Random weights and four small layers show that the arithmetic is the same, not that an extension of such a model is any
good. Not tried: weights of real checkpoints but for one (below), families that bring code of their own. Two processes
are held to one on 13 families in the tests alone.

"""


WINDOWS = """\
The default config of these families has a sliding window or chunks, in tokens. `extend` masks such layers by
position, and refuses a target above the window where all layers have one.

{windows}.
"""
TRIED_NARROW = """\
With a window of {tokens} tokens, narrower than the prompts, {families} families were tried too: answers are
those of `generate()`. {extended} were extended: their training loss at jumped positions is that of transformers' own
row of the target's length, whose other places are masked. The others are refused:
"""


VLLM = """\
Tiny extended checkpoints of the same families, most with heads of 32, in vLLM {version}'s CPU build (float32,
transformers 5.19.0):
"yes" if the greedy answers to four prompts of 23 to 200 tokens are those of transformers, "wrapped" if they are by
vLLM's wrapper around transformers' code. So it was with {same} of the {tried} families that were tried; the others are
below. What is refused may be so for the CPU build, this older transformers, or sizes that no published checkpoint has.
`phi3` differs because it is extended by `longrope` here, and vLLM takes the long factors for every prompt of a run
beyond the original window (docs/scoring.md): with `--max-model-len 256` its four answers are the same. The other four
that differ do so without any extension, too, so it is not the export; do not serve them unexamined. The rows are
`pages/models_vllm.jsonl` beside the others: 42 of them by `tests/support/families_vllm.py`, the others by scripts of
which it was made. What `gemma4_text` and `gpt_oss` are refused for is their tiny config's own."""


def in_vllm() -> dict[str, dict[str, str]]:
    """{family: its row of vLLM}; what vLLM says is cut at its first sentence."""
    path = ROWS.with_name("models_vllm.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        own, wrapped = row["vllm"].endswith("ForCausalLM"), row["vllm"].startswith("Transformers")
        row["cell"] = ("wrapped" if wrapped else "yes") if own else "differs" if "answers" in row["vllm"] else "no"
        said = re.sub(r"^.*Value error, |\[type=.*$|\{.*", "", row["vllm"])
        row["vllm"] = re.split(r"(?<=\w)\. ", said)[0].strip()
        if row["cell"] == "differs":
            row["vllm"] = "not all of the four answers are the same"
    return {row["family"]: row for row in rows}


def cell(row: dict[str, Any], step: str) -> str:
    said = row.get(step, "")
    if step == "score" and not row.get("generate", "works").startswith("works"):
        said = row["generate"]
    if not said.startswith("works"):
        return "no" if said else ""
    if part := re.search(r"less (\d+) of (\d+)", said):
        return f"{int(part[2]) - int(part[1])} of {part[2]}"
    star = "\\*" if step == "score" and row.get("loop") != "own" else ""
    scaling = re.search(r"\b(longrope|linear|none)\b", said)
    return ("eager" if "eager" in said else "yes") + (f", {scaling[0]}" if scaling else "") + star


def reasons(rows: list[dict[str, Any]], steps: list[str]) -> list[str]:
    """One line a reason, with the families that have it; a family's own name and numbers do not tell reasons apart."""
    found: dict[str, tuple[str, list[str]]] = {}
    for row in rows:
        for step in steps:
            said = row.get(step, "works")
            if said.startswith("works"):
                continue
            text = said.removeprefix("refused: ").removeprefix("no: ").removeprefix(f"{row['family']}: ")
            key = re.sub(r"\d[\d,]*", "N", re.sub(rf"\b{re.escape(row['family'])}\b", "F", text))
            names = found.setdefault(key, (text, []))[1]
            if row["family"] not in names:
                names.append(row["family"])
    made = []
    for text, names in sorted(found.values(), key=lambda one: (-len(one[1]), one[1])):
        more = ", ".join(f"`{name}`" for name in names)
        made.append(f"- {more}: {plain(text)}")
    return made


MULTIMODAL = """\
Nothing of these was tried. Of multimodal checkpoints the text model is extended and put back (`docs/training.md`); that
is tested on Gemma 3, Mistral 3, Qwen2.5-VL and Qwen3-VL."""
PUBLISHED = (
    """\
18 layers of which every sixth attends to everything and the others slide over 512 tokens, window 32,768. The public
Q4_K_M file was dequantised, and its three full layers scaled by YaRN to 131,072; 9.96 million tokens of public-domain
books, method `endprompt` on rows of 32,768, rate 1e-4, one seed, 5.4 minutes of a shared H200. Held out are 8 rows of
other books a length; needles are RULER's `niah_single`, 16 samples a cell. The training was made once more with the
same settings, on texts and samples that are the same; it is not deterministic. The rows are
`paper_figures/data/measured/pages/gemma3_270m*.jsonl`.""",
    """\
Beyond its window the checkpoint as it is loses 0.6 nats. YaRN without training already holds the loss flat to
131,072, and costs 0.05 inside the window. Training lowers it by 0.16 to 0.19, at 131,072 by 0.15 in the first
sixteenth of a row and by 0.23 in the last. Some of that is what books do at any length (at 32,768 it ends 0.11 below
the checkpoint as it is), and no arm tells the two apart. The losses of the two trainings are alike to 0.001; their
needles of the first kind are not (88 and 31% at 32,768), so one training says little of it. At 131,072 the second kind
is found as often without training as with it. The third kind, a UUID, stays almost out of reach of a model of this
size. Its answers are often the continuation of a question and not an answer, since it is no instruct model. Cells that
are empty were not run.
""",
)


def plain(text: str) -> str:
    """A message as text of a page: nothing of it is a mark."""
    return re.sub(r"([*_<>|`\[\]])", r"\\\1", text)


#: What a line of the tables is called, of which files' rows it is, and of which method.
ARMS = {
    "the checkpoint as it is": (("gemma3_270m", "gemma3_270m_needles"), "base"),
    "YaRN times 4, untrained": (("gemma3_270m", "gemma3_270m_needles"), "untrained+yarn"),
    "YaRN times 4, trained": (("gemma3_270m",), "endprompt+EP_1+yarn"),
    "the same, trained once more": (("gemma3_270m_again",), "endprompt+EP_1+yarn"),
}


def published() -> list[str]:
    """The section on Gemma 3 270M; its numbers are those of the measured rows, with their marks."""
    found = {
        file: [json.loads(line) for line in (ROWS.parent / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
        for files, _ in ARMS.values()
        for file in files
    }

    def table(metric: str, columns: list[tuple[str, int, str]], decimals: int) -> list[str]:
        lines = []
        for name, (files, method) in ARMS.items():
            cells = []
            for task, length, more in columns:
                wanted = {"task": task, "length": str(length), "method": method, "part": more.removeprefix("part=")}
                cells.append("")
                for source, row in ((one, row) for one in files for row in found[one]):
                    if all(str(row.get(key, "")) == value for key, value in wanted.items()):
                        mark = " | ".join([source, task, metric, f"length={length}", f"method={method}", more])
                        cells[-1] = f"{row['value']:.{decimals}f}<!-- {mark.removesuffix(' | ')} -->"
            lines += ["| " + " | ".join([name, *cells]) + " |"] if any(cells) else []
        return lines

    lengths = (32_768, 65_536, 131_072)
    losses = [("held_out", length, "") for length in lengths] + [
        ("held_out_by_position", 131_072, f"part={part}") for part in (1, 16)
    ]
    needles = [(f"niah_single_{kind}", length, "") for kind in (1, 2, 3) for length in lengths]
    needles = [
        one for one in needles if any((r["task"], r["length"]) == one[:2] for rows in found.values() for r in rows)
    ]
    return [
        "",
        "## A published one: Gemma 3 270M",
        "",
        *PUBLISHED[0].splitlines(),
        "",
        "| held-out loss, nats a token | 32,768 | 65,536 | 131,072 | its first sixteenth | its last |",
        "|---|---|---|---|---|---|",
        *table("loss", losses, 3),
        "",
        "| needles found, % | " + " | ".join(f"{task[-1]}, {length:,}" for task, length, _ in needles) + " |",
        "|---" * (len(needles) + 1) + "|",
        *table("string_match_all", needles, 0),
        "",
        *PUBLISHED[1].splitlines(),
    ]


def page(rows: list[dict[str, Any]]) -> str:
    tried = [row for row in rows if row["built"] == "yes"]
    rope = [row for row in rows if row["built"] != "no: not tried"]
    good = {step: sum(cell(row, step) not in ("no", "") for row in tried) for step in STEPS}
    text = HEAD.format(
        **rows[0]["versions"],
        count=len(rows),
        rope=len(rope),
        tried=len(tried),
        extended=good["extend"],
        scored=good["score"],
        verified=good["verify"],
        planned=good["plan"],
    )
    served = in_vllm()
    lines = ["| family | extend | score | verify | plan | vLLM |", "|---|---|---|---|---|---|"]
    for row in tried:
        cells = [row["family"], *(cell(row, step) for step in STEPS), served.get(row["family"], {}).get("cell", "")]
        lines += ["| " + " | ".join(cells) + " |"]
    for title, steps, some in (
        ("Not extended", ["extend"], tried),
        ("Not scored", ["generate", "score"], tried),
        ("Not read by verify", ["verify"], tried),
        ("Not planned", ["plan"], tried),
    ):
        if made := reasons(some, steps):
            lines += ["", f"## {title}", "", *made]
    bad = [row for row in served.values() if row["cell"] in ("no", "differs")]
    counts = {"version": bad[0]["version"], "same": len(served) - len(bad), "tried": len(served)}
    lines += ["", "## In vLLM", "", VLLM.format(**counts), "", *reasons(bad, ["vllm"])]
    windows = [
        f"`{row['family']}` ({row.get('sliding_window') or row.get('attention_chunk_size'):,})"
        for row in tried
        if (row.get("sliding_window") or row.get("attention_chunk_size")) and cell(row, "extend") != "no"
    ]
    narrow = [row for row in tried if row.get("narrow", "").startswith("works")]
    extended = sum("extended too" in row["narrow"] for row in narrow)
    lines += published()
    lines += ["", "## Layers that see a window", "", WINDOWS.format(windows=", ".join(windows))]
    lines += [TRIED_NARROW.format(tokens=NARROW, families=len(narrow), extended=extended)]
    others = [row | {"narrow": row["narrow"].partition("not extended: ")[2] or "works"} for row in narrow]
    lines += reasons(others, ["narrow"])
    lines += ["", "## Not built", ""]
    lines += [
        "No tiny model of these could be made: transformers' words, or sizes that the sweep cannot shrink.",
        "",
    ]
    lines += reasons([row for row in rope if row["built"] != "yes"], ["built"])
    lines += ["", "## Families without RoPE of their own", "", MULTIMODAL, ""]
    lines += reasons([row for row in rows if row["built"] == "no: not tried"], ["extend"])
    return text + "\n".join(lines) + "\n"


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    PAGE.write_text(page(read_rows()), encoding="utf-8")
