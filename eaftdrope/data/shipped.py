"""The data that comes with eaftdrope, which the recipes for a CPU read as `package:NAME`: see assets/README.md."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import as_file, files

from .readers import Row, iter_file

SPLITS = {"gsm8k": ("train", "test"), "medquad": ("train", "test"), "novels": ("train",)}


def check(name: str, split: str) -> str | None:
    """Problem text if the data set `name` has no such split, else None."""
    if split in SPLITS[name]:
        return None
    return f"package:{name}: no split {split!r}; it has {' and '.join(map(repr, SPLITS[name]))}."


def rows(name: str, split: str) -> Iterator[Row]:
    """The rows of a split, in order."""
    file_name = f"{name}_{split}.jsonl" if len(SPLITS[name]) > 1 else f"{name}.jsonl"
    with as_file(files("eaftdrope.data") / "assets" / file_name) as path:
        yield from iter_file(path, f"package:{name}[{split}]")
