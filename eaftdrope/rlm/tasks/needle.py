"""needle: one number among similar ones in lines of filler. No sub-model is needed."""

from __future__ import annotations

from .task import NAMES, Task, block, lines_of, note, number, seeded

_QUERIES = {
    "train": (
        "What is the magic number for {key}?",
        "Find the magic number for {key}.",
        "Which number is the magic number for {key}?",
        "What is the magic number of {key}?",
        "I need the number that belongs to {key}.",
        "Give the magic number of {key}.",
        "{key}: which number?",
        "Which magic number was assigned to {key}?",
    ),
    "test": ("What magic number does {key} have?", "Look up {key} and return its magic number."),
}
_DISTRACTORS = 5


def make(seed: int, chars: int, *, names: str, phrasings: str) -> Task:
    random = seeded("needle", seed, names)
    keys = random.sample(NAMES[names], _DISTRACTORS + 1)
    numbers = random.sample(range(10_000, 100_000), _DISTRACTORS + 1)
    lines = lines_of(chars, lambda index: note(random, index))
    for key, value in zip(keys, numbers, strict=True):
        lines.insert(random.randrange(len(lines) + 1), f"The magic number for {key} is {value}.")
    gold = str(numbers[0])
    found = f'import re\nresult = re.findall(r"magic number for {keys[0]} is (\\d+)", context)[0]'
    query = random.choice(_QUERIES[phrasings]).format(key=keys[0])
    # of the numbers in the text, any one
    return Task("needle", "\n".join(lines), query, gold, number(numbers[0]), str(random.choice(numbers)), block(found))
