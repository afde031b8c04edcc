"""Count the columns of the vocabulary that the operator keeps, from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from eaftdrope.loss.tail import TailSparseGradients


@dataclass
class KeptColumns:
    """Number of elements of the gradient with respect to the logits, and of those in kept columns, weighted by rows as in
    the FLOPs."""

    kept: int = 0
    of: int = 0

    @property
    def share(self) -> float | None:
        return self.kept / self.of if self.of else None

    def reset(self) -> None:
        self.kept = self.of = 0


@contextmanager
def watch_kept_columns() -> Iterator[KeptColumns]:
    """Count the columns of every group of rows that `TailSparseGradients` adds inside this context."""
    seen = KeptColumns()
    add_group = TailSparseGradients._add_group

    def watched(self, rows_R, hidden_RD, grad_RV):
        add_group(self, rows_R, hidden_RD, grad_RV)
        seen.kept += len(rows_R) * self.kept_columns[-1]
        seen.of += grad_RV.numel()

    TailSparseGradients._add_group = watched
    try:
        yield seen
    finally:
        TailSparseGradients._add_group = add_group
