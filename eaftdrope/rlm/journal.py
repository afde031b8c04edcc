"""The journal of a run: one JSON object per line, written before its effect is used.

    begin    what must be the same to resume: hashes of context and query, models, limits, prompt
    start    a conversation begins (the root's, or a child's): its place and first messages
    call     a model answered; of a sub-call also its prompt
    read     code gave texts to the reader: how many, and what they cost in tokens
    cell     a block of code ran: what it printed, and its error
    turn     what the root was shown after its reply
    stop     a conversation ends
    end      the result

To resume is to run again: code is deterministic and cheap, and calls that were answered come from here. An answer is found
by what was asked and how often it was asked in that place, not by a running number, so batches may be split differently.
A line that a kill has cut is dropped. While a run writes FILE it holds FILE.lock, so that no second one does. The file holds
pieces of the context: it is as private as the document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from filelock import BaseFileLock, FileLock, Timeout

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path

from .models import Message, Reply

VERSION = 1
# how a journal begins, of which a kill may leave a part
_BEGIN = f'{{"event": "begin", "version": {VERSION}, '.encode()

Event = dict[str, Any]


class Journal:
    """The events of a run, in a file or in memory (`path=None`).

    Args:
        path: the file.
        watch: called with each event that is written.

    Attributes:
        events: all of them, those of earlier starts included.
        replayed: calls that were answered from the file.

    Raises:
        UserError: the file is not a journal, or of another version; or another run is writing it.
    """

    def __init__(self, path: str | Path | None = None, watch: Callable[[Event], None] | None = None) -> None:
        self.path = None if path is None else usable_path(path)
        self.events: list[Event] = []
        self._watch = watch
        self.replayed = 0
        self._answers: dict[str, Reply] = {}
        self._asked: dict[str, int] = {}
        # events of earlier starts by place, which this one repeats
        self._before: dict[str | None, deque[str]] = {}
        self._file = None
        self._lock = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        try:
            if self.path.is_file():
                self._read(self.path)
            self._file = self.path.open("a", encoding="utf-8", errors="surrogatepass")
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path) -> None:
        events, whole = _whole_events(path)
        for number, event in enumerate(events, 1):
            try:
                self._add(event)
            except KeyError:
                raise _damaged(path, number) from None
        os.truncate(path, whole)

    def _add(self, event: dict[str, Any]) -> None:
        if event["event"] == "call":
            reply = Reply(event["text"], event["tokens_in"], event["tokens_out"], event["seconds"])
            self._answers[event["key"]] = reply
        else:
            self._before.setdefault(event.get("place"), deque()).append(_line(event))
        self.events.append(event)

    def begin(self, identity: dict[str, Any]) -> None:
        """Write, or compare, what must be the same to resume.

        Raises:
            UserError: the journal is of another run; names what differs.
        """
        if not self.events:
            self.write("begin", version=VERSION, **identity)
            return
        found = self.events[0]
        self._before[None].popleft()
        different = [name for name, value in identity.items() if found.get(name) != value]
        if different:
            raise UserError(
                f"{self.path} is the journal of another run (different: {', '.join(different)}). Choose another file, or "
                "delete this one to start over."
            )

    def write(self, event: str, **values: Any) -> None:
        """Write an event, unless an earlier start has: a run that was killed ends with the journal of one that was not."""
        whole = {"event": event, **values}
        line, before = _line(whole), self._before.get(values.get("place"))
        if before and event != "call":
            if before[0] == line:
                before.popleft()
                return
            # another output than then: what followed does not count any more
            before.clear()
        self.events.append(whole)
        if self._file is not None:
            self._put(self._file, line)
        if self._watch is not None:
            self._watch(whole)

    def _put(self, file: TextIO, line: str) -> None:
        """
        Raises:
            UserError: the disk is full, or gone. What was written before is kept, and resumes.
        """
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            # what could not be written would be tried again
            with contextlib.suppress(OSError):
                file.close()
            self._file = None
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}). Free some space, and run again: it resumes."
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            # while it is locked: later it could be another run's
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
            self._lock.release()
            self._lock = None

    # Calls

    def keys(self, place: str, model: str, max_tokens: int, conversations: Sequence[list[Message]]) -> list[str]:
        """The keys of calls that are asked now; asking again gives others."""
        keys = []
        for messages in conversations:
            asked = json.dumps([place, model, max_tokens, messages], ensure_ascii=False)
            digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:24]
            self._asked[digest] = number = self._asked.get(digest, -1) + 1
            keys.append(f"{digest}/{number}")
        return keys

    def answer(self, key: str) -> Reply | None:
        """The answer of a call that was made before; None if it was not."""
        return self._answers.get(key)

    def record(self, key: str, place: str, model: str, prompt: str | None, reply: Reply) -> None:
        """Write the answer of a call.

        Args:
            prompt: of a sub-call; the messages of a root follow from the events before.
        """
        self._answers[key] = reply
        self.write(
            "call",
            key=key,
            place=place,
            model=model,
            prompt=prompt,
            text=reply.text,
            tokens_in=reply.tokens_in,
            tokens_out=reply.tokens_out,
            seconds=round(reply.seconds, 4),
        )


def is_journal(path: Path) -> bool:
    """Whether a file begins as a journal of this version does."""
    with path.open("rb") as file:
        head = file.read(len(_BEGIN))
    return bool(head) and _BEGIN.startswith(head)


def read_journal(path: str | Path) -> list[Event]:
    """The events of a journal, which may be growing: the file is left as it is.

    Raises:
        UserError: no such file, or it is not a journal, or of another version.
    """
    path = usable_path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder. Choose one of its journals.")
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    return _whole_events(path)[0]


def _whole_events(path: Path) -> tuple[list[Event], int]:
    """The events of a file up to a line that a kill has cut, and their size in bytes."""
    content, events, whole = path.read_bytes(), [], 0
    if not _BEGIN.startswith(content[: len(_BEGIN)]):
        raise UserError(f"{path} is not a journal of an RLM run, or of another version. Choose another file.")
    for number, raw in enumerate(content.splitlines(keepends=True), 1):
        if not raw.endswith(b"\n"):
            break
        try:
            event = json.loads(raw)
            event["event"]
        except (ValueError, TypeError, KeyError):
            raise _damaged(path, number) from None
        events.append(event)
        whole += len(raw)
    return events, whole


def _damaged(path: Path, number: int) -> UserError:
    return UserError(f"{path}, line {number}: damaged. Delete this line and those after it.")


def _line(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


def _locked(path: Path) -> BaseFileLock:
    """
    Raises:
        UserError: another run holds the lock, or there can be no lock.
    """
    lock = FileLock(f"{path}.lock")
    try:
        # a run that is just ending deletes the file and releases it
        lock.acquire(timeout=1)
    except Timeout:
        if not os.path.exists(lock.lock_file):
            raise UserError(f"{path} cannot be locked: no file can be made beside it. Choose another folder.") from None
        raise UserError(f"another run is writing {path}. Wait for it, stop it, or choose another file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be locked ({error.strerror}: {path}.lock). Choose another folder.") from error
    return lock


def conversations(events: Sequence[Event]) -> Iterator[tuple[str, list[Message]]]:
    """Rebuild each conversation of a journal, the root's and the children's, exactly as the model saw it.

    A resumed run can come to another output than before, where a cell was stopped by its time: what follows it counts.
    """
    first: dict[str, list[Message]] = {}
    replies: dict[str, list[str]] = {}
    outputs: dict[str, list[str]] = {}
    for event in events:
        kind, place = event["event"], event.get("place", "")
        if kind == "start":
            first[place] = event["messages"]
            replies.setdefault(place, [])
            outputs.setdefault(place, [])
        elif kind == "call" and place in first:
            replies[place].append(event["text"])
        elif kind in ("turn", "stop"):
            del replies[place][event["turn"] :]
            if kind == "turn" or event["answer"] is not None:
                del outputs[place][max(event["turn"] - 1, 0) :]
            if kind == "turn":
                outputs[place].append(event["shown"])
    for place, messages in first.items():
        yield place, [*messages, *_alternating(replies[place], outputs[place])]


def _alternating(replies: Sequence[str], outputs: Sequence[str]) -> Iterator[Message]:
    for reply, output in zip_longest(replies, outputs[: len(replies)]):
        yield {"role": "assistant", "content": reply}
        if output is not None:
            yield {"role": "user", "content": output}
