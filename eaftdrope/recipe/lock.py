"""One start at a time: two that write the same run's folder would take each other's checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .place import make_folder, remove_empty

LOCK_FILE = ".eaftdrope.lock"


@contextmanager
def only_start(folder: str) -> Iterator[None]:
    """Holds the run of `folder` for this process; the system lets go of it when the process ends, however it ends.

    The lock is a file in the folder itself, locked with flock(2), so it does not depend on the user's temporary or home
    folder. On a disk that several machines share it also keeps their starts apart, if the disk passes locks on: NFS 4
    does, NFS 3 needs its lock daemon. The file is deleted at the end; what a killed process leaves of it is not locked,
    and stands in nobody's way.

    Raises:
        UserError: another start is at work on the folder; the folder cannot be made; its disk has no locks.
    """
    path = Path(folder).expanduser().resolve()
    made = make_folder(path, folder)
    file = path / LOCK_FILE
    try:
        descriptor = _lock(file)
    except BlockingIOError:
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
        # while it is locked: a start that has opened it finds it gone
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)
        remove_empty(made)


def _lock(file: Path) -> int:
    """The descriptor of the locked file. It is not inherited by programs that this one starts.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made or locked.
    """
    import fcntl

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # a start that ended in between has deleted it: this lock keeps nobody out
        os.close(descriptor)
