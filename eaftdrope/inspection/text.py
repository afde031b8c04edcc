"""Tokens as text: a conflict in its context, a short form of a row, and the key that copies of a row share."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import TYPE_CHECKING

from eaftdrope.evaluate.likelihood import IGNORED, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Trained text of at least this many letters is a copy in any row; shorter answers (yes, 42) may repeat legitimately.
_LONG = 40
_BEFORE, _AFTER = 60, 30
_ROW_CHARACTERS = 600


def copy_key(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return 64 bits that rows with the same text share, up to case, punctuation and white space.

    The text is the trained one, or the whole row if that is short.
    """
    trained = _normalised(_decoded(tokenizer, [token for token in row.labels if token != IGNORED]))
    text = trained if len(trained) >= _LONG else _normalised(_decoded(tokenizer, row.input_ids))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def in_context(row: TokenRow, position: int, predicted: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the text of a token, of the prediction in its place, and of the tokens before and after."""
    ids = row.input_ids
    return {
        "label": tokenizer.decode(ids[position]),
        "predicted": tokenizer.decode(predicted),
        "before": tokenizer.decode(ids[max(0, position - _BEFORE) : position]),
        "after": tokenizer.decode(ids[position + 1 : position + 1 + _AFTER]),
    }


def shown(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the row's text, or its first 600 characters."""
    text = tokenizer.decode(row.input_ids)
    return text if len(text) <= _ROW_CHARACTERS else text[:_ROW_CHARACTERS].rstrip() + " ..."


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _normalised(text: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
