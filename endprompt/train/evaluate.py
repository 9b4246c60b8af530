"""Evaluation during training: the loss on held-out text at several lengths, and a small needle score.

Rows are contiguous, of the length that is measured. The needle is a number hidden in the text; a row counts if each
token of the number is the most likely one, given all before it. This watches a run; benchmarks are scored apart.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from endprompt import distributed
from endprompt.data import Documents
from endprompt.distributed import World
from endprompt.files import sha256_of
from endprompt.model.length_rope import reading
from endprompt.positions import sample_rng

PARTS = 16  # of a row, whose losses are told apart
NEEDLE = " The pass key is {key}. Remember it: {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is"

Row = tuple[np.ndarray, np.ndarray]
#: (input_ids, position_ids, weights, hits or parts) -> float32 sum or sums
Objective = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """task: `held_out` (metric loss, nats a token) or `needle` (metric exact_match, percent). n: rows, samples_sha256:
    of their tokens and weights."""

    task: str
    metric: str
    length: int
    value: float
    n: int
    samples_sha256: str


def held_out_rows(documents: Documents, length: int, count: int, lead: Sequence[int] = ()) -> list[Row]:
    """Up to `count` rows of `length` tokens: windows evenly spaced over the held-out text without overlap. lead: ids in
    front of each, as in a row of training (BOS): without them some models read text far worse. Of conversations what
    the assistant wrote counts, as in training. Raises ValueError if the text is shorter than one window, or nothing of
    it counts.
    """
    total, taken = len(documents.tokens), length - len(lead)
    if total < taken:
        raise ValueError(f"the held-out text must be as long as an evaluation length: eval_lengths={length}, {total=}")
    count = min(count, total // taken)
    starts = np.linspace(0, total - taken, count).astype(np.int64)
    rows = []
    for start in starts:
        window = slice(start, start + taken)
        counted = np.ones(taken) if documents.weights is None else documents.weights[window]
        weights = np.concatenate([np.zeros(len(lead)), counted]).astype(np.float32)
        weights[0] = 0.0
        rows.append((np.asarray([*lead, *documents.tokens[window]], dtype=np.int64), weights))
    if not any(weights.any() for _, weights in rows):
        raise ValueError(f"no token of the held-out rows is the assistant's: eval_lengths={length} eval_rows={count}")
    return rows


def needle_rows(
    documents: Documents,
    length: int,
    count: int,
    encode: Callable[[str], list[int]],
    seed: int,
    lead: Sequence[int] = (),
) -> list[Row]:
    """`count` windows with a number hidden at evenly spread depths and asked for at the end; weight on the number.
    encode: text to token ids as it stands after other text (`data.encoder`). Raises ValueError if needle and question
    do not fit into the length.
    """
    rows = []
    for index in range(count):
        key = str(sample_rng(seed, index).integers(10_000, 100_000))
        needle, question, asked = encode(NEEDLE.format(key=key)), encode(QUESTION), encode(f"{QUESTION} {key}")
        shared = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(question, asked)))
        question, answer = asked[:shared], asked[shared:]  # the answer as it stands in the text
        room = length - len(lead) - len(needle) - len(question) - len(answer)
        if room < 1:
            raise ValueError(
                f"needle and question take {length - room} tokens, a row must be longer: eval_lengths={length}"
            )
        if len(documents.tokens) < room:
            raise ValueError(
                f"the held-out text must fill a needle row: it has {len(documents.tokens)} of {room} tokens, "
                f"eval_lengths={length}"
            )
        start = int(sample_rng(seed + 1, index).integers(len(documents.tokens) - room, endpoint=True))
        text = np.asarray(documents.tokens[start : start + room], dtype=np.int64)
        depth = round(room * (index + 0.5) / count)
        ids = np.concatenate([lead, text[:depth], needle, text[depth:], question, answer]).astype(np.int64)
        weights = np.zeros(length, dtype=np.float32)
        weights[-len(answer) :] = 1.0
        rows.append((ids, weights))
    return rows


class Evaluation:
    """The rows of all lengths, made once; `measure` runs the model over them."""

    def __init__(
        self,
        documents: Documents,
        lengths: list[int],
        rows: int,
        needles: int,
        encode: Callable[[str], list[int]],
        seed: int,
        lead: Sequence[int] = (),
    ):
        self.rows = {length: held_out_rows(documents, length, rows, lead) for length in lengths}
        #: of each length, as last measured: by equal parts of the row, where each has tokens that count
        self.by_position: dict[int, list[float]] = {}
        asked = lengths if needles else []
        self.needles = {length: needle_rows(documents, length, needles, encode, seed, lead) for length in asked}

    @property
    def asked(self) -> set[tuple[str, int, str]]:
        """(task, length, samples_sha256) of what is measured."""
        kinds = (("held_out", self.rows), ("needle", self.needles))
        return {(task, length, rows_sha256(rows)) for task, made in kinds for length, rows in made.items()}

    @torch.no_grad()
    def measure(self, objective: Objective, here: World) -> Iterator[Measured]:
        """One result a task and length. Every process must call it; each takes its share of the rows."""
        for length, rows in self.rows.items():
            sums = _sum(objective, rows, here, parts=min(PARTS, length - 1))
            weights = np.sum([weights[1:] for _, weights in rows], axis=0)
            counts = [float(part.sum()) for part in np.array_split(weights, len(sums))]
            if all(counts):
                self.by_position[length] = [value / count for value, count in zip(sums, counts)]
            loss = sum(sums) / sum(counts)
            yield Measured("held_out", "loss", length, loss, len(rows), rows_sha256(rows))
        for length, rows in self.needles.items():
            (hits,) = _sum(objective, rows, here, hits=True)
            yield Measured("needle", "exact_match", length, 100.0 * hits / len(rows), len(rows), rows_sha256(rows))


def rows_sha256(rows: list[Row]) -> str:
    return sha256_of(*(array.tobytes() for row in rows for array in row))


def _sum(objective: Objective, rows: list[Row], here: World, **what: Any) -> list[float]:
    """Sums over the rows: of losses, by `parts` of the positions, or of `hits`."""
    device, hits = torch.device(here.device), "hits" in what
    total = torch.zeros(what.get("parts", 1), device=device)
    for first in range(0, len(rows), here.shares):
        place = first + here.share
        ids, weights = rows[min(place, len(rows) - 1)]
        positions = torch.arange(len(ids), device=device)[None]
        row = torch.from_numpy(ids).to(device)[None], positions, torch.from_numpy(weights).to(device)[None]
        with reading(int(weights.argmax())) if hits else contextlib.nullcontext():  # frequencies as in generation
            value = objective(*row, **what)
        total += value * (place < len(rows))  # processes without a row of their own still take part in the gathering
    sums: list[float] = distributed.total(total).tolist()
    return sums
