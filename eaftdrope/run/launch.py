"""The processes of a launch: they join at the start, wait for each other, refuse together, and notice when one is lost.

Waiting goes through the store of torch.distributed and not through a collective: the main process may measure, merge or
upload for hours while the others wait, and no collective would let them. A lost process is noticed by its heartbeat.

    wait/<n>        how many have arrived at the n-th wait
    refused/<n>     the first refusal of the n-th block that is refused together
    end             why the launch ends early, from the process that noticed first
    left            how many no longer need the store
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from eaftdrope.errors import ReportedByAnother, UserError
from eaftdrope.processes import is_main_process, process_count, process_rank, restart_count

from .heartbeat import Heartbeat, LaunchEnded
from .interrupts import LOCK_FILE
from .machine import training_device

T = TypeVar("T")
_END = "end"
# A network file system may show a new file to another machine only after this many seconds.
_DISK_SECONDS = 60.0
# The process that holds the store waits this long for the others to end.
_LEAVING_SECONDS = 5.0
# Errors of gloo and NCCL have no class of their own.
_BROKEN = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


@dataclass
class Launch:
    """The processes of this launch, as one of them sees them.

    Args:
        store: shared by all of them.
        how_to_resume: returns how the run is resumed, for the message when it ends early.
    """

    store: distributed.Store
    rank: int
    processes: int
    how_to_resume: Callable[[], str] = lambda: "Run the same command again."
    _waits: int = 0
    _refusals: int = 0

    def wait(self) -> None:
        """Wait until every process is here.

        Raises:
            LaunchEnded: another process has ended early.
        """
        self._waits += 1
        key = f"wait/{self._waits}"
        self.store.add(key, 1)
        pause = 0.01
        while self.store.add(key, 0) < self.processes:
            self.raise_if_ended()
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def raise_if_ended(self) -> None:
        if self.store.check([_END]):
            raise LaunchEnded()

    def end(self, rank: int, text: str = "", *, blocked: bool = False) -> bool:
        """Record why the launch ends early; False if another process has done so before.

        Args:
            rank: the process that is the cause.
            text: the message about it.
            blocked: the others are likely to be blocked, and unable to end by themselves.
        """
        mine = json.dumps({"rank": rank, "by": self.rank, "text": text, "blocked": blocked})
        return self.store.compare_set(_END, "", mine).decode() == mine

    def ended(self) -> dict | None:
        """The record of an early end."""
        return json.loads(self.store.get(_END)) if self.store.check([_END]) else None

    def refusal(self, error: UserError | None) -> UserError | None:
        """The error to raise in this process, once every process has passed its own; None if none of them has one."""
        self._refusals += 1
        key = f"refused/{self._refusals}"
        if error is not None:
            self.store.compare_set(key, "", json.dumps([self.rank, str(error)]))
        self.wait()
        if not self.store.check([key]):
            return None
        rank, text = json.loads(self.store.get(key))
        if error is None or (rank != self.rank and text == str(error)):
            return ReportedByAnother(text)
        return error

    def leave(self) -> None:
        """Wait a little for the others if this process holds the store, which they need to the end."""
        key = "left"
        until = time.monotonic() + _LEAVING_SECONDS
        try:
            left = self.store.add(key, 1)
            while holds_store() and left < self.processes and time.monotonic() < until:
                time.sleep(0.05)
                left = self.store.add(key, 0)
        except RuntimeError:
            # the process that holds it has left
            return


_launch: Launch | None = None


def holds_store() -> bool:
    """True if the store lives in this process, and not in the launcher's agent or in another process."""
    return is_main_process() and not _launcher_has_store()


@contextmanager
def joined(minutes: float) -> Iterator[Launch | None]:
    """Join the processes of the launch for the duration of the block; None outside of a launcher.

    Args:
        minutes: how long a process may be silent, and a collective may take.

    Raises:
        UserError: the processes do not find each other; or one that the block raises.
        ReportedByAnother: another process prints the same error.
        LaunchEnded: another process was lost, or ended early.
    """
    global _launch
    if process_count() == 1:
        yield None
        return
    launch = _launch = _join(minutes)
    heartbeat = Heartbeat(launch, minutes * 60)
    heartbeat.start()
    try:
        yield launch
    except Exception as error:
        outcome = _outcome(launch, heartbeat, error)
        if outcome is error:
            raise
        raise outcome from error
    except BaseException:
        _end_quietly(launch)
        raise
    finally:
        launch.leave()
        heartbeat.stop()
        _launch = None


def _join(minutes: float) -> Launch:
    from accelerate import PartialState

    try:
        timeout = timedelta(minutes=minutes)
        PartialState(cpu=training_device().kind == "cpu", timeout=timeout, **_own_store(timeout))
    except distributed.DistError as error:
        raise UserError(
            f"the {process_count()} processes of the launch did not find each other within {minutes:g} minutes "
            f"({_first_line(error)}). Check that all of them were started with the same MASTER_ADDR and MASTER_PORT, and "
            "that no firewall is in between."
        ) from error
    # torchrun's store outlives its restarts, so each start has keys of its own
    start = [secrets.token_hex(8)]
    distributed.broadcast_object_list(start)
    store = distributed.PrefixStore(f"eaftdrope/{start[0]}", distributed.distributed_c10d._get_default_store())
    return Launch(store, distributed.get_rank(), distributed.get_world_size())


def _own_store(timeout: timedelta) -> dict[str, Any]:
    """Options of torch's process group after a restart by torchrun; empty otherwise.

    torchrun's store still has the addresses of the processes before, to which new ones would try to connect (torch 2.13).
    """
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not restart_count() or not _launcher_has_store() or is_deepspeed:
        return {}
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    prefixed = distributed.PrefixStore(f"restart-{restart_count()}", store)
    return {"store": prefixed, "rank": process_rank(), "world_size": process_count()}


def _launcher_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _outcome(launch: Launch, heartbeat: Heartbeat, error: Exception) -> Exception:
    """What this process raises for an error of its own, or for one that another process has caused."""
    if isinstance(error, (LaunchEnded, ReportedByAnother)):
        return error
    try:
        if isinstance(error, UserError):
            if launch.end(launch.rank, str(error)):
                return error
            first = launch.ended()
            return ReportedByAnother(str(error)) if first and first["text"] == str(error) else error
        if not _is_broken_connection(error):
            launch.end(launch.rank)
            return error
    except RuntimeError:
        # the store is gone
        return error
    return heartbeat.explain() or error


def _end_quietly(launch: Launch) -> None:
    """Record that this process was interrupted, for those that did not receive the signal."""
    try:
        launch.end(launch.rank, "interrupted")
    except RuntimeError:
        return


def _is_broken_connection(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _BROKEN)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def wait_for_everyone() -> None:
    """Wait until every process of the launch is here, however long that takes.

    Raises:
        LaunchEnded: another process has ended early.
    """
    if _launch is not None:
        _launch.wait()


def gather(mine: T) -> list[T]:
    """What every process passes, in the order of their ranks; waits for the slowest, however long that takes.

    Raises:
        LaunchEnded: another process has ended early.
    """
    if _launch is None:
        return [mine]
    _launch.wait()
    found: list[Any] = [None] * _launch.processes
    distributed.all_gather_object(found, mine)
    return found


@contextmanager
def refused_together() -> Iterator[None]:
    """Raise the UserError of any process in all of them. Every process must reach the end of the block.

    Raises:
        UserError: of this process.
        ReportedByAnother: of another process, which prints it.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    if _launch is not None:
        error = _launch.refusal(error)
    if error is not None:
        raise error


def check_common_folder(folder: str) -> None:
    """Check that every process sees the folder of the run, which the main process has locked.

    Raises:
        UserError: a process does not, because its machine has another disk at that place.
        ReportedByAnother: as UserError, in the other processes.
    """
    if _launch is None:
        return
    file, key = Path(folder).expanduser() / LOCK_FILE, "folder"
    if is_main_process():
        token = secrets.token_hex(8)
        file.write_text(token)
        _launch.store.set(key, token)
    _launch.wait()
    token = _launch.store.get(key).decode()
    with refused_together():
        until = time.monotonic() + _DISK_SECONDS
        while not (file.is_file() and file.read_text() == token):
            if time.monotonic() > until:
                raise UserError(
                    f"{folder} is not the same folder on every machine: rank {_launch.rank} (on {socket.gethostname()}) "
                    "does not see what rank 0 wrote there. Set output.dir to a folder on a disk that all machines share."
                )
            time.sleep(0.2)
