"""Held-out loss of the target: mean cross-entropy of the trained tokens of rows that were not trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..likelihood import TokenRow, rows_nll
from ..scores import Score, score_units
from ..texts import evenly_spaced


@dataclass(frozen=True)
class HeldOutLossProbe:
    """`rows` with their labels; the score is nats per labelled token over all rows (long answers weigh more)."""

    rows: list[TokenRow]
    group: str = "target"
    name: str = "held_out_loss"

    def run(self, model, tokenizer, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
        units = rows_nll(model, self.rows, batch_tokens=batch_tokens, progress=progress)
        return [score_units(self.name, self.group, "held-out loss", units, kind="mean", better="lower")]

    def subset(self, limit: int) -> HeldOutLossProbe:
        """The same probe on at most `limit` of its rows."""
        return replace(self, rows=evenly_spaced(self.rows, limit))
