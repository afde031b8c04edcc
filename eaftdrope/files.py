"""Files and folders: paths, the cache folder, atomic and durable writes, output folders, results that can be resumed.

    usable_path, cache_dir                       a path as a user writes it; where eaftdrope keeps what it can make again
    replacing, write_atomically, atomic_folder   writes that are seen whole or not at all
    flush, flush_tree                            wait until the disk has what was written
    check_writable, check_unused                 refuse an output folder before anything is computed
    make_folder, remove_empty                    create an output folder, and undo that
    ResultFolder, differences                    a growing document of results, never mixed with other results
    read_json, read_lines                        read the files of a run, which may still be in progress
    honour_umask                                 permissions of files of weights

Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError, printable


def cache_dir() -> Path:
    """Return `$EAFTDROPE_CACHE`, else `eaftdrope` in `$XDG_CACHE_HOME`, else `~/.cache/eaftdrope`.

    It holds dequantised models, compiled losses and scores.
    """
    if chosen := os.environ.get("EAFTDROPE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eaftdrope"


def usable_path(text: str | Path) -> Path:
    """Return `text` as a path with `~` expanded. The path need not exist.

    Raises:
        UserError: the text cannot be a path, or `~user` names a user that does not exist.
    """
    shown = printable(str(text)) if len(str(text)) <= 60 else f"{printable(str(text)[:57])}..."
    path = Path(text)
    try:
        path = path.expanduser()
        os.lstat(path)
    except RuntimeError:
        raise UserError(f"'{shown}': this user does not exist, so ~ cannot be expanded. Write the full path.") from None
    except ValueError:
        # a NUL, or half of a surrogate pair
        raise UserError(f"'{shown}' cannot be a file name: it has a character that no path may contain.") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"'{shown}' cannot be accessed: {error.strerror}.") from None
    return path


@contextmanager
def replacing(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; the file takes its name when the block ends without an error.

    Args:
        path (`Path`): the file; its folder must exist.
        durable (`bool`): wait until the file is on the disk, so that a power cut does not lose it.
        shared (`bool`): several processes may write `path` at the same time.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    try:
        yield partial
        if durable:
            flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False, shared: bool = False) -> Path:
    """Write a file so that readers, and a kill at any moment, see the old content or the new one; return `path`.

    Text is written as UTF-8. Missing folders are created. `durable` and `shared` as in [`replacing`].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable, shared=shared) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` to fill; it takes its name when the block ends, and is deleted on an error.

    `target` must not exist, or be an empty folder.
    """
    partial = target.with_name(f".{target.name}.partial")
    # what a killed process left
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk and not only in the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """Flush every file and folder in `folder`, except entries of its top level with the names `without`."""
    for entry in sorted(folder.iterdir()):
        if entry.name in without or entry.is_symlink():
            continue
        if entry.is_dir():
            flush_tree(entry)
        elif entry.is_file():
            flush(entry)
    flush(folder)


def check_writable(path: Path, option: str = "output.dir=...") -> None:
    """Check that a folder can be created at `path`, or that the one there can be written to.

    Args:
        path (`Path`): the output folder.
        option (`str`): what sets it, for messages.

    Raises:
        UserError: it cannot be created or written to.
    """
    advice = f"Choose another folder with {option}"
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # handled below
        pass
    # a name that is too long, or contains a zero byte
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be created ({_reason(error)}). {advice}") from error
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist. Create that folder, or choose another one "
            f"with {option}"
        )
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path} cannot be created: {place} is a file. {advice}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written to: no permission to write in {place}. {advice}, or change its permissions."
        )


def check_unused(path: Path, document: str, *, ignore: tuple[str, ...] = ()) -> None:
    """Check that `path` has no files of anyone else: it does not exist, is empty, or contains the file `document`.

    Args:
        path (`Path`): the output folder, set with --output.
        document (`str`): the file that marks a folder written by this command.
        ignore (`tuple[str, ...]`): names that a killed start may have left.

    Raises:
        UserError: the folder has other files.
    """
    if (path / document).is_file() or not path.exists() or all(entry.name in ignore for entry in path.iterdir()):
        return
    raise UserError(
        f"{path} is not empty and does not contain {document}. Nothing was changed: choose another folder with --output."
    )


def make_folder(path: Path, folder: str) -> list[Path]:
    """Create a folder and its missing parents; return the folders created, the innermost first.

    Args:
        path (`Path`): the folder.
        folder (`str`): the same as the user wrote it, for messages.

    Raises:
        UserError: it cannot be created.
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
            f"{folder} cannot be created ({_reason(error)}). Choose another folder with output.dir=..."
        ) from error
    return made


def remove_empty(made: list[Path]) -> None:
    """Delete those of the folders that are empty: a start that wrote nothing leaves nothing behind."""
    for path in made:
        # folders that are not empty stay
        with contextlib.suppress(OSError):
            path.rmdir()


def _reason(error: Exception) -> object:
    return getattr(error, "strerror", None) or error


class ResultFolder:
    """A folder with one JSON document of results, which grows while they are measured and can be resumed.

    The constructor only reads; `write` and `save` are the first to write.

    Args:
        folder (`Path`): the folder; it need not exist.
        name (`str`): file name of the document.
        kind (`str`): the results' name in messages, such as "an evaluation".
        settings (`dict`): the settings that determine the results; a document with other settings is refused.
        schema (`int`): version of the document's form.
        overwrite (`bool`): replace the document, whatever its settings.

    Attributes:
        document (`dict` or `None`): the document to resume; None if none exists, or it is to be replaced.

    Raises:
        UserError: the folder has other results or other files, or cannot be written to.
    """

    def __init__(
        self, folder: Path, name: str, kind: str, settings: dict[str, Any], *, schema: int, overwrite: bool = False
    ) -> None:
        usable_path(folder)
        check_writable(folder, "--output")
        check_unused(folder, name, ignore=(f".{name}.partial",))
        self.folder, self.name = folder, name
        self.document = None if overwrite else self._read(schema)
        if self.document is not None and self.document["settings"] != settings:
            keys = list(differences(self.document["settings"], settings))
            shown = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
            raise UserError(f"{folder} holds {kind} with other settings (different: {shown}). {_WAYS_OUT}")

    def write(self, name: str, text: str) -> Path:
        """Write a file of the folder atomically; return its path."""
        return write_atomically(self.folder / name, text)

    def save(self) -> None:
        """Write the document in its present state."""
        self.write(self.name, json.dumps(self.document) + "\n")

    def _read(self, schema: int) -> dict[str, Any] | None:
        file = self.folder / self.name
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        is_whole = isinstance(document, dict) and isinstance(document.get("settings"), dict)
        if document is None or not is_whole or document.get("schema") != schema:
            raise UserError(f"{file} cannot be read as results of this version. {_WAYS_OUT}")
        return document


_WAYS_OUT = "Nothing was changed: choose another folder with --output, or pass --overwrite to replace the results."


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, each with its old and new value (None if missing).

    Entries of a list of dictionaries with a `name` each are compared by name.
    """
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in keys}


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, list) and data and all(isinstance(item, dict) and "name" in item for item in data):
        data = {str(item["name"]): item for item in data}
    if isinstance(data, dict):
        return {key: value for name in data for key, value in _flat(data[name], f"{prefix}{name}.").items()}
    return {prefix[:-1]: data}


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a run; None if there is no such file.

    Raises:
        UserError: the file is not a JSON document.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON document ({error}), so no report can be built.") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a file with one JSON document per line; [] if there is no such file.

    A last line that is still being written is left out.

    Raises:
        UserError: a line is not a JSON document.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"{path} has a line that is not a JSON document ({error}), so no report can be built."
        ) from None


def honour_umask(folder: str | Path) -> None:
    """Give the safetensors files just written to a folder the permissions that other new files get.

    safetensors writes each file for its owner only (0600), whatever the umask. Links and files with several names are
    left alone: they belong to others too.
    """
    # a umask can be read only by setting it; for that moment, the stricter one
    umask = os.umask(0o077)
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        found = file.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and stat.S_IMODE(found.st_mode) == 0o600:
            file.chmod(0o666 & ~umask)
