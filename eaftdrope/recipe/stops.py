"""What ends a run before its end: a disk that cannot be written, and Ctrl-C. Both leave a folder to go on from."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

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
