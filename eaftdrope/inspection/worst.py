"""Candidates for review: the worst confident conflicts, and the rows that look like bad labels or copied noise.

A conflict is worse the lower the probability of its label. Rows are ranked in three lists:

    conflicts   nats of confident conflict per trained token: sum of nll over its conflicts / trained tokens
    loss        nats per trained token
    copies      other rows with the same text

and then by the best of their three ranks. Of rows that are copies of each other, only the first is in the third list.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from .tokens import Tokens

REASONS = ("conflicts", "loss", "copies")


@dataclass(frozen=True, order=True)
class ConfidentConflict:
    """A token whose place the model confidently gives to another one.

    Ordered by nll, then by confidence (minus the entropy). `row` is the index of the row, `position` that of the token in it.
    """

    nll: float
    confidence: float
    row: int
    position: int
    predicted: int
    predicted_probability: float

    @property
    def entropy(self) -> float:
        """Entropy of the prediction, in nats."""
        return -self.confidence


class WorstConflicts:
    """The `limit` worst of all conflicts added; `seen` counts them all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[ConfidentConflict] = []
        self.seen = 0

    def add(self, tokens: Tokens, rows: list[int]) -> None:
        """Add the conflicts of a batch; `rows` has the index of each of its rows."""
        at = tokens.conflicts
        columns = (
            tokens.stats.nll[at],
            -tokens.stats.entropy[at],
            tokens.row[at.to(tokens.row.device)],
            tokens.position[at.to(tokens.row.device)],
            tokens.predicted,
            tokens.predicted_probability,
        )
        for nll, confidence, row, *rest in zip(*(column.tolist() for column in columns), strict=True):
            conflict = ConfidentConflict(nll, confidence, rows[row], *rest)
            if len(self._heap) < self._limit:
                heapq.heappush(self._heap, conflict)
            else:
                heapq.heappushpop(self._heap, conflict)
        self.seen += len(at)

    def worst_first(self) -> list[ConfidentConflict]:
        """Return the conflicts kept, the worst first."""
        return sorted(self._heap, reverse=True)


class RowFigures:
    """Figures of `count` rows, 40 bytes each."""

    def __init__(self, count: int) -> None:
        self.tokens = np.zeros(count, dtype=np.int64)
        self.conflicts = np.zeros(count, dtype=np.int64)
        self.nll = np.zeros(count)
        self.conflict_nll = np.zeros(count)
        self.key = np.zeros(count, dtype=np.uint64)

    def add(self, tokens: Tokens, rows: list[int], keys: list[int]) -> None:
        """Add a batch: the indices of its rows, and their copy keys."""
        row = tokens.row.cpu().numpy()
        nll = tokens.stats.nll.double().cpu().numpy()
        conflict = tokens.stats.conflict.cpu().numpy()
        self.tokens[rows] = np.bincount(row, minlength=len(rows))
        self.conflicts[rows] = np.bincount(row, conflict, minlength=len(rows))
        self.nll[rows] = np.bincount(row, nll, minlength=len(rows))
        self.conflict_nll[rows] = np.bincount(row, np.where(conflict, nll, 0), minlength=len(rows))
        self.key[rows] = keys

    def duplicates(self) -> np.ndarray:
        """Return for each row the number of other rows with the same text."""
        _, inverse, counts = np.unique(self.key, return_inverse=True, return_counts=True)
        return counts[inverse] - 1

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the rows, worst first, and for each the index in `REASONS` of the list that decided."""
        count = len(self.tokens)
        ranks = np.stack(
            [
                _ranks(-self.conflict_nll / self.tokens, -self.nll / self.tokens, self.conflicts > 0),
                _ranks(-self.nll / self.tokens, None, np.ones(count, bool)),
                _ranks(-self.duplicates(), None, self._first_copies()),
            ]
        )
        reason, best = ranks.argmin(0), ranks.min(0)
        order = np.lexsort((np.arange(count), reason, best))
        return order, reason[order]

    def _first_copies(self) -> np.ndarray:
        """Return a bool for each row: it has copies and is the first of them."""
        _, first = np.unique(self.key, return_index=True)
        is_first = np.zeros(len(self.key), dtype=bool)
        is_first[first] = True
        return is_first & (self.duplicates() > 0)


def _ranks(badness: np.ndarray, then: np.ndarray | None, listed: np.ndarray) -> np.ndarray:
    """Return each row's rank in a list sorted by `badness` (smallest first, then by `then`, then in order); rows that are
    not listed come after all others."""
    keys = (badness,) if then is None else (then, badness)
    order = np.lexsort((np.arange(len(badness)), *keys, ~listed))
    ranks = np.empty(len(badness), dtype=np.int64)
    ranks[order] = np.arange(len(badness))
    return np.where(listed, ranks, len(badness))
