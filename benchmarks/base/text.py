"""Training data of the project's own base model: text that every installation has, and synthetic documents.

`prepare` collects documentation, docstrings, comments and sources of the interpreter and of installed packages under
permissive licences, trains the tokenizer and writes everything that `build` needs into one folder:

    text.bin         uint16 token stream, documents ended by the end-of-sequence token
    prose.npz        tokenised sentences for haystacks (documents.Prose)
    words.json       adjectives and nouns of the needles' keys
    tokenizer/       loadable by AutoTokenizer
    sources.json     for every package: version, licence, bytes taken

`build` makes training rows of it, `window` tokens each, in parallel:

    tokens.bin       uint16 [rows, window], even rows plain text, odd rows a document in RULER's manner
    weights.bin      uint8 [rows, window], loss weight of each token as a target: 1, and 10 in answers
    offsets.npy, completions.npy, manifest.json   as every token shard has them (endprompt.data.rows)

The shipped sample (endprompt/data/sample.txt) is held out: no 8 words in a row of it are left in the training text.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks.base.documents import NIAH, NOISE, RETRIEVAL_KINDS, SAMPLE_PATH, VT, Prose, Words, row, sentences
from endprompt.data.shards import seal_shard, tokenizer_sha256
from endprompt.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END = "<|endoftext|>"
END_OF_TURN = "<|eot_id|>"
# One digit a token; a word takes the space in front of it; a run of white space ends before the last space.
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zlib|CC0|BSL|Expat|HPND)", re.I)
RESTRICTED = re.compile(r"\b[AL]?GPL|General Public|\bMPL|Mozilla|EUPL|\bCC-BY|Creative Commons|proprietary", re.I)
# Folders of tests, of other people's vendored code, and of tables written as code.
SKIPPED = {"test", "tests", "testing", "_vendor", "vendor", "site-packages", "idle_test", "__pycache__", "encodings"}
ASCII = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\xa0": " ", "\t": "    "}
)
ROWS_A_TASK = 2048


@dataclass(frozen=True)
class Source:
    """A package whose text is used."""

    name: str
    version: str
    licence: str
    files: tuple[Path, ...]
    readme: str = ""


def licence_of(distribution: Distribution) -> str:
    """The licence a package states, one line; empty if it states none that is permissive."""
    metadata = cast(Message, distribution.metadata)
    stated = [metadata.get("License-Expression"), *(metadata.get_all("Classifier") or [])]
    stated = [s for s in stated if s and (not s.count("::") or s.startswith("License"))]
    first = (metadata.get("License") or "").strip().splitlines()[:1]
    names = [str(s).split("::")[-1].strip() for s in [*stated, *first]]
    line = "; ".join(dict.fromkeys(n for n in names if any(map(str.isalpha, n))))
    return line if PERMISSIVE.search(line) and not RESTRICTED.search(line) else ""


def _usable(path: Path) -> bool:
    return path.suffix in {".py", ".md", ".rst"} and not SKIPPED.intersection(path.parts[:-1])


def installed_sources() -> list[Source]:
    """The interpreter's library, then the installed packages under permissive licences, by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = (p.relative_to(library) for p in library.rglob("*.py"))
    chosen = [library / p for p in sorted(files) if _usable(p) and p.parts[0] != "pydoc_data"]
    found = [Source("python", platform.python_version(), "PSF-2.0", tuple(chosen))]
    seen = {"endprompt-lab"}
    for distribution in sorted(distributions(), key=lambda d: d.name.lower()):
        licence, name = licence_of(distribution), distribution.name.lower()
        if licence and name not in seen:
            seen.add(name)
            paths = sorted(p for p in distribution.files or [] if _usable(Path(str(p))))
            located = tuple(Path(str(p.locate())) for p in paths)
            metadata = cast(Message, distribution.metadata)
            readme = metadata.get_payload() or metadata.get("Description") or ""
            found.append(Source(distribution.name, distribution.version, licence, located, str(readme)))
    return found


def prose_of(source: str) -> list[str]:
    """Docstrings, other long strings and comments of Python source, in order."""
    found: list[tuple[int, str]] = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 100:
            text = node.value
            if " " in text and sum(c.isalpha() or c == " " for c in text) > 0.6 * len(text):
                found.append((node.lineno, _dedent(text)))
    lines = [line.strip() for line in source.splitlines()]
    block: list[str] = []
    for number, line in enumerate([*lines, ""]):
        if line.startswith("#"):
            block.append(line.lstrip("#").strip())
        elif block:
            text = "\n".join(block)
            if len(text) >= 100:
                found.append((number, text))
            block = []
    return [text for _, text in sorted(found, key=lambda f: f[0])]


def code_of(source: str) -> str:
    """Python source without long strings and comment lines."""
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = [
        line.rstrip()
        for number, line in enumerate(source.splitlines(), 1)
        if number not in dropped and not line.lstrip().startswith("#") and len(line) <= 200
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _dedent(text: str) -> str:
    first, _, rest = text.expandtabs(4).partition("\n")
    lines = rest.splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[indent:].rstrip() for line in lines)]).strip()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).lower().encode(), digest_size=8).digest()


def _spoken(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


class HeldOut:
    """Word sequences of the shipped sample: any 8 words in a row, and whole sentences of 4 to 7 words."""

    def __init__(self, text: str) -> None:
        self.grams: dict[int, set[tuple[str, ...]]] = {n: set() for n in range(4, 9)}
        for paragraph in text.split("\n\n"):
            words = _spoken(paragraph)
            self.grams[8].update(zip(*(words[i:] for i in range(8))))
            for sentence in sentences(paragraph):
                words = _spoken(sentence)
                if 4 <= len(words) < 8:
                    self.grams[len(words)].add(tuple(words))

    def occurs(self, text: str) -> bool:
        """Whether the text repeats the sample."""
        words = _spoken(text)
        return any(not grams.isdisjoint(zip(*(words[i:] for i in range(n)))) for n, grams in self.grams.items())


def _ascii_share(text: str) -> float:
    return sum(map(str.isascii, text)) / max(1, len(text))


class Keeper:
    """Lets a paragraph pass once, and none that repeats the shipped sample."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.held_out = HeldOut(SAMPLE_PATH.read_text(encoding="utf-8"))

    def keep(self, text: str) -> str:
        """The paragraphs of the text that pass, joined as they were."""
        kept = []
        for paragraph in re.split(r"\n[ ]*\n", text.translate(ASCII)):
            paragraph = paragraph.strip("\n").rstrip()
            if not paragraph.strip() or _ascii_share(paragraph) < 0.98:
                continue
            digest = _digest(paragraph)
            if self.held_out.occurs(paragraph) or (len(paragraph) >= 40 and digest in self.seen):
                continue
            self.seen.add(digest)
            kept.append(paragraph)
        return "\n\n".join(kept)


def _read(path: Path) -> tuple[list[str], str]:
    """Prose and code of a file; nothing where it cannot be read as Python or text in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            return [text], ""
        if len(text) > 2_000_000:
            return [], ""
        return prose_of(text), code_of(text)
    except (SyntaxError, ValueError, OSError, RecursionError):
        return [], ""


def collect(prose_bytes: int, code_bytes: int, processes: int) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Prose documents, code documents and the record of their sources; at most so many bytes of each.

    Files come in an order fixed by the digest of their names, so that what is left out is spread over all packages.
    """
    sources = installed_sources()
    items = [(s, p) for s in sources for p in s.files]
    items.sort(key=lambda item: _digest(f"{item[0].name}/{'/'.join(item[1].parts[-4:])}"))
    keeper = Keeper()
    prose: list[str] = []
    code: list[str] = []
    left = {"prose": prose_bytes, "code": code_bytes}
    taken = {s.name: {"prose": 0, "code": 0} for s in sources}

    def take(kind: str, text: str, source: Source, into: list[str]) -> None:
        size = len(text.encode())
        if len(text) >= 200 and size <= left[kind]:
            left[kind] -= size
            taken[source.name][kind] += size
            into.append(text)

    for source in sources:
        take("prose", keeper.keep(source.readme), source, prose)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        read = pool.imap(_read, [p for _, p in items], chunksize=16)
        for (source, _), (texts, program) in zip(items, read):
            take("prose", keeper.keep("\n\n".join(texts)), source, prose)
            if left["code"] > 0:
                take("code", keeper.keep(program), source, code)
    record = [
        {
            "name": s.name,
            "version": s.version,
            "licence": s.licence,
            **{f"{k}_bytes": v for k, v in taken[s.name].items()},
        }
        for s in sources
        if any(taken[s.name].values())
    ]
    return prose, code, record


def readable(text: str) -> Iterator[str]:
    """Paragraphs that are plain English sentences, white space collapsed."""
    for paragraph in re.split(r"\n[ ]*\n", text.translate(ASCII)):
        line = " ".join(paragraph.replace("``", "").replace("*", "").replace("`", "").split())
        words = line.split()
        if (
            len(words) >= 12
            and line.isascii()
            and line[0].isupper()
            and line[-1] in ".!?"
            and sum(c.isalpha() or c == " " for c in line) >= 0.9 * len(line)
            and sum(w.strip(".,;:()'\"").isalpha() for w in words) >= 0.8 * len(words)
            and not re.search(r">>>|[=|{}<>\\_]{2}|:\w+:|@\w|\.\. ", line)
        ):
            yield line


def write_sample(path: Path, size: int = 560_000) -> None:
    """The shipped sample: readable paragraphs of the interpreter's help topics and of its library's docstrings."""
    from pydoc_data import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [text for _, text in sorted(topics.topics.items())]
    for file in sorted(library.rglob("*.py")):
        relative = file.relative_to(library)
        if _usable(relative) and relative.parts[0] not in {"pydoc_data", "lib2to3", "idlelib"}:
            texts.append("\n\n".join(_read(file)[0]))
    lines: list[str] = []
    seen: set[bytes] = set()
    for text in texts:
        for line in readable(text):
            digests = {_digest(s) for s in sentences(line) if len(s) >= 30}
            if not digests & seen and sum(map(len, lines)) < size:
                seen |= digests
                lines.append(line)
    # Topics and docstrings alternate through the file, so that its two halves are alike.
    lines.sort(key=_digest)
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 entries with single digits, `<|endoftext|>` as its end and padding token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[END_OF_TURN],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer under the class name that every release of transformers resolves."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _templates(words: Words, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Prompts with keys and variables, so that RULER's wording and keys are cheap in tokens."""
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for key in words.keys(count, rng):
        yield NIAH.format(context=f"{NOISE}\nOne of the special magic numbers for {key} is: 1.", key=key)
        names = ["".join(rng.choice(letters, size=5)) for _ in range(4)]
        yield VT.format(context=f" VAR {names[0]} = VAR {names[1]}\n{NOISE}", value=1, count=5, assigned="assigned")


def prepare(
    output_dir: Path | str,
    *,
    prose_bytes: int = 44_000_000,
    code_bytes: int = 18_000_000,
    haystack_tokens: int = 4_000_000,
    processes: int | None = None,
) -> Path:
    """Collect the text, train the tokenizer and write what `build` needs; see the module's head for the files."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    prose, code, record = collect(prose_bytes, code_bytes, processes or os.cpu_count() or 1)
    words = Words.installed()
    texts = [*prose, *code]
    templates = _templates(words, 6000, np.random.default_rng(0))
    tokenizer = train_tokenizer([*texts[:: max(1, len(texts) // 20_000)], *templates])
    save_tokenizer(tokenizer, folder / "tokenizer")

    order = sorted(range(len(texts)), key=lambda i: _digest(texts[i]))
    with (folder / "text.bin").open("wb") as file:
        for start in range(0, len(order), 256):
            batch = [texts[i] for i in order[start : start + 256]]
            for encoding in tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False):
                file.write(np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16).tobytes())

    haystack, length = [], 0
    for text in sorted(prose, key=_digest):
        for paragraph in readable(text):
            haystack += sentences(paragraph)
            length += len(paragraph) // 4
        if length > haystack_tokens:
            break
    sentence_store = Prose.from_sentences(haystack, tokenizer)
    np.savez(folder / "prose.npz", ids=sentence_store.ids, offsets=sentence_store.offsets, starts=sentence_store.starts)
    (folder / "words.json").write_text(json.dumps(asdict(words)), encoding="utf-8")
    summary = {
        "text_tokens": (folder / "text.bin").stat().st_size // 2,
        "text_bytes": sum(len(t.encode()) for t in texts),
        "haystack_tokens": len(sentence_store.ids),
        "haystack_sentences": len(haystack),
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
        "packages": record,
    }
    (folder / "sources.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote, loaded."""

    tokenizer: PreTrainedTokenizerFast
    text: np.ndarray
    prose: Prose
    words: Words


@cache
def load_prepared(folder: str) -> Prepared:
    """Tokenizer, token stream, sentences and words of a prepared folder."""
    from transformers import PreTrainedTokenizerFast

    path = Path(folder)
    if not (path / "sources.json").is_file():
        raise FileNotFoundError(f"no prepared text here (sources.json is missing): {folder}")
    arrays = np.load(path / "prose.npz")
    return Prepared(
        PreTrainedTokenizerFast.from_pretrained(path / "tokenizer"),
        np.memmap(path / "text.bin", dtype=np.uint16, mode="r"),
        Prose(arrays["ids"], arrays["offsets"], arrays["starts"]),
        Words(**json.loads((path / "words.json").read_text(encoding="utf-8"))),
    )


def _fill(task: tuple[str, str, int, int, int, int]) -> dict[str, int]:
    """Make rows [first, last) of the shards; they depend on the seed and the row numbers alone."""
    data, output, window, first, last, seed = task
    prepared = load_prepared(data)
    rng = np.random.default_rng([seed, first])
    shape = (last - first, window)
    tokens, weights = np.empty(shape, dtype=np.uint16), np.ones(shape, dtype=np.uint8)
    counts = dict.fromkeys(("text", *RETRIEVAL_KINDS), 0)
    offsets = rng.integers(len(prepared.text) - window, size=last - first)
    kinds = rng.choice(RETRIEVAL_KINDS, size=last - first)
    for i in range(last - first):
        piece = prepared.text[offsets[i] : offsets[i] + window]
        if (first + i) % 2 == 0:
            tokens[i] = piece
            counts["text"] += 1
        else:
            kind = str(kinds[i])
            tokens[i], weights[i] = row(
                kind, window, prepared.tokenizer, rng, prose=prepared.prose, words=prepared.words, filler=piece
            )
            counts[kind] += 1
    for name, array in (("tokens.bin", tokens), ("weights.bin", weights)):
        with (Path(output) / name).open("r+b") as file:
            file.seek(first * window * array.itemsize)
            file.write(array.tobytes())
    return counts


def build(
    output_dir: Path | str,
    window: int,
    rows: int,
    seed: int,
    *,
    data: Path | str = ".basedata",
    processes: int | None = None,
) -> dict[str, Any]:
    """Write training rows and their manifest, which is returned; see the module's head for the files.

    The rows do not depend on the number of processes. The manifest is written last: a folder without it is unfinished.
    """
    output, data = Path(output_dir), str(Path(data).resolve())
    load_prepared(data)
    output.mkdir(parents=True, exist_ok=True)
    for name, size in (("tokens.bin", 2), ("weights.bin", 1)):
        with (output / name).open("wb") as file:
            file.truncate(rows * window * size)
    tasks = [
        (data, str(output), window, first, min(first + ROWS_A_TASK, rows), seed)
        for first in range(0, rows, ROWS_A_TASK)
    ]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    counts: dict[str, int] = {}
    with multiprocessing.get_context("spawn").Pool(min(processes or os.cpu_count() or 1, len(tasks))) as pool:
        for made in pool.imap_unordered(_fill, tasks):
            counts = {kind: counts.get(kind, 0) + n for kind, n in made.items()}
    ends = np.arange(1, rows + 1, dtype=np.int64) * window
    return seal_shard(
        output,
        np.concatenate([[0], ends]),
        ends,
        "uint16",
        tokenizer_sha256(load_prepared(data).tokenizer),
        rows=rows,
        window=window,
        seed=seed,
        answer_weight=10,
        counts=counts,
        inputs={
            name: file_sha256(Path(data) / name) for name in ("text.bin", "prose.npz", "words.json", "sources.json")
        },
    )
