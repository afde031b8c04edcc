"""Sources of rows: local files, folders, hub datasets, and data that a pip package carries.

- A row that cannot be read does not end the iteration: it is yielded as a `Row` with `error` set, so that the caller can
  stop or skip.
- A folder is read with its subfolders; its files that are not read are listed (`left_out`).
- `check_source` is for validation before anything is loaded: standard library only.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from eaftdrope.errors import DataError
from eaftdrope.rlm.experts import expert_rows

from . import bfcl
from .readers import SUFFIXES, Row, drop_nulls, iter_file

BFCL = "package:bfcl"
# data sets that eaftdrope carries for the CPU recipes, with their splits: see assets/README.md
SHIPPED = {"gsm8k": ("train", "test"), "medquad": ("train", "test"), "novels": ("train",)}
RLM_EXPERT = "package:rlm_expert"
# of a split, unless the source has a limit: the rows are made as they are read
_EXPERT_ROWS = 400
PACKAGES = (BFCL, RLM_EXPERT, *(f"package:{name}" for name in SHIPPED))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Args:
        path (`str`): local `.jsonl`, `.json`, `.parquet` or `.csv` file, folder of such files (with its subfolders), dataset
            id on the hub (`org/name`), or one of `PACKAGES`: `package:bfcl` (function calls), `package:gsm8k`,
            `package:medquad`, `package:novels`, `package:rlm_expert` (runs of a scripted root of an RLM).
        weight (`float`, *optional*, defaults to `1.0`): expected repetitions of the source's rows in the mixture: 2.0
            uses every row twice, 0.5 half of the rows (chosen by the seed), 1.5 every row and half of them again.
        split (`str`, *optional*, defaults to `"train"`): split of a hub dataset or a package; for a folder, the
            files named after the split (`test.jsonl`, `test-0001.parquet`).
        limit (`int`, *optional*): read only the first `limit` rows, before the weight applies.
        name (`str`, *optional*): configuration name of a hub dataset.
        reasoning (`bool`, *optional*, defaults to `True`): keep what the assistant thinks before it answers.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    limit: int | None = None
    name: str | None = None
    reasoning: bool = True

    def __str__(self) -> str:
        is_plain = self.split == "train" and self.name is None
        return self.path if is_plain else f"{self.path}[{':'.join(filter(None, (self.name, self.split)))}]"


def check_source(source: Source) -> str | None:
    """Return what is wrong with `source` and how to correct it, or None. Reads no row and imports nothing heavy.

    A hub dataset id is only checked for its form: its existence is checked when it is loaded.
    """
    if not source.weight > 0 or source.weight == float("inf"):
        return f"{source.path}: the weight is {source.weight:g}; it must be a number above 0 (1.0 uses each row once)."
    if source.limit is not None and source.limit < 1:
        return f"{source.path}: the limit is {source.limit}; it must be at least 1, or left out to use all rows."
    if source.path.startswith("package:"):
        if source.path not in PACKAGES:
            near = difflib.get_close_matches(source.path, PACKAGES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            return f"{source.path}: no such data package.{hint} There are {', '.join(PACKAGES)}."
        if source.path == BFCL:
            return bfcl.check(source.split)
        splits = ("train", "test") if source.path == RLM_EXPERT else SHIPPED[source.path.removeprefix("package:")]
        if source.split not in splits:
            return f"{source.path}: no split {source.split!r}; it has {' and '.join(map(repr, splits))}."
        if source.path == RLM_EXPERT and importlib.util.find_spec("pydantic_monty") is None:
            return f"{RLM_EXPERT}: its runs need a sandbox. Run `pip install 'eaftdrope[rlm]'`."
        return None
    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            folder_files(path, source.split)
            return None
        if path.is_file():
            return _check_file(path, source)
    except DataError as error:
        return str(error)
    if _looks_local(source.path):
        return _missing_file(source.path, path)
    return None


def iter_rows(source: Source) -> Iterator[Row]:
    """Yield the rows of `source` in their own order, at most `source.limit`, weight not applied, in constant memory.

    (A `.json` file that holds one array is the exception: it is read whole.)

    Raises:
        DataError: the source as a whole cannot be read. A single unreadable row is yielded with `error` set.
    """
    problem = check_source(source)
    if problem is not None:
        raise DataError(problem)
    rows = _iter_all(source)
    if source.limit is None:
        yield from rows
        return
    for _, row in zip(range(source.limit), rows):
        yield row


def left_out(source: Source) -> str | None:
    """Return a line about the files of a folder that are not read, or None.

    Raises:
        DataError: as `iter_rows`.
    """
    path = Path(source.path).expanduser()
    if source.path in PACKAGES or not path.is_dir():
        return None
    return folder_files(path, source.split).left_out


def _iter_all(source: Source) -> Iterator[Row]:
    if source.path == BFCL:
        for index, data in enumerate(bfcl.rows(source.split)):
            yield Row(data, f"{BFCL}[{source.split}]:{index} ({data['id']})")
        return
    if source.path == RLM_EXPERT:
        for data in expert_rows(source.limit or _EXPERT_ROWS, names=source.split):
            yield Row(data, f"{RLM_EXPERT}[{source.split}]:{data['id']}")
        return
    if source.path in PACKAGES:
        name = source.path.removeprefix("package:")
        file_name = f"{name}_{source.split}.jsonl" if len(SHIPPED[name]) > 1 else f"{name}.jsonl"
        with as_file(files("eaftdrope.data") / "assets" / file_name) as asset:
            yield from iter_file(asset, f"{source.path}[{source.split}]")
        return
    path = Path(source.path).expanduser()
    if path.is_dir():
        for file in folder_files(path, source.split).read:
            yield from iter_file(file, str(file))
    elif path.is_file():
        yield from iter_file(path, source.path)
    else:
        yield from _iter_hub(source)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_file(path: Path, source: Source) -> str | None:
    if path.suffix.lower() not in SUFFIXES:
        return (
            f"{source.path}: files of type {path.suffix or 'without suffix'!r} are not read. "
            f"Convert it to one of {', '.join(SUFFIXES)} (one JSON object per line is the simplest)."
        )
    if source.split != "train" or source.name is not None:
        return (
            f"{source.path}: a file has no splits or configurations. Set the file's path, and leave out split and name."
        )
    if not os.access(path, os.R_OK):
        return f"{source.path}: the file cannot be read (permission denied). Check its permissions."
    if path.stat().st_size == 0:
        return f"{source.path}: the file is empty."
    return None


def _looks_local(path: str) -> bool:
    """Return whether a path that does not exist was meant as a local one, rather than as a dataset id on the hub."""
    if path.lower().endswith((*SUFFIXES, ".txt", ".gz", ".zip", ".tsv", ".yaml")) or not _HUB_ID.fullmatch(path):
        return True
    return "/" not in path and bool(_close_names(Path(path)))


def _missing_file(given: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{given}: no such file; the folder {str(folder)!r} does not exist either. Check the path."
    close = _close_names(path)
    if close:
        return f"{given}: no such file. Did you mean {' or '.join(repr(str(folder / name)) for name in close)}?"
    names = [file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    found = f"Data files there: {listing(names)}." if names else "That folder has no data file."
    return f"{given}: no such file. {found} A dataset on the hub is written org/name."


def _close_names(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    names = [file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES]
    by_lower = {name.lower(): name for name in names} | {Path(name).stem.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), by_lower, n=3, cutoff=0.75)
    return list(dict.fromkeys(by_lower[name] for name in close))[:2]


# --- the hub -----------------------------------------------------------------------------------------------------------


def _iter_hub(source: Source) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(source.path, name=source.name, split=source.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source}: the dataset cannot be loaded from the hub: {error}\n"
            f"Check its id, split and configuration name, the network (HF_HUB_OFFLINE is "
            f"{os.environ.get('HF_HUB_OFFLINE', 'not set')}), or download it and use the local file."
        ) from error
    where = ":".join(filter(None, (source.name, source.split)))
    for index, data in enumerate(dataset):
        yield Row(drop_nulls(data), f"{source.path}[{where}]:{index}")


# --- folders ----------------------------------------------------------------------------------------------------------

_SPLIT = re.compile(r"(train|test|validation|valid|dev|eval)(\b|_)", re.IGNORECASE)
# files about a data set, never rows
_ABOUT = re.compile(r"_[A-Z]|_(common_)?metadata$|(readme|license|notice|changelog)\b", re.IGNORECASE)
_HIDDEN_FOLDER = re.compile(r"\.|__|_temporary$")


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder: `read` in order; `left_out` lists the others in one line, or is None."""

    read: list[Path]
    left_out: str | None


def folder_files(folder: Path, split: str) -> FolderFiles:
    """List the data files of `folder` and its subfolders for `split`, sorted.

    These are the files named after the split (or in a folder that is), or all if none is named after any split. Each file is
    read once, also if links lead to it again. Hidden files are not read; these, and files about the data set (README,
    LICENSE, _SUCCESS), are not mentioned.

    Raises:
        DataError: no such file, a broken link, or a subfolder that cannot be read.
    """
    files, others, empty, again = [], [], [], []
    seen: dict[str, Path] = {}
    for path in _walk(folder):
        if path.suffix.lower() not in SUFFIXES:
            if not _ABOUT.match(path.name):
                others.append(path)
            continue
        if path.is_file() and not os.access(path, os.R_OK):
            raise DataError(f"{path}: the file cannot be read (permission denied). Check its permissions.")
        if not path.is_file():
            raise DataError(f"{path}: a broken link, or not a file. Remove it, or put the file there.")
        real = os.path.realpath(path)
        if real in seen:
            again.append(path)
        elif path.stat().st_size == 0:
            empty.append(path)
        else:
            files.append(path)
        seen.setdefault(real, path)
    if not files:
        holds = f" It holds {listing(_below(folder, [*others, *empty]))}." if others or empty else ""
        rows = " with rows" if empty else ""
        raise DataError(
            f"{folder}: the folder holds no {', '.join(SUFFIXES)} file{rows}.{holds} Use a file, or put the data there."
        )
    chosen, unnamed = _of_split(folder, files, split)
    notes = [
        (others, f"not of a type that is read ({', '.join(SUFFIXES)})"),
        (empty, "empty"),
        (again, "links to a file that is read already"),
        (unnamed, f"not named after a split, as others are ({split!r} is read)"),
    ]
    parts = [f"{listing(_below(folder, paths))}: {what}" for paths, what in notes if paths]
    return FolderFiles(chosen, f"{folder}: files that are not read: {'; '.join(parts)}." if parts else None)


def listing(names: Iterable[str], most: int = 6) -> str:
    """Return the first names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _walk(folder: Path) -> list[Path]:
    """Return all files below `folder` that are not hidden, sorted; a folder that links lead to is entered once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}). Check its permissions.")

    found, entered = [], set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not _HIDDEN_FOLDER.match(name))
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _of_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], list[Path]]:
    """Return the files of the split, and the files of no split if others are of one."""
    of_split: dict[str | None, list[Path]] = {}
    for file in files:
        of_split.setdefault(_split(file.relative_to(folder)), []).append(file)
    unnamed = of_split.pop(None, [])
    if split in of_split:
        return of_split[split], unnamed
    if split == "train" and not of_split:
        return unnamed, []
    raise DataError(
        f"{folder}: no file of the folder is named after the split {split!r} "
        f"(files: {listing(_below(folder, files))}). Use a file, or change the split."
    )


def _split(path: Path) -> str | None:
    """Return the split that a file is named after, or else the innermost of its folders that is named after one."""
    found = (_SPLIT.match(part) for part in reversed(path.parts))
    return next((match[1].lower() for match in found if match), None)


def _below(folder: Path, paths: Iterable[Path]) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]
