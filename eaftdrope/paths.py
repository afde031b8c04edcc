"""Paths as a person writes them: in a recipe, on the command line, in a configuration."""

from __future__ import annotations

import os
from pathlib import Path

from eaftdrope.errors import UserError, printable


def usable_path(text: str | Path) -> Path:
    """`text` as a path, `~` resolved. It need not exist.

    Raises:
        UserError: no file can have that name, or there is no such user.
    """
    shown = printable(str(text)) if len(str(text)) <= 60 else f"{printable(str(text)[:57])}..."
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except RuntimeError:
        raise UserError(
            f"'{shown}': there is no such user, so ~ cannot be resolved. Write the folder itself."
        ) from None
    except ValueError:
        # a NUL, or half of a surrogate pair
        raise UserError(f"'{shown}' cannot be the name of a file: it has a character that no path may have.") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"'{shown}' cannot be looked up: {error.strerror}.") from None
    return path
