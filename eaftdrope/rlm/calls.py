"""Calls of models: asked by generators, answered together.

A conversation is a generator that yields the calls it waits for. `together` runs many in lockstep; `drive` answers what they
yield, from their journals or by the models. Models are called in one place, `_answer_slice`, where the limits are checked.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .journal import Journal
from .limits import Budget, LimitReached
from .models import Message, Model, Reply, generate_each
from .reader import Reading

# a batch is answered in slices of this many: a kill loses one slice at most, and less of a model that answers in pieces
SLICE = 32

_T = TypeVar("_T")


@dataclass
class Run:
    """What a run and its children share."""

    journal: Journal
    budget: Budget
    children: dict[str, int] = field(default_factory=dict)
    # place of a conversation -> what its code has read
    readings: dict[str, Reading] = field(default_factory=dict)

    def child_of(self, place: str) -> str:
        self.children[place] = number = self.children.get(place, 0) + 1
        return f"{place}/{number}"


@dataclass(frozen=True)
class Ask:
    """Calls of one model, to be answered together.

    Args:
        prompts: for the journal: the prompts of sub-calls; None for a root, whose messages follow from the events before.
    """

    run: Run
    place: str
    model: Model
    conversations: list[list[Message]]
    max_tokens: int
    prompts: list[str] | None = None


Answers = list[Reply] | LimitReached
# sent None to begin
Core = Generator[list[Ask], Any, _T]


def together(cores: Sequence[Core[_T]]) -> Core[list[_T]]:
    """Run cores in lockstep: yield all that they wait for, until each has returned."""
    results: dict[int, _T] = {}
    waiting: dict[int, list[Ask]] = {}

    def resume(index: int, answers: list[Answers] | None) -> None:
        try:
            waiting[index] = cores[index].send(answers)
        except StopIteration as done:
            results[index] = done.value

    try:
        for index in range(len(cores)):
            resume(index, None)
        while waiting:
            asked = dict(waiting)
            waiting.clear()
            answers = iter((yield [ask for asks in asked.values() for ask in asks]))
            for index, asks in asked.items():
                resume(index, [next(answers) for _ in asks])
        return [results[index] for index in range(len(cores))]
    finally:
        for core in cores:
            core.close()


def drive(core: Core[_T]) -> _T:
    answers = None
    try:
        while True:
            answers = _answer(core.send(answers))
    except StopIteration as done:
        return done.value
    finally:
        core.close()


def asked(ask: Ask) -> Core[list[Reply]]:
    """Yield what a conversation asks, and raise the limit that is reached on the way."""
    (answers,) = yield [ask]
    if isinstance(answers, LimitReached):
        raise answers
    return answers


def _answer(asks: Sequence[Ask]) -> list[Answers]:
    """Answer calls from the journals, and the others by the models: in slices, each written before the next is asked."""
    keys = [ask.run.journal.keys(ask.place, ask.model.name, ask.max_tokens, ask.conversations) for ask in asks]
    missing: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, ask in enumerate(asks):
        for index, key in enumerate(keys[number]):
            known = ask.run.journal.answer(key)
            if known is None:
                missing.setdefault((id(ask.model), ask.max_tokens), []).append((number, index))
            else:
                ask.run.journal.replayed += 1
                ask.run.budget.tokens += known.tokens_in + known.tokens_out
    reached: dict[int, LimitReached] = {}
    for places in missing.values():
        for start in range(0, len(places), SLICE):
            _answer_slice(asks, keys, places[start : start + SLICE], reached)
    return [
        reached.get(number) or [_known(ask.run.journal, key) for key in keys[number]] for number, ask in enumerate(asks)
    ]


def _answer_slice(
    asks: Sequence[Ask], keys: list[list[str]], places: list[tuple[int, int]], reached: dict[int, LimitReached]
) -> None:
    for number in {number for number, _ in places} - reached.keys():
        try:
            asks[number].run.budget.check()
        except LimitReached as limit:
            reached[number] = limit
    places = [place for place in places if place[0] not in reached]
    if not places:
        return
    first = asks[places[0][0]]
    batch = [asks[number].conversations[index] for number, index in places]
    for place, reply in generate_each(first.model, batch, first.max_tokens):
        number, index = places[place]
        ask = asks[number]
        prompt = None if ask.prompts is None else ask.prompts[index]
        ask.run.journal.record(keys[number][index], ask.place, ask.model.name, prompt, reply)
        ask.run.budget.tokens += reply.tokens_in + reply.tokens_out


def _known(journal: Journal, key: str) -> Reply:
    reply = journal.answer(key)
    assert reply is not None, "every call was answered"
    return reply
