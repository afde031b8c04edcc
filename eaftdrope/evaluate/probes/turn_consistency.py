"""Pairs of turns: the first states a fact or a standing instruction, the second can only be answered by keeping it.

The model answers both turns itself, greedily: its own first answer is part of the second prompt. Five kinds with 24 pairs
each: a name, a number, a place, the name of a pet, and a word that every later answer must end with. The score is the share
of second answers that keep what the first turn stated; a program can verify each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaftdrope.data import Example
from eaftdrope.errors import UserError

from ..scores import ENOUGH, Score, score_units
from ..texts import evenly_spaced
from .answers import answer, final_part, question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

_NAMES = (
    "Mara Tobias Ines Henrik Paula Oskar Leila Bruno Sofia Milan Greta Pavel Nadia Felix Irene Hugo Carla Anton "
    "Vera Jonas Rita Emil Dora Marek"
)
_PLACES = (
    "Oslo Lima Porto Turin Cairo Delhi Osaka Quito Basel Malmo Seville Dakar Perth Austin Galway Riga Bergen Leeds "
    "Nairobi Hanoi Ghent Split Tampa Kyoto"
)
_WORDS = (
    "banana window castle rocket pepper garden thunder button velvet marble lantern cactus bridge walnut feather "
    "island kettle saddle ribbon tunnel anchor cherry mirror pebble"
)
_PETS = ("dog", "cat", "parrot", "horse")


@dataclass(frozen=True)
class TurnPair:
    """Two user turns, the kind of what the first one states, and that word."""

    first: str
    second: str
    kind: str
    word: str

    def is_kept(self, text: str) -> bool:
        """Return whether an answer to the second turn keeps what the first one stated."""
        return _CHECKS[self.kind](final_part(text).strip(), self.word)


def _contains(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _ends(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}\W*$", text, re.IGNORECASE) is not None


_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "name": _contains,
    "number": _contains,
    "place": _contains,
    "pet": _contains,
    "ending": _ends,
}


def turn_pairs() -> list[TurnPair]:
    """Return the 120 pairs; neighbours are of different kinds."""
    names, pairs = _NAMES.split(), []
    for index, (name, place, word) in enumerate(zip(names, _PLACES.split(), _WORDS.split(), strict=True)):
        number, pet, other = str(2137 + 311 * index), _PETS[index % 4], names[index - 7]
        pairs += [
            TurnPair(f"My name is {name}. Please greet me in one short sentence.", "What is my name?", "name", name),
            TurnPair(
                f"My locker has the number {number}. Is that an even number?",
                "What is the number of my locker?",
                "number",
                number,
            ),
            TurnPair(
                f"I live in {place}. What can people do at home when it rains?",
                "In which city do I live?",
                "place",
                place,
            ),
            TurnPair(
                f"I have a {pet}, and it is called {other}. Tell me one thing that it may like to eat.",
                f"What is my {pet} called?",
                "pet",
                other,
            ),
            TurnPair(
                f"From now on, end every answer with the word {word}. How many days are in a week?",
                "How many months are in a year?",
                "ending",
                word,
            ),
        ]
    return pairs


@dataclass(frozen=True)
class TurnConsistencyProbe:
    """Share of `pairs` whose second answer keeps what the first turn stated."""

    pairs: list[TurnPair]
    max_new_tokens: int
    group: str = "general"
    name: str = "turn_consistency"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> TurnConsistencyProbe:
        """Build the probe; options: `limit` and `max_new_tokens`."""
        return cls(evenly_spaced(turn_pairs(), options["limit"]), options["max_new_tokens"], group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Measure a model.

        Raises:
            UserError: the tokenizer has no chat template, so there are no turns.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "the probe turn_consistency needs a chat template, and the tokenizer has none. Leave it out, or measure a "
                "model for conversations."
            )
        options = {"max_new_tokens": self.max_new_tokens, "batch_tokens": batch_tokens}

        def half(second: bool) -> Progress | None:
            # the two rounds of answers are one measurement
            return progress and (lambda done, total: progress(done + total * second, 2 * total))

        first = answer(model, tokenizer, [question(pair.first) for pair in self.pairs], progress=half(False), **options)
        asked = [
            _second_turn(pair, final_part(reply).strip() or "...")
            for pair, reply in zip(self.pairs, first, strict=True)
        ]
        second = answer(model, tokenizer, asked, progress=half(True), **options)
        units = [(float(pair.is_kept(text)), 1.0) for pair, text in zip(self.pairs, second, strict=True)]
        return [score_units(self.name, self.group, "turns kept", units, kind="share", better="higher", least=ENOUGH)]


def _second_turn(pair: TurnPair, reply: str) -> Example:
    turns = [("user", pair.first), ("assistant", reply), ("user", pair.second), ("assistant", "")]
    return Example(messages=[{"role": role, "content": text} for role, text in turns])
