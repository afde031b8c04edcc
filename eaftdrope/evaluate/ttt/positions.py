"""Loss by position in a passage, and differences between arms over the same passages.

Position t is the prediction of token t + 1 from the t + 1 tokens before it, so a passage of T tokens has T - 1 of them. With
a window of k tokens the positions below k have lost nothing yet, and with chunks of b tokens those below b are read with
the initial weights: no update has happened.

Bins double from 128 on; the window is a border too. P passages, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from ..scores import Score, change_stderr, score_units

FIRST = 128
Sums = tuple[tuple[float, int], ...]
"""(nats, predictions) of each bin of a passage."""


def position_edges(length: int, window: int) -> list[int]:
    """Return the borders of the bins of passages of `length` tokens: 0, 128, 256, 512, ..., `length`, and the window."""
    edges, edge = {0, window, length}, FIRST
    while edge < length:
        edges.add(edge)
        edge *= 2
    return sorted(edges)


def bin_sums(nll: torch.Tensor, edges: Sequence[int]) -> Sums:
    """Return the sums of the losses [T - 1] of one passage; the last bin has one prediction less than its width."""
    return tuple((nll[a:b].double().sum().item(), len(nll[a:b])) for a, b in pairwise(edges))


class Difference(NamedTuple):
    """A difference of two means over the same passages, in nats per token; `stderr` is None for a single passage."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class PositionLosses:
    """Losses of one arm: `sums[p][i]` is (nats, predictions) of bin i of passage p; `edges` are the borders of the bins."""

    edges: tuple[int, ...]
    sums: tuple[Sums, ...]

    def mean(self, start: int = 0, stop: int | None = None) -> Score:
        """Return the mean over positions `start` to `stop`, both borders of bins; its standard error is over passages."""
        first = self.edges.index(start)
        last = len(self.edges) - 1 if stop is None else self.edges.index(stop)
        units = [
            (sum(nats for nats, _ in bins[first:last]), float(sum(count for _, count in bins[first:last])))
            for bins in self.sums
        ]
        return score_units("ttt", "general", "loss", units, kind="mean", better="lower")

    def by_bin(self) -> list[Score]:
        """Return the mean of each bin, in order."""
        return [self.mean(a, b) for a, b in pairwise(self.edges)]

    def minus(self, other: PositionLosses, start: int = 0, stop: int | None = None) -> Difference:
        """Return the paired difference of the means over positions `start` to `stop`, over the passages that both have."""
        count = min(len(self.sums), len(other.sums))
        mine, others = (PositionLosses(self.edges, one.sums[:count]).mean(start, stop) for one in (self, other))
        return Difference(mine.value - others.value, change_stderr(others, mine))
