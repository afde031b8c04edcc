"""Whether a run's folder can be where the recipe wants it, looked at before anything is read; and making it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import UserError


def check_writable(path: Path) -> None:
    """
    Raises:
        UserError: no folder can be made at `path`, or nothing can be written into it.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # looked at below
        pass
    # a name that is too long, or has a zero byte
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be made ({reason}). Name another folder with output.dir=...") from error
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist. Make that folder, or name another one with "
            "output.dir=..."
        )
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path} cannot be made: {place} is a file. Name another folder with output.dir=...")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written to: no permission to write in {place}. Name another folder with "
            "output.dir=..., or change its permissions."
        )


def make_folder(path: Path, folder: str) -> list[Path]:
    """Makes a folder and what lies above it; returns what was made, the innermost first.

    Args:
        folder: the path as the user wrote it.

    Raises:
        UserError: it cannot be made.
    """
    made = []
    try:
        place = path
        while not place.exists():
            made.append(place)
            place = place.parent
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        remove_empty(made)
        raise UserError(
            f"{folder} cannot be made ({getattr(error, 'strerror', None) or error}). Name another folder with "
            "output.dir=..."
        ) from error
    return made


def remove_empty(made: list[Path]) -> None:
    """Deletes those of the folders that are empty: a start that wrote nothing leaves none."""
    for path in made:
        # those that are not empty stay
        with contextlib.suppress(OSError):
            path.rmdir()
