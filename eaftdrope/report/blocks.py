"""Elements of a page. A section is a list of blocks; assets/blocks.html has one macro for each kind.

All text is plain and is escaped when the page is rendered; only a `Picture` contains markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """A table cell. `tone` is "better", "worse" or "" (no colour); the text repeats it, so colour is never the only cue."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class TableBlock:
    """Rows of cells; the first cell of a row is its header. A row of one cell is the heading of a group.

    Attributes:
        numeric: indices of the columns with numbers, aligned to the right.
        long: indices of the columns with running text, which fill the width of a card.
        stack: on a phone, show each row as a card; otherwise the table scrolls sideways.
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
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Quote:
    """A text that a model wrote, set apart."""

    text: str
    kind: ClassVar[str] = "quote"


@dataclass(frozen=True)
class Picture:
    """A figure. `label` describes it to readers who cannot see it; a `wide` figure scrolls on a phone."""

    name: str
    svg: str
    label: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Gallery:
    """Figures side by side."""

    pictures: Sequence[Picture]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Sample:
    """A prompt, its reference answer, and (title, answer) of each model."""

    prompt: str
    reference: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """Prompts with the answers of the models side by side."""

    items: Sequence[Sample]
    kind: ClassVar[str] = "samples"


@dataclass(frozen=True)
class Conflict:
    """A token in its context. `facts` is a line of numbers below it."""

    before: str
    label: str
    after: str
    predicted: str
    facts: str


@dataclass(frozen=True)
class Conflicts:
    """A numbered list of conflicts."""

    items: Sequence[Conflict]
    kind: ClassVar[str] = "conflicts"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Folded:
    """Long text that is shown when its summary is clicked."""

    summary: str
    text: str
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class SubCallLine:
    """A call of a sub-model: what it was sent, and its reply."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class CodeStep:
    """A block of code of an RLM. `calls` and `children` are folded below `summary`; `rest` counts those not shown."""

    code: str
    output: str
    error: str
    summary: str = ""
    calls: Sequence[SubCallLine] = ()
    children: Sequence[Trajectory] = ()
    rest: str = ""


@dataclass(frozen=True)
class TurnStep:
    """A reply of a root: its text outside of code, then its blocks. `rest` counts the blocks that are not shown."""

    title: str
    tags: Sequence[str]
    facts: str
    text: str
    steps: Sequence[CodeStep]
    rest: str = ""


@dataclass(frozen=True)
class Trajectory:
    """The turns of a conversation of an RLM, with those of its children inside. A turn that is a text stands for those left
    out."""

    title: str
    turns: Sequence[TurnStep | str]
    answer: str = ""
    kind: ClassVar[str] = "trajectory"


@dataclass(frozen=True)
class PageSection:
    """A titled part of the page. `anchor` is its id."""

    anchor: str
    title: str
    blocks: Sequence[object] = field(default_factory=tuple)


@dataclass(frozen=True)
class Page:
    """A whole page. `kind` stands above the title; `summary` is one sentence below it."""

    kind: str
    title: str
    summary: str
    sections: Sequence[PageSection]
