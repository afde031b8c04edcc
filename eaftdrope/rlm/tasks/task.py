"""A task, its vocabulary and its scores."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")

SETS = ("train", "test")

_NOUNS = (
    "harbour ledger copper meadow signal winter basket corner engine garden letter mirror pocket river saddle ticket"
)
_TRAIN: str = (
    "heron birch anvil lantern walnut osprey cactus hammer almond silver canyon trumpet magnet glacier velvet thistle"
)
_TEST: str = (
    "falcon maple chisel candle hazel pelican fennel mallet cherry bronze valley cornet pulley iceberg linen clover"
)

NOUNS = _NOUNS.split()
"""Of filler text, in both sets."""

NAMES: dict[str, list[str]] = {"train": _TRAIN.split(), "test": _TEST.split()}
"""What queries are about; the two sets are disjoint."""


@dataclass(frozen=True)
class Task:
    """A question about a long context.

    Args:
        kind: one of `KINDS`.
        context: the text, or the documents.
        query: the question.
        gold: the right answer.
        score: of an answer, from 0 to 1.
        guess: the answer of a policy that does not read the context: its score is the floor.
        oracle: the reply of a root that solves the task in one block of code, from what the query contains.
    """

    kind: str
    context: str | list[str]
    query: str
    gold: str
    score: Callable[[str], float]
    guess: str
    oracle: str


def seeded(kind: str, seed: int, names: str) -> Random:
    """The random numbers of a task: other ones for each set of names."""
    return Random(f"{kind} {names} {seed}")


def lines_of(chars: int, make: Callable[[int], str]) -> list[str]:
    """As many lines as `chars` characters need."""
    lines, size = [], 0
    while size < chars:
        lines.append(make(len(lines)))
        size += len(lines[-1]) + 1
    return lines


def note(random: Random, number: int) -> str:
    """A line of filler."""
    return f"note {number:07d} the {random.choice(NOUNS)} was seen near the {random.choice(NOUNS)}"


def block(code: str) -> str:
    """A reply that runs `code`, which sets `result`, and finishes with it."""
    return f'```repl\n{code}\nanswer["content"] = result\nanswer["ready"] = True\n```'


def exact(gold: str) -> Callable[[str], float]:
    """1 for the gold answer, whatever its case and the quotes or full stop around it."""

    def score(answer: str) -> float:
        return float(answer.strip().strip(".'\"").lower() == gold.lower())

    return score


def number(gold: int) -> Callable[[str], float]:
    """1 for an answer whose only number is the gold one: a model without a REPL tends to answer in a sentence."""
    return lambda answer: float(_only_integer(answer) == gold)


def near(gold: int) -> Callable[[str], float]:
    """.75 ** |answer - gold|, as OOLONG scores counts; 0 for an answer that does not have exactly one number, an integer."""

    def score(answer: str) -> float:
        given = _only_integer(answer)
        return 0.0 if given is None else 0.75 ** abs(given - gold)

    return score


def _only_integer(answer: str) -> int | None:
    found = _NUMBER.findall(answer)
    # more digits than any answer has: a model that repeats them without end
    if len(found) != 1 or "." in found[0] or len(found[0]) > 20:
        return None
    return int(found[0].replace(",", ""))
