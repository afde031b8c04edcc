"""Limits of a chat template's rendering: it is a program that came with the model, and may loop or grow without end.

Time is the CPU time of the thread that renders, so a busy machine changes nothing; where that cannot be read (macOS), the
time of the clock. Memory is limited by the system (RLIMIT_DATA, on Linux). jinja's own sandbox limits neither.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eaftdrope.errors import TemplateLimitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20.0
"""CPU seconds of one rendering. An ordinary one takes some milliseconds."""
BYTES = 2 << 30
"""Memory that one rendering may need beside what the process has."""
_PAUSE = 0.25
# How long the memory of the process, as it was read, is taken for its present memory.
_READ_AGAIN = 1.0


class _TooLong(BaseException):
    """Raised in the thread that renders: a template's own code cannot catch it."""


class _Watch:
    """A thread that ends renderings that take too long."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # thread -> its CPU time at which it is ended
        self.deadlines: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def add(self, thread: int) -> None:
        with self.lock:
            self.deadlines[thread] = _cpu_time(thread) + SECONDS
            if self._thread is None or not self._thread.is_alive():
                # also in a forked process, which has no other thread
                self._thread = threading.Thread(target=self._run, name="template-limits", daemon=True)
                self._thread.start()

    def remove(self, thread: int) -> None:
        with self.lock:
            if self.deadlines.pop(thread, None) is None:
                # it was ended at the last moment: not after this
                _raise_in(thread, None)

    def _run(self) -> None:
        while True:
            time.sleep(_PAUSE)
            with self.lock:
                for thread in [thread for thread, end in self.deadlines.items() if _cpu_time(thread) > end]:
                    del self.deadlines[thread]
                    _raise_in(thread, _TooLong)


def _cpu_time(thread: int) -> float:
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


_watch = _Watch()
_memory = threading.local()


@contextmanager
def bounded(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Limit the time and the memory of the block, which renders a template of the tokenizer.

    Raises:
        TemplateLimitError: the block exceeded a limit.
    """
    thread = threading.get_ident()
    _watch.add(thread)
    try:
        with _limited_memory():
            try:
                yield
            finally:
                _watch.remove(thread)
    except _TooLong:
        raise TemplateLimitError(
            f"the chat template of {named(tokenizer)} takes more than {SECONDS:g} seconds to render."
        ) from None
    except MemoryError:
        raise TemplateLimitError(
            f"the chat template of {named(tokenizer)} needs more than {BYTES >> 20:,} MB to render."
        ) from None


def named(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a tokenizer's model in messages, in quotes."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


@contextmanager
def _limited_memory() -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + BYTES
    limit = limit if soft == resource.RLIM_INFINITY else min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """Private writable memory of this process, read once per second."""
    now = time.monotonic()
    if now - getattr(_memory, "read_at", -_READ_AGAIN) >= _READ_AGAIN:
        with open("/proc/self/status", encoding="ascii") as file:
            _memory.bytes = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))
        _memory.read_at = now
    return _memory.bytes
