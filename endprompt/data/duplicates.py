"""Documents that were there before, as they are or nearly: the first one stays."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

SHINGLE = 5  # tokens in a row that near duplicates have in common
PERMUTATIONS = 128


class Duplicates:
    """Remembers documents of one or several sources by their tokens. kind: `exact` for the same tokens; `near` for
    those whose sets of runs of 5 tokens have a Jaccard index, estimated by MinHash (datasketch), of at least
    `threshold`; `keep` remembers nothing. Raises ValueError if `near` lacks its package.
    """

    def __init__(self, kind: str, threshold: float):
        self.kind, self.threshold = kind, threshold
        self._exact: dict[bytes, int] = {}  # the source of each
        self._near: Any = None
        self._hashes: list[tuple[Any, int]] = []
        if kind == "near":
            try:
                from datasketch import MinHashLSH
            except ImportError as error:
                raise ValueError(
                    f"duplicates=near needs a package that does not load ({error}): pip install datasketch"
                ) from None
            self._near = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)

    def seen(self, ids: Sequence[int], source: int = 0) -> int | None:
        """Of which source one like it was there before; if of none, it is remembered."""
        if self.kind == "keep":
            return None
        tokens = np.asarray(ids, dtype=np.uint64)
        digest = hashlib.sha256(tokens.tobytes()).digest()[:16]
        if digest in self._exact:
            return self._exact[digest]
        if self.kind == "near":
            own = _minhash(tokens)
            for key in sorted(self._near.query(own)):
                other, of = self._hashes[key]
                if other.jaccard(own) >= self.threshold:
                    return of
            self._near.insert(len(self._hashes), own)
            self._hashes.append((own, source))
        self._exact[digest] = source
        return None


def _minhash(tokens: np.ndarray) -> Any:
    from datasketch import MinHash

    runs = max(1, len(tokens) - SHINGLE + 1)
    mixed = np.zeros(runs, dtype=np.uint64)
    for place in range(min(SHINGLE, len(tokens))):  # arithmetic modulo 2^64, then its upper half
        mixed = (mixed + tokens[place : place + runs] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    made = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    made.update_batch(np.unique(mixed >> np.uint64(32)).tolist())
    return made
