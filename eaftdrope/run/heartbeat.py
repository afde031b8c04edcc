"""Heartbeats: each process of a launch counts in the shared store, so that one that is killed or stopped can be named.

    beat/<rank>     "<count> pid 4242 on node-3"

Each process watches the next one; all ranks together are read only once something is wrong. A broken collective does
not state which process it lost (gloo has an address, NCCL waits), a heartbeat that has stopped does.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from typing import Protocol

from torch import distributed

from eaftdrope.errors import printable

EXIT_CODE = 3
"""Exit code of a process that ends because another one of its launch was lost."""
_KEY = "beat/{}"
# A main thread that is likely to be blocked has this long to end by itself.
_GRACE = 30.0


class LaunchEnded(Exception):
    """The launch has ended early because of another process. The text is for the user; "" if another process prints it."""


class Member(Protocol):
    """What a heartbeat needs of its launch (see `launch.Launch`)."""

    store: distributed.Store
    rank: int
    processes: int

    def how_to_resume(self) -> str: ...

    def end(self, rank: int, text: str = "", *, blocked: bool = False) -> bool: ...

    def ended(self) -> dict | None: ...


class Heartbeat(threading.Thread):
    """The thread that counts in the store, watches the next rank, and ends this process if its main thread is blocked.

    Args:
        launch: the processes.
        limit: seconds that a process may be silent.
    """

    def __init__(self, launch: Member, limit: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._launch = launch
        self._limit = limit
        # the store answers some thousand requests per second
        self._seconds = max(0.5, launch.processes / 500)
        self._stopped = threading.Event()
        self._count = 0
        self._neighbour = (launch.rank + 1) % launch.processes
        self._who = f"pid {os.getpid()} on {socket.gethostname()}"
        self._beat()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        now = last = seen_at = time.monotonic()
        seen, ends_at = "", math.inf
        while not self._stopped.wait(self._seconds) and now < ends_at:
            now = time.monotonic()
            if now - last > 10 * self._seconds:
                # this process was stopped itself, and the others may have been with it
                seen_at = now
            last = now
            try:
                self._beat()
                value = self._read(self._neighbour)
                if value != seen:
                    seen, seen_at = value, now
                elif now - seen_at > self._limit and ends_at == math.inf:
                    self._print(self._look(blocked=True))
                if ends_at == math.inf and (end := self._launch.ended()):
                    # a main thread that is not blocked may be writing a checkpoint
                    ends_at = now + (_GRACE if end["blocked"] else self._limit)
            except RuntimeError:
                # the store is gone, with the process that held it; the main thread finds out when it next needs another
                ends_at = min(ends_at, now + self._limit)
        if not self._stopped.is_set():
            os._exit(EXIT_CODE)

    def explain(self) -> LaunchEnded | None:
        """After a connection has broken: the end of the launch, or None if every process still responds."""
        found: list[str | None] = []
        # the process that holds the store may be stopped, and then no request to it returns
        worker = threading.Thread(target=lambda: found.append(self._look_or_guess()), daemon=True)
        worker.start()
        worker.join(20 * self._seconds)
        text = found[0] if found else self._without_store()
        return None if text is None else LaunchEnded(text)

    def _look_or_guess(self) -> str | None:
        try:
            return self._look()
        except RuntimeError:
            return self._without_store()

    def _look(self, *, blocked: bool = False) -> str | None:
        """The message about the ranks that are silent; "" if another process prints it, None if all respond."""
        launch, ranks = self._launch, range(self._launch.processes)
        if launch.ended():
            return ""
        before = [self._read(rank) for rank in ranks]
        time.sleep(6 * self._seconds)
        # this may be the thread that beats
        self._beat()
        after = [self._read(rank) for rank in ranks]
        silent = [rank for rank in ranks if before[rank] == after[rank]]
        if launch.ended():
            return ""
        if not silent:
            return None
        text = (
            f"{_names(silent, after)} no longer {'responds' if len(silent) == 1 else 'respond'}: killed, or stopped. "
        )
        text += launch.how_to_resume()
        return text if launch.end(silent[0], text, blocked=blocked) else ""

    def _without_store(self) -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"the launcher no longer responds. {self._launch.how_to_resume()}"
        # one message per machine, since the processes can no longer agree on one
        prints = os.environ.get("LOCAL_RANK") == "0" or self._launch.rank == 1
        return f"rank 0 no longer responds: killed, or stopped. {self._launch.how_to_resume()}" if prints else ""

    def _beat(self) -> None:
        self._count += 1
        self._launch.store.set(_KEY.format(self._launch.rank), f"{self._count} {self._who}")

    def _read(self, rank: int) -> str:
        key = _KEY.format(rank)
        return self._launch.store.get(key).decode() if self._launch.store.check([key]) else ""

    def _print(self, text: str | None) -> None:
        if text:
            print(printable(text, lines=True), file=sys.stderr, flush=True)


def _names(ranks: list[int], beats: list[str]) -> str:
    """`rank 1 (pid 4242 on node-3) and rank 5 (...)`; more than four are counted."""
    shown = [f"rank {rank} ({beats[rank].partition(' ')[2] or 'not started'})" for rank in ranks[:4]]
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return ", ".join(shown) + more
