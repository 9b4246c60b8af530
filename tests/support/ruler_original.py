"""Samples by RULER's own generator: makes, or checks, the digests in tests/benchmarks/ruler/ruler_golden.json.

    python -m tests.support.ruler_original CLONE EDITION --data DIR --tokenizers DIR --lengths 8192 [--tasks vt cwe]

CLONE: https://github.com/NVIDIA/RULER at the edition's commit. Its scripts are run as they are, with the arguments that
its prepare.py gives them. For `2024` and `2025-ruler` they draw and size by themselves. The edition `2025` draws by
itself: there RULER's functions are given what stands in a prompt of ours instead of random numbers (keys, values,
words, names, documents, places, orders, sizes) and must make that prompt and its answers of it. They are given only
what they could have drawn: entries of their lists, and the same things in another order.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import importlib.util
import itertools
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import types
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import ruler
from benchmarks.ruler import texts
from benchmarks.ruler.cell import samples_sha256
from endprompt.model import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "benchmarks" / "ruler" / "ruler_golden.json"
PATIENCE = 300  # seconds after which a generator that does not end is given up


def load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Original:
    """The scripts of a clone, with data files of ours beside them."""

    def __init__(self, clone: Path, data: Path | None):
        self.folder = Path(tempfile.mkdtemp()) / "data"
        shutil.copytree(clone / "scripts" / "data", self.folder)
        self.tasks = yaml.safe_load((clone / "scripts" / "synthetic.yaml").read_text())
        words = self.folder / "synthetic" / "json" / "english_words.json"
        words.write_text("{}")  # a Git LFS pointer in most clones; only the longest lists need it
        for file in data.glob("*.json") if data else ():
            shutil.copy(file, words.parent)
        sys.path[:0] = [str(self.folder), str(self.folder / "synthetic")]
        # The commit of 2024 imports two functions of NeMo's, which are replaced below.
        parts = ["nemo", "collections", "asr", "parts", "utils", "manifest_utils"]
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            sys.modules[name] = types.ModuleType(name)
        sys.modules[name].read_manifest = sys.modules[name].write_manifest = None  # type: ignore[attr-defined]

    def script(self, task: str, length: int, n: int, seed: int, tokenizer: Path, template: str = "base") -> Any:
        """A task's script as a module that has read its arguments."""
        kind = self.tasks[task]["task"]
        spec = self.tasks[task] | load(self.folder / "synthetic" / "constants.py", "constants").TASKS[kind]
        wrapped = load(self.folder / "template.py", "template").Templates[template]
        given = {
            "save_dir": self.folder,
            "save_name": task,
            "tokenizer_path": tokenizer,
            "tokenizer_type": "hf",
            "max_seq_length": length,
            "tokens_to_generate": spec["tokens_to_generate"],
            "num_samples": n,
            "random_seed": seed,
            **spec["args"],
            "template": wrapped.format(task_template=spec["template"]) + spec["answer_prefix"],
        }
        sys.argv = [kind, *(part for key, value in given.items() for part in (f"--{key}", str(value)))]
        return load(self.folder / "synthetic" / f"{kind}.py", kind)


def by_its_own_draws(script: Any) -> list[tuple[str, list[str]]]:
    """(prompt, answers) of a script's samples."""
    rows: list[dict[str, Any]] = []
    script.write_manifest = lambda path, made: rows.extend(made)
    script.main()
    return [(row["input"] + row.get("answer_prefix", ""), row["outputs"]) for row in rows]


class Given:
    """Stands in for Python's `random` and NumPy's: what is drawn next, of each kind. Until `on` it draws at random."""

    def __init__(self, on: bool = True, **of: Any):
        self.of, self.on, self.random = {kind: list(values) for kind, values in of.items()}, on, self

    def next(self, kind: str) -> Any:
        return self.of[kind].pop(0)

    def randint(self, low: int, high: int) -> int:
        value = int(self.next("numbers")) if self.on else low
        assert low <= value <= high
        return value

    def choice(self, words: list[str]) -> str:
        word = self.next("words")
        assert words[bisect.bisect_left(words, word)] == word, f"not in RULER's list: {word}"
        return word

    def getrandbits(self, bits: int) -> int:
        return uuid.UUID(self.next("uuids")).int

    def choices(self, letters: str, k: int) -> list[str]:
        name = self.next("names") if self.on else random.choices(letters, k=k)
        assert len(name) == k and set(name) <= set(letters)
        return list(name)

    def sample(self, items: Any, k: int) -> list[Any]:
        chosen = list(self.next("samples")) if self.on else random.sample(items, k)
        assert len(chosen) == k and not Counter(chosen) - Counter(items), "no sample of what RULER draws from"
        return chosen

    def Random(self, seed: int) -> Given:
        return self

    def shuffle(self, items: list[Any]) -> None:
        order = self.next("orders")
        assert Counter(order) == Counter(items), "RULER has other things to shuffle"
        items[:] = order


def needles(script: Any, sample: dict[str, Any], draft: Any, state: Any) -> tuple[str, list[str]]:
    spec, needle = ruler.SPECS[sample["task"]], texts.needle()
    _, *lines, question = sample["input"].split("\n")
    pattern = re.escape(needle.format(type_needle_v=spec.value, key="KEY", value="VALUE"))
    found = re.findall(pattern.replace("KEY", r"(.+?)").replace("VALUE", r"(\S+)"), "\n".join(lines))
    asked = re.search(r" for (.+?) mentioned", question)[1].replace(", and ", ", ").split(", ")  # type: ignore[index]
    own = [pair for pair in found if pair[0] in asked] if spec.haystack == "needle" else found
    keys = list(dict.fromkeys([*asked, *(key for key, _ in own)]))
    given: dict[str, list[Any]] = {kind: [] for kind in ("words", "numbers", "uuids")}
    for key in keys:
        given[spec.key].append(key)
        given[spec.value] += sample["outputs"] if asked == [key] else [dict(own)[key]]
    sentences = [needle.format(type_needle_v=spec.value, key=key, value=value) for key, value in own]
    if spec.haystack == "essay":
        essay, size = draft.made.essay, state
        ends = [essay.sentence_end(i, size) for i in range(essay.sentences(size) + 1)]
        split = [essay.text(a, b) for a, b in itertools.pairwise(ends)]  # by punctuation, as the edition splits them

        def sent_tokenize(text: str) -> list[str]:
            assert text == " ".join(split)
            return split

        script.sent_tokenize, places = sent_tokenize, draft.depths
    else:
        at = [i for i, line in enumerate(lines) if line in sentences]
        places, size = [place - i for i, place in enumerate(at)], len(lines) - len(at)
        sentences.reverse()  # RULER puts the first one in the hindmost place
        if spec.haystack == "needle":
            for key, value in (pair for pair in found if pair not in own):
                given[spec.key].append(key)
                given[spec.value].append(value)
    script.random = Given(**given, samples=[places, range(len(asked))], orders=[sentences])
    return script.generate_input_output(size)


def chains(script: Any, sample: dict[str, Any], draft: Any, state: Any) -> tuple[str, list[str]]:
    """Through RULER's whole loop, which puts the worked example in front: it is told sizes instead of tokens."""
    noise = "".join(texts.noise())
    drawn = []
    for part in sample["input"].split("\nQuestion: ")[:2]:
        lines = part.rsplit("text.\n\n", 1)[1].split("\n")
        at = [i for i, line in enumerate(lines) if line != noise]
        names = [lines[i].split(" = ")[0].removeprefix("VAR ") for i in at]
        drawn.append(
            (names, lines[at[0]].split(" = ")[1], [place - i for i, place in enumerate(at)], len(lines) - len(at))
        )
    (shown, number, places, size), (names, value, own_places, own_size) = drawn
    script.random = Given(names=shown, samples=[places])
    text, outputs = script.generate_input_output(size, 1, len(shown) - 1, is_icl=True)
    draws = Given(on=False, names=[*names, *shown], numbers=[value, number], samples=[own_places])
    script.random, script.np = draws, draws

    def each(samples: range) -> range:
        draws.on = True
        return samples

    script.tqdm = each
    script.TOKENIZER = types.SimpleNamespace(text_to_tokens=lambda text: range(text.count(noise)))
    script.args.tokens_to_generate = 0
    rows = script.sys_vartrack_w_noise_random(
        1, own_size + size, num_hops=len(shown) - 1, icl_example={"input": text, "outputs": outputs}, final_output=True
    )
    return rows[0]["input"] + rows[0]["answer_prefix"], rows[0]["outputs"]


def words_of(numbered: str) -> list[str]:
    return [part.split(". ", 1)[1] for part in re.split(r" (?=\d+\. )", numbered)]


def common_words(script: Any, sample: dict[str, Any], draft: Any, state: Any) -> tuple[str, list[str]]:
    shown, listed = map(words_of, re.findall(r"^(1\. .*)$", sample["input"], re.M)[:2])
    answer = re.search(r"in the list are: (1\. .*)\n", sample["input"])[1]  # type: ignore[index]
    commons = [words_of(answer), sample["outputs"]]
    chosen = [[*common, *(set(words) - set(common))] for common, words in zip(commons, (shown, listed))]
    script.random = Given(samples=chosen, orders=[shown, listed])
    return script.generate_input_output(len(chosen[1]))


def frequent_words(script: Any, sample: dict[str, Any], draft: Any, state: Any) -> tuple[str, list[str]]:
    listed = re.search(r"coded words\. (.*)\nQ", sample["input"])[1].split(" ")  # type: ignore[index]
    words = [draft.made.pool[i] for i in draft.chosen]
    script.random = Given(names=words, orders=[words, listed, listed])
    size = (sample["budget"] - sample["max_new_tokens"]) // 50
    return script.generate_input_output(10**9, num_words=state, vocab_size=size)[:2]


def documents(script: Any, sample: dict[str, Any], draft: Any, state: Any) -> tuple[str, list[str]]:
    blocks = re.split(r"\n\n(?=Document \d+:\n|Answer the question based)", sample["input"])[1:-1]
    chosen = [block.split(":\n", 1)[1] for block in blocks]
    index = {text: i for i, text in enumerate(script.DOCS)}
    question = script.QAS[sample["index"]]
    own, related = question["context"], set(question.get("more_context", ()))
    others = [index[text] for text in chosen if index[text] not in own]
    if len(others) > len(related):
        others = [i for i in others if i not in related]
    script.random = Given(samples=[others], orders=[chosen])
    return script.generate_input_output(sample["index"], len(chosen))


MAKERS = {"niah": needles, "vt": chains, "cwe": common_words, "fwe": frequent_words, "qa": documents}


def by_our_draws(script: Any, cell: ruler.Cell) -> list[tuple[str, list[str]]]:
    made = []
    for i, sample in enumerate(cell):
        maker, source = MAKERS[ruler.SPECS[sample["task"]].family], cell._source
        made.append(maker(script, sample, source.draw(i), cell.recipe["samples"][i][0]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", type=Path)
    parser.add_argument("edition", choices=("2024", "2025-ruler", "2025"))
    parser.add_argument("--data", type=Path, help="folder with RULER's data files")
    parser.add_argument("--data-name", default="real")
    parser.add_argument("--tokenizers", type=Path, nargs="+", required=True)
    parser.add_argument("--tasks", nargs="+", default=ruler.TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, required=True)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--template", default="base")
    args = parser.parse_args()
    original = Original(args.clone, args.data)
    signal.signal(signal.SIGALRM, give_up)
    for task in args.tasks:
        script = None
        for folder, length in itertools.product(args.tokenizers, args.lengths):
            row = {
                "edition": args.edition, "data": args.data_name, "task": task, "length": length,
                "template": args.template, "random_seed": args.seed, "tokenizer": folder.name,
            }  # fmt: skip
            shape = (task, length, args.samples, args.seed)
            script = script or original.script(*shape, folder, args.template)
            # A script reads its arguments once and takes its time to: what differs is set as it would read it.
            script.args.max_seq_length, script.TOKENIZER = length, script.select_tokenizer("hf", str(folder))
            random.seed(args.seed)
            np.random.seed(args.seed)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 0.01)
            try:
                if args.edition == "2025":
                    cell = ruler.Cell.build(
                        task, length, load_tokenizer(folder), args.samples, args.seed - 42, args.data
                    )
                    made = by_our_draws(script, cell)
                else:
                    with contextlib.redirect_stdout(sys.stderr):  # the scripts of 2024 print every step
                        made = by_its_own_draws(script)
                row["sha256"] = [digest(prompt, outputs) for prompt, outputs in made]
            except (ValueError, TimeoutError, AssertionError) as error:  # too short; no end; other documents
                row["none"] = str(error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(row), flush=True)


def give_up(number: int, frame: Any) -> None:
    """Again and again: RULER catches every exception while it draws."""
    if frame.f_code.co_filename != __file__:
        raise TimeoutError(f"no end in {PATIENCE} seconds")


def digest(prompt: str, outputs: list[str]) -> str:
    return samples_sha256([{"input": prompt, "outputs": list(dict.fromkeys(outputs))}])[:16]


if __name__ == "__main__":
    main()
