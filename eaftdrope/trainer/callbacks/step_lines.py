"""A file of JSON lines, one for each time something was written down in training, each with the step it belongs to.

A run that was killed after step k+n and resumed from the checkpoint of step k comes through the steps after k again. So
when training begins, lines that the resumed run will write anew are dropped: a resumed run's file has the same lines as
an undisturbed run's.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.files import write_atomically


class StepLines:
    """Lines of `path`, each `{"step": k, ...}`; each reaches the disk's cache at once. For the main process.

    Args:
        path (`Path`): the file. Missing folders are made.
        what (`str`): what the lines are, for messages, such as "training metrics".

    Raises:
        UserError: in the method that fails, where the file cannot be written or has a line that is not ours.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what = path, what

    def begin(self, step: int, again: Callable[[dict], bool] = lambda row: False) -> None:
        """Drop what a run that goes on from `step` will write again (all of it at step 0), and the rows that `again` says
        are among it; an unwritable file is noticed here."""
        with self._told_to_user():
            write_atomically(self.path, b"".join(self._kept(step, again) if step else []), durable=True)

    def add(self, row: dict) -> None:
        """Append one line. NaN and infinity are refused: JSON does not have them."""
        text = json.dumps(row, allow_nan=False)
        # Opened for each line: nothing is buffered when the process is killed, and no handle outlives an exception.
        with self._told_to_user(), open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _kept(self, step: int, again: Callable[[dict], bool]) -> list[bytes]:
        """The lines (with line ends) that a run resumed from `step` will not write again."""
        if not self.path.exists():
            return []
        # bytes: a line that is not UTF-8 is named like any other that is not ours
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not line.endswith(b"\n"):
                break  # the process was killed, or the disk was full, in the middle of this line
            try:
                row = json.loads(line)
                dropped = row["step"] > step or again(row)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(
                    f"{self.path}:{number}: not a line of {self._what}, so the file cannot be continued. "
                    "Move the file away and start again; the run then resumes with a new file."
                ) from error
            if not dropped:
                kept.append(line)
        return kept

    @contextmanager
    def _told_to_user(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"cannot write {self.path}: the disk is full. Free some space and start the same command again; "
                    "the run resumes from its last checkpoint."
                ) from error
            raise UserError(
                f"cannot write the {self._what} to {self.path}: {error.strerror}. "
                "Choose an output folder that can be written to."
            ) from error
