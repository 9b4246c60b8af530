"""`endprompt verify`: bounds on real weights, what the gap can hide, and what training changed.

For every layer and head the same pairs of places of a text are taken, their spectra checked against the model's own
logits, and their maxima over all distances 0..L-1 held against bounds over the whole line. Rows that show every
distance leave no gap: what is about it is left out then. Values are logits (attention factor squared and 1/sqrt(D)
included).
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from analysis import outlook
from analysis.config import VerifyConfig
from analysis.findings import Findings, VerifyReport
from analysis.scene import prepare, read_layers
from endprompt.files import sole_use, write_text
from endprompt.results import read_rows, write_rows
from endprompt.runs import RunDirectory

CURVES = "curves.json"
#: Layers that are examined at a time while a GPU reads on; on a CPU the sweep itself takes all cores.
LAYERS = 4


def verify(config: VerifyConfig) -> VerifyReport:
    """Examine a checkpoint; rows, curves and figures go into config.output. Raises ValueError for impossible sizes."""
    from analysis import figures

    scene = prepare(config)
    config = scene.config
    before: dict[int, Any] = {}
    if config.against:  # this model is let go before the other is loaded
        read_layers(config.against, scene, lambda layer: before.__setitem__(layer.layer, layer))
    with ThreadPoolExecutor(LAYERS) as pool:  # what asks for no weights goes first
        ahead = pool.submit(outlook.outlook, scene.geometry, scene.window, scene.length, scene.context, config)
        findings = Findings(scene, pool if config.device.startswith("cuda") else None)
        read_layers(config.checkpoint, scene, lambda layer: findings.add(layer, before.pop(layer.layer, None)))
    report = findings.report(ahead.result())
    with sole_use(config.output):
        run = RunDirectory(config.output, config)
        replace_rows(run, report.rows)
        write_text(run.path / CURVES, json.dumps(report.curves, allow_nan=False) + "\n")
        figures.draw_at_once(run.path / CURVES, run.path, config.formats)
    return report


def replace_rows(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    """Add the rows; those of an earlier verification of the same checkpoint in this directory make room."""
    own = {(row["suite"], row["model"], row["method"]) for row in rows}
    if run.results.exists():
        kept = [row for row in read_rows(run.results) if (row["suite"], row["model"], row["method"]) not in own]
        write_rows(run.results, kept)
    run.add(rows)
