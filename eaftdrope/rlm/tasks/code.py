"""code: small functions in files, each calling up to two earlier ones: the callers of one, or the value of one.

Callers are counted through others too; values come from running the code. No sub-model is needed.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from .task import NAMES, Task, block, near, number, seeded

_PER_FILE = 8
_FUNCTION_CHARS = 72
_PRIME = 9973
_QUERIES = {
    "train": {
        "callers": "How many functions call {name}, directly or through others? Answer with a number.",
        "value": "What does {name}(3) return? Answer with a number.",
    },
    "test": {
        "callers": "Count the direct and indirect callers of {name}.",
        "value": "What is the value of {name}(3)?",
    },
}
_FORMS = tuple(_QUERIES["train"])
_ORACLES = {
    "callers": r"""import re
calls = {{}}
for file in context:
    for name, body in re.findall(r"def (\w+)\(x\):\n([^\n]*)", file):
        calls[name] = set(re.findall(r"(\w+)\(x \+", body))
reach = {{"{name}"}}
while True:
    more = {{n for n in calls if calls[n] & reach}} - reach
    if not more:
        break
    reach |= more
result = len(reach) - 1""",
    "value": "for file in context:\n    exec(file)\nresult = {name}(3)",
}


class _Function(NamedTuple):
    """(x * factor + term + the called ones, each of x + its shift) % _PRIME."""

    name: str
    factor: int
    term: int
    calls: tuple[tuple[int, int], ...]


def make(seed: int, chars: int, *, names: str, phrasings: str) -> Task:
    random = seeded("code", seed, names)
    functions: list[_Function] = []
    for index in range(max(_PER_FILE, chars // _FUNCTION_CHARS)):
        functions.append(_function(random, index, NAMES[names]))
    written = [_written(function, functions) for function in functions]
    context = [
        f"# file: module_{start // _PER_FILE}.py\n" + "\n".join(written[start : start + _PER_FILE])
        for start in range(0, len(written), _PER_FILE)
    ]
    form = _FORMS[seed % len(_FORMS)]
    # early enough to have callers
    target = random.randrange(len(functions) // 4, len(functions) // 2)
    name = functions[target].name
    query, oracle = _QUERIES[phrasings][form].format(name=name), block(_ORACLES[form].format(name=name))
    if form == "value":
        value = _value(functions, target, 3)
        return Task("code", context, query, str(value), number(value), str(random.randrange(_PRIME)), oracle)
    callers = _callers(functions, target)
    # of a function with one expected call per later one, half of these
    guess = (len(functions) - target) // 2
    return Task("code", context, query, str(callers), near(callers), str(guess), oracle)


def _function(random: Random, index: int, names: list[str]) -> _Function:
    called = random.sample(range(index), min(index, random.randrange(3)))
    calls = tuple((callee, random.randrange(5)) for callee in called)
    return _Function(f"{random.choice(names)}_{index}", random.randrange(2, 9), random.randrange(100), calls)


def _written(function: _Function, functions: list[_Function]) -> str:
    calls = "".join(f" + {functions[index].name}(x + {shift})" for index, shift in function.calls)
    return f"def {function.name}(x):\n    return (x * {function.factor} + {function.term}{calls}) % {_PRIME}\n"


def _value(functions: list[_Function], index: int, x: int) -> int:
    function = functions[index]
    called = sum(_value(functions, callee, x + shift) for callee, shift in function.calls)
    return (x * function.factor + function.term + called) % _PRIME


def _callers(functions: list[_Function], target: int) -> int:
    reach = {target}
    for index in range(target + 1, len(functions)):
        if any(callee in reach for callee, _ in functions[index].calls):
            reach.add(index)
    return len(reach) - 1
