"""pairs: all pairs of users with questions of two types; the answer grows with the square of the users.

There are two entries per user: with ten, nearly every pair would be right. At most 100 users: what is left of the length
are lines of filler among the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .entries import FIRST_USER, INTRODUCTION, LABEL, TYPES, entry_maker, line_of
from .task import Task, block, lines_of, note, seeded

_MOST_USERS = 100
_ENTRIES_PER_USER = 2
_LINE_CHARS = 62
_QUERIES = {
    "train": (
        "List all pairs of different users of whom one has an entry of type {x} and the other one of type {y}. One pair "
        "per line: id,id"
    ),
    "test": (
        "Which two users together have entries of types {x} and {y}, one each? Write every such pair on a line of its own, "
        "as id,id"
    ),
}
_ORACLE = """\
ids = [row[1][5:] for row in rows]
x = {{i for i, t in zip(ids, types) if t == "{x}"}}
y = {{i for i, t in zip(ids, types) if t == "{y}"}}
found = [(a, b) for a in sorted(x | y) for b in sorted(x | y) if a < b and ((a in x and b in y) or (a in y and b in x))]
result = "\\n".join(a + "," + b for a, b in found)"""

_Pair = tuple[int, int]


def make(seed: int, chars: int, *, names: str, phrasings: str) -> Task:
    random = seeded("pairs", seed, names)
    count = max(3, min(_MOST_USERS, chars // (_LINE_CHARS * _ENTRIES_PER_USER)))
    draw = entry_maker(random, range(FIRST_USER[names], FIRST_USER[names] + count))
    drawn = [draw() for _ in range(count * _ENTRIES_PER_USER)]
    lines = [line_of(number, entry) for number, entry in enumerate(drawn)]
    filler = lines_of(chars - sum(len(line) + 1 for line in lines), lambda number: note(random, number))
    # shuffled together; the entries stay in order among themselves
    turns = [True] * len(lines) + [False] * len(filler)
    random.shuffle(turns)
    entries, notes = iter(lines), iter(filler)
    context = "\n".join(next(entries) if is_entry else next(notes) for is_entry in turns)

    x, y = random.sample(list(TYPES), 2)
    having = {kind: {entry.user for entry in drawn if entry.type == kind} for kind in (x, y)}
    everyone = sorted({entry.user for entry in drawn})
    every = [(a, b) for a in everyone for b in everyone if a < b]
    gold = {(a, b) for a, b in every if (a in having[x] and b in having[y]) or (a in having[y] and b in having[x])}
    query = INTRODUCTION + _QUERIES[phrasings].format(x=x, y=y)
    oracle = block(LABEL + _ORACLE.format(x=x, y=y))
    return Task("pairs", context, query, _written(sorted(gold)), f1(gold), _written(every), oracle)


def _written(pairs: Iterable[_Pair]) -> str:
    return "\n".join(f"{a},{b}" for a, b in pairs)


def f1(gold: set[_Pair]) -> Callable[[str], float]:
    """F1 over sets of pairs, a pair per line (or separated by `;`), the order within a pair ignored.

    What cannot be read as a pair counts as a wrong one; a pair counts once.
    """

    def score(answer: str) -> float:
        given = {_read(part) for part in answer.replace("\n", ";").split(";") if part.strip()}
        if not gold or not given:
            return float(not gold and not given)
        return 2 * len(given & gold) / (len(given) + len(gold))

    return score


def _read(part: str) -> _Pair | str:
    numbers = [word.strip() for word in part.strip(" ()[]").split(",")]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return part
    a, b = sorted(map(int, numbers))
    return a, b
