"""What a cell is estimated to take: FLOPs of training and scoring, seconds on a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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


ALONE = 50_000_000  # models from this many parameters on keep a GPU busy by themselves
#: Of such a model on an H200: FLOP/s of reading prompts, seconds of a step of generation with the caches of its batch,
#: and of a cell beside. From cells of preset smollm2-small, 127 s with training (50 s of it) and 77 s without.
READING, GENERATED_STEP, CELL = 3.7e14, 0.006, 15.0
#: Tokens of one of LongBench's prompts, the mean of the five sets that SmolLM2 is scored on, and of a long answer.
SET_PROMPT, SET_ANSWER = 7_000, 200


def fills_a_gpu(cell: Cell) -> bool:
    return base_shape(cell.model).multiplied >= ALONE


@cache
def planned_speed(model: str, target: int, row_tokens: int, rows: int) -> float:
    """Tokens/s of training on one H200, by `plan` with float32 masters."""
    from endprompt.plan import PlanConfig, plans

    return plans(PlanConfig(model, target=target, row_tokens=row_tokens, rows=rows, optimizer="adamw"))[0].tokens_per_s


def alone_seconds(cell: Cell) -> float:
    """Of a cell that has an H200 to itself: training as planned, prompts, and steps of generation by their memory."""
    tokens = cell.steps * cell.rows * cell.row_tokens
    training = tokens / planned_speed(cell.model, cell.target, cell.row_tokens, cell.rows) if tokens else 0.0
    batches = sum(len(cell.scoring.tasks) * -(-cell.scoring.count(length) * length // 2**19) for length in cell.lengths)
    new = cell.scoring.max_new_tokens or 96
    sets = sum(-(-count * SET_PROMPT // 2**19) for count in cell.scoring.longbench.values())
    steps = batches * new + sets * SET_ANSWER
    return CELL + training + score_flops(cell) / READING + steps * GENERATED_STEP


def train_flops(cell: Cell) -> float:
    """Floating-point operations of a cell's training: 6 a parameter and token, and causal attention."""
    shape = base_shape(cell.model)
    each = 6 * shape.multiplied + 6 * shape.layers * shape.query * cell.row_tokens
    return float(cell.steps * cell.rows * cell.row_tokens * each)


def score_flops(cell: Cell) -> float:
    """Of reading all prompts and the held-out text once."""
    shape, scoring = base_shape(cell.model), cell.scoring
    read = [(n, len(scoring.tasks) * scoring.count(n) + scoring.loss_rows) for n in cell.lengths]
    read.append((min(SET_PROMPT, cell.target), sum(scoring.longbench.values())))
    each = 2 * shape.multiplied
    return float(sum(n * count * (each + 2 * shape.layers * shape.query * n) for n, count in read))


def seconds(cell: Cell, device: str) -> float:
    if device == "cuda" and fills_a_gpu(cell):
        return alone_seconds(cell)
    rate = RATES[device]
    training = max(train_flops(cell) / rate.flops, cell.steps * rate.step)
    if device == "cuda" and cell.settings.get("lora_rank"):
        training *= PLAIN_STEPS
    return rate.cell + training + score_flops(cell) / rate.flops
