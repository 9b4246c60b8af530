"""What RULER's prompts are made of: the suite's wording, noise, essays, word lists, question-answering documents.

The wording is read from the installed lm-eval package's source files as text, without importing them (importing them
fetches data and materialises six million words), and is corrected here where it departs from RULER. Everything else
comes from local files; nothing is downloaded. This module imports neither lm_eval nor wonderwords.
"""

import ast
import bisect
import contextlib
import functools
import gc
import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import originals
from endprompt.files import check_fetched, parse_json, read_text, remembered_sha256

# A text without sentence ends (code, lists) is cut after this many words, so that needle depths stay spread.
LONGEST_SENTENCE = 50
SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*$")


SOURCES = originals.originals("ruler")


def data_file(kind: str, data_dir: str | Path | None, task: str) -> Path:
    """Path of a user's data file. Raises ValueError saying what is missing, which option, which command."""
    source = SOURCES[kind]
    if (path := found_file(kind, data_dir)) is not None:
        return path
    where = "--data-dir is not set" if data_dir is None else f"it is not in --data-dir {data_dir}"
    raise ValueError(
        f"task {task} needs {source.names[0]} ({source.what}) and {where}: "
        f"{originals.command('ruler', data_dir)} brings it there"
    )


def found_file(kind: str, data_dir: str | Path | None) -> Path | None:
    """Path of a user's data file, None if there is none. Raises ValueError for a Git LFS pointer."""
    for name in SOURCES[kind].names if data_dir is not None else ():
        if (path := Path(str(data_dir)) / name).is_file():
            check_fetched(path)
            originals.say_version("ruler", path)
            return path
    return None


@dataclass(frozen=True)
class Edition:
    """One state of RULER's tasks. `replayed`: by RULER's own generator, to the byte; others fill each window."""

    name: str
    replayed: bool = False
    layout: str = "one-turn"  # of chats, if no other is asked for
    misspelled: bool = False  # vt: "assgined"
    bare_end: bool = False  # vt: the space after "they are:" is left out
    cut_lines: bool = False  # the last noise line may be cut after a sentence
    plain_places: bool = False  # essays: no space for an empty stretch between needles, sentences by whole numbers
    answers_in_vocabulary: bool = False  # fwe: the room for the answer counts into the size of the vocabulary


#: The paper's tables (RULER at f36197b), its repository today (c3f5e3b) by streams of our own and by its own, and what
#: the project's bases, demo and lab were trained and scored on.
EDITIONS = {
    edition.name: edition
    for edition in (
        Edition("2025"),
        Edition("2025-ruler", replayed=True, layout="ruler"),
        Edition("2024", replayed=True, layout="ruler", misspelled=True, answers_in_vocabulary=True),
        Edition("lab-2026", bare_end=True, cut_lines=True, plain_places=True, answers_in_vocabulary=True),
    )
}
DEFAULT_EDITION = "2025"


@dataclass(frozen=True)
class Wording:
    """One task family's prompt: `template` up to the end of the question, then `prefix`, the start of the answer."""

    template: str
    prefix: str
    reserve: int  # tokens kept for generation


@functools.cache
def wording(family: str, edition: str = DEFAULT_EDITION) -> Wording:
    """RULER's prompt for "niah", "vt", "cwe", "fwe" or "qa". Raises ImportError if lm-eval is not installed."""
    if family == "niah":
        template = _constant("niah_utils.py", "TEMPLATE")
        question = template.rsplit("\n", 1)[1]
        subject = question.removeprefix("What are all the").removesuffix("?")
        return Wording(template, f" The{subject} are", 128)
    file = {"vt": "vt_utils.py", "cwe": "cwe_utils.py", "fwe": "fwe_utils.py", "qa": "qa_utils.py"}[family]
    config = _constant(file, "CONFIG")
    config = config.get("variable_tracking", config)
    template, prefix = config["template"], config["answer_prefix"]
    if family == "vt":
        rules = EDITIONS[edition]
        prefix = prefix.replace(*(("assigned", "assgined") if rules.misspelled else ("assgined", "assigned")))
        prefix = prefix.rstrip() if rules.bare_end else prefix.rstrip() + " "
    if family == "qa":
        prefix = " " + prefix.lstrip()
    return Wording(template, prefix, config["tokens_to_generate"])


def question(family: str, edition: str = DEFAULT_EDITION, **places: Any) -> tuple[str, str]:
    """(prompt up to the end of the question, answer prefix) with these in their places."""
    words = wording(family, edition)
    return words.template.format(**places), words.prefix.format(**places)


def needle() -> str:
    return _constant("prepare_niah.py", "NEEDLE")


def needle_of(kind: str, key: str, value: str) -> str:
    """The needle that says a key's value. kind: numbers, words or uuids."""
    return needle().format(type_needle_v=kind, key=key, value=value)


def noise() -> list[str]:
    """The sentences of the noise haystack."""
    text = next(v for v in _constants("prepare_niah.py", "haystack") if isinstance(v, str))
    return re.findall(r"[^.]+\.", text)


def document_prompt() -> str:
    return _constant("qa_utils.py", "DOCUMENT_PROMPT")


def _constant(file: str, name: str) -> Any:
    return _constants(file, name)[0]


@functools.cache
def _constants(file: str, name: str) -> list:
    """Literals assigned to `name` anywhere in one of lm-eval's RULER files."""
    tree = ast.parse(_lm_eval_file(file).read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            with contextlib.suppress(ValueError):
                found.append(ast.literal_eval(node.value))
    if not found:
        raise ImportError(f"lm-eval's RULER file {file} defines no {name}: lm-eval 0.4.13 is the tested version")
    return found


def package_folder(name: str, said: str) -> Path:
    """Folder of a package, found without importing it. Raises ImportError of these words if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(said)
    return Path(spec.submodule_search_locations[0])


def _lm_eval_file(name: str) -> Path:
    said = "RULER's prompts are read from the lm-eval package: pip install 'lm-eval>=0.4.13'"
    path = package_folder("lm_eval", said) / "tasks" / "ruler" / name
    if not path.is_file():
        raise ImportError(f"the installed lm-eval has no {path}: lm-eval 0.4.13 is the tested version")
    return path


@functools.cache
def word_list(kind: str) -> tuple[str, ...]:
    """Sorted unique "noun", "adjective" or "verb" entries of the wonderwords package."""
    said = "the needles' keys come from the wonderwords package: pip install wonderwords==3.0.1"
    path = package_folder("wonderwords", said) / "assets" / f"{kind}list.txt"
    return tuple(sorted({line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}))


def key_word(index: int) -> str:
    """Entry of the list of all adjective-noun pairs, by arithmetic: the six million pairs are never made."""
    nouns = word_list("noun")
    return f"{word_list('adjective')[index // len(nouns)]}-{nouns[index % len(nouns)]}"


def key_words() -> int:
    """How many adjective-noun pairs there are."""
    return len(word_list("adjective")) * len(word_list("noun"))


@functools.cache
def _word_blocks() -> tuple[tuple[str | tuple[str, ...], ...], tuple[int, ...]]:
    """All adjective-noun pairs in alphabetical order as blocks, and the number of pairs up to the end of each. A block
    is an adjective, whose pairs stand together, or the pairs themselves where those of several adjectives mix
    ("able-zoo" stands after "able-bodied-ant").
    """
    nouns = word_list("noun")
    blocks: list[str | tuple[str, ...]] = []
    adjectives = sorted(word_list("adjective"), key=lambda adjective: adjective + "-")
    while adjectives:
        first = adjectives[0] + "-"
        mixed = [adjective for adjective in adjectives if (adjective + "-").startswith(first)]
        pairs = {f"{adjective}-{noun}" for adjective in mixed for noun in nouns} if len(mixed) > 1 else ()
        blocks.append(tuple(sorted(pairs)) or mixed[0])
        del adjectives[: len(mixed)]
    sizes = [len(nouns) if isinstance(block, str) else len(block) for block in blocks]
    return tuple(blocks), tuple(itertools.accumulate(sizes))


def sorted_key_word(index: int) -> str:
    """Entry of RULER's own list, the different adjective-noun pairs in alphabetical order, of which none is made."""
    blocks, ends = _word_blocks()
    at = bisect.bisect_right(ends, index)
    block, rest = blocks[at], index - (ends[at - 1] if at else 0)
    return f"{block}-{word_list('noun')[rest]}" if isinstance(block, str) else block[rest]


def sorted_key_words() -> int:
    return _word_blocks()[1][-1]


@functools.cache
def common_words() -> tuple[str, ...]:
    """The words of common-word extraction: nouns, adjectives and verbs, each once (8166 in wonderwords 3.0.1)."""
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)}))


def more_words(path: Path) -> tuple[str, ...]:
    """RULER's longer word list in its order, for samples that need more than `common_words` has."""
    try:
        return tuple(_text(word) for word in read_json(path, dict).values())
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"{path}: not in the layout of {SOURCES['words'].what} ({error})") from None


def sentence_ends(words: Sequence[str]) -> list[int]:
    """Words up to each end of a sentence by punctuation; the last word ends one."""
    ends, start = [], 0
    for i, word in enumerate(words, 1):
        if SENTENCE_END.search(word) or i - start >= LONGEST_SENTENCE or i == len(words):
            ends.append(i)
            start = i
    return ends


@dataclass
class Essay:
    """A haystack of running text, repeated without end. `words` are split at white space; positions are counted in
    words from the start of the first copy. Sentence ends are found by punctuation, so samples do not depend on
    downloaded models.
    """

    name: str
    sha256: str
    words: list[str]
    edges: tuple[bool, bool] = (False, False)  # whether white space stood in front of the text, and after it
    ends: np.ndarray = field(init=False)  # [sentences] words up to each sentence end, within one copy

    def __post_init__(self) -> None:
        self.ends = np.array(sentence_ends(self.words), dtype=np.int64)
        self._text = " ".join(self.words) + " "
        self._starts = [0, *itertools.accumulate(len(word) + 1 for word in self.words)]

    def text(self, first: int, last: int) -> str:
        """Words first..last-1 joined by single spaces."""
        size, pieces = len(self.words), []
        while first < last:
            copy = first // size
            stop = min(last, (copy + 1) * size)
            pieces.append(self._text[self._starts[first - copy * size] : self._starts[stop - copy * size] - 1])
            first = stop
        return " ".join(pieces)

    def sentences(self, n: int) -> int:
        """Sentences in the first n words; a cut one at the end counts."""
        size = len(self.words)
        rest = n % size
        return n // size * len(self.ends) + int(np.searchsorted(self.ends, rest)) + bool(rest)

    def sentence_end(self, count: int, n: int) -> int:
        """Words up to the end of sentence `count` (0: the start), at most n."""
        if count == 0:
            return 0
        copies, rest = divmod(count - 1, len(self.ends))
        return min(n, copies * len(self.words) + int(self.ends[rest]))


def essay(haystack_text: str | Path | None, data_dir: str | Path | None, task: str = "niah_single_2") -> Essay:
    """The essay haystack: the user's text, else RULER's essays in `data_dir`, else the project's sample text."""
    if haystack_text is not None:
        path = Path(haystack_text)
        if not path.is_file():
            raise ValueError(f"--haystack-text must be a text file: {path} does not exist")
        check_fetched(path)
    else:
        path = found_file("essays", data_dir) or shipped_sample()
        if not path.is_file():
            try:
                data_file("essays", data_dir, task)
            except ValueError as missing:
                raise ValueError(f"{missing}; or give a text of your own by --haystack-text") from None
    return _essay(path, remembered_sha256(path))


def shipped_sample() -> Path:
    """The project's sample text, of which the second half is the haystack; the first may be trained on."""
    return Path(str(resources.files("endprompt") / "data" / "sample.txt"))


@functools.lru_cache(maxsize=4)
def _essay(path: Path, sha256: str) -> Essay:
    if path.suffix == ".json":
        text = read_json(path, dict).get("text")
        try:
            _text(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f'{path}: must be a JSON object {{"text": ...}} ({error})') from None
    else:
        text = read_text(path)
    name = path.name
    if path == shipped_sample():
        paragraphs = text.split("\n\n")
        text, name = "\n\n".join(paragraphs[len(paragraphs) // 2 :]), f"{name}, second half"
    words = text.split()
    if not words:
        raise ValueError(f"{path}: a haystack must have words; the file is empty")
    return Essay(name, sha256, words, (text[0].isspace(), text[-1].isspace()))


@functools.cache
def _punkt() -> Any:
    """NLTK's splitter of English sentences, which RULER uses; None if it or its data are not on this machine."""
    try:
        from nltk.tokenize.punkt import PunktTokenizer

        return PunktTokenizer("english")
    except (ImportError, LookupError):
        return None


def has_punkt() -> bool:
    return _punkt() is not None


def sentences(text: str) -> list[str]:
    """Sentences of running text: NLTK's if it has its data, else by punctuation."""
    if has_punkt():
        return list(_punkt().tokenize(text))
    words = text.split(" ") if text else []
    return [" ".join(words[first:last]) for first, last in itertools.pairwise([0, *sentence_ends(words)])]


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]
    context: tuple[int, ...]  # documents that must be there
    related: tuple[int, ...] = ()  # documents of the same article, used before others
    given: tuple[str, ...] = ()  # the answers as the file has them, of which some are the same


@dataclass(frozen=True)
class Library:
    """Documents and the questions over them, in the data set's own order."""

    name: str
    sha256: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    whole: bool = True  # the set as it was published, not a part of it


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No search for reference cycles inside: hundreds of thousands of texts are made, and none refers to another."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def library(dataset: str, data_dir: str | Path | None, task: str) -> Library:
    path = data_file(dataset, data_dir, task)
    return _library(dataset, path, remembered_sha256(path))


@functools.lru_cache(maxsize=4)
def _library(dataset: str, path: Path, sha256: str) -> Library:
    read = read_json(path, dict if dataset == "squad" else list)
    try:
        documents, questions = _squad(read) if dataset == "squad" else _hotpotqa(read)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not in the layout of {SOURCES[dataset].what} ({error!r})") from None
    if not questions:
        raise ValueError(f"{path}: has no answerable question")
    source = SOURCES[dataset]
    whole = sha256 in source.whole or len(questions) == source.questions
    return Library(path.name, sha256, tuple(documents), tuple(questions), whole)


def _text(value: Any) -> str:
    """The value, which must be text that a tokenizer takes."""
    if not isinstance(value, str):
        raise TypeError(f"text must be a string, got {type(value).__name__}")
    value.encode()  # half of a surrogate pair is a ValueError
    return value


def _squad(whole: dict[str, Any]) -> tuple[list[str], list[Question]]:
    articles = whole["data"]
    documents = sorted({_text(p["context"]) for article in articles for p in article["paragraphs"]})
    index = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in articles:
        of_article = list(dict.fromkeys(index[p["context"]] for p in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            own = index[paragraph["context"]]
            related = tuple(i for i in of_article if i != own)
            for qa in paragraph["qas"]:
                if not qa["is_impossible"]:
                    given = tuple(_text(answer["text"]) for answer in qa["answers"])
                    if not given:
                        raise ValueError("an answerable question must have an answer")
                    answers = tuple(dict.fromkeys(given))
                    questions.append(Question(_text(qa["question"]), answers, (own,), related, given))
    return documents, questions


def _hotpotqa(entries: list[Any]) -> tuple[list[str], list[Question]]:
    texts = [
        [_text(f"{_text(title)}\n{''.join(sentences)}") for title, sentences in entry["context"]] for entry in entries
    ]
    documents = sorted({text for entry in texts for text in entry})
    index = {text: i for i, text in enumerate(documents)}
    questions = [
        Question(
            _text(entry["question"]),
            (_text(entry["answer"]),),
            tuple(dict.fromkeys(index[text] for text in own)),
            given=(entry["answer"],),
        )
        for entry, own in zip(entries, texts)
    ]
    return documents, questions


def read_json(path: Path, kind: type) -> Any:
    """A JSON file of the given top-level type. Raises ValueError naming file, line and column."""
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, kind):
        raise ValueError(f"{path}: must hold a JSON {kind.__name__}, got {type(value).__name__}")
    return value
