"""Checkpoints as people have them: a directory, an id of the Hugging Face hub, or a GGUF file; all become a directory
of a plain checkpoint (config.json, tokenizer, *.safetensors).

An id is `ORG/NAME` or `ORG/NAME@REVISION`; its files come into the hub's own cache (HF_HOME, HF_ENDPOINT and
HF_HUB_OFFLINE are the hub's), without code. A GGUF file is dequantised by transformers into a folder named by its hash,
under ENDPROMPT_CACHE or ~/.cache/endprompt, in bfloat16 or ENDPROMPT_GGUF_DTYPE. Where a directory came from is read
off it, so that it can be moved.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endprompt.files import read_object, remembered_sha256, write_text

#: What is taken of a hub's repository; nothing of its subfolders, and no other copy of the weights.
FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "spiece.model", "chat_template*", "README.md"),
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
LEFT = ("*/*", "consolidated*", "*.py")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
#: In a dequantised directory: of which file it was made.
NOTE = "origin.json"
#: GGUF's numbers of file types (general.file_type) that keep two bits or fewer of a weight.
COARSE = ("Q2", "IQ2", "IQ1", "TQ1", "TQ2")


def directory_of(typed: str | Path, *, weights: bool = True, code: bool = False) -> Path:
    """The directory that holds what was typed; downloads or dequantises where that is needed. weights: also the
    weights; code: also Python files of a hub's repository. Raises ValueError for what is none of the three, or cannot
    be had whole.
    """
    path = Path(typed)
    if path.is_dir():
        return path
    if path.is_file():
        return from_gguf(path)
    text = str(typed)
    found = HUB_ID.fullmatch(text)
    if path.suffix == ".gguf" or not found or (Path(text.split("/")[0]).is_dir() and not found[2]):
        raise ValueError(
            f"the checkpoint directory must exist (or be a GGUF file, or a hub's ORG/NAME): model={text!r}"
        )
    return from_hub(found[1], found[2], weights, code)


def name_of(typed: str | Path) -> str:
    """The model's name for rows and folders, of what was typed as of the directory that it became."""
    told = hub_of(typed)
    path = Path(typed)
    if told:
        return told["hub"].rpartition("/")[2]
    if not path.exists() and (found := HUB_ID.fullmatch(str(typed))):
        return found[1].rpartition("/")[2]
    return path.stem if path.suffix == ".gguf" else path.name or path.resolve().name


def hub_of(directory: str | Path) -> dict[str, str]:
    """{hub: ORG/NAME, revision: commit} of a folder in the hub's cache, else empty."""
    parts = Path(directory).parts
    for place, part in enumerate(parts):
        if part.startswith("models--"):
            told = {"hub": part.removeprefix("models--").replace("--", "/", 1)}
            if parts[place + 1 : place + 2] == ("snapshots",) and len(parts) > place + 2:
                told["revision"] = parts[place + 2]
            return told
    return {}


def about(directory: str | Path) -> dict[str, Any]:
    """Where a checkpoint's directory came from, for records: the hub's id and commit, or the GGUF file; else empty."""
    return read_object(Path(directory) / NOTE, optional=True) or dict(hub_of(directory))


def told(source: dict[str, Any]) -> str | None:
    """`about` in words, None if it is empty."""
    if source.get("file"):
        said = f"dequantised from {source['quantisation']}, {source['file']}, sha256 {source['sha256']}"
        return f"{said}, in {source['dtype']}" if "dtype" in source else said
    return f"{source['hub']}, revision {source.get('revision', 'not known')}" if source.get("hub") else None


@functools.cache
def from_hub(repository: str, revision: str | None, weights: bool = True, code: bool = False) -> Path:
    """Snapshot of a hub's repository, asked for once a process."""
    import huggingface_hub
    from huggingface_hub import errors

    shown = repository + (f"@{revision}" if revision else "")
    allowed = [*FILES, *(WEIGHTS if weights else ()), *(("*.py",) if code else ())]
    left = [pattern for pattern in LEFT if not (code and pattern == "*.py")]
    options: dict[str, Any] = {"revision": revision, "allow_patterns": allowed, "ignore_patterns": left}
    try:
        snapshot = Path(huggingface_hub.snapshot_download(repository, **options))
    except Exception as error:  # also of the HTTP library underneath, whichever it is
        reasons = {
            errors.GatedRepoError: f"the hub gives {shown} only to those who accepted its terms: log in with "
            "`hf auth login`",
            errors.RevisionNotFoundError: f"the hub's {repository} has no such revision: model={shown!r}",
            errors.RepositoryNotFoundError: "no such directory, and the hub has no such model (or a private one): "
            f"model={shown!r}",
            errors.IncompleteSnapshotError: f"{shown}: the download is not whole, and the hub {no_answer(error)}",
            errors.LocalEntryNotFoundError: "no such directory, not whole in the hub's cache, and the hub "
            f"{no_answer(error)}: model={shown!r}",
            Exception: f"{shown}: the hub does not give it: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300] or type(error).__name__}",
        }
        raise ValueError(next(said for kind, said in reasons.items() if isinstance(error, kind))) from None
    check_whole(snapshot, shown, weights)
    return snapshot


def no_answer(error: BaseException) -> str:
    """Why the hub gave nothing, in words that follow "the hub"."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "is not asked (HF_HUB_OFFLINE is set)"
    cause = error.__cause__ or error
    does = "does not give it" if isinstance(cause, errors.HfHubHTTPError) else "cannot be reached"
    return f"({constants.ENDPOINT}) {does}: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"


def check_whole(snapshot: Path, shown: str, weights: bool) -> None:
    """Raises ValueError if the snapshot lacks its configuration or, where they are wanted, any of its weights."""
    if not (snapshot / "config.json").is_file():
        raise ValueError(f"{shown}: the hub's repository has no config.json")
    if not weights:
        return
    wanted = {path.name for path in snapshot.glob("*.safetensors")}
    for index in snapshot.glob("*.safetensors.index.json"):
        wanted |= set(read_object(index).get("weight_map", {}).values())
    if not wanted:
        raise ValueError(f"{shown}: the hub's repository has no weights as *.safetensors, and no others are read")
    missing = sorted(name for name in wanted if not (snapshot / name).is_file())
    if missing:
        raise ValueError(f"{shown}: the download is not whole, it lacks {', '.join(missing)}")


def cache_folder() -> Path:
    return Path(os.environ.get("ENDPROMPT_CACHE") or Path.home() / ".cache" / "endprompt")


def from_gguf(path: Path) -> Path:
    """The directory of a GGUF file's weights, rounded to bfloat16 unless ENDPROMPT_GGUF_DTYPE is float32, made once a
    file. Raises ValueError if it is no GGUF file, or of an architecture that transformers does not read, and without
    the package `gguf`.
    """
    dtype = os.environ.get("ENDPROMPT_GGUF_DTYPE") or "bfloat16"
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"the environment's ENDPROMPT_GGUF_DTYPE must be bfloat16 or float32: {dtype!r}")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"a checkpoint that is a file must be a GGUF file: model={str(path)!r}")
    digest = remembered_sha256(path)
    kept = {} if dtype == "bfloat16" else {"dtype": dtype}
    made = cache_folder() / "gguf" / "-".join([digest[:16], *kept.values()]) / path.stem
    if (made / NOTE).is_file():
        return made
    try:
        import gguf
    except ImportError:
        raise ValueError(f"a GGUF file needs the package gguf (pip install gguf): model={str(path)!r}") from None
    note = {"file": path.name, "sha256": digest} | kept
    return made_once(made, lambda aside: note | dequantise(path, aside, gguf, dtype))


def made_once(made: Path, make: Callable[[Path], dict[str, Any]]) -> Path:
    """A folder of the cache, made under a lock unless it is there whole. make: fills a folder, returns its note."""
    from filelock import FileLock

    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{made}.lock"):
        if not (made / NOTE).is_file():
            aside = made.with_name(made.name + ".making")
            shutil.rmtree(aside, ignore_errors=True)
            write_text(aside / NOTE, json.dumps(make(aside), indent=2) + "\n")
            shutil.rmtree(made, ignore_errors=True)
            os.replace(aside, made)
    return made


def dequantise(path: Path, directory: Path, gguf: Any, dtype: str) -> dict[str, Any]:
    """Write the file's model as a plain checkpoint; returns its quantisation and, if stated, its licence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype == "bfloat16":
        print(
            f"{path.name}: its weights are rounded to bfloat16, 2 bytes each; ENDPROMPT_GGUF_DTYPE=float32 keeps them "
            "as they are, in 4",
            file=sys.stderr,
        )
    try:
        fields = gguf.GGUFReader(path).fields
        architecture = str(fields["general.architecture"].contents())
        kind = fields.get("general.file_type")
        named = str(gguf.LlamaFileType(int(kind.contents())).name) if kind is not None else "an unstated type"
        quantisation = named.removeprefix("MOSTLY_").removeprefix("ALL_")  # such as Q4_1 or Q4_K_M
    except Exception as error:  # a damaged file makes its reader run into anything
        raise ValueError(f"{path}: the GGUF file cannot be read: {' '.join(str(error).split())}") from None
    if quantisation.startswith(COARSE):
        print(f"{path.name}: {quantisation} keeps so few bits of a weight that scores suffer", file=sys.stderr)
    options = {"gguf_file": path.name}
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
        loaded, report = both
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        config = loaded.config
        with contextlib.suppress(AttributeError):
            del config.quantization_config  # with it transformers refuses to save
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        plain.generation_config = loaded.generation_config
        plain.load_state_dict(loaded.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except Exception as error:  # as above
        message = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: transformers does not read this GGUF file, architecture {architecture!r}: {message}"
        ) from None
    licence = fields.get("general.license")
    return {"quantisation": quantisation} | ({"licence": str(licence.contents())} if licence else {})
