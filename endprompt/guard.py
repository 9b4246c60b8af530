"""Notices a run that has gone wrong, so that it stops with its last good state kept."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Guard:
    """A loss that is not finite, or one far above the best it had.

    limit: nats that the smoothed loss may be above its best; 0 for no limit. smoothed: running mean over about ten
    losses. best: its lowest value so far.
    """

    limit: float
    smoothed: float | None = None
    best: float | None = None

    def check(self, loss: float, norm: float, smooth: bool = True) -> str | None:
        """What is wrong with this loss and gradient norm, or None. smooth: count the loss into the running mean."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss={loss} gradient norm={norm}"
        if not smooth:
            return None
        self.smoothed = loss if self.smoothed is None else 0.9 * self.smoothed + 0.1 * loss
        self.best = self.smoothed if self.best is None else min(self.best, self.smoothed)
        if self.limit and self.smoothed > self.best + self.limit:
            return (
                f"the smoothed loss {self.smoothed:.3f} is over divergence={self.limit} above its best {self.best:.3f}"
            )
        return None
