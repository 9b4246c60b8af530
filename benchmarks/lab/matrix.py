"""What a lab run consists of: the matrix file, the cells that it stands for, and what each is expected to cost.

A matrix is a YAML file; docs/lab.md shows one and says what its keys mean. Runs that come to the same settings are one
cell with the questions of all.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from analysis.spectra import with_factor
from benchmarks.lab.config import LabConfig
from benchmarks.lab.inputs import read_rates, sources
from benchmarks.longbench.sets import dataset_of
from benchmarks.ruler.texts import EDITIONS
from endprompt import origin
from endprompt.config import ExtendConfig, check_config, method_name
from endprompt.files import read_text, remembered_sha256, sha256_of
from endprompt.runs import plain
from endprompt.shapes import Shape

FOLDER = Path(__file__).parent
BASES = FOLDER.parent / "base"

VERSION = 1  # part of every cell's hash: a change of what a cell does makes earlier rows another cell's

#: Settings that the lab gives the trainer itself.
OWN = frozenset(
    {"model", "data", "output", "target", "seed", "device", "compile", "deterministic", "resume", "overwrite"}
    | {"save_every", "keep"}
)

SETTINGS = frozenset(field.name for field in dataclasses.fields(ExtendConfig)) - OWN

FILTERS = ("arm", "base", "fold", "seed", "question")  # what `--only KEY=VALUE` may name


@dataclass(frozen=True)
class Scoring:
    """How a cell is scored: tasks of RULER with options for small windows, and rows of held-out text a length.
    samples_at: other numbers of samples at some lengths. bins: of positions, for the held-out loss by position.
    longbench: sets, and how many of their documents, the first; their files `SET.jsonl` are among the inputs."""

    tasks: tuple[str, ...] = ("niah_single_1", "niah_single_2", "niah_multikey_1", "vt")
    samples: int = 64
    max_new_tokens: int | None = 30
    shots: int = 0
    hops: int = 3
    edition: str = "lab-2026"
    loss_rows: int = 8
    samples_at: Mapping[int, int] = field(default_factory=dict)
    bins: int = 0
    longbench: Mapping[str, int] = field(default_factory=dict)

    def count(self, length: int) -> int:
        return self.samples_at.get(length, self.samples)


@dataclass(frozen=True)
class Cell:
    """One training and what is measured on it.

    arm: unique for a base and target. method: its name in the rows. settings: of the trainer, beside the lab's own.
    documents: how many there are in the training file that all arms of this row length and seed share.
    longest: tokens of the longest question with its answer in them.
    sources: hashes of the inputs that the matrix names. retrieval: rows with a question for each row of such documents.
    """

    base: str
    model: str
    window: int
    target: int
    lengths: tuple[int, ...]
    arm: str
    method: str
    seed: int
    trained: bool
    settings: Mapping[str, Any]
    scoring: Scoring
    documents: int
    longest: int
    verified: bool = False
    questions: tuple[int, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    retrieval: float = 0.0

    @property
    def fold(self) -> int:
        return self.target // self.window

    @property
    def name(self) -> str:
        """Unique in a run, and fit to be a file's name."""
        return f"{self.base}-{self.fold}x-{self.arm}-seed{self.seed}".replace("/", "_").replace(":", "_")

    @property
    def row_tokens(self) -> int:
        return self.settings.get("row_tokens") or self.window

    @property
    def steps(self) -> int:
        return self.settings["steps"] if self.trained else 0

    @property
    def rows(self) -> int:
        return self.settings.get("rows", ExtendConfig.rows)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Cells that agree in it run the same compiled code."""
        kept = ("attention", "lora_rank", "dtype", "autocast", "micro_rows", "checkpointing")
        return self.base, self.trained, self.row_tokens, self.rows, *(self.settings.get(key) for key in kept)

    @property
    def sha256(self) -> str:
        """Hash of all that the cell's rows depend on beside the code; which questions it answers is not among it."""
        about = {key: plain(value) for key, value in dataclasses.asdict(self).items() if key != "questions"}
        if self.scoring.edition == Scoring.edition:  # rows from before it had a name were made with it
            del about["scoring"]["edition"]
        for where, keys in ((about, ("sources", "retrieval")), (about["scoring"], ("samples_at", "bins", "longbench"))):
            for key in keys:  # likewise
                if not where[key]:
                    del where[key]
        # Rows of a factor that was set were once those of target / window.
        version = VERSION if self.settings.get("factor") is None else VERSION + 1
        about |= {"model": base_sha256(self.model), "version": version}
        return sha256_of(json.dumps(about, sort_keys=True))[:24]

    def config(self, data: Sequence[str], output: str, **how: Any) -> ExtendConfig:
        """The trainer's configuration; a scaling NAME@FACTOR as `analysis.spectra.with_factor` has it. how: device,
        compile and deterministic, where they are not the trainer's defaults."""
        settings = dict(self.settings)
        scaling, factor = settings.get("scaling", ExtendConfig.scaling), settings.get("factor") or self.fold
        settings["scaling"], options = with_factor(scaling, *turned(self.model), factor, self.window)
        if options:
            settings["rope_options"] = {**settings.get("rope_options", {}), **options}
        own: dict[str, Any] = {"model": self.model, "data": list(data), "output": output, "overwrite": True}
        return ExtendConfig(**settings, **own, **how, target=self.target, seed=self.seed)


@dataclass
class Answer:
    """What comes of a cell, as a worker says it: rows (of results.jsonl), scores (of its samples, for scores.jsonl) and
    seconds of each phase, or the error with its traceback. ready: said once, before the first cell. last: the worker
    ends now."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    trace: str | None = None
    ready: bool = False
    last: bool = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)


def presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def matrix_files(config: LabConfig) -> list[Path]:
    """The matrices asked for. Raises ValueError if there is none."""
    if config.matrix:
        path = Path(config.matrix)
        if not path.is_file():
            raise ValueError(f"matrix must be a file: matrix={config.matrix!r}")
        return [path]
    known = presets()
    names = list(dict.fromkeys(name.strip() for name in (config.preset or "").split(",")))
    if not set(names) <= known.keys():
        raise ValueError(f"preset must be one of {', '.join(known)} (or give matrix): preset={config.preset!r}")
    return [known[name] for name in names]


def read_matrix(path: Path) -> dict[str, Any]:
    """A matrix file's content. Raises ValueError naming file and key."""
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold the keys of a matrix, got {type(content).__name__}")
    return content


def base_directory(base: str, weights: bool = True) -> Path:
    """Directory of one of the project's own bases by its window, or of a checkpoint. Raises ValueError for neither."""
    for path in (BASES / base, Path(base)):
        if (path / "config.json").is_file():
            return path
    if "/" in base or base.endswith(".gguf"):
        return origin.directory_of(base, weights=weights)
    own = ", ".join(sorted(path.name for path in BASES.iterdir() if path.is_dir()))
    raise ValueError(f"base must be one of {own}, or a checkpoint's directory: base={base!r}")


@cache
def base_shape(model: str) -> Shape:
    from endprompt.plan import shape_of

    return shape_of(model)


@cache
def turned(model: str) -> tuple[float, int]:
    """(base of RoPE, components of a head that it turns)."""
    from endprompt.model import load_config, rope_geometry

    geometry = rope_geometry(load_config(model))
    return geometry.parameters["rope_theta"], geometry.rotary_dim


def base_sha256(model: str) -> str:
    source = origin.about(model)
    if source.get("sha256") or source.get("revision"):  # whatever release of transformers has written the files
        return str(source.get("sha256") or sha256_of(source["hub"], source["revision"]))
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*")):
        if path.name in ("config.json", "tokenizer.json") or path.suffix in (".safetensors", ".bin"):
            digest.update(path.name.encode() + bytes.fromhex(remembered_sha256(path)))
    return digest.hexdigest()


def all_cells(matrices: Mapping[str, Mapping[str, Any]], config: LabConfig) -> list[Cell]:
    """The cells of several matrices (source -> content), each once. Raises ValueError if two matrices mean different
    cells by one base, target, arm and seed."""
    made: dict[tuple[Any, ...], Cell] = {}
    for source, content in matrices.items():
        for cell in cells(content, source, config):
            key = (cell.base, cell.target, cell.arm, cell.seed)
            other = made.setdefault(key, cell)
            if other.sha256 != cell.sha256:
                raise ValueError(
                    f"{source}: {cell.name} has other settings than in {', '.join(matrices)}: run it apart"
                )
            made[key] = dataclasses.replace(other, questions=both(other, cell))
    return list(made.values())


def cells(content: Mapping[str, Any], source: str, config: LabConfig) -> list[Cell]:
    """All cells of a matrix, in its order. Raises ValueError naming file, key and rule."""
    check_keys(content, {"seeds", "train", "score", "arms", "blocks", "questions", "inputs", "retrieval"}, source)
    for needed in ("arms", "blocks"):
        if not content.get(needed):
            raise ValueError(f"{source}: a matrix must have {needed}")
    scoring = scoring_of(content.get("score", {}), source, config)
    for name in scoring.longbench:
        if f"{name}.jsonl" not in content.get("inputs", ()):
            raise ValueError(f"{source}: inputs must name {name}.jsonl, the documents of longbench's {name}")
    found = sources(content.get("inputs", ()), config)
    made: dict[tuple[Any, ...], Cell] = {}
    names: dict[tuple[Any, ...], tuple[str, str]] = {}
    for number, block in enumerate(content["blocks"], 1):
        where = f"{source}, block {number}"
        for cell in block_cells(block, content, scoring, where, config):
            cell = dataclasses.replace(cell, sources=found, retrieval=float(content.get("retrieval", 0.0)))
            key = (cell.base, cell.target, cell.arm, cell.seed)
            earlier = made.get(key)
            if earlier is not None:
                same = dataclasses.replace(earlier, questions=cell.questions, documents=cell.documents, verified=False)
                if same != dataclasses.replace(cell, verified=False):
                    raise ValueError(f"{where}: arm {cell.arm!r} has other settings than an earlier one of this name")
                verified, documents = earlier.verified or cell.verified, max(earlier.documents, cell.documents)
                questions = both(earlier, cell)
                cell = dataclasses.replace(earlier, verified=verified, documents=documents, questions=questions)
            made[key] = cell
            shown = (cell.base, cell.target, cell.method, cell.steps, cell.settings.get("prompt_weight"), cell.seed)
            # A trial of a few steps may make arms alike that differ in their steps.
            if names.setdefault(shown, (cell.arm, where))[0] != cell.arm and not config.steps:
                raise ValueError(
                    f"{where}: arms {names[shown][0]!r} and {cell.arm!r} would have the same method in the rows, "
                    f"{cell.method!r}: give one of them a `method`"
                )
    # All arms of one base and row length draw from the same documents: as many as the longest of them needs.
    most: dict[tuple[str, int], int] = {}
    for cell in made.values():
        place = (cell.base, cell.row_tokens)
        most[place] = max(most.get(place, 0), cell.documents)
    return [dataclasses.replace(cell, documents=most[cell.base, cell.row_tokens]) for cell in made.values()]


def both(one: Cell, other: Cell) -> tuple[int, ...]:
    return tuple(sorted({*one.questions, *other.questions}))


def scoring_of(given: Mapping[str, Any], source: str, config: LabConfig) -> Scoring:
    check_keys(given, Scoring.__dataclass_fields__, f"{source}, score")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    for name, count in values.get("longbench", {}).items():
        if type(count) is not int or count < 1 or not dataset_of(name):
            raise ValueError(f"{source}, score: longbench must give each set a number of documents: {name}: {count!r}")
    if config.samples:
        fewer = {name: min(count, config.samples) for name, count in values.get("longbench", {}).items()}
        values |= {"samples": config.samples, "samples_at": {}, "longbench": fewer}
    made = Scoring(**values)
    if made.edition not in EDITIONS:
        raise ValueError(f"{source}, score: edition must be one of {', '.join(EDITIONS)}: {made.edition!r}")
    return made


BLOCK = {"base", "target", "lengths", "train", "runs", "longest", "document_tokens", "documents", "seeds"}
RUN = {"arms", "questions", "verify", "seeds", "lengths"}


def block_cells(
    block: Mapping[str, Any], content: Mapping[str, Any], scoring: Scoring, where: str, config: LabConfig
) -> Iterable[Cell]:
    check_keys(block, BLOCK, where)
    for key in ("base", "target", "lengths", "runs"):
        if key not in block:
            raise ValueError(f"{where}: a block must have {key}")
    base = str(block["base"])
    own = (BASES / base).is_dir()
    model = str(base_directory(base if own else config.model or base, weights=not config.dry_run))
    if not own and (config.model or not Path(base).is_dir()):
        base = origin.name_of(config.model or base)
    window, target = base_shape(model).window, int(block["target"])
    if target <= window or target % window:
        raise ValueError(f"{where}: the target must be a multiple of the window {window}: target={target}")
    rates = read_rates(config.rates)
    common = {**content.get("train", {}), **block.get("train", {})}
    fewest = {int(tokens): int(count) for tokens, count in block.get("documents", {}).items()}
    for run in block["runs"]:
        check_keys(run, RUN | SETTINGS, f"{where}, run")
        lengths = tuple(int(length) for length in run.get("lengths", block["lengths"]))
        if target not in lengths or window not in lengths:
            raise ValueError(f"{where}: lengths must hold the window {window} and the target {target}: {list(lengths)}")
        for name in run["arms"]:
            if name not in content["arms"]:
                raise ValueError(f"{where}: no arm has this name: {name!r} of {', '.join(content['arms'])}")
            arm = dict(content["arms"][name] or {})
            check_keys(arm, {"train", "method"} | SETTINGS, f"{where}, arm {name}")
            crossed = {key: value for key, value in run.items() if key in SETTINGS}
            for values in itertools.product(*(v if isinstance(v, list) else [v] for v in crossed.values())):
                changes = dict(zip(crossed, values))
                settings = {**common, **{k: v for k, v in arm.items() if k in SETTINGS}}
                told = {k: v for k, v in changes.items() if k != "scaling" and settings.get(k) != v}
                settings |= changes
                if config.steps:
                    settings["steps"] = config.steps
                plain_name = f"{name}+{settings.get('scaling', ExtendConfig.scaling)}"
                if "lr" not in changes and (rate := rates.get(plain_name)) is not None:
                    settings["lr"] = rate
                trained = bool(arm.get("train", True))
                full_name = "".join([plain_name, *(f"@{k}={v}" for k, v in told.items())])
                questions, verify = tuple(sorted(run.get("questions", ()))), bool(run.get("verify", False))
                about = (base, model, window, target, lengths, full_name, "", 0, trained, settings, scoring)
                cell = Cell(*about, documents=0, longest=0, questions=questions)
                try:
                    check_config(cell.config(["documents"], "output"))
                except ValueError as error:
                    raise ValueError(f"{where}, arm {full_name}: {error}") from None
                limit = int(block.get("document_tokens", 5_000_000)) // cell.row_tokens
                wanted = max(min(max(cell.steps * cell.rows, cell.rows), limit), fewest.get(cell.row_tokens, 0))
                room = int(block.get("longest", window - 56)) if cell.row_tokens == window else cell.row_tokens
                cell = dataclasses.replace(cell, method=method_of(cell, arm, told), documents=wanted, longest=room)
                for seed in config.seeds or run.get("seeds") or block.get("seeds") or content.get("seeds", [0]):
                    yield dataclasses.replace(cell, seed=int(seed), verified=verify and int(seed) == 0)


def method_of(cell: Cell, arm: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """The method's name in the rows: scheme, prompt and scaling, or the arm's own name for it and the scaling. What
    else tells arms apart is in columns of the rows, or, where the figures know no such column, in the name."""
    scaling = cell.settings.get("scaling", ExtendConfig.scaling)
    if not cell.trained and "method" not in arm:
        return "base" if scaling == "none" else f"untrained+{scaling}"
    config = cell.config([], "")
    stem = arm["method"] if "method" in arm else method_name(config).removesuffix(f"+{config.scaling}")
    known = {"steps", "prompt", "prompt_weight", "anchors", "scheme"}
    return "+".join([stem, *(f"{key}-{value}" for key, value in told.items() if key not in known), scaling])


def check_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: must be keys and values, got {type(given).__name__}")
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}, must be one of {', '.join(sorted(known))}")


def chosen(made: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that hold all conditions `KEY=VALUE,VALUE`. Raises ValueError for an unknown key, or if none is
    left."""
    left = list(made)
    for condition in only:
        key, equals, values = condition.partition("=")
        if not equals or key not in FILTERS:
            raise ValueError(f"only must be KEY=VALUE with a key of {', '.join(FILTERS)}: only={condition!r}")
        wanted = [value.strip() for value in values.split(",")]
        left = [cell for cell in left if matches(cell, key, wanted)]
        if not left:
            raise ValueError(f"only leaves no cell of the matrix: only={condition!r}")
    return left


def matches(cell: Cell, key: str, wanted: Sequence[str]) -> bool:
    if key == "question":
        return any(str(question) in wanted for question in cell.questions)
    if key == "arm":
        return any(fnmatch.fnmatchcase(cell.arm, pattern) for pattern in wanted)
    return str(getattr(cell, key)) in wanted
