"""One start at a time: two that write the same run's folder would take each other's checkpoints."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def only_start(folder: str) -> Iterator[None]:
    """Holds the run of `folder` for this process; the system lets go of it when the process ends, however it ends.

    The lock is a file of the machine's temporary folder, so that looking at a run writes nothing into it. Starts on two
    machines that share a disk are not kept apart.

    Raises:
        UserError: another start on this machine is at work on the folder.
    """
    from filelock import FileLock, Timeout

    path = Path(folder).expanduser().resolve()
    # another user's lock could not be opened
    name = hashlib.sha256(f"{Path.home()}\n{path}".encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"eaftdrope-{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another start is at work on {folder}. Nothing was touched: wait for it, stop it, or name another folder with "
            "output.dir=..."
        ) from None
    try:
        yield
    finally:
        lock.release()
