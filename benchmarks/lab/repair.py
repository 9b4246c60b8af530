"""What training repairs: measures of an extended checkpoint, head by head, before it was trained and after.

    python -m benchmarks.lab.repair --base CHECKPOINT --target 65536 --trained FOLDER ... --device cuda --output FILE

FOLDER: extended checkpoints with their record, as `endprompt lab --keep-checkpoints` leaves them. The text is that of
`endprompt predict`. Each is compared with the base inside its own window, and so are the base's weights under the
scaling of each before training: steps 0. A row for each checkpoint and measure, `heads` the values by layer and head
(of layers that an extension scales), `value` their mean; and for the base the share of each head's score that distance
alone carries (`distance_share`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from analysis import predict
from analysis.config import PredictConfig
from endprompt.model import load_config
from endprompt.results import recorded, result_row, write_rows
from endprompt.runs import git_revision

#: Measures that each head has.
BY_HEAD = ("entropy", "entropy_plain", "sink_lost", "attention_moved", "separation_lost", "distance_change")


def measured(config: PredictConfig, trained: Any, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one checkpoint, `trained` as of `analysis.predict.read`."""
    reading = predict.read(config, trained=trained)
    values = {key: reading.found["trained"][key] for key in BY_HEAD}
    if not about["steps"]:
        values["distance_share"] = reading.weights
    rows = []
    for key, layers in values.items():
        heads = [[round(float(x), 4) for x in layer] for layer in layers]
        about |= {"heads": heads, "window": reading.window, "length": reading.target}
        value = float(np.concatenate(layers).mean())
        rows.append(result_row(suite="analysis", task="repair", metric=key, value=value, seed=None, **about))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--target", required=True, type=int)
    parser.add_argument("--trained", required=True, nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args(argv)
    config = PredictConfig(given.base, given.target, tokens=given.tokens, device=given.device)
    common = {"model": Path(given.base).name, "device": given.device, "tokens": given.tokens}
    common |= {"text": "analysis/sample.txt", "revision": git_revision()}
    rows: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for folder in given.trained:
        if (target := recorded(folder).get("target")) != given.target:
            raise ValueError(f"target must be what {folder} was extended to, {target}: target={given.target}")
        record = recorded(folder)["config"]
        settings = load_config(folder)
        before.setdefault(str(settings.rope_parameters), (record["scaling"], settings))
        about = {"method": f"{record['scheme']}+{record['scaling']}", "scaling": record["scaling"]}
        about |= {"scheme": record["scheme"], "steps": record["steps"], "train_tokens": recorded(folder)["tokens"]}
        rows += measured(config, str(folder), common | about)
    for scaling, settings in before.values():
        about = {"method": f"untrained+{scaling}", "scaling": scaling, "scheme": None, "steps": 0, "train_tokens": 0}
        rows += measured(config, (given.base, settings), common | about)
    write_rows(given.output, rows)
    for row in rows:
        print(row["method"], row["steps"], row["metric"], f"{row['value']:+.3f}")


if __name__ == "__main__":
    main()
