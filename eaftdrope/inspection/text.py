"""Tokens as text for people: a conflict in its context, a row in short, and what makes two rows copies of each other."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from eaftdrope.evaluate.likelihood import IGNORED, TokenRow

# Trained text of at least this many letters is a copy wherever it stands; shorter answers (yes, 42) are repeated by right.
_LONG = 40
_BEFORE, _AFTER = 60, 30
_ROW_CHARACTERS = 600


def copy_key(row: TokenRow, tokenizer) -> int:
    """64 bits that rows have in common when they say the same, but for case, punctuation and white space: in their trained
    text, or in the whole row where that is short."""
    trained = _normalised(_decoded(tokenizer, [token for token in row.labels if token != IGNORED]))
    text = trained if len(trained) >= _LONG else _normalised(_decoded(tokenizer, row.input_ids))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def in_context(row: TokenRow, position: int, predicted: int, tokenizer) -> dict[str, str]:
    """A token's text, what stands around it, and what the model would have written."""
    ids = row.input_ids
    return {
        "label": tokenizer.decode(ids[position]),
        "predicted": tokenizer.decode(predicted),
        "before": tokenizer.decode(ids[max(0, position - _BEFORE) : position]),
        "after": tokenizer.decode(ids[position + 1 : position + 1 + _AFTER]),
    }


def shown(row: TokenRow, tokenizer) -> str:
    """The row's text, or its first 600 characters."""
    text = tokenizer.decode(row.input_ids)
    return text if len(text) <= _ROW_CHARACTERS else text[:_ROW_CHARACTERS].rstrip() + " ..."


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _normalised(text: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
