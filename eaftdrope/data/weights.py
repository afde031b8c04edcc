"""Weights of the trained tokens of a row: those of the row and of its messages, and the tokens that the gate leaves alone.

    u_t = weight of the row x weight of the message, negated for a token that is exempt from the gate

as the column `token_weights` of a data set and the loss read it. A row whose tokens all have weight 1 has no such list.

The loss is divided by the number of trained tokens, whatever their weights, as by TRL for labels and by ms-swift under its
`loss_scale`: a weight of 2 doubles the gradient of a token and leaves all others as they are. Repeating a row (`weight` of a
source) also counts its tokens again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eaftdrope.errors import DataError

# A larger one is a measurement under the name of a weight.
LARGEST = 1000.0
_IGNORED = -100

Extent = tuple[int, int]
"""Characters [begin, end) of the text."""


@dataclass(frozen=True)
class TokenWeights:
    """Weights of a row's tokens.

    Args:
        values (`list[float]`, *optional*): one per token, negative for those exempt from the gate, 1 for those that are not
            trained; None if all are 1.
        exempt (`dict[str, int]`): the number of trained tokens that each exempt string covers.
    """

    values: list[float] | None = None
    exempt: dict[str, int] = field(default_factory=dict)


def is_weight(value: Any) -> bool:
    """Return whether `value` is a number that can weight a loss."""
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= LARGEST


def check_exempt(strings: Sequence[str]) -> None:
    """Raise DataError for an empty string, which would be everywhere."""
    if not all(strings):
        raise DataError(
            "an exempt string is empty. Write the name or the special token whose tokens the gate leaves alone."
        )


def weigh_tokens(
    labels: list[int],
    extents: list[Extent],
    text: str,
    *,
    weight: float,
    pieces: Sequence[tuple[int, int, float]] = (),
    exempt: Sequence[str] = (),
) -> TokenWeights:
    """Return the weights of a row's tokens.

    Args:
        labels (`list[int]`): -100 for tokens that are not trained.
        extents (`list[Extent]`): the characters that each token covers; may be longer than `labels`.
        weight (`float`): of the row.
        pieces (`Sequence[tuple[int, int, float]]`): characters [begin, end) with a weight of their own, in order.
        exempt (`Sequence[str]`): strings whose tokens are exempt from the gate.
    """
    counts = dict.fromkeys(exempt, 0)
    spans = {string: spans_of(text, string) for string in exempt if string in text}
    if weight == 1 and not spans and all(own == 1 for _, _, own in pieces):
        return TokenWeights(None, counts)
    values = [1.0 if label == _IGNORED else float(weight) for label in labels]
    for begin, end, own in pieces:
        if own != 1:
            for index in covering(extents, len(labels), begin, end):
                values[index] = 1.0 if labels[index] == _IGNORED else weight * own
    for string, found in spans.items():
        covered = {index for begin, end in found for index in covering(extents, len(labels), begin, end)}
        trained = {index for index in covered if labels[index] != _IGNORED}
        counts[string] = len(trained - {0})
        for index in trained:
            values[index] = -abs(values[index])
    return TokenWeights(None if all(value == 1 for value in values) else values, counts)


def spans_of(text: str, string: str) -> list[Extent]:
    """Return the characters of every occurrence of `string` in `text`; occurrences may overlap."""
    found, at = [], text.find(string)
    while at >= 0:
        found.append((at, at + len(string)))
        at = text.find(string, at + 1)
    return found


def covering(extents: list[Extent], count: int, begin: int, end: int) -> range:
    """Return the indices of those of the first `count` tokens that cover a character of [begin, end)."""
    # the ends of the tokens never fall
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if extents[middle][1] <= begin else (low, middle)
    last = low
    while last < count and extents[last][0] < end:
        last += 1
    return range(low, last)
