"""The project's own base models: one command makes each again from nothing.

text and documents -> tokenizer -> rows -> a Llama of this shape, trained by the project's own trainer. The recipes
below are the whole of it; `benchmarks/base/` holds what they gave. How far a rebuild may differ: the text depends on
the versions of the installed packages (sources.json records them), and a GPU's sums on their order, so weights differ
in every digit and scores by about their interval; with the same prepared data the rows are the same to the byte.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.files import write_text
from endprompt.runs import plain


@dataclass(frozen=True)
class BaseRecipe:
    """Shape and training of a base model. rows: of one step; distinct: how many different rows are made."""

    window: int
    layers: int
    hidden: int
    heads: int
    steps: int
    rows: int
    distinct: int
    lr: float
    export_dtype: str
    seed: int = 0


RECIPES = {
    256: BaseRecipe(256, 4, 192, 3, steps=6000, rows=512, distinct=786_432, lr=4e-3, export_dtype="float32"),
    512: BaseRecipe(512, 6, 256, 4, steps=3500, rows=256, distinct=393_216, lr=3e-3, export_dtype="bfloat16"),
}
HEAD_DIM, INTERMEDIATE, THETA = 64, 3, 10_000.0
FOLDER = Path(__file__).parent


def model_config(recipe: BaseRecipe, tokenizer: Any) -> Any:
    """Llama shape: head_dim 64, SwiGLU of three times the hidden size, tied embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=INTERMEDIATE * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=recipe.window,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def rebuild(
    window: int, output: str, data: str = ".basedata", work: str | None = None, steps: int | None = None
) -> Path:
    """Make a base model from prepared data (`benchmarks.base.text.prepare`, called if there is none); returns its
    directory.

    work: folder for the rows, removed afterwards. steps: fewer than the recipe's, for a trial.
    Raises ValueError if there is no recipe for the window.
    """
    from transformers import AutoTokenizer

    from benchmarks.base.text import build, prepare
    from endprompt import results, train
    from endprompt.config import ExtendConfig

    if window not in RECIPES:
        raise ValueError(f"a base model's window must be one of {', '.join(map(str, RECIPES))}: {window=}")
    recipe = RECIPES[window]
    if not (Path(data) / "sources.json").is_file():
        prepare(data)
    tokenizer = AutoTokenizer.from_pretrained(Path(data) / "tokenizer")
    rows = Path(work or f"{output}.rows")
    count = recipe.distinct if steps is None else min(recipe.distinct, steps * recipe.rows)
    started = time.perf_counter()
    manifest = build(rows, window, count, recipe.seed, data=data)
    built = time.perf_counter() - started
    config = ExtendConfig(
        model=f"random weights, window {window}",
        data=[str(rows)],
        output=output,
        target=window,
        scheme="contiguous",
        scaling="none",
        rows=recipe.rows,
        steps=steps or recipe.steps,
        lr=recipe.lr,
        warmup=50,
        schedule="linear",
        seed=recipe.seed,
        autocast=True,
        export_dtype=recipe.export_dtype,
        log_every=100,
        overwrite=True,
    )
    path = train.pretrain(config, model_config(recipe, tokenizer), tokenizer)
    record = json.loads((path / results.RECORD).read_text(encoding="utf-8"))
    about = {"recipe": plain(vars(recipe)), "rows": manifest, "seconds_for_rows": round(built, 1)}
    write_text(path / results.RECORD, json.dumps(record | {"method": "base", "base": about}, indent=2) + "\n")
    shutil.copy(Path(data) / "sources.json", path / "sources.json")
    shutil.rmtree(rows)
    return path


if __name__ == "__main__":
    import sys

    size, target, *text = sys.argv[1:]
    print(rebuild(int(size), target, text[0] if text else ".basedata"))
