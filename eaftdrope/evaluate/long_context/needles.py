"""Needles: sentences with a random number, hidden in a long text ("hay") and followed by a question about them.

    niah          one needle at a depth; as many trials at every depth
    multi-query   four needles with a key each, at random places; the question is for all four numbers
    multi-key     the same; the question is for the number of one key
    multi-value   four needles with the same key; the question is for all four numbers
    passkey       a pass key of five digits in the filler text of Mohtashami and Jaggi (arXiv 2305.16300)

The numbers have seven digits and there are always four (key, number) pairs, as in the DroPE paper (arXiv 2512.12167); the
wording follows RULER (arXiv 2404.06654). A trial is right if the first numbers of a greedy answer are exactly the requested
ones, in any order. The chat template is not used: base and instruction models get the same text to continue.

`Hay` has the tokens of the texts: windows for the loss, and stretches to hide needles in.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from eaftdrope.errors import UserError

from ..likelihood import bos_prefix
from ..texts import evenly_spaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """A prompt with needles.

    Attributes:
        ids: the prompt.
        numbers: the requested numbers.
        span: the first and one past the last token of the (first requested) needle in the prompt.
        depth: of the needle, None if it is random.
    """

    ids: list[int]
    numbers: tuple[str, ...]
    span: tuple[int, int]
    depth: float | None


class Needles:
    """Trials of one kind and length, each created on request.

    Args:
        kind: one of `KINDS`.
        hay: the text around the needles (passkey brings its own).
        length: tokens of prompt and answer together.
        depths: number of depths of `niah`, from 0 (the beginning) to 1 (just before the question).
        seed: of keys, numbers, places and the part of the text; trial i is the same for every model with the same
            tokenizer.

    Raises:
        UserError: `length` leaves no room for hay.
    """

    def __init__(
        self, kind: str, tokenizer: PreTrainedTokenizerBase, hay: Hay, length: int, *, depths: int = 10, seed: int = 0
    ) -> None:
        assert kind in KINDS and depths >= 1
        self.kind, self.length, self.depths = kind, length, depths
        self._tokenizer, self._seed = tokenizer, seed
        self._hay = Hay(tokenizer, [_PASSKEY_HAY], between="") if kind == "passkey" else hay
        self.prefix = self._hay.prefix
        self.requested = PAIRS if kind in ("multi-query", "multi-value") else 1
        # Room for the numbers and some words around them, the same in every trial so that prompts are equally long.
        self.answer_tokens = len(self._encode(", ".join([" 8362917"] * self.requested))) + 4 * self.requested + 4
        self.trial(0)

    def trial(self, index: int) -> Trial:
        """Create trial number `index`."""
        random = Random(f"{self._seed} {self.kind} {self.length} {index}")
        intro, needles, question, numbers = self._texts(random)
        head = [*self._hay.prefix, *self._encode(intro)]
        tail, pieces = self._encode(question), [self._encode(needle) for needle in needles]
        room = self.length - self.answer_tokens - len(head) - len(tail) - sum(map(len, pieces))
        # The first trial is created before anything is measured; others differ from it by the tokens of some keys.
        if room < (_SHORTEST_HAY if index == 0 else 1):
            raise UserError(
                f"{self.length} tokens are too few for the probe {self.kind}: question, needles and answer need "
                f"{self.length - room}. Choose longer lengths, or leave it out of --probes."
            )
        hay, stops = self._hay.cut(room, random)
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
        """Return introduction, needles (a requested one first), question, and the requested numbers."""
        if self.kind == "passkey":
            number = str(random.randrange(10_000, 100_000))
            return _PASSKEY_INTRO, [_PASSKEY_NEEDLE.format(number=number)], _PASSKEY_QUESTION, (number,)
        count = 1 if self.kind == "niah" else PAIRS
        keys = random.sample(_KEYS, count)
        if self.kind == "multi-value":
            keys = keys[:1] * PAIRS
        numbers = [str(number) for number in random.sample(range(1_000_000, 10_000_000), count)]
        needles = [_NEEDLE.format(key=key, number=number) for key, number in zip(keys, numbers)]
        if self.requested == 1:
            return _INTRO, needles, _ONE.format(keys=keys[0]), (numbers[0],)
        names = f"{', '.join(keys[:-1])} and {keys[-1]}" if self.kind == "multi-query" else keys[0]
        return _INTRO, needles, _ALL.format(keys=names), tuple(numbers)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def numbers_found(answer: str, numbers: tuple[str, ...]) -> int:
    """Count those of `numbers` that are among the first len(numbers) numbers of the answer, digit for digit."""
    return len(set(re.findall(r"\d+", answer)[: len(numbers)]) & set(numbers))


class Windows(NamedTuple):
    """Token ids of equal length; `joined`: cut from all documents in a row, because no document was long enough."""

    rows: list[list[int]]
    joined: bool


class Hay:
    """Texts as tokens.

    Attributes:
        prefix: the tokens that begin every text (BOS, or none); not part of the others.
        documents: the tokens of each text.
        tokens: all of them in a row, with `between` between two texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, between: str = "\n\n") -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

        self.prefix = bos_prefix(tokenizer)
        self.documents = [ids for ids in map(encode, texts) if ids]
        if not self.documents:
            raise UserError("the text is empty, so nothing can be measured. Use a file with some pages.")
        self._between = encode(between)
        row = [token for ids in self.documents for token in (*ids, *self._between)]
        self.tokens = row[: len(row) - len(self._between)]
        ends = {token: _ends_sentence(tokenizer.decode([token])) for token in set(self.tokens)}
        # Positions right after a sentence; the beginning of the text is one of them.
        self._stops = [0, *(i + 1 for i, token in enumerate(self.tokens) if ends[token])]
        # Positions where a trial's hay can begin: text follows them.
        self._starts = [stop for stop in self._stops if stop < len(self.tokens)]

    def repeats(self, length: int) -> bool:
        """Return True if hay of `length` tokens contains some of the text twice."""
        return length > len(self.tokens)

    def windows(self, length: int, count: int) -> Windows | None:
        """Return at most `count` evenly spaced windows of exactly `length` tokens (prefix included) that do not overlap.

        None if the texts have fewer tokens than one window: a repeated text would measure copying.
        """
        rows = self._windows(self.documents, length)
        joined = not rows
        if joined:
            rows = self._windows([self.tokens], length)
        return Windows(evenly_spaced(rows, count), joined) if rows else None

    def _windows(self, documents: list[list[int]], length: int) -> list[list[int]]:
        step = length - len(self.prefix)
        return [
            self.prefix + ids[start : start + step]
            for ids in documents
            for start in range(0, len(ids) - step + 1, step)
        ]

    def cut(self, count: int, random: Random) -> tuple[list[int], list[int]]:
        """Return `count` tokens from the beginning of a random sentence, continued at the beginning of the text, and the
        positions in them (0 to `count`) right after a sentence."""
        start = random.choice(self._starts)
        tokens, stops, offset = [], [], -start
        while offset < count:
            tokens += self.tokens[max(0, -offset) :] + self._between
            first, last = bisect_left(self._stops, -offset), bisect_right(self._stops, count - offset)
            stops += [stop + offset for stop in self._stops[first:last]]
            offset += len(self.tokens) + len(self._between)
        return tokens[:count], sorted(set(stops))


def place(depth: float, count: int, stops: list[int]) -> int:
    """Return the position of a needle at `depth` (0 to 1) of `count` tokens: after the last sentence that ends before it."""
    target = round(depth * count)
    if target == count:
        return count
    before = bisect_right(stops, target)
    return stops[before - 1] if before else target


def _ends_sentence(text: str) -> bool:
    return text.rstrip().rstrip("\"'”’)").endswith((".", "!", "?"))
