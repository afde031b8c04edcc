"""Files and folders: atomic writes, folders of results, paths as a person writes them, the cache folder.

Where this program keeps what it can make again: dequantised models, compiled loss, scores. Standard library only.

Who may read a file of weights: safetensors writes each for its owner only (0600), whatever the umask.

Paths as a person writes them: in a recipe, on the command line, in a configuration.

Files that are on the disk when the call returns, and not only in the system's cache: a power cut does not lose them.

Whether a run's folder can be where the recipe wants it, looked at before anything is read; and making it.

A folder with one JSON document of results, which grows while they are measured and is never mixed with other results.

Reading what a folder holds: JSON documents and lines of JSON, of a run that may still be going on.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path

from eaftdrope.errors import UserError, printable


def cache_dir() -> Path:
    """`$EAFTDROPE_CACHE`, else `eaftdrope` in `$XDG_CACHE_HOME`, else `~/.cache/eaftdrope`."""
    if chosen := os.environ.get("EAFTDROPE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eaftdrope"


def honour_umask(folder: str | Path) -> None:
    """Gives the safetensors files of a folder, just written, the permissions that other new files get.

    Links and files with several names are left alone: they are somebody else's too.
    """
    # the only way to read it is to set it; for that moment, the stricter one
    umask = os.umask(0o077)
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        found = file.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and stat.S_IMODE(found.st_mode) == 0o600:
            file.chmod(0o666 & ~umask)


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


def write_durably(file: Path, text: str) -> None:
    """A small file, whole or not at all: written beside its place, flushed, and renamed."""
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(partial, file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Waits until the system has written a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """`flush` for every file and folder in `folder`, but for entries of its top with these names."""
    for entry in sorted(folder.iterdir()):
        if entry.name in without or entry.is_symlink():
            continue
        if entry.is_dir():
            flush_tree(entry)
        elif entry.is_file():
            flush(entry)
    flush(folder)


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


_WAYS_OUT = "Nothing was touched: name another folder with --output, or pass --overwrite to delete it and start anew."


class ResultFolder:
    """Making one only looks; `write` and `save` are the first to touch anything.

    Args:
        name: the document's file.
        what: what error messages call the results ("a probe").
        settings: what decides the results, as JSON; a document with others is not gone on with.
        overwrite: the document there is replaced, whatever its settings.

    Attributes:
        document: the document that is gone on with; None where there is none, or it is to be replaced.

    Raises:
        UserError: the folder holds other results or strangers' files, or cannot be written to.
    """

    def __init__(self, folder: Path, name: str, what: str, settings: dict, *, schema: int, overwrite: bool = False):
        usable_path(folder)
        self.folder, self.name = folder, name
        self._check_writable()
        if not (folder / name).is_file() and not self._is_free():
            raise UserError(
                f"{folder} is not empty and holds no {name} of ours. Nothing was touched: name another folder with --output."
            )
        self.document = None if overwrite else self._read(schema)
        if self.document is not None and self.document["settings"] != settings:
            keys = _differences(self.document["settings"], settings)
            raise UserError(f"{folder} holds {what} with other settings (different: {keys}). {_WAYS_OUT}")

    def write(self, name: str, text: str) -> Path:
        """A small file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / name)
        return self.folder / name

    def save(self) -> None:
        """The document as it is now."""
        self.write(self.name, json.dumps(self.document) + "\n")

    def _read(self, schema: int) -> dict | None:
        file = self.folder / self.name
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        whole = isinstance(document, dict) and isinstance(document.get("settings"), dict)
        if not whole or document.get("schema") != schema:
            raise UserError(f"{file} cannot be read as results of this version. {_WAYS_OUT}")
        return document

    def _is_free(self) -> bool:
        return not self.folder.exists() or all(entry.name == f".{self.name}.partial" for entry in self.folder.iterdir())

    def _check_writable(self) -> None:
        place = self.folder
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            why = "no permission to write in" if place.is_dir() else "this is a file:"
            raise UserError(f"--output {self.folder} cannot be made: {why} {place}. Name another folder.")


def _differences(old: dict, new: dict) -> str:
    """Dotted keys whose values differ."""

    def flat(data, prefix=""):
        if isinstance(data, list) and data and isinstance(data[0], dict):
            data = {str(item.get("name")): item for item in data if isinstance(item, dict)}
        if isinstance(data, dict):
            return {key: value for name in data for key, value in flat(data[name], f"{prefix}{name}.").items()}
        return {prefix[:-1]: data}

    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")


def read_json(path: Path) -> dict | list | None:
    """The document; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON document ({error}), so no report can be made of it.") from None


def read_lines(path: Path) -> list[dict]:
    """A document a line, none where there is no such file. A last line that is still being written is left out."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"{path} has a line that is no JSON document ({error}), so no report can be made of it."
        ) from None
