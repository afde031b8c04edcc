"""Entries: lines with a user and a question, whose type of answer is not written and has to be understood (or matched).

`aggregate` and `pairs` are about them; `classifier` is a scripted sub-model for them with a chosen error rate.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from ..models import Message, ScriptedModel
from .task import NOUNS

TYPES = {
    "location": (
        "Which city lies east of the {a} {b}?",
        "In what country is the {a} {b} found?",
        "Where is the old {a} {b}?",
    ),
    "number": (
        "How many {a}s fit into one {b}?",
        "What is the price of a {a} {b}?",
        "In which year was the {a} {b} built?",
    ),
    "person": (
        "Who painted the {a} {b}?",
        "Which author wrote about the {a} {b}?",
        "Who was the first owner of the {a} {b}?",
    ),
    "abbreviation": (
        "What does {A}{B} stand for?",
        "What is the abbreviation of {a} {b} institute?",
        "What is {A}.{B}. short for?",
    ),
    "description": (
        "Why does a {a} need a {b}?",
        "How do you repair a {a} {b}?",
        "What is the meaning of {a} {b}?",
    ),
    "entity": (
        "What animal carries a {a} {b}?",
        "What colour is the {a} {b}?",
        "Name a game played with a {a} and a {b}.",
    ),
}
INTRODUCTION = f"Each entry is a question whose answer is of one of these types: {', '.join(TYPES)}. "
FIRST_USER = {"train": 1000, "test": 5000}
"""Of each set of names; no task has 4,000 users."""

LABEL = f"""\
rows = [line.split(" || ") for line in context.split("\\n") if line.startswith("entry")]
head = "Of which type is the answer of the question: {", ".join(TYPES)}? Answer with the type.\\n"
types = llm_query_batched([head + row[2] for row in rows])
"""
"""The beginning of an oracle: `rows` (entry, user, question) and their `types`."""


class Entry(NamedTuple):
    """A question of a user; `type` is not written in the context."""

    user: int
    type: str
    question: str


def entry_maker(random: Random, users: range) -> Callable[[], Entry]:
    """Draw entries: uniformly over the users, with weights of the types that are drawn once."""
    weights = [random.random() + 0.2 for _ in TYPES]

    def make() -> Entry:
        kind = random.choices(list(TYPES), weights)[0]
        a, b = random.sample(NOUNS, 2)
        question = random.choice(TYPES[kind]).format(a=a, b=b, A=a[0].upper(), B=b[0].upper())
        return Entry(random.choice(users), kind, question)

    return make


def line_of(number: int, entry: Entry) -> str:
    return f"entry {number:05d} || user {entry.user} || {entry.question}"


def classify(question: str) -> str:
    """The type of a question, by its form.

    Raises:
        ValueError: it is not one of an entry.
    """
    for kind, forms in TYPES.items():
        for form in forms:
            if question.startswith(form.split("{")[0]) and question.endswith(form.split("}")[-1]):
                return kind
    raise ValueError(f"not a question of an entry: {question!r}")


def classifier(error_rate: float = 0.0) -> ScriptedModel:
    """A sub-model that classifies the question in the last line of a prompt, wrongly at the given rate.

    Whether a question is classified wrongly depends on the prompt only, so a run can be repeated.
    """

    def reply(messages: list[Message]) -> str:
        prompt = messages[-1]["content"]
        right = classify(prompt.rpartition("\n")[2])
        random = Random(prompt)
        return random.choice([kind for kind in TYPES if kind != right]) if random.random() < error_rate else right

    return ScriptedModel(reply, name=f"classifier, error rate {error_rate:g}", window=1_000_000)
