"""Calls of models: generators wait for them, and they are answered in batches.

A conversation is a generator that yields the calls it waits for. `in_lockstep` runs many at once; `drive` answers what they
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
class Calls:
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
Core = Generator[list[Calls], Any, _T]


def in_lockstep(cores: Sequence[Core[_T]]) -> Core[list[_T]]:
    """Run cores in lockstep: yield all that they wait for, until each has returned."""
    results: dict[int, _T] = {}
    waiting: dict[int, list[Calls]] = {}

    def resume(index: int, answers: list[Answers] | None) -> None:
        try:
            waiting[index] = cores[index].send(answers)
        except StopIteration as done:
            results[index] = done.value

    try:
        for index in range(len(cores)):
            resume(index, None)
        while waiting:
            yielded = dict(waiting)
            waiting.clear()
            answers = iter((yield [calls for batch in yielded.values() for calls in batch]))
            for index, batch in yielded.items():
                resume(index, [next(answers) for _ in batch])
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


def replies_to(calls: Calls) -> Core[list[Reply]]:
    """Wait for the replies to calls, and raise the limit that is reached on the way."""
    (answers,) = yield [calls]
    if isinstance(answers, LimitReached):
        raise answers
    return answers


def _answer(waiting: Sequence[Calls]) -> list[Answers]:
    """Answer calls from the journals, and the others by the models: in slices, each written before the next begins."""
    keys = [one.run.journal.keys(one.place, one.model.name, one.max_tokens, one.conversations) for one in waiting]
    missing: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, calls in enumerate(waiting):
        for index, key in enumerate(keys[number]):
            known = calls.run.journal.answer(key)
            if known is None:
                missing.setdefault((id(calls.model), calls.max_tokens), []).append((number, index))
            else:
                calls.run.journal.replayed += 1
                calls.run.budget.tokens += known.tokens_in + known.tokens_out
    reached: dict[int, LimitReached] = {}
    for places in missing.values():
        for start in range(0, len(places), SLICE):
            _answer_slice(waiting, keys, places[start : start + SLICE], reached)
    return [
        reached.get(number) or [_known(calls.run.journal, key) for key in keys[number]]
        for number, calls in enumerate(waiting)
    ]


def _answer_slice(
    waiting: Sequence[Calls], keys: list[list[str]], places: list[tuple[int, int]], reached: dict[int, LimitReached]
) -> None:
    for number in {number for number, _ in places} - reached.keys():
        try:
            waiting[number].run.budget.check()
        except LimitReached as limit:
            reached[number] = limit
    places = [place for place in places if place[0] not in reached]
    if not places:
        return
    first = waiting[places[0][0]]
    batch = [waiting[number].conversations[index] for number, index in places]
    for place, reply in generate_each(first.model, batch, first.max_tokens):
        number, index = places[place]
        calls = waiting[number]
        prompt = None if calls.prompts is None else calls.prompts[index]
        calls.run.journal.record(keys[number][index], calls.place, calls.model.name, prompt, reply)
        calls.run.budget.tokens += reply.tokens_in + reply.tokens_out


def _known(journal: Journal, key: str) -> Reply:
    reply = journal.answer(key)
    assert reply is not None, "every call was answered"
    return reply
