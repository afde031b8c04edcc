"""A journal read as conversations: turns with their blocks of code, what each printed, its sub-calls and its children.

    root = conversation_tree(read_journal("run.jsonl"))
    root.turns[0].blocks[0].calls

A call belongs to the block that was running in its place. Where a resumed run came to another output than before, the later
branch counts, as in `journal.conversations`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .journal import Event
from .protocol import parse

_BEGINS = "\nIt begins: "


@dataclass(frozen=True)
class SubCall:
    """A call of the sub-model and its cost."""

    prompt: str
    reply: str
    tokens: int
    seconds: float


@dataclass
class BlockOfCode:
    """A block of a reply. `ran` is False for one that was not reached; `error` is what the root read of a failure."""

    code: str
    ran: bool = False
    output: str = ""
    error: str | None = None
    calls: list[SubCall] = field(default_factory=list)
    children: list[Conversation] = field(default_factory=list)


@dataclass
class Turn:
    """A reply of a root and what came of it. `shown` is what the root read next; None after its last reply."""

    reply: str
    tokens_in: int
    tokens_out: int
    seconds: float
    blocks: list[BlockOfCode]
    shown: str | None = None

    @property
    def sub_calls(self) -> int:
        """Calls of the sub-model by this turn, those of its children included."""
        return sum(len(block.calls) + sum(child.sub_calls for child in block.children) for block in self.blocks)

    @property
    def error(self) -> str | None:
        """The error that ended the turn's code."""
        return next((block.error for block in self.blocks if block.error is not None), None)


@dataclass
class Conversation:
    """The conversation of the root, or of a child.

    Attributes:
        ended: it set an answer or reached a limit; False for a run that was killed, or is running.
        repeated: a resumed run came to another output in it, so a part of its calls is not among its turns.
    """

    place: str
    query: str
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    stopped: str | None = None
    ended: bool = False
    repeated: bool = False

    @property
    def sub_calls(self) -> int:
        """Calls of the sub-model, those of children included."""
        return sum(turn.sub_calls for turn in self.turns)

    @property
    def children(self) -> Iterator[Conversation]:
        """The conversations that its code began."""
        return (child for turn in self.turns for block in turn.blocks for child in block.children)


def conversation_tree(events: Sequence[Event]) -> Conversation:
    """Read the events of a journal as the conversation of its root; a run without a reply has no turns."""
    query = next((event["query"] for event in events if event["event"] == "begin"), "")
    found = {"root": Conversation("root", query)}
    # (cells that came after all blocks of a turn had run) of an earlier turn, which a resumed run repeats
    late: dict[str, list[Event]] = {}
    for event in events:
        kind, place = event["event"], event.get("place", "")
        if kind == "start":
            _start(found, place, event)
        elif kind == "call" and event["prompt"] is None and place in found:
            found[place].turns.append(_turn(event))
        elif kind == "call":
            block = _running(found.get(place.removesuffix(".sub")))
            if block is not None:
                tokens = event["tokens_in"] + event["tokens_out"]
                block.calls.append(SubCall(event["prompt"] or "", event["text"], tokens, event["seconds"]))
        elif kind == "cell":
            if not _ran(found[place], event):
                late.setdefault(place, []).append(event)
        elif kind in ("turn", "stop"):
            _close(found[place], event, late.pop(place, []))
    return found["root"]


def _start(found: dict[str, Conversation], place: str, event: Event) -> None:
    if place in found:
        return
    query = event["messages"][-1]["content"].partition(_BEGINS)[0].removeprefix("Query: ")
    found[place] = child = Conversation(place, query)
    block = _running(found.get(place.rpartition("/")[0]))
    if block is not None:
        block.children.append(child)


def _turn(event: Event) -> Turn:
    blocks = [BlockOfCode(code) for code in parse(event["text"]).blocks]
    return Turn(event["text"], event["tokens_in"], event["tokens_out"], event["seconds"], blocks)


def _running(conversation: Conversation | None) -> BlockOfCode | None:
    """The block that runs now, or the last one if all have run."""
    blocks = conversation.turns[-1].blocks if conversation and conversation.turns else []
    return next((block for block in blocks if not block.ran), blocks[-1] if blocks else None)


def _ran(conversation: Conversation, event: Event) -> bool:
    """Note what the running block printed; return False if none is running."""
    block = _running(conversation)
    if block is None or block.ran:
        return False
    _note(block, event)
    return True


def _note(block: BlockOfCode, event: Event) -> None:
    block.ran, block.output, block.error = True, event["output"], event["error"]


def _close(conversation: Conversation, event: Event, late: list[Event]) -> None:
    """End a turn, or the conversation. A number below that of the last turn begins another branch."""
    turns, number = conversation.turns, event["turn"]
    if number < len(turns):
        del turns[number:]
        conversation.repeated = True
        if turns:
            again = late[-len(turns[-1].blocks) :] if turns[-1].blocks else []
            for block, cell in zip(turns[-1].blocks[len(turns[-1].blocks) - len(again) :], again, strict=True):
                _note(block, cell)
    if event["event"] == "turn":
        if turns:
            turns[-1].shown = event["shown"]
        conversation.ended = False
        return
    conversation.answer, conversation.stopped, conversation.ended = event["answer"], event["stopped"], True
