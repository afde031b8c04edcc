"""multi-hop: the end of a chain of facts, each in another document, among other chains of the same relations.

No sub-model is needed.
"""

from __future__ import annotations

from random import Random

from .task import NAMES, NOUNS, Task, block, exact, seeded

_WORDS = 120
_DOCUMENT_CHARS = 820
_FACTS = (
    "{} works for the firm {}.",
    "The firm {} has its seat in {}.",
    "The mayor of {} is {}.",
    "{} was born in the village {}.",
)
_ASKED = {
    "train": ("the employer of {}", "the town where {} has its seat", "the mayor of {}", "the birthplace of {}"),
    "test": (
        "the firm that employs {}",
        "the seat of {}",
        "whoever is mayor of {}",
        "the village in which {} was born",
    ),
}
_HOPS = (2, 3, 4)


def make(seed: int, chars: int, *, names: str, phrasings: str) -> Task:
    random = seeded("multi-hop", seed, names)
    hops = _HOPS[seed % len(_HOPS)]
    # two chains at least, and no more than a fact per document
    documents = max(2 * hops, chars // _DOCUMENT_CHARS)
    people = [f"{noun.capitalize()}{name}" for noun in NOUNS for name in NAMES[names]]
    random.shuffle(people)
    chains = min(max(2, documents // (2 * hops)), len(people) // (hops + 1))
    nodes = [[people.pop() for _ in range(hops + 1)] for _ in range(chains)]
    facts = [_FACTS[hop].format(chain[hop], chain[hop + 1]) for chain in nodes for hop in range(hops)]
    context: list[str] = [" ".join(random.choices(NOUNS, k=_WORDS)) for _ in range(documents)]
    for fact, place in zip(facts, random.sample(range(documents), len(facts)), strict=True):
        context[place] = _with_fact(random, context[place], fact)
    start, gold = nodes[0][0], nodes[0][-1]
    asked = start
    for hop in range(hops):
        asked = _ASKED[phrasings][hop].format(asked)
    guess = random.choice([chain[-1] for chain in nodes])
    query = f"What is {asked}? Answer with the name."
    return Task("multi-hop", context, query, gold, exact(gold), guess, block(_oracle(start, hops)))


def _with_fact(random: Random, text: str, fact: str) -> str:
    cut = text.find(" ", random.randrange(len(text) // 2))
    return f"{text[:cut]}. {fact} {text[cut + 1 :]}"


def _oracle(start: str, hops: int) -> str:
    forms = [fact.rstrip(".").replace("{}", "X", 1).replace("{}", r"(\w+)") for fact in _FACTS[:hops]]
    return (
        f'import re\ntext = " ".join(context)\nresult = "{start}"\nfor form in {forms!r}:\n'
        '    result = re.findall(form.replace("X", result), text)[0]'
    )
