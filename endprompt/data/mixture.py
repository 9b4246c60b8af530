"""Rows of several sources in given shares of the tokens, which are shares of rows, all of one length.

Which source row `index` is of is a pure function of (seed, index). Sources are told apart two by two: one of weight w
among those that are left has floor(n w + u) of their first n rows, with u drawn once from [0, 1). So each row is of a
source with exactly its share as probability, and of any first n rows it has its share to within a row for each step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from endprompt.config import Source
from endprompt.data.documents import Documents
from endprompt.data.rows import Batch, Rows, RowSpec, stacked
from endprompt.files import sha256_of
from endprompt.positions import sample_rng

BITS = 48  # of a share as a whole number, so that nothing is rounded on the way


class Mixture:
    """Rows as `Rows` has them, from several of those. Raises ValueError for a source that no row can be made of."""

    dropped: int
    dropped_tokens: int
    truncated_tokens: int
    padding: int

    def __init__(self, sources: Sequence[Source], documents: Callable[[str], Documents], spec: RowSpec):
        self.spec, self.sources = spec, list(sources)
        self.rows: list[Rows] = []
        for place, source in enumerate(sources):
            seed = int(np.random.SeedSequence([spec.seed, place, 2]).generate_state(1)[0])
            rows = Rows(documents(source.path), dataclasses.replace(spec, seed=seed))
            if not len(rows):
                raise ValueError(
                    f"a source of the mixture runs dry: no document makes a row of at least {spec.needed} tokens "
                    f"(dropped {rows.dropped} shorter ones{rows.hint}): data={source.name!r}"
                )
            self.rows.append(rows)
        for count in ("dropped", "dropped_tokens", "truncated_tokens", "padding"):
            setattr(self, count, sum(getattr(rows, count) for rows in self.rows))
        left = np.cumsum([source.weight for source in sources][::-1])[::-1]
        self._shares = [round(source.weight / rest * 2**BITS) for source, rest in zip(sources, left)]
        draw = sample_rng(spec.seed, 0).spawn(1)[0]
        self._offsets = [int(draw.integers(2**BITS)) for _ in sources]

    def place(self, index: int) -> tuple[int, int]:
        """(source, which of its rows) of row `index`."""
        for source, (share, offset) in enumerate(zip(self._shares, self._offsets)):
            before, behind = ((n * share + offset) >> BITS for n in (index, index + 1))
            if behind > before or source == len(self.rows) - 1:
                return source, before if source < len(self.rows) - 1 else index
            index -= before
        raise AssertionError("a mixture has at least one source")

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows are of each source."""
        found = []
        for share, offset in zip(self._shares[:-1], self._offsets):
            found.append((rows * share + offset) >> BITS)
            rows -= found[-1]
        return [*found, rows]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source, own = self.place(index)
        return self.rows[source].row(own)

    def batch(self, first: int, count: int) -> Batch:
        return stacked([self.row(index) for index in range(first, first + count)])

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    @cached_property
    def sha256(self) -> str:
        return sha256_of(*(f"{source.weight!r} {rows.sha256}" for source, rows in zip(self.sources, self.rows)))

    @property
    def hint(self) -> str:
        return max(rows.hint for rows in self.rows)

    def record(self, rows: int) -> list[dict[str, Any]]:
        """What the first `rows` rows take of each source: share of the tokens, passes over what it has."""
        return [
            {
                "source": source.name,
                "weight": source.weight,
                "rows": count,
                "share": count / rows if rows else 0.0,
                "epochs": count / len(own),
                "documents_dropped": own.dropped,
                "tokens_dropped": own.dropped_tokens,
            }
            for source, own, count in zip(self.sources, self.rows, self.counts(rows))
        ]
