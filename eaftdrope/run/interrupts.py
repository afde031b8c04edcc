"""Early exits: an unwritable disk, SIGTERM and Ctrl-C, which leave a folder to resume from; and the lock of a run.

Only one process may run in a folder: two that write the same run folder would use each other's checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from eaftdrope.errors import UserError
from eaftdrope.files import make_folder, remove_empty

LOCK_FILE = ".eaftdrope.lock"

_FULL = (errno.ENOSPC, errno.EDQUOT)
# `ulimit -f`, or the largest file of the file system
_TOO_LARGE = errno.EFBIG
# the words of torch.save instead, in torch 2.13
_FULL_FOR_TORCH = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would raise KeyboardInterrupt."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a run; the text states where it stopped and how to resume it.

    Args:
        message: the text.
        signal_number: the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Raise Terminated at SIGTERM. Elsewhere than in the main thread, which has the signals, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def disk_errors_to_user_errors(folder: str) -> Iterator[None]:
    """Turn the errors of a full or unwritable disk into UserError.

    A full disk is an OSError in Python, an error that quotes the system's text in safetensors and tokenizers, and a
    RuntimeError about a position or a stream in torch.save.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        file = error.filename if isinstance(error, OSError) else None
        texts = [*(os.strerror(known) for known in _FULL), *_FULL_FOR_TORCH]
        if number == _TOO_LARGE or os.strerror(_TOO_LARGE) in str(error) or f"os error {_TOO_LARGE}" in str(error):
            raise UserError(
                f"a file of {folder} would exceed the size limit ({_first_line(error)}): raise the limit of this shell "
                "(ulimit -f) or choose a folder on another disk. Complete files are kept: run the same command again "
                "(without --overwrite) to resume."
            ) from error
        if number is not None and number in _FORBIDDEN and _is_within(file, folder):
            raise UserError(
                f"{folder} cannot be written to ({os.strerror(number)}: {file}). Choose another folder with "
                "output.dir=..., or change its permissions."
            ) from error
        if number not in _FULL and not any(text in str(error) for text in texts):
            raise
        raise UserError(
            f"the disk of {file or folder} is full ({_first_line(error)}). Complete files are kept: free some space and run "
            "the same command again (without --overwrite) to resume."
        ) from error


def _is_within(file: str | bytes | int | None, folder: str) -> bool:
    if not isinstance(file, str):
        return False
    return Path(file).absolute().is_relative_to(Path(folder).expanduser().absolute())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@contextmanager
def run_lock(folder: str) -> Iterator[None]:
    """Hold the lock of a run folder; the system releases it when the process ends, however it ends.

    The lock is a file in the folder itself, locked by the system, so it does not depend on the user's temporary or home
    folder. It also works between machines that share a disk, if the disk supports locks: NFS 4 does, NFS 3 needs its lock
    daemon. The file is deleted at the end; one that a killed process leaves is not locked and does no harm.

    Raises:
        UserError: another process is running in the folder; the folder cannot be made; its disk has no locks.
    """
    path = Path(folder).expanduser().resolve()
    made = make_folder(path, folder)
    file = path / LOCK_FILE
    lock = FileLock(file)
    try:
        # a process that is just ending deletes the file and releases it: retried for a second
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(
            f"another process is already running in {folder}. Nothing was changed: wait for it, stop it, or choose another "
            "folder with output.dir=..."
        ) from None
    except OSError as error:
        remove_empty(made)
        raise UserError(
            f"{folder} cannot be locked, so two processes could write it at the same time ({error.strerror}: {file}). Choose "
            "a folder on another disk with output.dir=..., or change its permissions."
        ) from error
    try:
        yield
    finally:
        # while it is locked: later it could be another process's
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
        remove_empty(made)
