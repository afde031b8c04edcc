"""What a check returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A claim that was checked.

    Attributes:
        claim (`str`): its id in docs/evidence.md.
        statement (`str`): what is checked, in one sentence.
        holds (`bool`): whether it is so.
        values (`dict`): the numbers, by name.
    """

    claim: str
    statement: str
    holds: bool
    values: dict[str, float | list[float]]
