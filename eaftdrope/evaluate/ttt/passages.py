"""Passages: consecutive blocks of equal length, each inside one document, for the test and for the fit of an inner rate.

A rate is never fitted on the test text. By default the last blocks of the texts are kept for the fit and the test passages
are chosen among the others; texts passed for the fit are used instead. Either way the two are compared token by token,
because a corpus may contain a document twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from eaftdrope.errors import UserError

from ..texts import evenly_spaced

# Two texts share a run of this many tokens only where one quotes the other, or both carry the same boilerplate.
_RUN = 32
# The largest share of a fitting passage's runs that boilerplate may explain.
_SHARED = 0.05


class Passage(NamedTuple):
    """`ids` are the tokens from position `start` of document number `document` on, after those that begin every text."""

    document: int
    start: int
    ids: list[int]


class Passages(NamedTuple):
    """Passages to measure, and those that an inner rate is fitted on."""

    test: list[Passage]
    fit: list[Passage]


def cut_passages(documents: Sequence[list[int]], prefix: list[int], length: int) -> list[Passage]:
    """Return every block of exactly `length` tokens, `prefix` included; what is left at the end of a document is unused."""
    step = length - len(prefix)
    return [
        Passage(number, start, prefix + ids[start : start + step])
        for number, ids in enumerate(documents)
        for start in range(0, len(ids) - step + 1, step)
    ]


def choose_passages(blocks: Sequence[Passage], count: int, fit_blocks: Sequence[Passage] | None, fit: int) -> Passages:
    """Return at most `count` test passages, evenly spaced over `blocks`, and at most `fit` fitting passages.

    Args:
        fit_blocks: blocks of texts passed for the fit; None to keep the last ones of `blocks` for it: `fit` of them, or
            a fifth where there are too few for both.

    Raises:
        UserError: a fitting passage contains test text.
    """
    if fit_blocks is None:
        few = min(fit, max(1, len(blocks) // 5), max(0, len(blocks) - 1))
        kept = fit if len(blocks) >= count + fit else few
        blocks, fit_blocks = blocks[: len(blocks) - kept], blocks[len(blocks) - kept :]
    chosen = Passages(evenly_spaced(blocks, count), evenly_spaced(fit_blocks, fit))
    tested = runs_of(passage.ids for passage in chosen.test)
    for passage in chosen.fit:
        if (share := shared(passage.ids, tested)) > _SHARED:
            raise UserError(
                f"{100 * share:.0f} % of a passage for the fit of the inner rate is test text too (document "
                f"{passage.document + 1}, token {passage.start:,}). A rate fitted on the test text would make naive TTT look "
                "better than it is: pass other text with --fit-text."
            )
    return chosen


def counted(passages: int) -> str:
    """Return `1 passage`, `16 passages`."""
    return f"{passages} passage" + ("" if passages == 1 else "s")


def runs_of(texts: Iterable[Sequence[int]]) -> set[tuple[int, ...]]:
    """Return every run of 32 tokens of some texts."""
    return {run for ids in texts for run in _runs(ids)}


def shared(ids: Sequence[int], runs: set[tuple[int, ...]]) -> float:
    """Return the share of the runs of 32 tokens of `ids` that are in `runs`; 0 if it is shorter than one."""
    mine = _runs(ids)
    return sum(run in runs for run in mine) / max(1, len(mine))


def _runs(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + _RUN]) for i in range(len(ids) - _RUN + 1)]
