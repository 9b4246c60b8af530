"""Measures of an extended checkpoint beside those of its base."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import predict
from analysis.config import PredictConfig
from benchmarks.lab import repair
from endprompt.model import extended_config, load_config, load_model, load_tokenizer
from endprompt.results import read_rows
from endprompt.text import Reader

BASE = "benchmarks/base/256"


def test_what_training_changes_is_measured_head_by_head(tmp_path):
    """Layer 0 sees no RoPE before it: untrained it is the base's own under the scaling. Queries of 0 attend evenly."""
    settings = extended_config(load_config(BASE), "yarn", 2048)
    config = PredictConfig(BASE, 2048, tokens=256)
    model = load_model(BASE, config=settings)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[64:128] = 0
    model.save_pretrained(tmp_path / "trained")
    record = {"window": 256, "target": 2048, "tokens": 7, "config": {"scheme": "pose", "scaling": "yarn", "steps": 3}}
    (tmp_path / "trained" / "endprompt.json").write_text(json.dumps(record))
    repair.main(["--base", BASE, "--target", "2048", "--trained", str(tmp_path / "trained"), "--tokens", "256",
                 "--output", str(tmp_path / "rows.jsonl")])  # fmt: skip
    with pytest.raises(ValueError, match="was extended to, 2048: target=4096"):
        repair.main(["--base", BASE, "--target", "4096", "--trained", str(tmp_path / "trained"), "--output", "x"])
    rows = {(r["steps"], r["metric"]): r for r in read_rows(tmp_path / "rows.jsonl")}
    scaled = predict.read(config, ["yarn"])
    for key in repair.BY_HEAD:
        before, after = (np.array(rows[steps, key]["heads"]) for steps in (0, 3))
        assert before.shape == after.shape == (4, 3)
        np.testing.assert_allclose(before[0], scaled.found["yarn"][key][0], atol=6e-5, err_msg=key)
        np.testing.assert_allclose(after[0, [0, 2]], before[0, [0, 2]], atol=1e-4, err_msg=key)
        assert rows[0, key]["value"] == pytest.approx(before.mean(), abs=1e-4)
    places = 2048 - 256 + scaled.base.query.numpy()
    even = np.log(places + 1).mean()
    changed = np.array(rows[3, "entropy"]["heads"])[0, 1]
    assert changed == pytest.approx(even - entropy_in_the_window(), abs=1e-3)
    assert rows[3, "entropy"]["train_tokens"] == 7 and {r[1] for r in rows if not r[0]} - {*repair.BY_HEAD} == {
        "distance_share"
    }


def entropy_in_the_window():
    """Of head 1 in layer 0 of the base, from eager attention's own weights."""
    text = Path("analysis/sample.txt").read_text(encoding="utf-8")
    ids = Reader(load_tokenizer(BASE)).prompts([text])[0][:256]
    with torch.no_grad():
        p = load_model(BASE, attention="eager")(torch.as_tensor(ids)[None], output_attentions=True).attentions[0][0, 1]
    return float(torch.special.entr(p).sum(-1)[torch.linspace(128, 255, 8).round().long()].mean())
