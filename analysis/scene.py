"""What verify looks at: checkpoints, text, heads, distances, and the pass that captures them."""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from analysis import observability
from analysis.capture import capture, choose_pairs
from analysis.config import VerifyConfig
from endprompt.files import read_text, sha256_of
from endprompt.positions import Intervals
from endprompt.results import recorded
from endprompt.text import Reader

#: Seconds between lines about the layers, where there is no terminal for a bar.
LINE_SECONDS = 10.0


@dataclass
class Scene:
    """What is examined: a text, pairs of places in it, and the distances that training observed and did not."""

    config: VerifyConfig
    geometry: Any
    ids: np.ndarray
    pairs: Any
    window: int
    length: int
    context: int
    omega: np.ndarray
    attention_factor: float
    observed: Intervals
    gap: Intervals
    samples: str
    heads: list[tuple[int, int]]
    without_rope: list[int] = dataclasses.field(default_factory=list)
    sliding: dict[int, int] = dataclasses.field(default_factory=dict)  # layer -> tokens that it sees, below the target
    kinds: list[str] = dataclasses.field(default_factory=list)  # a line each, where there is more than one


def prepare(config: VerifyConfig) -> Scene:
    """Everything but the weights. Raises ValueError for sizes that cannot be, before anything is loaded."""
    from endprompt import model as models
    from endprompt.model.kinds import described
    from endprompt.model.wrapper import text_checkpoint

    check_means(config)
    config = dataclasses.replace(
        config,
        checkpoint=str(text_checkpoint(config.checkpoint)),
        against=str(text_checkpoint(config.against)) if config.against else None,
    )
    settings = models.load_config(config.checkpoint)
    geometry = models.rope_geometry(settings)
    base = models.load_config(config.against) if config.against else None
    if base is not None:
        same = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
        differing = [key for key in same if getattr(base, key, None) != getattr(settings, key, None)]
        if differing:
            raise ValueError(
                f"against must be the model before extension, of the same architecture: against={config.against!r} "
                f"differs in {', '.join(differing)}"
            )
    config, window, length = resolved(config, settings, base)
    scheme, context, prompt, count = config.scheme, config.context, config.prompt, config.count
    assert scheme is not None and context is not None and prompt is not None and count is not None
    observed, gap = observability.distance_segments(length, context, prompt, scheme, count=count)
    omega, attention_factor = geometry.frequencies(length)
    ids = read_ids(config, settings, window)
    pairs = choose_pairs(ids.size, config.pairs, config.seed)
    samples = sha256_of(ids.tobytes(), pairs.query.tobytes(), pairs.key.tobytes())
    heads = parse_heads(config.heads, settings.num_hidden_layers, settings.num_attention_heads)
    read = (config, geometry, ids, pairs, window, length, context, omega, attention_factor, observed, gap)
    lines = described(settings, length)
    kinds = lines if len(lines) > 1 else []
    return Scene(*read, samples, heads, sliding=narrower(settings, length), kinds=kinds)


def read_ids(config: Any, settings: Any, window: int) -> np.ndarray:
    """The text's first tokens, int64, as many as are asked for and the window holds."""
    from endprompt.model.load import check_tokens, check_vocabulary, load_tokenizer

    text = read_text(str(files("analysis") / "sample.txt") if config.text is None else config.text)
    tokenizer = load_tokenizer(config.checkpoint)
    check_vocabulary(settings, tokenizer)
    ids = np.asarray(Reader(tokenizer).prompts([text])[0], dtype=np.int64)[: min(config.tokens, window)]
    check_tokens(ids, settings, tokenizer, config.text or "sample.txt")
    return ids


def check_means(config: Any) -> None:
    """Raises ValueError for a device that is not there or a noise that cannot be."""
    import torch

    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has: device={config.device!r}, torch finds no CUDA")
    if not config.noise > 0:
        raise ValueError(f"the noise of an observed score must be positive: noise={config.noise}")


def narrower(settings: Any, length: int) -> dict[int, int]:
    """Layers that see less than a length, and how much; none if all do, for then there are no others to read."""
    from endprompt.model.kinds import layer_kinds

    kinds = layer_kinds(settings)
    if not any(kind.sees(length) and kind.parameters for kind in kinds):
        return {}
    return {layer: kind.reach for kind in kinds if kind.reach and kind.reach < length for layer in kind.layers}


def parse_heads(names: str, layers: int, heads: int) -> list[tuple[int, int]]:
    """(layer, head) of each `layer.head` in a list with commas. Raises ValueError if the model has no such head."""
    found = []
    for name in filter(None, names.split(",")):
        layer, _, head = name.strip().partition(".")
        if not (layer.isdigit() and head.isdigit() and int(layer) < layers and int(head) < heads):
            raise ValueError(f"heads must be layer.head of a model with {layers} layers of {heads} heads: {name!r}")
        found.append((int(layer), int(head)))
    return found


def resolved(config: VerifyConfig, settings: Any, base: Any | None) -> tuple[VerifyConfig, int, int]:
    """(the configuration with target, scheme, context, prompt and count; window before extension; window after it).
    Flags go before the checkpoint's own record, and that before what its config says. Raises ValueError where nothing
    says what the window was.
    """
    from endprompt.model.geometry import window_of

    record = recorded(config.checkpoint)
    known = None not in (record.get("window"), record.get("target"), record.get("row_tokens"))
    trained = record.get("config", {}) if known else {}
    rows: dict[str, Any] = {"scheme": trained.get("scheme"), "count": trained.get("anchors"), "prompt": None}
    if known:
        rows["prompt"] = record.get("prompt_tokens", 0)
    for key, usual in (("scheme", "endprompt"), ("count", 4), ("prompt", 20)):
        stated = getattr(config, key)
        rows[key] = next(value for value in (stated, rows[key], usual) if value is not None)
    now = None if known and config.window is None else window_of(settings, config.window)
    if base is not None:
        window = window_of(base).window
    else:
        window = int(record["window"]) if now is None else now.original
    length = config.target or (int(record["target"]) if now is None else now.window)
    if length <= window and config.context is None:
        raise ValueError(
            f"the target must be above the window that was trained: target={length} window={window} "
            "(give --target; or --against the base, or --context, where the config does not say what it was)"
        )
    row_tokens = int(record["row_tokens"]) if known else window
    context = row_tokens - rows["prompt"] if config.context is None else config.context
    return dataclasses.replace(config, context=context, **rows), window, length


def load(path: str, config: VerifyConfig, settings: Any = None) -> Any:
    """The model, read by its own config or another."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from endprompt import model as models

    settings = settings or models.load_config(path)
    # torch's fused attention has no soft-capping of logits and no sinks, so those families run their own
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    fused = getattr(family, "_supports_sdpa", True) and not getattr(settings, "attn_logit_softcapping", None)
    attention = "sdpa" if fused else "eager"
    return models.load_model(path, dtype=config.dtype, attention=attention, device=config.device, config=settings)


def read_layers(path: str, scene: Scene, consume: Callable[[Any], None]) -> None:
    """Run a checkpoint over the text and hand its spectra on layer by layer; a terminal shows a bar, else lines."""
    from rich.console import Console
    from rich.progress import Progress

    model = load(path, scene.config)
    console, layers = Console(stderr=True), model.config.num_hidden_layers
    plain = not console.is_terminal or console.no_color
    done, told = 0, time.monotonic()
    with Progress(console=console, transient=True, disable=plain) as progress:
        bar = progress.add_task(f"verify {Path(path).name}: layers", total=layers)

        def pass_on(layer: Any) -> None:
            nonlocal done, told
            if layer.layer not in scene.sliding:
                consume(layer)
            progress.advance(bar)
            done += 1
            if plain and time.monotonic() - told >= LINE_SECONDS:
                print(f"verify {Path(path).name}: {done} of {layers} layers", file=sys.stderr, flush=True)
                told = time.monotonic()

        without_rope: list[int] = []
        capture(model, scene.ids, scene.pairs, pass_on, without_rope=without_rope)
    scene.without_rope[:] = without_rope
    for layer, head in scene.heads:
        if layer in without_rope:
            raise ValueError(f"heads must be of layers with RoPE, which layer {layer} has not: heads={layer}.{head}")
        if layer in scene.sliding:
            raise ValueError(
                f"heads must be of layers that see the target, and layer {layer} slides: heads={layer}.{head}"
            )
