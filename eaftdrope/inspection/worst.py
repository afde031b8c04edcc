"""What a person should look at: the worst confident conflicts, and the rows that look like bad labels or copied noise.

A conflict is worse the less likely the model holds the label. A row is looked at in three ways:

    conflicts   nats of confident conflict a trained token: sum of nll over its conflicts / trained tokens
    loss        nats a trained token
    copies      other rows with the same text

and stands where the worst of its three places puts it. Of rows that are copies of each other, the first has their place by
copies.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from .tokens import Tokens

REASONS = ("conflicts", "loss", "copies")


@dataclass(frozen=True, order=True)
class ConfidentConflict:
    """A token that the model is sure is another one. Ordered by badness: nll, then entropy reversed; `row` is the number
    of the row, `position` the token's place in it."""

    nll: float
    confidence: float
    row: int
    position: int
    predicted: int
    predicted_probability: float

    @property
    def entropy(self) -> float:
        return -self.confidence


class WorstConflicts:
    """Keeps the `limit` worst of all conflicts that it is shown."""

    def __init__(self, limit: int):
        self._limit = limit
        self._heap: list[ConfidentConflict] = []
        self.seen = 0

    def add(self, tokens: Tokens, rows: list[int]) -> None:
        """`rows` has the number of each row of the batch."""
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
        return sorted(self._heap, reverse=True)


class RowFigures:
    """40 bytes of figures for each of `count` rows."""

    def __init__(self, count: int):
        self.tokens = np.zeros(count, dtype=np.int64)
        self.conflicts = np.zeros(count, dtype=np.int64)
        self.nll = np.zeros(count)
        self.conflict_nll = np.zeros(count)
        self.key = np.zeros(count, dtype=np.uint64)

    def add(self, tokens: Tokens, rows: list[int], keys: list[int]) -> None:
        """The rows of a batch: their numbers, and what rows with the same text have in common."""
        where = tokens.row.cpu().numpy()
        nll = tokens.stats.nll.double().cpu().numpy()
        conflict = tokens.stats.conflict.cpu().numpy()
        self.tokens[rows] = np.bincount(where, minlength=len(rows))
        self.conflicts[rows] = np.bincount(where, conflict, minlength=len(rows))
        self.nll[rows] = np.bincount(where, nll, minlength=len(rows))
        self.conflict_nll[rows] = np.bincount(where, np.where(conflict, nll, 0), minlength=len(rows))
        self.key[rows] = keys

    def duplicates(self) -> np.ndarray:
        """`[rows]`: how many other rows have the same text."""
        _, inverse, counts = np.unique(self.key, return_inverse=True, return_counts=True)
        return counts[inverse] - 1

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the rows, worst first; for each the index in `REASONS` of what put it there)"""
        count = len(self.tokens)
        places = np.stack(
            [
                _places(-self.conflict_nll / self.tokens, -self.nll / self.tokens, self.conflicts > 0),
                _places(-self.nll / self.tokens, None, np.ones(count, bool)),
                _places(-self.duplicates(), None, self._first_copies()),
            ]
        )
        reason, best = places.argmin(0), places.min(0)
        order = np.lexsort((np.arange(count), reason, best))
        return order, reason[order]

    def _first_copies(self) -> np.ndarray:
        """`[rows]` bool: rows that have copies and are the first of them."""
        _, first = np.unique(self.key, return_index=True)
        is_first = np.zeros(len(self.key), dtype=bool)
        is_first[first] = True
        return is_first & (self.duplicates() > 0)


def _places(badness: np.ndarray, then: np.ndarray | None, listed: np.ndarray) -> np.ndarray:
    """Each row's place in a list that is sorted by `badness` (smallest first, then by `then`, then in order); rows that
    are not listed stand behind all others."""
    keys = (badness,) if then is None else (then, badness)
    order = np.lexsort((np.arange(len(badness)), *keys, ~listed))
    places = np.empty(len(badness), dtype=np.int64)
    places[order] = np.arange(len(badness))
    return np.where(listed, places, len(badness))
