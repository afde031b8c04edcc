"""Where a root's code runs: Monty, a Python interpreter without files, network, processes or imports from the host.

    for each cell: run(code) yields host calls (llm_query, ...) and returns what was printed

Monty is a language-level sandbox in a worker process, not one of the operating system; `bubblewrap` puts it into one.
A cell is a transaction: if a limit stops it, the variables are as they were before it.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from eaftdrope.errors import UserError, missing_package

from . import bubblewrap
from .limits import Limits

TOOLS = ("llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched")
"""The functions that code can call on the host."""
READ = "read"
"""One more, in a run with a reader."""

# A context beyond this is dumped only every few cells: a dump costs 9 ms per MB.
_LARGE = 20_000_000
_CELLS_BETWEEN_DUMPS = 8
# a worker that does not stop by itself is killed this much later
_GRACE_SECONDS = 5.0
# address space that the worker takes for itself
_BASE_MB = 256
TRACEBACK_CHARS = 800
STOPPED = "The cell was stopped ({}) and its variables were put back."


@dataclass(frozen=True)
class HostCall:
    """A call of a function of the host."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a host call gave: a value, or an error that the code can catch."""

    value: Any = None
    error: str | None = None
    message: str = ""


@dataclass(frozen=True)
class Cell:
    """What a block of code did.

    Args:
        output: what it printed; of much, the head and the tail.
        error: the end of the traceback, or why it was stopped; None if it ran to its end.
        stopped: a limit stopped it, and its variables were put back.
        hidden: characters that it printed between the head and the tail.
    """

    output: str
    error: str | None = None
    stopped: bool = False
    hidden: int = 0


class Sandbox(Protocol):
    """A REPL."""

    lacking: str
    """A line for the prompt about what its Python lacks, or ""."""

    def __init__(self, limits: Limits, tools: Sequence[str] = TOOLS) -> None: ...

    @staticmethod
    def require() -> None:
        """
        Raises:
            UserError: this machine does not have it; states what is missing.
        """

    def set(self, values: dict[str, Any]) -> None:
        """Set variables."""

    def run(self, code: str) -> Generator[HostCall, Outcome, Cell]:
        """Run a block of code. Closing the generator abandons the block."""

    def get(self, name: str) -> Any:
        """The value of a variable.

        Raises:
            NameError: it has none.
        """

    def close(self) -> None:
        """End the REPL."""


class Printed:
    """A print callback that keeps the head and the tail: a flood of output costs time, but no memory."""

    def __init__(self, chars: int) -> None:
        self._chars, self._head, self._tail, self._total = chars, "", "", 0

    def __call__(self, stream: str, text: str) -> None:
        self._total += len(text)
        room = self._chars - len(self._head)
        self._head += text[:room]
        if room < len(text):
            self._tail = (self._tail + text[room:])[-self._chars :]

    def cell(self, error: str | None = None, *, stopped: bool = False) -> Cell:
        """The cell that printed this."""
        text = self._head + self._tail
        return Cell(text, error, stopped, self._total - len(text))


class MontySandbox:
    """A REPL in a worker process of Monty. Clock and random are fixed, so the same code does the same again."""

    lacking = "Python lacks del, yield, class inheritance, and modules beside re, json, math, datetime and a few.\n"

    def __init__(self, limits: Limits, tools: Sequence[str] = TOOLS, *, binary: Path | None = None) -> None:
        """
        Args:
            tools: the functions that code can call on the host.
            binary: the worker's program, where it is not Monty's own (a wrapper that isolates it).

        Raises:
            UserError: Monty is not installed.
        """
        self.require()
        import pydantic_monty as monty

        self._monty, self._tools = monty, tuple(tools)
        # waiting and host calls stop the clock of a cell, so each has a limit of its own
        self._limits = {
            "max_memory": limits.memory_mb << 20,
            "max_feed_duration_secs": limits.cell_seconds,
            "max_total_sleep_secs": limits.cell_seconds,
            "max_suspensions": 1000 + 4 * limits.sub_calls,
        }
        self._keep, self._seconds = limits.output_chars, limits.cell_seconds
        self._pool = monty.Monty(
            binary_path=binary, max_processes=2, request_timeout=limits.cell_seconds + _GRACE_SECONDS
        )
        self._pool.__enter__()
        self._saved: bytes | None = None
        # the cells since that dump, with the outcomes of their host calls
        self._since: list[tuple[str, list[Outcome]]] = []
        self._size = 0
        self._open(None)

    @staticmethod
    def require() -> None:
        """
        Raises:
            UserError: Monty is not installed.
        """
        try:
            import pydantic_monty  # noqa: F401
        except ModuleNotFoundError as error:
            if (missing := missing_package(error)) is None:
                raise
            raise missing from error

    def _open(self, state: bytes | None) -> None:
        policy = {"datetime": datetime(2026, 1, 1, tzinfo=UTC), "random_start": {"seed": 0}}
        self._scope = self._pool.checkout(limits=self._limits, os_policy=policy)
        self._session = self._scope.__enter__()
        if state is not None:
            self._session.load_session(state)

    def set(self, values: dict[str, Any]) -> None:
        """
        Raises:
            UserError: they do not fit into the memory of the REPL.
        """
        try:
            self._session.feed_run("None", inputs=values)
            self._dump()
        except self._monty.MontyError as error:
            raise UserError(f"the context does not fit into the REPL ({error}): raise memory_mb.") from error
        self._size = sum(_size(value) for value in values.values())

    def run(self, code: str) -> Generator[HostCall, Outcome, Cell]:
        printed, outcomes = Printed(self._keep), []
        monty = self._monty
        try:
            step: Any = self._session.feed_start(
                code, print_callback=printed, external_lookup=dict.fromkeys(self._tools, _tool)
            )
            while not isinstance(step, monty.MontyComplete):
                if self._is_tool(step):
                    outcome = yield HostCall(step.function_name, tuple(step.args), dict(step.kwargs))
                    outcomes.append(outcome)
                    step = step.resume(_resumed(outcome))
                else:
                    step = step.resume_auto()
        except (monty.MontyRuntimeError, monty.MontySyntaxError) as error:
            message = error.display("type-msg")
            # after one of these Monty does not vouch for the variables, or has lost its worker
            if message.startswith(("TimeoutError", "MemoryError", "RuntimeError: suspension limit")):
                return self._put_back(printed, self._reason(message))
            return self._ran(code, outcomes, printed, error.display("traceback")[-TRACEBACK_CHARS:])
        except monty.MontyError:
            return self._put_back(printed, f"it ran longer than {self._seconds:g} s, or used too much memory")
        return self._ran(code, outcomes, printed)

    def get(self, name: str) -> Any:
        if not name.isidentifier():
            raise NameError(f"{name!r} is not the name of a variable")
        try:
            return self._session.feed_run(name)
        except (self._monty.MontyRuntimeError, self._monty.MontySyntaxError) as error:
            raise NameError(f"{name} is not defined") from error
        except self._monty.MontyError as error:
            # too large to pass on
            self._put_back(Printed(0), "")
            raise NameError(f"{name} cannot be read") from error

    def close(self) -> None:
        self._close_scope()
        self._pool.__exit__(None, None, None)

    def _is_tool(self, step: Any) -> bool:
        is_call = isinstance(step, self._monty.FunctionSnapshot)
        return is_call and step.function_name in self._tools and not step.is_os_function

    def _ran(self, code: str, outcomes: list[Outcome], printed: Printed, error: str | None = None) -> Cell:
        """Note a cell that ran, so that its effect survives the next one that is stopped."""
        self._since.append((code, outcomes))
        if self._size < _LARGE or len(self._since) >= _CELLS_BETWEEN_DUMPS:
            try:
                self._dump()
            except self._monty.MontyError:
                self._since.pop()
                return self._put_back(printed, "its variables leave too little memory to save them")
        return printed.cell(error)

    def _dump(self) -> None:
        self._saved, self._since = self._session.dump(), []

    def _put_back(self, printed: Printed, reason: str) -> Cell:
        self._close_scope()
        self._open(self._saved)
        for code, outcomes in self._since:
            self._repeat(code, outcomes)
        return printed.cell(STOPPED.format(reason), stopped=True)

    def _reason(self, message: str) -> str:
        """Monty's messages have the time that was measured, and what the root reads has to repeat itself."""
        if "time limit exceeded" in message:
            return f"it ran longer than {self._seconds:g} s"
        return "it used too much memory" if message.startswith("MemoryError") else message

    def _repeat(self, code: str, outcomes: Iterable[Outcome]) -> None:
        """Run a cell again with the outcomes that its host calls had."""
        given = iter(outcomes)
        # it ended the same way before
        with contextlib.suppress(self._monty.MontyRuntimeError, self._monty.MontySyntaxError):
            step: Any = self._session.feed_start(code, external_lookup=dict.fromkeys(self._tools, _tool))
            while not isinstance(step, self._monty.MontyComplete):
                step = step.resume(_resumed(next(given))) if self._is_tool(step) else step.resume_auto()

    def _close_scope(self) -> None:
        # the worker may be dead, and the pool replaces it
        with contextlib.suppress(self._monty.MontyError):
            self._scope.__exit__(None, None, None)


class MontyInBubblewrap(MontySandbox):
    """The same with its worker inside bubblewrap: a boundary held by the kernel under one held by an interpreter."""

    def __init__(self, limits: Limits, tools: Sequence[str] = TOOLS) -> None:
        self.require()
        # Monty starts a program by its path, so the command has to be a file. The terminal stays outside.
        self._folder = tempfile.TemporaryDirectory(prefix="eaftdrope_rlm_")
        wrapper = Path(self._folder.name, "monty")
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(self._command(limits))} "$@" 2>/dev/null\n', encoding="utf-8")
        wrapper.chmod(0o700)
        super().__init__(limits, tools, binary=wrapper)

    @staticmethod
    def require() -> None:
        """
        Raises:
            UserError: Monty is not installed, or bubblewrap cannot be had here.
        """
        MontySandbox.require()
        bubblewrap.require()

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def _command(self, limits: Limits) -> list[str]:
        from pydantic_monty._binary import find_monty_binary

        program = Path(find_monty_binary()).resolve()
        # above Monty's own limits, for the day that those fail
        memory = 2 * limits.memory_mb + _BASE_MB
        return bubblewrap.confined(
            [str(program)], visible=[program], memory_mb=memory, seconds=limits.seconds, processes=None
        )


def _tool(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("host calls are answered by the engine")


def _resumed(outcome: Outcome) -> Any:
    if outcome.error is None:
        return {"return_value": outcome.value}
    return {"exc_type": outcome.error, "message": outcome.message}


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(len, value)) if isinstance(value, list) else 0
