"""What a page is made of. A section is a list of these; assets/page.html has one macro for each kind.

All text is plain: it is escaped when the page is rendered, and only a `Picture` holds markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """`tone` is "better", "worse" or "" (no colour); the text says the same, so that colour is never alone."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its header. A row of one cell heads a group.

    Attributes:
        numeric: columns that are numbers, aligned at the right.
        long: columns of running text, which take a card's whole width.
        stack: on a phone, every row becomes a card; else the table scrolls sideways.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numeric: Sequence[int] = ()
    long: Sequence[int] = ()
    stack: bool = False
    note: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Text:
    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Picture:
    """`label` says in words what is seen; `wide` figures scroll on a phone."""

    name: str
    svg: str
    label: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Gallery:
    pictures: Sequence[Picture]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Sample:
    prompt: str
    reference: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """A prompt with answers side by side."""

    items: Sequence[Sample]
    kind: ClassVar[str] = "samples"


@dataclass(frozen=True)
class Conflict:
    """A token in its context. `facts` are lines of numbers below it."""

    before: str
    label: str
    after: str
    predicted: str
    facts: str


@dataclass(frozen=True)
class Conflicts:
    items: Sequence[Conflict]
    kind: ClassVar[str] = "conflicts"


@dataclass(frozen=True)
class Facts:
    """Names and values; a value may be code."""

    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Folded:
    """Long text behind a line that opens it."""

    summary: str
    text: str
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Section:
    """`anchor` is its id in the page."""

    anchor: str
    title: str
    blocks: Sequence[object] = field(default_factory=tuple)


@dataclass(frozen=True)
class Page:
    """`kind` is said above the title; `summary` is one sentence."""

    kind: str
    title: str
    summary: str
    sections: Sequence[Section]
