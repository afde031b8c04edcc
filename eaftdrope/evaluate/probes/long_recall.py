"""Recall beyond the trained length: a number hidden in a text of 1, 2 and 4 times that length (`long_context/needles.py`).

The score of each length is the share of needles whose number is the first one of the greedy answer, over ten depths. The text
around them is the one that comes with eaftdrope, repeated where it is too short. `eaftdrope context` has more kinds of
needles, curves over depth, and the loss by length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError

from ..likelihood import Progress
from ..long_context.needles import Hay, Needles
from ..long_context.retrieval import find_needles
from ..scores import ENOUGH, Score, score_units
from ..texts import shipped_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .base import HeldOut

_DEPTHS = 10


@dataclass(frozen=True)
class LongRecallProbe:
    """Shares of `trials` needles that are found at each of `multiples` of `length` tokens."""

    length: int
    multiples: tuple[int, ...]
    trials: int
    group: str = "general"
    name: str = "long_recall"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> LongRecallProbe:
        """Build the probe; options: `length` (the trained one), `multiples` and `trials`.

        Raises:
            UserError: no length.
        """
        if options["length"] is None:
            raise UserError(f"the probe {name} needs the trained length: set its `length`, in tokens.")
        return cls(options["length"], tuple(options["multiples"]), options["trials"], group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Measure a model.

        Raises:
            UserError: a length is too short for a needle, or the model has no positions for one.
        """
        longest = self.length * max(self.multiples)
        learned = getattr(model.config.get_text_config(), "n_positions", None)
        if learned is not None and learned < longest:
            raise UserError(
                f"the probe {self.name} reads {longest:,} tokens, and the model has learned positions for {learned:,} only. "
                "Lower its length or multiples."
            )
        hay, scores = Hay(tokenizer, [shipped_text()]), []
        for number, multiple in enumerate(self.multiples):
            length = multiple * self.length
            found = find_needles(
                model,
                tokenizer,
                Needles("niah", tokenizer, hay, length, depths=_DEPTHS),
                self.trials,
                batch_tokens=max(4 * batch_tokens, length),
                progress=self._part(number, progress),
            )
            units = [(float(outcome.right), 1.0) for outcome in found.outcomes]
            metric = f"numbers recalled at {multiple} x {self.length:,} tokens"
            options = {"kind": "share", "better": "higher", "least": ENOUGH}
            scores.append(score_units(self.name, self.group, metric, units, **options))
        return scores

    def _part(self, number: int, progress: Progress | None) -> Progress | None:
        if progress is None:
            return None
        return lambda done, total: progress(number * total + done, len(self.multiples) * total)
