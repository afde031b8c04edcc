"""The inner rate of naive TTT: the one of a grid with the lowest loss on passages that are not test text."""

from __future__ import annotations

import math
from dataclasses import dataclass

RATES = (0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class RateFit:
    """Mean loss of the fitting passages at each rate of the grid, in nats per token; `passages` is their number."""

    losses: dict[float, float]
    passages: int

    @property
    def best(self) -> float:
        """The rate with the lowest loss; a loss that is not a number counts as infinite."""
        return min(self.losses, key=lambda rate: self.losses[rate] if math.isfinite(self.losses[rate]) else math.inf)

    @property
    def at_edge(self) -> bool:
        """True if the best rate is the smallest or the largest of the grid: a wider grid might have a better one."""
        return self.best in (min(self.losses), max(self.losses))
