"""One start at a time: two that write the same run's folder would take each other's checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .place import make_folder, remove_empty

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
