"""A reader: a model that keeps what it reads, for the librarian that a root is.

The root selects passages and calls `read(texts)`; from then on its `llm_query` asks the reader, which has read all of them,
however many there are. The engine knows a reader by this interface only; `eaftdrope.ask` has one that learns as it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .models import Model


class Reading(Model, Protocol):
    """What one conversation has read, as a model to ask.

    Its name depends on all that was read, in order, so that a journal tells answers after different readings apart.

    Attributes:
        remembers: questions and their answers are read too: each changes what comes after it.
    """

    remembers: bool

    def count(self, texts: Sequence[str]) -> int:
        """Tokens that reading these texts takes."""
        ...

    def read(self, texts: Sequence[str]) -> None:
        """Read texts. The work may be put off until something is asked: a run that is replayed then reads nothing."""

    def note(self, prompt: str, reply: str) -> None:
        """Read a question and its answer, for a reader that remembers."""


class Reader(Protocol):
    """A model that reads. `name` identifies it, and how it reads, in a journal."""

    name: str

    def begin(self) -> Reading:
        """An empty reading."""
        ...
