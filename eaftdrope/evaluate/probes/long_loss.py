"""Loss by length: the same tokens predicted after 1, 2 and 4 times the trained length.

Every passage ends at the same places, and only its last tokens are scored, half of the trained length, so that lengths differ
in nothing but the context before these tokens. A model that uses its context has a lower loss at a larger length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError

from ..likelihood import IGNORED, Progress, TokenRow, bos_prefix, rows_nll
from ..scores import Score, score_units
from ..texts import evenly_spaced, read_texts, shipped_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .base import HeldOut


@dataclass(frozen=True)
class LongLossProbe:
    """Nats per token of the last tokens of `passages` of `multiples` x `length` tokens."""

    texts: list[str]
    length: int
    multiples: tuple[int, ...]
    passages: int
    group: str = "general"
    name: str = "long_loss"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> LongLossProbe:
        """Build the probe; options: `files`, `length` (the trained one), `multiples` and `passages`.

        Raises:
            UserError: no length.
        """
        if options["length"] is None:
            raise UserError(f"the probe {name} needs the trained length: set its `length`, in tokens.")
        files = options["files"]
        texts = [shipped_text()] if files is None else [t for file in files for t in read_texts(Path(file), name)]
        return cls(texts, options["length"], tuple(options["multiples"]), options["passages"], group)

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
            UserError: no text is as long as the longest passage.
        """
        scores = []
        for number, multiple in enumerate(self.multiples):
            part = None if progress is None else _part(number, len(self.multiples), progress)
            units = rows_nll(model, self.rows(tokenizer, multiple), batch_tokens=batch_tokens, progress=part)
            metric = f"nats per token at {multiple} x {self.length:,} tokens"
            scores.append(score_units(self.name, self.group, metric, units, kind="mean", better="lower"))
        return scores

    def subset(self, limit: int) -> LongLossProbe:
        return replace(self, passages=min(limit, self.passages))

    def rows(self, tokenizer: PreTrainedTokenizerBase, multiple: int) -> list[TokenRow]:
        """Passages of `multiple` x `length` tokens.

        Raises:
            UserError: no text is as long as the longest passage.
        """
        prefix, scored = bos_prefix(tokenizer), self.length // 2
        size, longest = (count * self.length - len(prefix) for count in (multiple, max(self.multiples)))
        ends = []
        for text in self.texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ends += [(ids, end) for end in range(longest, len(ids) + 1, scored)]
        if not ends:
            raise UserError(
                f"the probe {self.name} reads {longest:,} tokens, and no text is as long. Lower its length or multiples, or "
                "set `files` to longer texts."
            )
        passages = [prefix + ids[end - size : end] for ids, end in evenly_spaced(ends, self.passages)]
        return [TokenRow(ids, [IGNORED] * (len(ids) - scored) + ids[-scored:]) for ids in passages]


def _part(number: int, parts: int, progress: Progress) -> Progress:
    return lambda done, total: progress(number * total + done, parts * total)
