"""aggregate: a figure about the types of all entries, so each has to be classified."""

from __future__ import annotations

from collections import Counter

from .entries import FIRST_USER, INTRODUCTION, LABEL, TYPES, Entry, entry_maker, line_of
from .task import Task, block, exact, lines_of, near, seeded

_USERS = 20
_QUERIES = {
    "train": {
        "count": "How many entries are of type {kind}? Answer with a number.",
        "user": "How many entries of user {user} are of type {kind}? Answer with a number.",
        "top": "Which type is the most frequent? Answer with the type.",
    },
    "test": {
        "count": "What is the number of entries with type {kind}?",
        "user": "User {user} wrote how many entries of type {kind}? Return a number.",
        "top": "Name the commonest type.",
    },
}
_FORMS = tuple(_QUERIES["train"])
_ORACLES = {
    "count": 'result = types.count("{kind}")',
    "user": 'result = sum(1 for row, t in zip(rows, types) if row[1] == "user {user}" and t == "{kind}")',
    "top": "from collections import Counter\nresult = Counter(types).most_common(1)[0][0]",
}


def make(seed: int, chars: int, *, names: str, phrasings: str) -> Task:
    random = seeded("aggregate", seed, names)
    users = range(FIRST_USER[names], FIRST_USER[names] + _USERS)
    form = _FORMS[seed % len(_FORMS)]
    while True:
        draw, drawn = entry_maker(random, users), []

        def entry(number: int, draw=draw, drawn: list[Entry] = drawn) -> str:
            drawn.append(draw())
            return line_of(number, drawn[-1])

        context = "\n".join(lines_of(chars, entry))
        ranked = Counter(entry.type for entry in drawn).most_common()
        # a tie has no answer: draw again
        if form != "top" or len(ranked) == 1 or ranked[0][1] > ranked[1][1]:
            break
    kind, user = random.choice(list(TYPES)), random.choice(users)
    query = INTRODUCTION + _QUERIES[phrasings][form].format(kind=kind, user=user)
    oracle = block(LABEL + _ORACLES[form].format(kind=kind, user=user))
    if form == "top":
        return Task("aggregate", context, query, ranked[0][0], exact(ranked[0][0]), random.choice(list(TYPES)), oracle)
    chosen = [entry for entry in drawn if form == "count" or entry.user == user]
    gold = sum(entry.type == kind for entry in chosen)
    share = len(TYPES) * (_USERS if form == "user" else 1)
    return Task("aggregate", context, query, str(gold), near(gold), str(round(len(drawn) / share)), oracle)
