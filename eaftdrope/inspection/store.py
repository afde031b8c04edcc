"""The folder of an inspection: made whole beside its place, then put there.

inspect.json       everything a page is drawn from; written there last
conflicts.jsonl    the worst confident conflicts, one a line, with their context
rows.jsonl         every row, those to look at first
report.html, figures/
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.paths import usable_path

NAME = "inspect.json"
_FILES = ("conflicts.jsonl", "rows.jsonl", NAME)
_WAYS_OUT = "Nothing was touched: name another folder with --output"


class InspectionFolder:
    """`path`, looked at; nothing is written before there is something to put there.

    Raises:
        UserError: it holds an inspection and is not to be overwritten, holds strangers' files, or cannot be made.
    """

    def __init__(self, path: Path, *, overwrite: bool = False):
        self.path = path
        usable_path(path)
        place = path
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            why = "no permission to write in" if place.is_dir() else "this is a file:"
            raise UserError(f"--output {path} cannot be made: {why} {place}. Name another folder.")
        if (path / NAME).is_file():
            if not overwrite:
                raise UserError(
                    f"{path} holds an inspection. {_WAYS_OUT}, or pass --overwrite to put the new one in its place."
                )
        elif path.exists() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no {NAME} of ours. {_WAYS_OUT}.")

    @contextmanager
    def filled(self) -> Iterator[Path]:
        """A folder to write the three files into; they are put in their place when the block ends, and are gone if it does
        not come to its end."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        # what a killed start left
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            self.path.mkdir(exist_ok=True)
            # a folder with new lines and an old summary must not pass for whole
            (self.path / NAME).unlink(missing_ok=True)
            for name in _FILES:
                os.replace(partial / name, self.path / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
