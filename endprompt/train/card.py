"""The model card of an extended checkpoint: README.md with the hub's metadata, from what the run noted of itself.

Names of files only, never their folders. The licence is the one that the base's own card states, or none: nobody here
can grant it. Results stand in the metadata's `model-index` and, with their intervals, in a table.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from endprompt import origin
from endprompt.files import read_object, write_text
from endprompt.results import RECORD

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from jinja2 import Template

CARD = "README.md"
#: What makes a checkpoint, as it is taken from the hub; logs, states and notes that name folders stay here.
UPLOADED = (*origin.FILES, *origin.WEIGHTS)
SUITES = {"ruler": "RULER", "longbench": "LongBench", "short": "short-text tasks"}


def write_card(directory: str | Path, results: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write a checkpoint's README.md; returns its path. results: its rows. ValueError: `extend` did not write it."""
    directory = Path(directory)
    path = directory / CARD
    write_text(path, card(read_record(directory), results, directory.name.removesuffix(".partial")))
    return path


def read_record(directory: Path) -> dict[str, Any]:
    """What a finished run noted of itself. Raises ValueError naming file and key if that is not there."""
    path = directory / RECORD
    if not path.is_file():
        raise ValueError(f"a model card needs a checkpoint that `endprompt extend` wrote: {path} does not exist")
    record = read_object(path)
    for key in ("config", "environment"):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"{path}: must hold an object `{key}`")
    for key in ("method", "model", "window", "target", "steps", "tokens", "row_tokens"):
        if record.get(key) is None:
            raise ValueError(f"{path}: must hold `{key}`: the card is for an extended checkpoint")
    return record


def card(record: Mapping[str, Any], results: Sequence[Mapping[str, Any]], name: str) -> str:
    """Metadata and text of the card. name: of the model."""
    from huggingface_hub import ModelCardData

    config = record["config"]
    data = ModelCardData(
        base_model=base if re.fullmatch(r"([\w.-]+/)?[\w.-]+", base := hub_name(config["model"])) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "rope", "endprompt-lab", config["scheme"], f"rope-{config['scaling']}"],
        model_name=name,
        eval_results=[eval_result(row) for row in results] or None,
        **licence(Path(config["model"])),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text(record, results, name)}"


def hub_name(model: str) -> str:
    """The base's name on the hub as far as its path tells (the hub's own cache does), else its folder's name."""
    return origin.hub_of(model).get("hub") or origin.name_of(model)


def licence(base: Path) -> dict[str, Any]:
    """The licence as the base's own card or GGUF file states it; empty if there is none, or it cannot be read."""
    import yaml

    if isinstance(noted := origin.about(base).get("licence"), str):
        return {"license": noted}
    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*\n", (base / CARD).read_text(encoding="utf-8") + "\n", re.DOTALL)
        stated = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(stated, dict) or not isinstance(stated.get("license"), str):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: stated[key] for key in keys if isinstance(stated.get(key), str)}


def eval_result(row: Mapping[str, Any]) -> EvalResult:
    """A row of results as the hub's `model-index` holds it."""
    from huggingface_hub import EvalResult

    suite = SUITES.get(row["suite"], row["suite"])
    at = "" if row["length"] is None else f" at {row['length']} tokens"
    return EvalResult(
        task_type="text-generation",
        dataset_type=row["suite"],
        dataset_name=f"{suite} {row['task']}{at}",
        dataset_config=row["task"] if row["length"] is None else f"{row['task']}@{row['length']}",
        metric_type=row["metric"],
        metric_name=f"{row['metric']}, percent",
        metric_value=round(row["value"], 4),
        metric_args={key: row[key] for key in ("n", "ci95", "seed") if row.get(key) is not None} or None,
    )


@functools.cache
def template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(loader=PackageLoader("endprompt"), undefined=StrictUndefined, keep_trailing_newline=True)
    return templates.get_template("card.md")


def text(record: Mapping[str, Any], results: Sequence[Mapping[str, Any]], name: str) -> str:
    config = record["config"]
    return template().render(
        name=name,
        base=hub_name(config["model"]),
        window=record["window"],
        target=record["target"],
        facts=facts(record),
        adapter=config.get("adapter") == "only",
        dynamic=config["scaling"] == "dynamic",  # vLLM's frequencies do not change with the length, its table ends
        rows=[score_cells(row) for row in results],
    )


def facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What the card's first table says, in its order."""
    config, environment = record["config"], record["environment"]
    scaling, tuned = str(config["scaling"]), record["target"] == record["window"]
    if tuned:
        scaling = "as the base has it"
    elif scaling != "none":
        scaling += f", factor {record.get('factor') or config.get('factor') or record['target'] / record['window']:g}"
    if config.get("rope_options"):
        scaling += ", " + ", ".join(f"{key}={value}" for key, value in config["rope_options"].items())
    loss = record.get("final_loss")
    kept = {"beside": "merged, and as an adapter in adapter/", "only": "as an adapter"}
    told = kept.get(config.get("adapter", ""), "merged")
    base = "the base in 4 bits, " if config.get("quantize") == "4bit" else ""
    sources = [one if one.startswith("hub:") else PurePath(one).name for one in config["data"]]
    found = {
        "method": f"`{record['method']}`",
        "position scheme": str(config["scheme"]),
        "end prompt": f"{record['prompt_tokens']} tokens" if record.get("prompt_tokens") else "none",
        "RoPE scaling": scaling,
        "window": f"{record['window']:,} tokens, as before"
        if tuned
        else f"{record['window']:,} to {record['target']:,} tokens",
        "weights trained": f"LoRA, rank {config['lora_rank']}, {base}{told}" if config.get("lora_rank") else "all",
        "training data": ", ".join(f"`{source}`" for source in sources),
        "training tokens": f"{record['tokens']:,}",
        "steps": f"{record['steps']:,} of {config['rows']} rows of {record['row_tokens']:,} tokens",
        "learning rate, schedule": f"{config['lr']:g}, {config['schedule']}",
        "final training loss": "unknown" if loss is None else f"{loss:.4f}",
        "seed": str(config["seed"]),
        "revision of EndPrompt Lab": str(environment.get("revision") or "not known (installed without a checkout)"),
    }
    if source := origin.told(record.get("origin") or {}):
        found["base from"] = source
    if record.get("weights"):
        found["differs from the base's files"] = "; ".join(record["weights"])
    versions = environment.get("packages", {})
    found["made with"] = ", ".join(f"{key} {versions[key]}" for key in ("torch", "transformers") if key in versions)
    return {key: value.replace("|", "\\|") for key, value in found.items()}


def score_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of results as a line of the card's table."""
    suite, length = SUITES.get(row["suite"], row["suite"]), "" if row["length"] is None else f"{row['length']:,}"
    interval = "" if row["ci95"] is None else f"{row['ci95'][0]:.1f} to {row['ci95'][1]:.1f}"
    n = "" if row["n"] is None else str(row["n"])
    return [suite, row["task"], length, row["metric"], f"{row['value']:.1f}", interval, n]


def push(directory: str | Path, repository: str) -> str:
    """Upload a checkpoint to the hub (a new repository is a private one) after the user has typed the repository's
    name; returns its address. Raises ValueError if the name is not typed, or if the hub refuses.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"push_to_hub must be a repository as OWNER/NAME: push_to_hub={repository!r}")
    names = sorted(p.name for p in directory.iterdir() if p.is_file() and any(map(p.match, UPLOADED)))
    print(f"to upload to {repository}: {', '.join(names)}", file=sys.stderr)
    print(f"type {repository} to confirm: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != repository:
        raise ValueError("nothing was uploaded: the name that was typed is not the repository's")
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=directory, allow_patterns=names, commit_message="Checkpoint and model card"
        )
    except Exception as error:  # the hub's client raises errors of several libraries, which may quote a header
        said = re.sub(r"hf_\w+|(?i:bearer)\s+\S+", "(token)", str(error))
        raise ValueError(f"the hub refused {repository}: {said}") from None
    return str(done)
