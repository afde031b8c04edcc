"""Needles: sentences with a random number, hidden in a long text, and the question for them behind it.

    niah          one needle at a depth; as many trials at every depth
    multi-query   four needles with a key each, at random places; all four numbers are asked for
    multi-key     the same; the number of one key is asked for
    multi-value   four needles with the same key; all four numbers are asked for
    passkey       a pass key of five digits in the filler text of Mohtashami and Jaggi (arXiv 2305.16300)

The numbers have seven digits and there are always four (key, number) pairs, as in the DroPE paper (arXiv 2512.12167); the
wording follows RULER (arXiv 2404.06654). A trial is right when the first numbers of a greedy answer are exactly those asked
for, in any order. Nothing of the tokenizer's chat template is used: base and instruction models are asked alike, by a text
to go on with.

Tokens of the texts that probes read: windows for the loss, and hay to hide a needle in.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from eaftdrope.errors import UserError

from ..likelihood import bos_prefix
from ..texts import evenly_spaced

KINDS = ("niah", "multi-query", "multi-key", "multi-value", "passkey")
PAIRS = 4
_SHORTEST_HAY = 32
_WORDS = (
    "amber anchor apron badge barrel basket beacon blanket bottle bridge bucket button candle canyon carpet castle "
    "cellar chapel cherry circle copper corner cradle cushion dagger desert dragon engine feather ferry fiddle garden "
    "hammer harbour helmet island jacket kettle ladder lantern marble meadow mirror monkey needle orchard oyster pebble "
    "pepper pillow pocket ribbon saddle shovel silver spider temple thunder tunnel velvet walnut whistle window winter"
)
_KEYS = _WORDS.split()
_INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you about "
    "the numbers afterwards.\n"
)
_NEEDLE = " One of the special magic numbers for {key} is: {number}."
_ONE = (
    "\nWhat is the special magic number for {keys} mentioned in the provided text? The special magic number for {keys} "
    "mentioned in the provided text is"
)
_ALL = (
    "\nWhat are all the special magic numbers for {keys} mentioned in the provided text? The special magic numbers for "
    "{keys} mentioned in the provided text are"
)
_PASSKEY_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
_PASSKEY_HAY = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_PASSKEY_NEEDLE = " The pass key is {number}. Remember it. {number} is the pass key."
_PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Trial:
    """`ids` is the prompt; `span` is where the (first asked) needle stands in it; `depth` is None where it is random."""

    ids: list[int]
    numbers: tuple[str, ...]
    span: tuple[int, int]
    depth: float | None


class Needles:
    """Trials of one kind and length, each made when it is asked for.

    Args:
        kind: one of `KINDS`.
        hay: the text around the needles (passkey brings its own).
        length: tokens of prompt and answer together.
        depths: how many depths `niah` has, from 0 (the beginning) to 1 (just before the question).
        seed: of keys, numbers, places and which part of the text is taken; trial i is the same for every model that
            has the same tokenizer.

    Raises:
        UserError: `length` leaves no room for hay.
    """

    def __init__(self, kind: str, tokenizer, hay: Hay, length: int, *, depths: int = 10, seed: int = 0):
        assert kind in KINDS and depths >= 1
        self.kind, self.length, self.depths = kind, length, depths
        self._tokenizer, self._seed = tokenizer, seed
        self._hay = Hay(tokenizer, [_PASSKEY_HAY], between="") if kind == "passkey" else hay
        self.begin = self._hay.begin
        self.asked = PAIRS if kind in ("multi-query", "multi-value") else 1
        # Room for the numbers and for some words around them, the same in every trial so that prompts are equally long.
        self.answer_tokens = len(self._encode(", ".join([" 8362917"] * self.asked))) + 4 * self.asked + 4
        self.trial(0)

    def trial(self, index: int) -> Trial:
        random = Random(f"{self._seed} {self.kind} {self.length} {index}")
        intro, needles, question, numbers = self._texts(random)
        head = [*self._hay.begin, *self._encode(intro)]
        tail, pieces = self._encode(question), [self._encode(needle) for needle in needles]
        room = self.length - self.answer_tokens - len(head) - len(tail) - sum(map(len, pieces))
        # The first trial is made before anything is measured; others differ from it by the tokens of some keys.
        if room < (_SHORTEST_HAY if index == 0 else 1):
            raise UserError(
                f"{self.length} tokens are too few for the probe {self.kind}: question, needles and answer alone take "
                f"{self.length - room}. Name longer lengths, or leave it out of --probes."
            )
        hay, stops = self._hay.take(room, random)
        depth = None
        if self.kind == "niah":
            depth = index % self.depths / (self.depths - 1) if self.depths > 1 else 0.5
        places = [place(random.random() if depth is None else depth, room, stops) for _ in pieces]
        ids, span = list(head), (0, 0)
        done = 0
        for at, number in sorted(zip(places, range(len(pieces)))):
            ids += hay[done:at]
            if number == 0:
                span = (len(ids), len(ids) + len(pieces[0]))
            ids += pieces[number]
            done = at
        ids += hay[done:] + tail
        return Trial(ids, numbers, span, depth)

    def _texts(self, random: Random) -> tuple[str, list[str], str, tuple[str, ...]]:
        """Introduction, needles (an asked one first), question, and the numbers asked for."""
        if self.kind == "passkey":
            number = str(random.randrange(10_000, 100_000))
            return _PASSKEY_INTRO, [_PASSKEY_NEEDLE.format(number=number)], _PASSKEY_QUESTION, (number,)
        count = 1 if self.kind == "niah" else PAIRS
        keys = random.sample(_KEYS, count)
        if self.kind == "multi-value":
            keys = keys[:1] * PAIRS
        numbers = [str(number) for number in random.sample(range(1_000_000, 10_000_000), count)]
        needles = [_NEEDLE.format(key=key, number=number) for key, number in zip(keys, numbers)]
        if self.asked == 1:
            return _INTRO, needles, _ONE.format(keys=keys[0]), (numbers[0],)
        names = f"{', '.join(keys[:-1])} and {keys[-1]}" if self.kind == "multi-query" else keys[0]
        return _INTRO, needles, _ALL.format(keys=names), tuple(numbers)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def numbers_found(answer: str, numbers: tuple[str, ...]) -> int:
    """How many of `numbers` are among the first len(numbers) numbers of the answer, digit for digit."""
    return len(set(re.findall(r"\d+", answer)[: len(numbers)]) & set(numbers))


class Windows(NamedTuple):
    """Token ids of equal length. `joined`: no document was long enough, so they were cut from all documents in a row."""

    rows: list[list[int]]
    joined: bool


class Hay:
    """Texts as tokens: `documents` apart, `tokens` in a row with `between` between two of them; `begin` (BOS) in neither."""

    def __init__(self, tokenizer, texts: list[str], *, between: str = "\n\n"):
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

        self.begin = bos_prefix(tokenizer)
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
        return Windows(evenly_spaced(rows, count), joined) if rows else None

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
