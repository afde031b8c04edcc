"""Lengths in tokens, or in multiples of the length that a model was trained on. Standard library only."""

from __future__ import annotations

import re

from eaftdrope.errors import UserError

_LENGTH = re.compile(r"(\d+)|(\d+(?:\.\d+)?)x")


def parse_lengths(text: str, trained: int) -> list[int]:
    """Parse `2048,4096` or `1x,2x,4x` (times `trained`); return tokens, ascending, each once.

    Raises:
        UserError: a part has neither form, or is below 2 tokens.
    """
    lengths = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _LENGTH.fullmatch(part)
        if match is None:
            raise UserError(f"{part!r} is not a length. Write tokens (4096) or a multiple of the trained length (2x).")
        lengths.add(int(match[1]) if match[1] else round(float(match[2]) * trained))
    if not lengths or min(lengths) < 2:
        raise UserError(f"{text!r}: a length is at least 2 tokens, such as 2048,4096 or 1x,2x,4x.")
    return sorted(lengths)


def multiple(length: int, trained: int) -> str:
    """Return a length in multiples of the trained one, such as `1.5x`."""
    return f"{length / trained:.3g}x"


def slope_text(slope: float, stretch: str) -> str:
    """Return the temperature as a formula of `stretch`, such as `1 + 0.103 ln(s)`."""
    return f"1 {'-' if slope < 0 else '+'} {abs(slope):.3f} ln({stretch})"
