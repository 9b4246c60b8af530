"""What a cell is estimated to take: FLOPs of training and scoring, seconds on a device."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.lab.matrix import Cell, base_shape


@dataclass(frozen=True)
class Rate:
    """What one worker reaches: FLOP/s in training and scoring, seconds of a step at least, seconds of a cell beside."""

    flops: float
    step: float
    cell: float
    start: float


#: Steps that are not recorded as a graph take so much longer on a shared GPU (LongLoRA's: 53 s where 18 were expected).
PLAIN_STEPS = 3.0

#: By measurement: on two CPU cores, and on an H200 that 8 workers share, with deterministic training. There it says
#: 14.2 minutes for ten seeds of preset micro, which took 15.8.
RATES = {"cpu": Rate(7.0e10, 0.0, 1.5, 15.0), "cuda": Rate(2.0e13, 0.010, 1.5, 15.0)}


def train_flops(cell: Cell) -> float:
    """Floating-point operations of a cell's training: 6 a parameter and token, and causal attention."""
    shape = base_shape(cell.model)
    each = 6 * shape.parameters + 6 * shape.layers * shape.width * cell.row_tokens
    return float(cell.steps * cell.rows * cell.row_tokens * each)


def score_flops(cell: Cell) -> float:
    """Of reading all prompts and the held-out text once."""
    shape, scoring = base_shape(cell.model), cell.scoring
    total = 0.0
    for length in cell.lengths:
        tokens = length * (len(scoring.tasks) * scoring.samples + scoring.loss_rows)
        total += tokens * (2 * shape.parameters + 2 * shape.layers * shape.width * length)
    return total


def seconds(cell: Cell, device: str) -> float:
    """What a worker is expected to need for a cell."""
    rate = RATES[device]
    training = max(train_flops(cell) / rate.flops, cell.steps * rate.step)
    if device == "cuda" and cell.settings.get("lora_rank"):
        training *= PLAIN_STEPS
    return rate.cell + training + score_flops(cell) / rate.flops
