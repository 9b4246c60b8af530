"""Bases whose heads each sharpen attention by a factor of their own, and the matrix of preset `controls` for them.

    python -m benchmarks.lab.heads FOLDER
    endprompt lab --matrix FOLDER/heads.yaml

The factors are those of `analysis.predict.even_factor` with YaRN's frequencies: each head has at the target the entropy
that it has in the window, before any training. They go into the queries, W_q f^2, so the scaling of the arms is yarn@1.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from analysis.config import PredictConfig
from analysis.predict import even_factor
from benchmarks.lab.matrix import base_directory, presets, read_matrix


def sharpen(base: str, target: int, folder: Path) -> None:
    """Write the base with its heads' factors for that target to a folder."""
    source = base_directory(base)
    _, factors = even_factor(PredictConfig(str(source), target), "yarn")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    for number, factor_H in enumerate(factors):
        queries = weights[f"model.layers.{number}.self_attn.q_proj.weight"]
        for rows, factor in zip(queries.chunk(len(factor_H)), factor_H):
            rows *= factor**2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main(folder: str) -> None:
    content = read_matrix(presets()["controls"])
    for block in content["blocks"]:
        own = Path(folder, f"{block['base']}-{block['target']}")
        sharpen(str(block["base"]), block["target"], own)
        block |= {"base": str(own), "runs": [block["runs"][0] | {"scaling": ["yarn@1"]}]}
    Path(folder, "heads.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
