"""What ends a run before its end: a disk that cannot be written, and Ctrl-C. Both leave a folder to go on from.

One start at a time: two that write the same run's folder would take each other's checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.files import make_folder, remove_empty

_FULL = (errno.ENOSPC, errno.EDQUOT)
# `ulimit -f`, or the largest file of the file system
_TOO_LARGE = errno.EFBIG
# what torch.save says instead, as torch 2.13 words it
_FULL_FOR_TORCH = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the text says where it stopped and how to go on."""


@contextmanager
def told_about_disk(folder: str) -> Iterator[None]:
    """Turns the errors of a full or unwritable disk into UserError.

    A full disk is an OSError in Python, an error that quotes the system's text in safetensors and tokenizers, and a
    RuntimeError about a position or a stream in torch.save.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        texts = [*(os.strerror(known) for known in _FULL), *_FULL_FOR_TORCH]
        if number == _TOO_LARGE or os.strerror(_TOO_LARGE) in str(error) or f"os error {_TOO_LARGE}" in str(error):
            raise UserError(
                f"a file of {folder} may not become as large as it must ({_first_line(error)}): raise the limit of this "
                "shell (ulimit -f) or name a folder on another disk. What was written whole is kept: run the same command "
                "again (without --overwrite) to resume."
            ) from error
        if number in _FORBIDDEN and _is_within(error.filename, folder):
            raise UserError(
                f"{folder} cannot be written to ({error.strerror}: {error.filename}). Name another folder with "
                "output.dir=..., or change its permissions."
            ) from error
        if number not in _FULL and not any(text in str(error) for text in texts):
            raise
        place = error.filename if number and error.filename else folder
        raise UserError(
            f"the disk of {place} is full ({_first_line(error)}). What was written whole is kept: make room and run the "
            "same command again (without --overwrite) to go on."
        ) from error


def _is_within(file: str | bytes | int | None, folder: str) -> bool:
    if not isinstance(file, str):
        return False
    return Path(file).absolute().is_relative_to(Path(folder).expanduser().absolute())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


LOCK_FILE = ".eaftdrope.lock"


@contextmanager
def only_start(folder: str) -> Iterator[None]:
    """Holds the run of `folder` for this process; the system lets go of it when the process ends, however it ends.

    The lock is a file in the folder itself, locked by the system, so it does not depend on the user's temporary or home
    folder. On a disk that several machines share it also keeps their starts apart, if the disk passes locks on: NFS 4
    does, NFS 3 needs its lock daemon. The file is deleted at the end; what a killed process leaves of it is not locked,
    and stands in nobody's way.

    Raises:
        UserError: another start is at work on the folder; the folder cannot be made; its disk has no locks.
    """
    from filelock import FileLock, Timeout

    path = Path(folder).expanduser().resolve()
    made = make_folder(path, folder)
    file = path / LOCK_FILE
    lock = FileLock(file)
    try:
        # a start that is just ending deletes the file and lets go of it: tried again for a second
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(
            f"another start is at work on {folder}. Nothing was touched: wait for it, stop it, or name another folder with "
            "output.dir=..."
        ) from None
    except OSError as error:
        remove_empty(made)
        raise UserError(
            f"{folder} cannot be locked, so two starts could write it at a time ({error.strerror}: {file}). Name a folder "
            "on another disk with output.dir=..., or change its permissions."
        ) from error
    try:
        yield
    finally:
        # while it is locked, so that it is nobody else's
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
        remove_empty(made)
