"""How many columns of the vocabulary the operator keeps, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from eaftdrope.loss.tail import TailSparseGradients


@dataclass
class KeptColumns:
    """Elements of the gradient by the logits, and those of them in kept columns: a group counts by its rows, as in the
    FLOPs."""

    kept: int = 0
    of: int = 0

    @property
    def share(self) -> float | None:
        return self.kept / self.of if self.of else None

    def reset(self) -> None:
        self.kept = self.of = 0


@contextmanager
def watch_kept_columns() -> Iterator[KeptColumns]:
    """Counts the columns of every group of rows that `TailSparseGradients` adds meanwhile."""
    seen = KeptColumns()
    add_group = TailSparseGradients._add_group

    def watched(self, rows_R, hidden_RH, grad_RV):
        add_group(self, rows_R, hidden_RH, grad_RV)
        seen.kept += len(rows_R) * self.kept_columns[-1]
        seen.of += grad_RV.numel()

    TailSparseGradients._add_group = watched
    try:
        yield seen
    finally:
        TailSparseGradients._add_group = add_group
