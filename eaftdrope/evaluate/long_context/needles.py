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
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from eaftdrope.errors import UserError

from .haystack import Hay, place

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
