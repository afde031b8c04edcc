"""Tokens of the texts that probes read: windows for the loss, and hay to hide a needle in."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

from eaftdrope.errors import UserError
from eaftdrope.evaluate.likelihood import beginning
from eaftdrope.evaluate.sampling import evenly


class Windows(NamedTuple):
    """Token ids of equal length. `joined`: no document was long enough, so they were cut from all documents in a row."""

    rows: list[list[int]]
    joined: bool


class Hay:
    """Texts as tokens: `documents` apart, `tokens` in a row with `between` between two of them; `begin` (BOS) in neither."""

    def __init__(self, tokenizer, texts: list[str], *, between: str = "\n\n"):
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

        self.begin = beginning(tokenizer)
        self.documents = [ids for ids in map(encode, texts) if ids]
        if not self.documents:
            raise UserError("the text is empty, so there is nothing to measure on. Name a file with some pages.")
        self._between = encode(between)
        row = [token for ids in self.documents for token in (*ids, *self._between)]
        self.tokens = row[: len(row) - len(self._between)]
        ends = {token: _ends_sentence(tokenizer.decode([token])) for token in set(self.tokens)}
        # Where a sentence has just ended; the text's own beginning counts.
        self._stops = [0, *(i + 1 for i, token in enumerate(self.tokens) if ends[token])]
        # Only these can be where a trial's hay begins: something stands behind them.
        self._starts = [stop for stop in self._stops if stop < len(self.tokens)]

    def repeats(self, length: int) -> bool:
        """Whether hay of `length` tokens holds some of the text twice."""
        return length > len(self.tokens)

    def windows(self, length: int, count: int) -> Windows | None:
        """At most `count` windows of exactly `length` tokens (`begin` included) that do not overlap, spread evenly.
        None where the texts have fewer tokens than one window: a repeated text would measure copying."""
        rows = self._cut(self.documents, length)
        joined = not rows
        if joined:
            rows = self._cut([self.tokens], length)
        return Windows(evenly(rows, count), joined) if rows else None

    def _cut(self, documents: list[list[int]], length: int) -> list[list[int]]:
        step = length - len(self.begin)
        return [
            self.begin + ids[start : start + step] for ids in documents for start in range(0, len(ids) - step + 1, step)
        ]

    def take(self, count: int, random) -> tuple[list[int], list[int]]:
        """`count` tokens from a random beginning of a sentence on, going on at the text's beginning where it ends; and the
        places in them (0 to `count`) where a sentence has just ended."""
        start = random.choice(self._starts)
        tokens, stops, offset = [], [], -start
        while offset < count:
            tokens += self.tokens[max(0, -offset) :] + self._between
            first, last = bisect_left(self._stops, -offset), bisect_right(self._stops, count - offset)
            stops += [stop + offset for stop in self._stops[first:last]]
            offset += len(self.tokens) + len(self._between)
        return tokens[:count], sorted(set(stops))


def place(depth: float, count: int, stops: list[int]) -> int:
    """Where a needle at `depth` (0 to 1) of `count` tokens goes: behind the last sentence that ends before it."""
    target = round(depth * count)
    if target == count:
        return count
    before = bisect_right(stops, target)
    return stops[before - 1] if before else target


def _ends_sentence(text: str) -> bool:
    return text.rstrip().rstrip("\"'”’)").endswith((".", "!", "?"))
