"""Perplexity of general text: exp of the mean nats per token, over windows that do not overlap.

Where the tokenizer itself begins a text with a token (BOS), so does every window; its first word is then scored too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError

from ..likelihood import IGNORED, TokenRow, bos_prefix, rows_nll
from ..scores import Score, score_units
from ..texts import evenly_spaced, read_texts, shipped_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut


@dataclass(frozen=True)
class PerplexityProbe:
    """Perplexity of `texts`, over at most `max_tokens` tokens (None: all) in windows spread evenly over the texts.

    Windows are short so that there are many of them: the standard error is over windows.
    """

    texts: list[str]
    max_tokens: int | None
    window: int = 256
    group: str = "general"
    name: str = "perplexity"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> PerplexityProbe:
        """Build the probe; options: `files` (text, or JSONL with `text`; None: the shipped text) and `max_tokens`."""
        texts = (
            [shipped_text()]
            if options["files"] is None
            else [text for file in options["files"] for text in read_texts(Path(file), "the perplexity probe")]
        )
        return cls(texts, options["max_tokens"], group=group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        units = rows_nll(model, self.windows(tokenizer), batch_tokens=batch_tokens, progress=progress)
        return [score_units(self.name, self.group, "perplexity", units, kind="exp", better="lower")]

    def subset(self, limit: int) -> PerplexityProbe:
        tokens = limit * self.window
        return replace(self, max_tokens=tokens if self.max_tokens is None else min(tokens, self.max_tokens))

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
        """Return rows of `window` tokens, fewer at the end of a text (at least 2).

        Raises:
            UserError: the texts are empty.
        """
        prefix = bos_prefix(tokenizer)
        rows = []
        for text in self.texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            step = self.window - len(prefix)
            pieces = [prefix + ids[start : start + step] for start in range(0, len(ids), step)]
            rows += [TokenRow(piece, [IGNORED, *piece[1:]]) for piece in pieces if len(piece) > 1]
        if not rows:
            raise UserError(
                "the perplexity probe has no text: its files are empty. Use files with at least a sentence."
            )
        if self.max_tokens is None:
            return rows
        return evenly_spaced(rows, max(1, self.max_tokens // self.window))
