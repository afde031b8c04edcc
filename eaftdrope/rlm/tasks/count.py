"""count: how many records have a label that is written in them. No sub-model is needed."""

from __future__ import annotations

from .task import NAMES, NOUNS, Task, block, lines_of, near, seeded

_LABELS = 6
_QUERIES = {
    "train": (
        'How many records have "label: {label}"? Answer with a number.',
        'Count the records with "label: {label}". Answer with a number.',
        "How many of the records have the label {label}?",
        "Number of records with label {label}?",
        "How often does the label {label} occur? Answer with a number.",
        "Count all records of {label}.",
        "How many {label} records are there?",
    ),
    "test": (
        "How many records are labelled {label}? Answer with a number.",
        "What is the number of records whose label is {label}?",
    ),
}


def make(seed: int, chars: int, *, names: str, phrasings: str) -> Task:
    random = seeded("count", seed, names)
    labels = random.sample(NAMES[names], _LABELS)
    weights = [random.random() + 0.2 for _ in labels]
    given: list[str] = []

    def record(number: int) -> str:
        given.append(random.choices(labels, weights)[0])
        return f"record {number:06d} | {random.choice(NOUNS)} and {random.choice(NOUNS)} | label: {given[-1]}"

    context = "\n".join(lines_of(chars, record))
    label = random.choice(labels)
    gold = given.count(label)
    query = random.choice(_QUERIES[phrasings]).format(label=label)
    guess = str(round(len(given) / _LABELS))
    # the whole label: no name of a set is the beginning of another
    return Task(
        "count", context, query, str(gold), near(gold), guess, block(f'result = context.count("label: {label}")')
    )
