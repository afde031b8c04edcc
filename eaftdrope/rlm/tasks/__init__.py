"""Tasks over long contexts, generated from a seed: each with its score, its floor and a root that solves it.

    task = make_task("needle", seed=3, chars=64_000)
    task.score(rlm.complete(task.context, task.query).answer)

| kind      | work         | what is asked                                                  | score             |
|-----------|--------------|----------------------------------------------------------------|-------------------|
| needle    | O(1)         | one number among similar ones                                  | the only number   |
| count     | O(N)         | how many records have a written label                          | .75^|error|       |
| aggregate | O(N)         | a count of questions by their type, or the commonest type      | .75^|error|, exact |
| pairs     | O(N^2)       | all pairs of users with questions of two types                 | F1                |
| multi-hop | O(documents) | the end of a chain of facts, each in another document          | exact             |
| code      | O(files)     | the callers of a function, or its value                        | .75^|error|, exact |

Only `aggregate` and `pairs` need a sub-model, and the first words of their questions give the type away: they measure the
harness, and are no evidence of understanding. The names of the sets "train" and "test" are disjoint, and so are the
phrasings of their queries.
"""

from __future__ import annotations

from collections.abc import Callable

from eaftdrope.errors import UserError

from . import aggregate, code, count, multi_hop, needle, pairs
from .task import SETS, Task

_MAKERS: dict[str, Callable[..., Task]] = {
    "needle": needle.make,
    "count": count.make,
    "aggregate": aggregate.make,
    "pairs": pairs.make,
    "multi-hop": multi_hop.make,
    "code": code.make,
}
KINDS = tuple(_MAKERS)

__all__ = ["KINDS", "SETS", "Task", "make_task"]


def make_task(kind: str, seed: int, chars: int, *, names: str = "test", phrasings: str = "train") -> Task:
    """Generate a task; the same arguments give the same task.

    Args:
        kind (`str`): one of `KINDS`.
        seed (`int`): of everything in it. Kinds with several forms of query alternate them by seed.
        chars (`int`): length of the context in characters, reached by its last line, document or function.
        names (`str`, *optional*, defaults to `"test"`): the set of names, one of `SETS`.
        phrasings (`str`, *optional*, defaults to `"train"`): the set of phrasings of the query, one of `SETS`.

    Raises:
        UserError: an unknown kind or set, or no length.
    """
    for option, value, known in (("kind", kind, KINDS), ("names", names, SETS), ("phrasings", phrasings, SETS)):
        if value not in known:
            raise UserError(f"{option}={value!r}: not one of {', '.join(known)}.")
    if chars < 1:
        raise UserError(f"chars={chars}: must be positive.")
    return _MAKERS[kind](seed, chars, names=names, phrasings=phrasings)
