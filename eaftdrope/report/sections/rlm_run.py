"""A run of a recursive language model, from its journal: the answer, what it cost, what it did, and every turn.

A page is at most `MAX_BYTES` however long the run: texts and lists are cut to the first of `_DETAILS` that fits. From
`COLLAPSE_FROM` sub-calls on, only the first few of each block of code are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from eaftdrope.rlm.journal import Event, read_journal
from eaftdrope.rlm.protocol import outside_of_code
from eaftdrope.rlm.strategies import RUN_RULES, TURN_RULES, strategy_of, tagged_turns
from eaftdrope.rlm.turns import BlockOfCode, Conversation, Turn, conversation_tree

from ..blocks import (
    CodeStep,
    Facts,
    Page,
    PageSection,
    Quote,
    SubCallLine,
    TableBlock,
    Text,
    Trajectory,
    TurnStep,
)
from ..render import render
from ..words import number, plural, start_of

MAX_BYTES = 2_000_000
COLLAPSE_FROM = 10_000
_ANSWER_CHARS = 20_000
_QUERY_CHARS = 2_000
_TITLE_CHARS = 120
_ENDS = (
    "The journal and this page contain pieces of the context, so they are as private as it is. What is cut here is complete "
    "in the journal."
)


@dataclass(frozen=True)
class Detail:
    """How much of a run is shown.

    Args:
        text: characters of a reply, a block of code, an output or an error.
        call: characters of a prompt, and of a reply, of a sub-call.
        calls: sub-calls of a block that are listed; None for all.
        turns, blocks: of a conversation, and of a turn.
        children: conversations below the root's, in all.
    """

    text: int
    call: int
    calls: int | None
    turns: int
    blocks: int
    children: int


Tags = dict[int, list[tuple[Turn, list[str]]]]


@dataclass
class _View:
    """A detail, how many children it may still show, and the strategies of conversations, which are found once."""

    detail: Detail
    left: int
    tags: Tags

    def may_show_child(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def tagged(self, conversation: Conversation) -> list[tuple[Turn, list[str]]]:
        if id(conversation) not in self.tags:
            self.tags[id(conversation)] = tagged_turns(conversation)
        return self.tags[id(conversation)]


# the last one fits whatever the journal contains
_DETAILS = (
    Detail(20_000, 2_000, None, 1_000, 100, 1_000),
    Detail(6_000, 400, None, 400, 50, 400),
    Detail(3_000, 100, None, 200, 20, 200),
    Detail(2_000, 40, None, 100, 20, 100),
    Detail(2_000, 400, 20, 100, 20, 100),
    Detail(1_000, 200, 10, 40, 10, 40),
    Detail(400, 100, 5, 12, 6, 8),
    Detail(150, 50, 3, 6, 3, 4),
)


def rlm_run_page(journal: Path) -> Page:
    """Return the page of a journal, of a run that may not have ended.

    Raises:
        UserError: the file is not a journal.
    """
    events = read_journal(journal)
    root = conversation_tree(events)
    listed = sum(event["event"] == "call" for event in events) < COLLAPSE_FROM
    tags: Tags = {}
    for detail in _DETAILS:
        if detail.calls is None and not listed:
            continue
        page = _page(journal, events, root, _View(detail, detail.children, tags))
        # markup and escapes only add to its characters
        if detail is _DETAILS[-1] or (_chars(page) <= MAX_BYTES and len(render(page).encode()) <= MAX_BYTES):
            return page
    raise AssertionError("the last detail is returned")


def _chars(block: object) -> int:
    """The characters of all texts of a block."""
    if isinstance(block, str):
        return len(block)
    if is_dataclass(block):
        return sum(_chars(getattr(block, each.name)) for each in fields(block))
    return sum(map(_chars, block)) if isinstance(block, Iterable) else 0


def _page(journal: Path, events: Sequence[Event], root: Conversation, view: _View) -> Page:
    begin = next((event for event in events if event["event"] == "begin"), {})
    sections = [
        PageSection("answer", "Answer", _answer(root, begin)),
        PageSection("cost", "Cost", _cost(events, begin)),
        PageSection("strategies", "What it did", _strategies(root, view)),
        PageSection("turns", "Turns", _turns(root, view, journal.name)),
        PageSection("run", "How it was run", [Facts(_settings(begin)), Text(_ENDS)]),
    ]
    title = start_of(" ".join(root.query.split()), _TITLE_CHARS) or journal.stem
    return Page("Run of a recursive language model", title, _summary(root, events), sections)


def _summary(root: Conversation, events: Sequence[Event]) -> str:
    calls = sum(event["event"] == "call" and event["prompt"] is not None for event in events)
    did = f"{plural(len(root.turns), 'turn')}, {plural(calls, 'sub-call')}, strategy: {strategy_of(root)}."
    if root.answer is not None:
        return f"Answered after {did}"
    state = f"Stopped by a limit ({root.stopped})" if root.ended else "Not finished: killed, or still running"
    return f"{state}, after {did}"


def _answer(root: Conversation, begin: Event) -> list[object]:
    facts = [("Query", start_of(root.query, _QUERY_CHARS)), ("Context", begin.get("described", ""))]
    if root.answer is None:
        stopped = f"No answer: {root.stopped}." if root.ended else "No answer yet: the same command resumes the run."
        return [Text(stopped), Facts(facts)]
    return [Quote(start_of(root.answer, _ANSWER_CHARS) or "(an empty answer)"), Facts(facts)]


def _cost(events: Sequence[Event], begin: Event) -> list[object]:
    roots = [event for event in events if event["event"] == "call" and event["prompt"] is None]
    subs = [event for event in events if event["event"] == "call" and event["prompt"] is not None]
    rows = []
    for name, calls in (("root", roots), ("sub-model", subs), ("all", [*roots, *subs])):
        tokens_in, tokens_out = (sum(call[key] for call in calls) for key in ("tokens_in", "tokens_out"))
        longest = max((call["tokens_in"] for call in calls), default=0)
        seconds = sum(call["seconds"] for call in calls)
        rows.append([name, *(f"{n:,}" for n in (len(calls), tokens_in, tokens_out, longest)), number(seconds, 1)])
    head = ("model", "calls", "tokens read", "tokens written", "longest prompt", "seconds")
    limits = begin.get("limits", {})
    used = sum(call["tokens_in"] + call["tokens_out"] for call in [*roots, *subs])
    note = (
        f"Seconds are those of the models. Used: {used:,} of {limits.get('tokens', 0):,} tokens, {len(subs):,} of "
        f"{limits.get('sub_calls', 0):,} sub-calls."
    )
    return [TableBlock("Calls of models", head, rows, numeric=range(1, len(head)), stack=True, note=note)]


def _strategies(root: Conversation, view: _View) -> list[object]:
    """Strategies of the root's turns, with the distribution of the sub-calls in the turns of each."""
    tagged = view.tagged(root)
    rows = []
    for name, rule in TURN_RULES.items():
        calls = [turn.sub_calls for turn, names in tagged if name in names]
        if calls:
            spread = (f"{sum(calls):,}", f"{median(calls):,.0f}", f"{max(calls):,}")
            rows.append([name, rule, f"{len(calls):,}", *spread])
    strategy = strategy_of(root)
    words = f"The run as a whole: {strategy} ({RUN_RULES[strategy]})."
    if not rows:
        return [Text(words)]
    head = ("strategy", "rule", "turns", "sub-calls", "median", "most")
    note = "Found by these rules in the code and the calls of the root's turns; a turn can have several."
    table = TableBlock("Strategies of the turns", head, rows, numeric=(2, 3, 4, 5), long=(1,), stack=True, note=note)
    return [Text(words), table]


def _turns(root: Conversation, view: _View, file: str) -> list[object]:
    if not root.turns:
        return [Text("The root has not replied yet.")]
    shown = _trajectory(root, view, "")
    notes = []
    if root.repeated:
        notes.append(
            f"A resumed start came to another output: the turns are those of the last start. {file} has the earlier ones."
        )
    return [*map(Text, notes), shown]


def _trajectory(conversation: Conversation, view: _View, title: str) -> Trajectory:
    detail, numbered = view.detail, list(enumerate(view.tagged(conversation), 1))
    head, tail = numbered, []
    if len(numbered) > detail.turns:
        kept = detail.turns - detail.turns // 3
        head, tail = numbered[:kept], numbered[-(detail.turns // 3) :]
    turns: list[TurnStep | str] = [_turn(n, turn, tags, view) for n, (turn, tags) in head]
    if tail:
        turns.append(f"{len(numbered) - len(head) - len(tail):,} turns are not shown.")
        turns += [_turn(n, turn, tags, view) for n, (turn, tags) in tail]
    return Trajectory(title, turns, start_of(conversation.answer or "", detail.text))


def _turn(place: int, turn: Turn, tags: list[str], view: _View) -> TurnStep:
    detail = view.detail
    facts = f"{turn.tokens_in:,} tokens read, {turn.tokens_out:,} written, {turn.seconds:.1f} s"
    steps = [_step(block, view) for block in turn.blocks[: detail.blocks]]
    more = len(turn.blocks) - len(steps)
    rest = f"{plural(more, 'block')} of code not shown." if more else ""
    text = start_of(outside_of_code(turn.reply).strip(), detail.text)
    return TurnStep(f"Turn {place}", tags, facts, text, steps, rest)


def _step(block: BlockOfCode, view: _View) -> CodeStep:
    detail = view.detail
    code = start_of(block.code.rstrip("\n"), detail.text)
    error = "(not run)" if not block.ran and not block.calls else start_of((block.error or "").strip("\n"), detail.text)
    children = [
        _trajectory(child, view, _child_title(child))
        for child in islice(block.children, detail.children)
        if view.may_show_child()
    ]
    listed = block.calls[: detail.calls]
    lines = [SubCallLine(start_of(call.prompt, detail.call), start_of(call.reply, detail.call)) for call in listed]
    more = [
        plural(count, name, names)
        for count, name, names in (
            (len(block.children) - len(children), "child", "children"),
            (len(block.calls) - len(lines), "sub-call", None),
        )
        if count
    ]
    rest = f"{' and '.join(more)} not shown." if more else ""
    output = start_of(block.output.strip("\n"), detail.text)
    return CodeStep(code, output, error, _calls_summary(block), lines, children, rest)


def _calls_summary(block: BlockOfCode) -> str:
    parts = []
    if block.children:
        below = sum(child.sub_calls for child in block.children)
        children = plural(len(block.children), "child with its own REPL", "children with REPLs of their own")
        parts.append(f"{children} ({plural(below, 'sub-call')} below)")
    if block.calls:
        tokens, seconds = sum(call.tokens for call in block.calls), sum(call.seconds for call in block.calls)
        parts.append(f"{plural(len(block.calls), 'sub-call')}: {tokens:,} tokens, {seconds:.1f} s")
    return "; ".join(parts)


def _child_title(child: Conversation) -> str:
    query = start_of(" ".join(child.query.split()), _TITLE_CHARS)
    answer = "no answer" if child.answer is None else start_of(" ".join(child.answer.split()), _TITLE_CHARS)
    return f"{child.place}, {plural(len(child.turns), 'turn')}: {query} → {answer}"


def _settings(begin: Event) -> list[tuple[str, str]]:
    limits = ", ".join(f"{name} {value:,}" for name, value in begin.get("limits", {}).items())
    pairs = [
        ("Root", begin.get("model")),
        ("Sub-model", begin.get("sub_model")),
        ("Windows", ", ".join(f"{window:,}" for window in begin.get("windows", [])) + " tokens"),
        ("Sandbox", begin.get("sandbox")),
        ("Limits", limits),
    ]
    return [(name, value) for name, value in pairs if value]
