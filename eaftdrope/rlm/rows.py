"""Training rows from runs: what a root saw and answered, as chat rows for `data.format: messages`.

    rows, dropped = training_rows([Path("run.jsonl")], RowFilters(min_turns=1))

A row per conversation trains all of its turns and encodes the history once. A row per turn has the history before it as
context (`weight: 0`), as in the RLM paper (arXiv 2512.24601): turns that are too long, or ran nothing, are left out. But for
repaired markers, roles and contents are what the model saw, to the character.

Read are journals, and logs of the package `rlms` (0.1): one file per logger, a line per iteration.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path

from .journal import conversations, read_journal
from .models import Message
from .protocol import NOTHING_RUN, parse

PER = ("conversation", "turn")

_MARKER = re.compile(r"^[ \t]*(FINAL_VAR|FINAL)\(", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_ASSIGNED = re.compile(r"^\s*(\w+)\s*=(?!=)", re.MULTILINE)


@dataclass(frozen=True)
class Trajectory:
    """A conversation of a root.

    Args:
        origin: its file and its place there.
        turns: for each of its replies, the messages it saw and the reply as the last one.
        finished: it set an answer.
    """

    origin: str
    turns: list[list[Message]]
    finished: bool


@dataclass(frozen=True)
class RowFilters:
    """What is left out. The defaults are those of the RLM paper; for the runs of a scripted expert, set `min_turns` to 1.

    Args:
        unfinished: keep conversations that a limit ended.
        min_turns: replies of a conversation, at least.
        max_chars: characters of a row, at most.
        repair: correct the marker of a row's last reply: FINAL(x) where x is a variable, FINAL_VAR(x) where x is text.
    """

    unfinished: bool = False
    min_turns: int = 2
    max_chars: int = 100_000
    repair: bool = True


def training_rows(
    files: Iterable[Path],
    filters: RowFilters | None = None,
    *,
    per: str = "conversation",
    scores: Mapping[str, float] | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows of runs, and how many were left out or repaired, by reason.

    Args:
        files: journals, or logs of `rlms`.
        filters: by default those of the paper.
        per: one of `PER`.
        scores: of runs, by the name of their file; a run with score 0 is left out.

    Raises:
        UserError: a file is neither a journal nor a log of `rlms`, or has no score; an unknown `per`.
    """
    if per not in PER:
        raise UserError(f"per={per!r}: not one of {', '.join(PER)}.")
    filters = filters or RowFilters()
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for file in files:
        if scores is not None and file.name not in scores:
            raise UserError(f"{file} has no score. Pass scores of all runs, or leave --scores out.")
        for trajectory in read_trajectories(file):
            reason = _unusable(trajectory, filters, None if scores is None else scores[file.name])
            if reason is not None:
                counts[reason] += 1
                continue
            for number, turn in _turns(trajectory, per):
                _add_row(rows, counts, f"{trajectory.origin}:{number}", turn, filters, per)
    return rows, counts


def _unusable(trajectory: Trajectory, filters: RowFilters, score: float | None) -> str | None:
    if not trajectory.finished and not filters.unfinished:
        return "not finished"
    if score == 0:
        return "score 0"
    if len(trajectory.turns) < filters.min_turns:
        return f"fewer than {filters.min_turns} turns"
    return None


def _turns(trajectory: Trajectory, per: str) -> list[tuple[int, list[Message]]]:
    numbered = list(enumerate(trajectory.turns, 1))
    return numbered[-1:] if per == "conversation" else numbered


def _add_row(
    rows: list[dict[str, Any]], counts: Counter[str], name: str, turn: list[Message], filters: RowFilters, per: str
) -> None:
    if sum(len(message["content"]) for message in turn) > filters.max_chars:
        counts[f"over {filters.max_chars:,} characters"] += 1
        return
    if per == "turn" and not _runs_or_finishes(turn[-1]["content"]):
        counts["nothing was run"] += 1
        return
    messages: list[dict[str, Any]] = [dict(message) for message in turn]
    if filters.repair:
        reply = repaired(turn)
        if reply != turn[-1]["content"]:
            counts["repaired"] += 1
            messages[-1]["content"] = reply
    for message, following in pairwise(messages):
        # context, not to be learned
        if message["role"] == "assistant" and (per == "turn" or following["content"] == NOTHING_RUN):
            message["weight"] = 0
    rows.append({"id": name, "messages": messages})


def _runs_or_finishes(reply: str) -> bool:
    parsed = parse(reply)
    return bool(parsed.blocks) or parsed.final is not None or parsed.variable is not None


def repaired(messages: Sequence[Message]) -> str:
    """The last reply of a conversation with the right one of FINAL and FINAL_VAR.

    The paper found the wrong one in 16 % and 13 % of the turns of its trajectories.
    """
    reply = messages[-1]["content"]
    parsed = parse(reply)
    if parsed.final is not None and parsed.final.isidentifier():
        code = [block for m in messages if m["role"] == "assistant" for block in parse(m["content"]).blocks]
        if parsed.final in _ASSIGNED.findall("\n".join(code)):
            return _with_marker(reply, "FINAL_VAR")
    if parsed.variable is not None and not parsed.variable.isidentifier():
        return _with_marker(reply, "FINAL")
    return reply


def _with_marker(reply: str, marker: str) -> str:
    """The reply with another marker in the place of the one outside of its blocks and its thinking."""
    for found in _MARKER.finditer(reply):
        before = reply[: found.start()]
        if len(_FENCE.findall(before)) % 2 == 0 and before.count("<think>") == before.count("</think>"):
            return reply[: found.start(1)] + marker + reply[found.end(1) :]
    raise AssertionError("the reply was parsed as having a marker")


# Reading


def read_trajectories(path: Path) -> list[Trajectory]:
    """The conversations of a journal (the root's first, then its children's), or of a log of `rlms`.

    Raises:
        UserError: the file is neither.
    """
    path = usable_path(path)
    return _of_rlms(path) if _is_of_rlms(path) else _of_journal(path)


def _of_journal(path: Path) -> list[Trajectory]:
    events = read_journal(path)
    # a resumed run stops its places again: the last counts
    finished = {event["place"]: event["answer"] is not None for event in events if event["event"] == "stop"}
    return [
        Trajectory(f"{path.name}:{place}", _split(messages), finished.get(place, False))
        for place, messages in conversations(events)
    ]


def _split(messages: list[Message]) -> list[list[Message]]:
    return [messages[: index + 1] for index, message in enumerate(messages) if message["role"] == "assistant"]


def _is_of_rlms(path: Path) -> bool:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    with path.open(encoding="utf-8") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and first.get("type") in ("metadata", "iteration")


def _lines(path: Path) -> list[str]:
    """The lines of a JSONL file; str.splitlines would also cut at separators inside of JSON strings."""
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def _of_rlms(path: Path) -> list[Trajectory]:
    """A metadata line, then a line per iteration with its `prompt` and `response`; iteration 1 begins a conversation."""
    found: list[Trajectory] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            entry = json.loads(line)
            if entry["type"] != "iteration":
                continue
            prompt, reply = entry["prompt"], {"role": "assistant", "content": entry["response"]}
            seen = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            turn = [*({"role": message["role"], "content": message["content"]} for message in seen), reply]
            is_first, finished = entry["iteration"] == 1, entry["final_answer"] is not None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a line of a log of rlms 0.1 ({error!r}).") from None
        if is_first or not found:
            found.append(Trajectory(f"{path.name}:{len(found) + 1}", [turn], finished))
        else:
            found[-1] = Trajectory(found[-1].origin, [*found[-1].turns, turn], finished)
    return found
