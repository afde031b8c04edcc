"""A run of an RLM in a terminal: turns with their code and output, sub-calls, and what is left of the budget.

`eaftdrope rlm ask` prints the events as they happen, `eaftdrope rlm replay` those of a journal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eaftdrope.errors import printable
from eaftdrope.rlm.protocol import parse, shortened

if TYPE_CHECKING:
    from rich.console import Console

    from eaftdrope.rlm.journal import Event

# of a sub-call's prompt and reply
_SUB_CALL_CHARS = 160
_SUB_CALLS_SHOWN = 3


class TrajectoryView:
    """Prints events of a journal.

    Args:
        console: where to.
        every_call: print all sub-calls; else the first few of each turn.

    Attributes:
        turns: replies of roots so far; `sub_calls` and `tokens` likewise, of the events that were shown.
    """

    def __init__(self, console: Console, *, every_call: bool = False) -> None:
        self._console, self._every_call = console, every_call
        self._limits: dict[str, Any] = {}
        self._turn_calls = 0
        self.turns, self.sub_calls, self.tokens = 0, 0, 0

    def show(self, event: Event) -> bool:
        """Print an event. Returns True if a reply of a root was shown: a step."""
        kind = event["event"]
        if kind == "begin":
            self._limits = event["limits"]
            self._text(f"{event['described']}; {event['query']}", "bold")
            self._text(f"root {event['model']}, sub-model {event['sub_model']}, sandbox {event['sandbox']}", "dim")
        elif kind == "start" and event["place"] != "root":
            self._text(f"{event['place']} begins: {event['messages'][-1]['content']}", "magenta")
        elif kind == "call":
            return self._call(event)
        elif kind == "read":
            self.tokens += event["tokens"]
            self._text(f"  read: {event['texts']:,} texts, {event['tokens']:,} tokens", "cyan")
        elif kind == "cell":
            self._text(event["output"], "")
            self._text(event["error"] or "", "red")
        elif kind == "stop":
            self._stop(event)
        return False

    def used(self) -> str:
        """What the run has used."""
        return f"turns: {self.turns}, sub-calls: {self.sub_calls:,}, tokens: {self.tokens:,}"

    def left(self) -> str:
        """What is left of the budget, short enough for a line of a narrow terminal."""
        calls, tokens = (self._limits.get(name, 0) for name in ("sub_calls", "tokens"))
        calls, tokens = max(0, calls - self.sub_calls), max(0, tokens - self.tokens)
        return f"turn {self.turns} · left: {calls:,} sub-calls, {tokens:,} tokens"

    def _call(self, event: Event) -> bool:
        self.tokens += event["tokens_in"] + event["tokens_out"]
        if event["prompt"] is not None:
            self.sub_calls += 1
            self._turn_calls += 1
            if self._every_call or self._turn_calls <= _SUB_CALLS_SHOWN:
                asked, replied = (_one_line(event[name]) for name in ("prompt", "text"))
                self._text(f"  {asked} -> {replied}", "cyan")
            elif self._turn_calls == _SUB_CALLS_SHOWN + 1:
                self._text("  ... more sub-calls", "cyan")
            return False
        self.turns += 1
        self._turn_calls = 0
        self._console.rule(f"{event['place']}, reply {self.turns}", align="left", style="dim")
        self._reply(event["text"])
        return True

    def _reply(self, text: str) -> None:
        from rich.syntax import Syntax

        blocks = parse(text).blocks
        if not blocks:
            self._text(text, "italic")
        for block in blocks:
            code = printable(block.rstrip("\n"), lines=True)
            self._console.print(Syntax(code, "python", background_color="default", word_wrap=True))

    def _stop(self, event: Event) -> None:
        if event["answer"] is None:
            self._text(f"{event['place']} stopped: {event['stopped']}", "bold red")
        elif event["place"] != "root":
            self._text(f"{event['place']} answers: {_one_line(event['answer'])}", "magenta")

    def _text(self, text: str, style: str) -> None:
        from rich.text import Text

        if text.strip():
            self._console.print(Text(printable(text.rstrip("\n"), lines=True), style))


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _SUB_CALL_CHARS else " ".join(shortened(joined, _SUB_CALL_CHARS).split())
