"""Where a root's code runs with all of Python: CPython in a process of its own, inside bubblewrap with limits. Linux only.

The process runs `worker.py`. Full Python cannot be held from inside, so nothing that the process sends is trusted: a line has
a size, a type and a time to arrive, and a process that breaks one of these is killed. Then, as in Monty, the variables are as
they were before the cell: a new process repeats the earlier cells, with the recorded outcomes of their host calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError

from . import bubblewrap, worker
from .limits import Limits
from .sandbox import STOPPED, TOOLS, TRACEBACK_CHARS, Cell, HostCall, Outcome, Printed

# of a new process, and of the values that it begins with
_START_SECONDS = 60.0
# a cell that ran within its limit may take longer on a machine that is busier now
_REPEAT_FACTOR = 4
# the interpreter itself, beside what the limit of memory is for
_BASE_MB = 48
# of a line to the host: its bytes, and its values, of which each takes the host up to 250 bytes
_LINE_BYTES = 64 << 20
_LINE_VALUES = 1_000_000
# possessive: in time that grows with the line, and not with its square
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)')
_READ_BYTES = 1 << 16


class _Lost(Exception):
    """The worker has ended, or has to; the message is the reason."""


class CPythonSandbox:
    """A REPL in CPython inside bubblewrap. Hashes, random and addresses are fixed; the clock is not."""

    lacking = "Python has no packages beside the standard library, no network, no threads or processes.\n"

    def __init__(self, limits: Limits, tools: Sequence[str] = TOOLS) -> None:
        self._limits, self._tools = limits, tuple(tools)
        self._values: dict[str, Any] = {}
        # the cells that ran, each with its host calls and their outcomes
        self._ran: list[tuple[str, list[tuple[str, Outcome]]]] = []
        try:
            self._worker = _Worker(limits, self._tools)
        except _Lost as lost:
            raise UserError(f"the REPL cannot be started: {lost}.") from None

    @staticmethod
    def require() -> None:
        """
        Raises:
            UserError: bubblewrap cannot be had here.
        """
        bubblewrap.require()

    def set(self, values: dict[str, Any]) -> None:
        """
        Raises:
            UserError: they do not fit into the memory of the REPL.
        """
        self._values |= values
        try:
            self._worker.set(values)
        except _Lost as lost:
            raise UserError(
                f"the context does not fit into a REPL of memory_mb={self._limits.memory_mb} ({lost})."
            ) from None

    def run(self, code: str) -> Generator[HostCall, Outcome, Cell]:
        printed, calls = Printed(self._limits.output_chars), []
        try:
            self._worker.ask({"run": code}, self._limits.cell_seconds)
            while "done" not in (message := self._worker.receive()):
                if "print" in message:
                    printed("stdout", str(message["print"]))
                    continue
                call, began = _host_call(message, self._tools), time.monotonic()
                outcome = yield call
                calls.append((_fingerprint(call), outcome))
                self._worker.answer(outcome, time.monotonic() - began)
        except _Lost as lost:
            return self._put_back(printed, str(lost))
        if message.get("full"):
            return self._put_back(printed, "it used too much memory")
        self._ran.append((code, calls))
        error = message["done"]
        return printed.cell(None if error is None else str(error)[-TRACEBACK_CHARS:])

    def get(self, name: str) -> Any:
        try:
            self._worker.ask({"get": name}, self._limits.cell_seconds)
            # to turn a value into text runs code of the value, which may print, but not call
            while "print" in (message := self._worker.receive()):
                pass
            if "call" in message:
                raise _Lost("it calls the engine to become text")
        except _Lost as lost:
            self._put_back(Printed(0), "")
            raise NameError(f"{name} cannot be read: {lost}") from None
        if "value" not in message:
            raise NameError(str(message.get("missing", f"{name} cannot be read")))
        return message["value"]

    def close(self) -> None:
        self._worker.kill()

    def _put_back(self, printed: Printed, reason: str) -> Cell:
        """Replace the worker by one with the variables as they were before the cell.

        Raises:
            UserError: no worker can be started any more.
        """
        try:
            self._restart()
            repeated = all(self._repeated(code, calls) for code, calls in self._ran)
            if not repeated:
                # what depends on the clock, for example, does not come out the same twice
                self._ran = []
                self._restart()
        except _Lost as lost:
            raise UserError(
                f"the REPL cannot be started again: {lost}. Run again to resume from the journal."
            ) from None
        text = STOPPED if repeated else "The cell was stopped ({}), and the variables of earlier cells are lost."
        return printed.cell(text.format(reason), stopped=True)

    def _restart(self) -> None:
        self._worker.kill()
        self._worker = _Worker(self._limits, self._tools)
        self._worker.set(self._values)

    def _repeated(self, code: str, calls: list[tuple[str, Outcome]]) -> bool:
        """Run a cell again with the outcomes that its host calls had; False if it does not repeat itself."""
        expected = iter(calls)
        try:
            self._worker.ask({"run": code}, _REPEAT_FACTOR * self._limits.cell_seconds)
            while "done" not in (message := self._worker.receive()):
                if "print" in message:
                    continue
                fingerprint, outcome = next(expected, ("", Outcome()))
                if _fingerprint(_host_call(message, self._tools)) != fingerprint:
                    return False
                self._worker.answer(outcome, 0.0)
        except _Lost:
            return False
        return not message.get("full") and next(expected, None) is None


class _Worker:
    """The process, and lines of JSON to and from it, each within a time.

    Raises:
        UserError: bubblewrap cannot be had here.
        _Lost: the process does not start.
    """

    def __init__(self, limits: Limits, tools: Sequence[str]) -> None:
        # the interpreter that runs this, without the packages of its environment
        program, source = Path(sys.executable).resolve(), Path(worker.__file__).resolve()
        command = bubblewrap.confined(
            [str(program), "-s", "-S", "-P", "-B", str(source), *tools],
            visible=[Path(sys.base_prefix).resolve(), source],
            memory_mb=limits.memory_mb + _BASE_MB,
            seconds=limits.seconds,
            processes=1,
        )
        self._process = subprocess.Popen(
            command, env={}, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._buffer, self._number = bytearray(), 0
        self._allow(_START_SECONDS)
        try:
            self.receive()
        except _Lost:
            self.kill()
            raise

    def set(self, values: dict[str, Any]) -> None:
        self.ask({"set": values}, _START_SECONDS)
        self.receive()

    def ask(self, request: dict[str, Any], seconds: float) -> None:
        """Send a request, and set the time that the worker may take for it."""
        self._number += 1
        self._allow(seconds)
        self._send({"number": self._number, **request})

    def answer(self, outcome: Outcome, paused: float) -> None:
        """Send the outcome of a host call, during which the worker paused for so many seconds."""
        self._deadline += paused
        failed = {"error": outcome.error, "message": outcome.message}
        self._send({"value": outcome.value} if outcome.error is None else failed)

    def _allow(self, seconds: float) -> None:
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def _send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        while data:
            self._wait(self._in, select.POLLOUT)
            try:
                data = data[os.write(self._in, data) :]
            except OSError:
                raise _Lost("its process ended") from None

    def receive(self) -> dict[str, Any]:
        """The next message about the last request; others are dropped."""
        while (message := _parsed(self._line())).get("number") != self._number:
            pass
        return message

    def _line(self) -> bytes:
        # lines that have arrived already are not waited for
        self._left()
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            if len(self._buffer) > _LINE_BYTES:
                raise _Lost(f"it passed on more than {_LINE_BYTES >> 20} MB at once")
            start = len(self._buffer)
            self._wait(self._out, select.POLLIN)
            chunk = os.read(self._out, _READ_BYTES)
            if not chunk:
                raise _Lost("its process ended, or used too much memory")
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        poll.poll(self._left() * 1000)
        self._left()

    def _left(self) -> float:
        if (left := self._deadline - time.monotonic()) > 0:
            return left
        raise _Lost(f"it ran longer than {self._seconds:g} s")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _parsed(line: bytes) -> dict[str, Any]:
    """
    Raises:
        _Lost: the line is not an object in JSON.
    """
    try:
        text = line.decode("utf-8")
        if _values(text) > _LINE_VALUES and _values(_STRING.sub("", text)) > _LINE_VALUES:
            raise _Lost(f"it passed on more than {_LINE_VALUES:,} values at once")
        message = json.loads(text)
        if "\\ud" in text.lower():
            # half of a surrogate pair could not be written to the journal
            message = json.loads(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise _Lost("it broke the connection to the engine")
    return message


def _values(text: str) -> int:
    return sum(map(text.count, "[{,"))


def _host_call(message: dict[str, Any], tools: Sequence[str]) -> HostCall:
    """
    Raises:
        _Lost: the message is not a call.
    """
    name, args, kwargs = message.get("call"), message.get("args"), message.get("kwargs")
    if not isinstance(name, str) or name not in tools or not isinstance(args, list) or not isinstance(kwargs, dict):
        raise _Lost("it broke the connection to the engine")
    return HostCall(name, tuple(args), kwargs)


def _fingerprint(call: HostCall) -> str:
    return hashlib.sha256(json.dumps([call.name, call.args, call.kwargs]).encode()).hexdigest()
