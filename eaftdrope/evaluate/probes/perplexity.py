"""Perplexity of general text: exp of the mean nats per token, over windows that do not overlap.

Where the tokenizer itself begins a text with a token (BOS), so does every window; its first word is then scored too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eaftdrope.errors import UserError

from ..likelihood import IGNORED, TokenRow, bos_prefix, rows_nll
from ..scores import Score, score_units
from ..texts import evenly_spaced


@dataclass(frozen=True)
class PerplexityProbe:
    """`max_tokens` bounds the tokens read (None: all), taken from windows spread evenly over the texts.

    Windows are short so that there are many of them: the standard error is over windows.
    """

    texts: list[str]
    max_tokens: int | None = 4096
    window: int = 256
    group: str = "general"
    name: str = "perplexity"

    def run(self, model, tokenizer, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
        units = rows_nll(model, self.windows(tokenizer), batch_tokens=batch_tokens, progress=progress)
        return [score_units(self.name, self.group, "perplexity", units, kind="exp", better="lower")]

    def subset(self, limit: int) -> PerplexityProbe:
        """The same probe on at most `limit` windows."""
        tokens = limit * self.window
        return replace(self, max_tokens=tokens if self.max_tokens is None else min(tokens, self.max_tokens))

    def windows(self, tokenizer) -> list[TokenRow]:
        """Rows of `window` tokens, fewer at the end of a text (at least 2)."""
        begin = bos_prefix(tokenizer)
        rows = []
        for text in self.texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            step = self.window - len(begin)
            pieces = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
            rows += [TokenRow(piece, [IGNORED, *piece[1:]]) for piece in pieces if len(piece) > 1]
        if not rows:
            raise UserError(
                "the perplexity probe has no text: its files are empty. Name files with at least a sentence."
            )
        if self.max_tokens is None:
            return rows
        return evenly_spaced(rows, max(1, self.max_tokens // self.window))
