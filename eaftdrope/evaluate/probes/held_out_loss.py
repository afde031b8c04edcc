"""Held-out loss of the target: mean cross-entropy of the labelled tokens of rows that were not trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError

from ..likelihood import TokenRow, rows_nll
from ..scores import Score, score_units
from ..texts import evenly_spaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut


@dataclass(frozen=True)
class HeldOutLossProbe:
    """Nats per labelled token over all `rows` (long answers weigh more)."""

    rows: list[TokenRow]
    group: str = "target"
    name: str = "held_out_loss"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> HeldOutLossProbe:
        """Build the probe; options: `limit`."""
        dataset = held_out.dataset
        if dataset is None or len(dataset) == 0:
            raise UserError(f"the probe {name} needs held-out rows, and none were found. Set `data.held_out`.")
        indices = evenly_spaced(range(len(dataset)), options["limit"])
        rows = [TokenRow(list(dataset[i]["input_ids"]), list(dataset[i]["labels"])) for i in indices]
        return cls(rows, group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        units = rows_nll(model, self.rows, batch_tokens=batch_tokens, progress=progress)
        return [score_units(self.name, self.group, "held-out loss", units, kind="mean", better="lower")]

    def subset(self, limit: int) -> HeldOutLossProbe:
        return replace(self, rows=evenly_spaced(self.rows, limit))
